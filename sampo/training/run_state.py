"""State of a run without the model, saved with every checkpoint: epoch, θ of a length penalty, what was measured."""

from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from .length_penalty import Theta


class RunState(TrainerCallback, ExportableState):
    """The index of the epoch, θ of a learned length penalty, and what was measured before or between the steps.

    It is saved in `trainer_state.json` with every checkpoint. transformers restores callbacks only on request
    (`restore_callback_states_from_checkpoint`), so the state is taken back here.

    Attributes:
        epoch: index of the running epoch, 0, 1, … `state.epoch` itself is late by an epoch border for streamed data.
        theta: of the length penalty.
        way: the forward that `pair_stream: auto` has settled on (`sampo.scoring.ways`), once it has.
        tokens_per_forward: what `max_tokens_per_forward: auto` has found, once it has.
        start_length: what `generate_every` has measured at the start (`sampo.training.generated_length`).
        stop_reason: why the run has stopped before its last step, if it has; not saved.
    """

    def __init__(self, length_penalty_lr: float = 0.05, theta: float = 0.0):
        self.epoch = 0
        self.theta = Theta(length_penalty_lr, theta)
        self.way: str | None = None
        self.tokens_per_forward: int | None = None
        self.start_length: dict[str, Any] | None = None
        self.stop_reason: str | None = None
        self._begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the state of a checkpoint."""
        self.epoch, self._begun = int(state.epoch or 0), False
        saved = (state.stateful_callbacks or {}).get(type(self).__name__, {}).get("attributes", {})
        if "adam" in saved:
            self.theta.restore(saved["adam"])
        self.way = saved.get("way", self.way)
        self.tokens_per_forward = saved.get("tokens_per_forward", self.tokens_per_forward)
        self.start_length, self.stop_reason = saved.get("start_length"), None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epoch."""
        self.epoch += self._begun
        self._begun = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update θ."""
        self.theta.step()

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps."""
        return {
            "args": {"length_penalty_lr": self.theta.lr},
            "attributes": {
                "adam": self.theta.state(),
                "way": self.way,
                "tokens_per_forward": self.tokens_per_forward,
                "start_length": self.start_length,
            },
        }

    @property
    def adam(self) -> dict[str, float]:
        """θ and its optimiser's moments; transformers sets it when it restores callbacks itself."""
        return self.theta.state()

    @adam.setter
    def adam(self, saved: dict[str, float]) -> None:
        self.theta.restore(saved)
