"""A checkpoint at SIGTERM and at Ctrl-C, by all processes of a run together."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from ..logs import get_logger

logger = get_logger(__name__)

ONE_KEY_PRESS = 1.0  # seconds: a launcher passes Ctrl-C on to processes that already got it from the terminal


class Preempted(SystemExit):
    """SIGTERM or Ctrl-C came, and a checkpoint was saved.

    A process that does not catch this ends with status 143 or 130: 128 + the number of the signal, as shells
    report a process that the signal has ended.
    """

    def __init__(self, checkpoint: Path, received: int = signal.SIGTERM):
        self.status = 128 + received
        self.checkpoint = checkpoint
        super().__init__(self.status)


class SaveOnSignal(TrainerCallback):
    """After SIGTERM or Ctrl-C: save at the end of the step and stop, all processes together.

    A second Ctrl-C stops at once. transformers' own `enable_jit_checkpoint` saves before the optimiser step, each
    process when *it* got the signal, and lets the run end as if it were finished.
    """

    def __init__(self) -> None:
        self.received = 0  # the number of the signal
        self.received_at = 0.0  # seconds, of the monotonic clock
        self.stopped = False

    @contextlib.contextmanager
    def listening(self, *, active: bool) -> Iterator[None]:
        """Handle the signals inside. Only a main thread can; processes without one are notified by the others."""
        self.received, self.stopped = 0, False
        self._active = active
        if not active or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if number == self.received == signal.SIGINT and now - self.received_at > ONE_KEY_PRESS:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.received_at = number, now

    def _asked_for(self, args: Any) -> bool:
        """Whether any process got a signal; all then know which."""
        if self._active and torch.distributed.is_initialized():
            flag = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.received = int(flag.item())
        return bool(self.received)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if a process got a signal."""
        if self._asked_for(args):
            name = "Ctrl-C" if self.received == signal.SIGINT else "SIGTERM"
            now = " Ctrl-C once more stops at once." if self.received == signal.SIGINT else ""
            logger.info(f"{name}: saving checkpoint-{state.global_step}, then leaving.{now}")
            control.should_save = control.should_training_stop = self.stopped = True
            control.should_evaluate = False  # there may be seconds left

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, if the signal came during the save."""
        if not self.stopped and self._asked_for(args):
            control.should_training_stop = self.stopped = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do nothing more after a stop."""
        if self.stopped:
            control.should_save = control.should_evaluate = control.should_log = False
