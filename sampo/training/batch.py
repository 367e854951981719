"""The tensors of one step. B pairs are 2B rows, chosen first; of L tokens in a row N = L − 1 are predicted."""

from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from ..scoring.lm_head import PER_TOKEN
from ..scoring.packing import Stream, lay_out
from ..scoring.scorer import Scores
from ..weighting import sequence_logps

Weights = tuple[Tensor, Tensor]  # of the policy's and of the reference's log-probs, each `(2B, N)`


@dataclass
class PairBatch:
    """A collated batch, and which of its tokens are scored.

    Attributes:
        inputs: the collated batch.
        mask: `(2B, N)` bool, completion tokens.
        end: `(2B, N)` bool, the end token of each completion.
        epoch: key of the draws.
        positions: `(2B, N)` bool, the tokens that go through the LM head of the policy.
        ref_positions: `(2B, N)` bool, and of the reference.
        weights: for each draw; None until they can be known.
        every_token: the stream has unscored tokens too.
    """

    inputs: dict[str, Any]
    mask: Tensor
    end: Tensor
    epoch: int
    positions: Tensor
    ref_positions: Tensor
    weights: list[Weights] | None = None
    every_token: bool = False

    @property
    def n_pairs(self) -> int:
        """B."""
        return self.mask.size(0) // 2

    @property
    def lengths(self) -> Tensor:
        """`(2B,)` int64, completion tokens of each row."""
        return self.mask.sum(dim=1)

    @property
    def ids(self) -> Tensor:
        """`(2B, N)` the predicted tokens."""
        return self.inputs["input_ids"][:, 1:]

    def select(self, positions: Tensor, ref_positions: Tensor) -> None:
        """Omit unselected tokens from the batch."""
        self.positions, self.ref_positions = positions, ref_positions
        self.__dict__.pop("stream", None)

    @cached_property
    def stream(self) -> Stream:
        """The batch as one row, as far as its scored tokens or `every_token` need it."""
        ids, real, completion = (self.inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        needed = self.positions | self.ref_positions
        return lay_out(ids, real, completion, needed, every_token=self.every_token)


@dataclass
class Reference:
    """Log-probs of the reference.

    Attributes:
        logps: `(2B, N)` log π_ref of the batch's tokens, of the scored ones at least.
        sums: `(2B,)` TRL's sums, if the reference is live.
        end_probs: `(2B, N)` its probability of the end token at each completion position, if it was asked for.
        scores: of its pass, if it is live.
    """

    logps: Tensor
    sums: Tensor | None = None
    end_probs: Tensor | None = None
    scores: Scores | None = None


@dataclass
class Draw:
    """One subset, or the one set of fractional weights, and the results for the batch.

    Attributes:
        weights: `(2B, N)` of the policy's log-probs.
        ref_sums: `(2B,)` Σ w·log π_ref.
        scores: `(2B,)` S without a length penalty, without gradient.
    """

    weights: Tensor
    ref_sums: Tensor
    scores: Tensor


@dataclass
class Scored:
    """A batch with its log-probs.

    Attributes:
        output: TRL's output of the policy, and with it the statistics of the head.
        logps: `(2B, N)` log π, zero where not scored.
        ref_logps: `(2B, N)` log π_ref, of the scored tokens at least.
        draws: the weighted results.
        pressure: `(B,)` length pressure, if it is logged.
        kl: `(2B, N)` KL(π_ref ‖ π) at the scored tokens, with `tdpo`.
    """

    output: Any
    logps: Tensor
    ref_logps: Tensor
    draws: list[Draw]
    pressure: Tensor | None = None
    kl: Tensor | None = None

    @property
    def mean_scores(self) -> Tensor:
        """`(2B,)` S, averaged over the draws."""
        return torch.stack([draw.scores for draw in self.draws]).mean(dim=0)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, without gradient; the rows of each are those of the batch."""
        found = {"logps": self.logps, "ref_logps": self.ref_logps, "pressure": self.pressure, "kl": self.kl}
        found |= {f"output.{name}": getattr(self.output, name) for name in PER_TOKEN if name != "log_probs"}
        for k, draw in enumerate(self.draws):
            found |= {f"draws.{k}.{name}": value for name, value in vars(draw).items()}
        return {name: value.detach() for name, value in found.items() if value is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Self:
        """From the tensors by name."""
        output = {name: tensors.get(f"output.{name}") for name in PER_TOKEN} | {"log_probs": tensors["logps"]}
        n_draws = sum(name.endswith(".scores") for name in tensors)
        names = ("weights", "ref_sums", "scores")
        draws = [Draw(**{name: tensors[f"draws.{k}.{name}"] for name in names}) for k in range(n_draws)]
        own = tensors["logps"], tensors["ref_logps"]
        return cls(SimpleNamespace(**output), *own, draws, tensors.get("pressure"), tensors.get("kl"))

    def with_scores_kept(self) -> Self:
        """The same with the reference sums that give the scores again.

        A sum over rows of another width rounds differently. So a policy that equals its reference has margins of
        exactly 0 in any layout.
        """
        sums = [sequence_logps(self.logps, draw.weights) - draw.scores for draw in self.draws]
        draws = [replace(draw, ref_sums=each) for draw, each in zip(self.draws, sums, strict=True)]
        return replace(self, draws=draws)
