"""What a run has to remember beside the model, saved with every checkpoint."""

import math

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback


class RunState(TrainerCallback, ExportableState):
    """What a run has to remember beside the model: the index of the epoch, and θ of a learned length penalty.

    It is saved in `trainer_state.json` with every checkpoint. transformers restores callbacks only on request
    (`restore_callback_states_from_checkpoint`), so the state is taken back here.

    Attributes:
        epoch: index of the running epoch, 0, 1, … `state.epoch` itself is late by an epoch border for streamed data.
    """

    def __init__(self, length_penalty_lr: float = 0.05, theta: float = 0.0):
        self.epoch = 0
        self.length_penalty_lr = length_penalty_lr
        self._begun = False
        self._gradients: list[float] = []  # of the micro-batches since the last step
        self._set_theta(theta)

    @property
    def theta(self) -> float:
        """Weight of (T_w − T_l)/scale in the logit."""
        return self._theta.item()

    def add_gradient(self, gradient: float) -> None:
        """One micro-batch's dL/dθ, already averaged over processes."""
        self._gradients.append(gradient)

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102, transformers' own interface
        self.epoch, self._begun = int(state.epoch or 0), False
        saved = (state.stateful_callbacks or {}).get(type(self).__name__, {}).get("attributes", {})
        if "adam" in saved:
            self._set_theta(saved["adam"]["theta"], saved["adam"])

    def on_epoch_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.epoch += self._begun
        self._begun = True

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if self._gradients:
            mean = math.fsum(self._gradients) / len(self._gradients)
            self._theta.grad = torch.tensor(mean, dtype=torch.float64)
            self._adam.step()
            self._gradients.clear()

    def state(self) -> dict:
        """What `trainer_state.json` keeps."""
        moments = {name: value.item() for name, value in self._adam.state[self._theta].items()}
        return {
            "args": {"length_penalty_lr": self.length_penalty_lr},
            "attributes": {"adam": {"theta": self.theta, **moments}},
        }

    @property
    def adam(self) -> dict[str, float]:
        """θ and its optimiser's moments; transformers sets it when it restores callbacks itself."""
        return self.state()["attributes"]["adam"]

    @adam.setter
    def adam(self, saved: dict[str, float]) -> None:
        self._set_theta(saved["theta"], saved)

    def _set_theta(self, theta: float, moments: dict[str, float] | None = None) -> None:
        self._theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self._adam = torch.optim.Adam([self._theta], lr=self.length_penalty_lr)
        moments = {name: value for name, value in (moments or {}).items() if name != "theta"}
        if moments:
            self._adam.state[self._theta] = {
                # Adam keeps its step in float32 and the moments in the parameter's type
                name: torch.tensor(value, dtype=torch.float32 if name == "step" else torch.float64)
                for name, value in moments.items()
            }
