"""A trainer that can be interrupted at any moment and resumes as if it had not been.

[`ResumableTrainer`] stands between transformers' `Trainer` and ours. What it relies on in transformers 5.23, pinned by
tests/checkpointing/test_resume.py:

1. `_save_checkpoint` asks `_get_output_dir` where to write, and writes the checkpoint nowhere else.
2. `_run_epoch` is called for each epoch, first with the counters of the log just set to zero; `_tr_loss`,
   `_total_loss_scalar` and `_globalstep_last_logged` are those counters.
3. `_push_from_checkpoint(folder)` is the last call for a checkpoint, before older ones are removed.
4. The loader of a resumed epoch is accelerate's `skip_first_batches`, whose `remainder` stays at −1.
"""

import contextlib
import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import has_length

from ..io.files import write_atomic
from ..io.locks import FolderInUseError, alone_in
from ..io.schemas import WrongFile, read_json
from ..logs import get_logger, silenced
from ..models.load import not_finite
from . import files as checkpoints
from .fingerprint import changes, identity
from .signals import Preempted, SaveOnSignal

logger = get_logger(__name__)

LOG_WINDOW = "log_window.json"


@dataclass(frozen=True)
class LogWindow:
    """What was measured since the last line of the log.

    Attributes:
        last_logged_step: the step of that line.
        loss_sums: of each process.
        metrics: values of each metric of TRL's.
        num_tokens: trained on so far.
        carried: the state of the trainer's `Carried` object.
    """

    last_logged_step: int
    loss_sums: list[float]
    metrics: dict[str, list[float]]
    num_tokens: int
    carried: dict[str, float]

    def __post_init__(self) -> None:
        if not self.loss_sums:
            raise ValueError("`loss_sums` must hold a number for each process, got none")


class Carried(Protocol):
    """State that a checkpoint saves and restores without interpreting it."""

    def state(self) -> dict[str, float]:
        """What the checkpoint saves."""

    def restore(self, state: dict[str, float]) -> None:
        """Continue from a saved state."""


class WeightsNotFiniteError(FloatingPointError):
    """The weights have become NaN or infinite, and were not saved."""


class ResumeRefusedError(ValueError):
    """The run cannot resume from this checkpoint; the text gives the reason."""


@contextlib.contextmanager
def _code_refused(checkpoint: Path | None) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's own advice is to let the code run
        raise ResumeRefusedError(
            f"The files of a checkpoint must hold tensors and plain values, got one in {checkpoint} that would run "
            "code when it is loaded. Nothing was run. The file was changed: use another checkpoint."
        ) from error


def find_value_issue(checkpoint: Path) -> str | None:
    """Describe why a run cannot resume from the weights of a checkpoint, or None."""
    from safetensors import safe_open

    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if bad := not_finite((name, file.get_tensor(name)) for name in file.keys()):  # noqa: SIM118, no mapping
                return f"{bad[0]} in {path.name} holds NaN or infinity"
    return None


