"""What a training prints when it logs: one line of at most 100 columns in place of about thirty metrics.

transformers prints the metrics as a dict: `PrinterCallback`, or `ProgressCallback` where there is a bar. The commands
replace them through the trainer's callbacks; a trainer that a script makes keeps them, as a drop-in subclass must.
Only the output changes: `trainer_state.json`, `log_history` and every tracker get all metrics.
"""

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

WIDTH = 100

# Metric, its label and its format, in the order of the line; the last go first where the line is too long. A metric
# that is not logged is omitted.
SHOWN_METRICS = (
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", ".4f"),
    ("rewards/accuracies", "acc", ".2f"),
    ("accuracies/chosen_longer", "longer", ".2f"),  # where the chosen response is; in evaluation
    ("accuracies/chosen_shorter", "shorter", ".2f"),
    ("length_gap/correlation", "length gap", "+.2f"),
    ("length/generated", "answers", ".1f"),
    ("length/generated_ended", "ended", ".2f"),
    ("length/generated_ratio", "ratio", ".2f"),
)


def show_one_line(trainer: Any) -> None:
    """Let a trainer print one line per log. A notebook keeps its table."""
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    elif DEFAULT_PROGRESS_CALLBACK is ProgressCallback:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(BarAlone())
    else:
        return
    trainer.add_callback(LogLine(getattr(trainer, "rows_per_pair", 1)))


def beside_bar(trainer: Any) -> AbstractContextManager[None]:
    """Print the messages of loggers above the bar of a trainer, not into it."""
    return nullcontext() if trainer.args.disable_tqdm else logging_redirect_tqdm()


class BarAlone(ProgressCallback):
    """The bar of transformers without the metrics."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing; `LogLine` does."""


class LogLine(TrainerCallback):
    """Prints a line per log, above the bar where there is one.

    Args:
        rows_per_pair: rows that the training counts for a pair.
    """

    def __init__(self, rows_per_pair: int = 1) -> None:
        self._rows_per_pair = rows_per_pair
        self._began = self._mark = time.perf_counter()
        self._busy = 0.0  # seconds of steps since the last log, without evaluations and checkpoints
        self._first_step = self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clocks; a resumed run continues the count of tokens."""
        self._began = self._mark = time.perf_counter()
        self._first_step = state.global_step
        self._tokens = next((int(log["num_tokens"]) for log in reversed(state.log_history) if "num_tokens" in log), 0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Add the time of the step and of loading its data."""
        self._busy += time.perf_counter() - self._mark
        self._mark = time.perf_counter()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Leave the time of the evaluation out."""
        self._mark = time.perf_counter()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Leave the time of the checkpoint out."""
        self._mark = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Print the line, on the first process."""
        logs = logs or {}
        done, total = state.global_step, state.max_steps
        steps = f"{done:>{len(str(total))}}/{total}"
        prefix = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), "")
        if "loss" in logs:
            line = one_line(f"step {steps}", logs, self._speed(logs) + self._time_left(done, total))
        elif "length/generated" in logs:
            self._busy += time.perf_counter() - self._mark - logs["generate_runtime"]  # that of the step
            line = one_line(f"gen  {steps}", logs, [f"{logs['generate_runtime']:.1f} s"])
        elif prefix == "train_":
            took = duration(logs["train_runtime"])
            speed = logs["train_samples_per_second"] / self._rows_per_pair
            line = f"{steps.strip() if done < total else done} steps in {took}, mean loss {logs['train_loss']:.4f}, "
            line += f"{speed:.1f} pairs/s"
        elif prefix:
            values = {name.removeprefix(prefix): value for name, value in logs.items()}
            speed = values["samples_per_second"] / self._rows_per_pair
            line = one_line(f"{prefix[:-1]} {steps}", values, [f"{speed:.1f} pairs/s"])
        else:
            line = str(logs)  # of another callback
        if state.is_world_process_zero:
            tqdm.write(line)  # takes the bar away, prints, and puts the bar back
            sys.stdout.flush()  # a program that reads the lines gets each at once
        self._mark = time.perf_counter()

    def _speed(self, logs: dict[str, Any]) -> list[str]:
        """Tokens of prompts and responses per second since the last log, all processes together."""
        tokens, busy = int(logs.get("num_tokens", 0)) - self._tokens, self._busy
        self._tokens, self._busy = self._tokens + tokens, 0.0
        return [f"{tokens / busy:,.0f} tokens/s"] if tokens > 0 and busy else []

    def _time_left(self, done: int, total: int) -> list[str]:
        """At the mean speed of this process so far, evaluations and checkpoints included."""
        steps = done - self._first_step
        return [f"ETA {duration((time.perf_counter() - self._began) / steps * (total - done))}"] if steps > 0 else []


def one_line(head: str, values: dict[str, Any], tail: list[str]) -> str:
    """Head, the metrics of `SHOWN_METRICS` and tail; as many metrics as fit into `WIDTH`."""
    shown = [f"{label} {values[name]:{form}}" for name, label, form in SHOWN_METRICS if name in values]
    while len(line := "  ".join([head, *shown, *tail])) > WIDTH and shown:
        shown.pop()
    return line


def duration(seconds: float) -> str:
    """`1:02:03` for 3,723 seconds."""
    return str(timedelta(seconds=round(seconds)))
