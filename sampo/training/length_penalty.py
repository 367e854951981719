"""The length penalty: α·(T_w − T_l), or θ·(T_w − T_l)/scale with a learned θ, inside the logit of the loss.

It enters through the reference sums that TRL is given, so that the chosen score grows by penalty / β. dL/dθ is then
one `autograd.grad` of the loss with respect to that shift: θ is no parameter of the model, and every engine treats it
alike. Sources: R-DPO, arXiv 2403.19159; learned: BA-DPO (2026).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import SamPOConfig
from ..data.lengths import TokenCounts


class Theta:
    """A learned scalar with its Adam, in float64.

    Args:
        lr: its learning rate.
        value: where it starts.
    """

    def __init__(self, lr: float, value: float = 0.0):
        self.lr = lr
        self.gradients: list[float] = []  # of the micro-batches since the last step
        self.set(value)

    @property
    def value(self) -> float:
        """Weight of (T_w − T_l)/scale in the logit."""
        return self._parameter.item()

    def set(self, value: float, moments: dict[str, float] | None = None) -> None:
        """Set it, and its optimiser's moments."""
        self._parameter = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self._adam = torch.optim.Adam([self._parameter], lr=self.lr)
        if moments:
            self._adam.state[self._parameter] = {
                # Adam keeps its step in float32 and the moments in the parameter's type
                name: torch.tensor(number, dtype=torch.float32 if name == "step" else torch.float64)
                for name, number in moments.items()
            }

    def step(self) -> None:
        """One step of the optimiser, by the mean of the gradients since the last one."""
        if self.gradients:
            mean = math.fsum(self.gradients) / len(self.gradients)
            self._parameter.grad = torch.tensor(mean, dtype=torch.float64)
            self._adam.step()
            self.gradients.clear()

    def state(self) -> dict[str, float]:
        """The value and the optimiser's moments."""
        moments = {name: value.item() for name, value in self._adam.state[self._parameter].items()}
        return {"theta": self.value, **moments}

    def restore(self, state: dict[str, float]) -> None:
        """Take a saved state back."""
        self.set(state["theta"], {name: value for name, value in state.items() if name != "theta"})


class LengthPenalty:
    """What a run adds to the margin for the lengths of its pairs.

    Args:
        args: of the run.
        counts: of the tokenised training data, if they could be counted.
        theta: gives the learned scalar; asked at each step, for transformers replaces callbacks that it restores.
        mean: over all processes.

    Raises:
        ValueError: the scale is neither given nor measurable.
    """

    def __init__(
        self,
        args: SamPOConfig,
        counts: TokenCounts | None,
        theta: Callable[[], Theta],
        mean: Callable[[Tensor], Tensor] = lambda value: value,
    ):
        self._args, self._theta, self._mean = args, theta, mean
        self.scale = _find_scale(args, counts)

    @property
    def per_token(self) -> float:
        """What one more chosen token adds to the logit."""
        if self._args.learns_length_penalty:
            return self._theta().value / self.scale
        return float(self._args.length_penalty or 0.0)

    def shift(self, lengths: Tensor) -> Tensor | None:
        """The `(B,)` shift of the chosen score, so that the logit β·(S_w − S_l) grows by the penalty.

        Args:
            lengths: `(2B,)` completion tokens, chosen rows first.
        """
        if not self._args.has_length_penalty:
            return None
        chosen, rejected = lengths.float().chunk(2)
        shift = self.per_token * (chosen - rejected) / self._args.beta
        return shift.requires_grad_(self._args.learns_length_penalty and torch.is_grad_enabled())

    def learn(self, loss: Tensor, shift: Tensor | None, lengths: Tensor) -> None:
        """Add the dL/dθ of a batch to the gradients of θ.

        Args:
            loss: of the batch.
            shift: that it was computed with.
            lengths: `(2B,)` completion tokens.
        """
        if shift is None or not shift.requires_grad:
            return
        (gradient,) = torch.autograd.grad(loss, shift, retain_graph=True)
        chosen, rejected = lengths.float().chunk(2)
        by_theta = (gradient * (chosen - rejected)).sum() / (self.scale * self._args.beta)
        self._theta().gradients.append(self._mean(by_theta.detach()).item())

    def metrics(self) -> dict[str, float]:
        """For the log of the training, if the penalty is learned."""
        if not self._args.learns_length_penalty:
            return {}
        return {"length_penalty/theta": self._theta().value, "length_penalty/per_token": self.per_token}


def _find_scale(args: SamPOConfig, counts: TokenCounts | None) -> float:
    if not args.learns_length_penalty:
        return 1.0
    if args.length_penalty_scale is not None:
        return args.length_penalty_scale
    if counts is None or not counts.rms_difference:
        raise ValueError(
            "`length_penalty_scale` must be given where the lengths of the training pairs cannot be measured "
            "before (streamed or vision data) or do not differ, got None. Set it to a typical T_w - T_l in tokens."
        )
    return counts.rms_difference