class ResumableTrainer(Trainer):
    """Complete checkpoints, exact resume, a checkpoint at SIGTERM and Ctrl-C; for trainers that log like TRL's."""

    args: Any
    _metrics: dict[str, Any]
    _total_train_tokens: int
    _carried: Carried

    _staging = False
    _log_window: "LogWindow | None" = None
    _stop: SaveOnSignal
    _identity: dict[str, Any]

    def make_resumable(self, carried: Carried) -> None:
        """To be called at the end of the constructor, while the model has its first weights.

        Args:
            carried: what is measured since the last line of the log, saved and restored with it.
        """
        self._carried = carried
        if self.args.enable_jit_checkpoint:
            raise ValueError(
                "`enable_jit_checkpoint` must be off, got true: this trainer itself saves at SIGTERM, at the end "
                "of the step and on all processes. Remove the option."
            )
        self._stop = SaveOnSignal()
        self.add_callback(self._stop)
        self._identity = identity(self) if self.is_world_process_zero() else {}

    # --- going on ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any) -> Any:
        """As in transformers, from a complete checkpoint.

        Args:
            resume_from_checkpoint: `True` resumes from the last complete checkpoint in `output_dir`, `"auto"` too but
                starts if there is none, and a path resumes from that one alone.
            *rest: As in transformers.
            **kwargs: As in transformers.

        Raises:
            ResumeRefusedError: no complete checkpoint, or one of another run; what has changed is named.
            CheckpointNotSavedError: a checkpoint could not be written.
            FolderInUseError: another process trains into `output_dir`.
            Preempted: SIGTERM or Ctrl-C came, and a checkpoint was saved.
            WeightsNotFiniteError: the weights have become NaN or infinite; the checkpoints before are untouched.
        """
        with self._alone_in_output_dir():
            return self._train_alone(resume_from_checkpoint, *rest, **kwargs)

    def _train_alone(self, resume_from_checkpoint: str | bool | None, *rest: Any, **kwargs: Any) -> Any:
        checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        self._log_window = None
        if checkpoint is not None:
            try:
                self._log_window = read_json(checkpoint / LOG_WINDOW, LogWindow, complete=True)
            except (OSError, WrongFile) as error:
                raise ResumeRefusedError(f"{error} Use another checkpoint.") from None
        own_words = silenced("transformers.trainer_utils", "Warning: The following arguments do not match")
        with self._stop.listening(active=self.args.save_strategy != "no"), _code_refused(checkpoint), own_words:
            result = super().train(str(checkpoint) if checkpoint else None, *rest, **kwargs)
        if self._stop.stopped:
            self.accelerator.wait_for_everyone()
            checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            raise Preempted(checkpoint, self._stop.received)
        return result

    @contextlib.contextmanager
    def _alone_in_output_dir(self) -> Iterator[None]:
        """Lock the folder for a run that saves. The first process takes the lock, and broadcasts the result."""
        if self.args.save_strategy == "no":
            yield
            return
        with contextlib.ExitStack() as stack:
            shared: list[Any] = [None]
            if self.is_world_process_zero():
                try:
                    stack.enter_context(alone_in(Path(str(self.args.output_dir))))
                except FolderInUseError as error:
                    shared[0] = str(error)
            if self.args.world_size > 1:
                broadcast_object_list(shared)
            if shared[0] is not None:
                raise FolderInUseError(shared[0])
            yield

    def _choose_checkpoint(self, wanted: str | bool | None) -> Path | None:
        """The first process decides and broadcasts: processes must not resume from different steps."""
        if not wanted:
            return None
        shared: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                shared[0] = self._find_checkpoint(wanted)
            except ResumeRefusedError as error:
                shared[1] = str(error)
        if self.args.world_size > 1:
            broadcast_object_list(shared)
        if shared[1] is not None:
            raise ResumeRefusedError(shared[1])
        return shared[0]

    def _find_checkpoint(self, wanted: str | Literal[True]) -> Path | None:
        folder = Path(str(self.args.output_dir))
        if wanted is True or wanted == "auto":
            checkpoints.finish_interrupted(folder)
            found = checkpoints.find_complete_checkpoint(folder, find_value_issue)
            checkpoints.clear_staging(folder)
            for path, reason in found.skipped.items():
                logger.warning(f"{path.name} is skipped: {reason}.")
            if found.path is None and wanted is True:
                raise ResumeRefusedError(
                    "`resume_from_checkpoint: true` needs a complete checkpoint in `output_dir`, got none in "
                    f"{folder}.{found.describe_skipped()} To start from step 0 in that case, use "
                    "`resume_from_checkpoint: auto`."
                )
            if found.path is None:
                logger.info(f"No checkpoint to resume from in {folder}: the run starts from step 0.")
                return None
            checkpoint = found.path
        else:
            checkpoint = Path(wanted)
            issue = checkpoints.find_checkpoint_issue(checkpoint) or find_value_issue(checkpoint)
            if issue is not None:
                raise ResumeRefusedError(
                    f"`resume_from_checkpoint` must be a complete checkpoint, got {wanted}, and {issue}. With `true` "
                    "the last complete one in `output_dir` is found."
                )
        self._refuse_other_run(checkpoint)
        return checkpoint

    def _refuse_other_run(self, checkpoint: Path) -> None:
        before = checkpoints.read_manifest(checkpoint).run
        if getattr(self.args, "sync_ref_model", False):
            raise ResumeRefusedError(
                "A run with `sync_ref_model` cannot be resumed, got one to resume: its reference has moved, and "
                "checkpoints hold the policy alone. Start a new run, or unset the option in it."
            )
        changed = changes(before.must, self._identity["must"])
        if changed:
            raise ResumeRefusedError(
                f"A resumed run must be the run that wrote {checkpoint}, got one that differs: {'; '.join(changed)}. "
                "Restore it, or start a new run in another `output_dir`."
            )
        rounding = changes(before.rounding, self._identity["rounding"])
        if rounding:
            logger.warning(f"The resumed run equals an uninterrupted one except for rounding: {'; '.join(rounding)}.")
        length = {"`max_steps`": self.args.max_steps, "`num_train_epochs`": self.args.num_train_epochs}
        lengthened = changes(before.length, length)
        if lengthened and not self.args.lr_scheduler_type.value.startswith("constant"):
            logger.warning(
                f"{'; '.join(lengthened)}: from here on the learning rate follows the schedule of the new length, "
                "which is neither that of the old run nor that of a new one."
            )
        logger.info(f"Resuming from {checkpoint}.")

    def restore_dataloader(self) -> None:
        """Set for `gather_for_metrics` how many rows of the epoch's last batch are not repeated, also after a resume.

        To be called in a step of the training.
        """
        loader = self.accelerator.gradient_state.active_dataloader
        known = loader is None or loader.remainder >= 0 or self.args.dataloader_drop_last
        if not known and has_length(loader.dataset):
            loader.remainder = len(loader.dataset) % (self.args.train_batch_size * self.accelerator.num_processes)

    def gather_pairs(self, rows: Tensor) -> Tensor:
        """Rows of all processes, one per pair, without those that were repeated to fill a batch."""
        assert self.model is not None
        if self.model.training:
            self.restore_dataloader()
        return self.accelerator.gather_for_metrics(rows)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._log_window is not None:
            self._restore_log_window(self._log_window)
            self._log_window = None
        if self.state.global_step >= self.state.max_steps:  # transformers would train one more step
            logger.info(f"Nothing is left to train: the checkpoint is at step {self.state.global_step}, the last one.")
            self.control.should_training_stop = True
        if self.control.should_training_stop:  # or a callback has stopped the run before its first step
            return
        super()._run_epoch(*args, **kwargs)

    # --- saving --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, checkpoints.STAGING) if self._staging else folder

    def refuse_weights_not_finite(self, name: str) -> None:
        """Stop on all processes if a trained weight is NaN or infinite, before a finite checkpoint is replaced.

        Args:
            name: of what would have been saved.

        Raises:
            WeightsNotFiniteError: with the names of such weights.
        """
        model = self.accelerator.unwrap_model(self.model)
        bad = not_finite((each, weight) for each, weight in model.named_parameters() if weight.requires_grad)
        if self.args.world_size > 1:  # each has a part of the weights, or all
            bad = sorted(set(gather_object(bad)))
        if not bad:
            return
        kept = [path.name for path in checkpoints.numbered_checkpoints(str(self.args.output_dir))]
        last = f"The last checkpoint is {kept[-1]}: `resume: auto` resumes from it" if kept else "Start a new run"
        raise WeightsNotFiniteError(
            f"The weights must be finite, got NaN or infinity in {len(bad)} of them after step "
            f"{self.state.global_step}, first in {bad[0]}: the training has diverged, and {name} is not saved. "
            f"{last}, with a lower `learning_rate` or `max_grad_norm`, or with bf16 or fp32 in place of fp16."
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.refuse_weights_not_finite(f"checkpoint-{self.state.global_step}")
        target = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        staged = target.parent / checkpoints.STAGING / target.name
        with checkpoints.wrap_save_errors(target):
            if self.args.should_save:
                checkpoints.clear_staging(target.parent)
            self.accelerator.wait_for_everyone()
            self._staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = False
            self._note_best_checkpoint(target, staged)
            self._save_log_window(staged)
            self.accelerator.wait_for_everyone()
            self._publish(staged, target)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(target))

    def _publish(self, staged: Path, target: Path) -> None:
        """The first process gives the checkpoint its name; on machines with a disk of their own, one process each."""
        length = {"`max_steps`": self.args.max_steps, "`num_train_epochs`": self.args.num_train_epochs}
        run = checkpoints.RunRecord(**self._identity, length=length)
        first = self.is_world_process_zero()
        for its_turn in (first, self.args.local_process_index == 0 and not first):
            if its_turn and staged.is_dir():
                checkpoints.write_manifest(staged, run, resumable=not self.args.save_only_model)
                checkpoints.publish(staged, target)
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.remove_older(target, self.args.save_total_limit, self.state.best_model_checkpoint)
            checkpoints.clear_staging(target.parent)

    def _note_best_checkpoint(self, target: Path, staged: Path) -> None:
        """For the best checkpoint transformers looks beside the new one, which is elsewhere while it is written."""
        if not self.state.best_global_step:
            return
        best = target.parent / f"checkpoint-{self.state.best_global_step}"
        if best == target or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # else when it has its name
            super()._push_from_checkpoint(checkpoint_folder)

    # --- the log -------------------------------------------------------------------------------------------------

    def _save_log_window(self, folder: Path) -> None:
        losses = gather_object([self._tr_loss.item()])
        if self.args.should_save:
            window = LogWindow(
                last_logged_step=self._globalstep_last_logged,
                loss_sums=losses,
                metrics=dict(self._metrics["train"]),
                num_tokens=self._total_train_tokens,
                carried=self._carried.state(),
            )
            write_atomic(folder / LOG_WINDOW, json.dumps(asdict(window)))

    def _restore_log_window(self, window: "LogWindow") -> None:
        sums, mine = window.loss_sums, self.args.process_index
        same = len(sums) == self.args.world_size
        self._tr_loss += sums[mine] if same else sum(sums) / len(sums)
        self._total_loss_scalar -= sum(sums) / len(sums)  # the last line of the log is about this launch alone
        self._globalstep_last_logged = window.last_logged_step
        for name, values in window.metrics.items():
            self._metrics["train"][name] = list(values)
        self._total_train_tokens = window.num_tokens
        self._carried.restore(window.carried)
