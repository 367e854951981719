"""Log-probs of tokens from hidden states and the LM head on CPU, with matrix products in the precision of the run.

TRL's function converts each tile of logits to float32 for the products of the backward pass, and its statistics take
several passes over the tile. Here a tile has all of the vocabulary, so a product of the backward pass is rounded once,
as in a linear layer, and blocks of a few rows stay in the processor's cache while their statistics are computed. On
other devices TRL's own kernel is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS
from trl.trainer.utils import maybe_gather_lm_head_ctx

_TILE_BYTES = 2**28
_BLOCK_NUMBERS = 2**20  # float32 numbers of a block of rows: 4 MiB


class TokenLogProbs(torch.autograd.Function):
    """As TRL's `ChunkedLogProbFunction`, for a head without bias, soft-capping and scale.

    The statistics have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Tensor | None, ...]:
        """Score.

        Args:
            ctx: of autograd.
            states: `(M, H)`.
            weight: `(V, H)`.
            targets: `(M,)`.
            outputs: which of TRL's statistics are wanted.

        Returns:
            `(M,)` each, float32: log-probs (nats), entropy, log Σ p², mean logit, and whether the target has the
            largest logit; None where not wanted.
        """
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
        cast = weight.to(dtype)
        with torch.autocast("cpu", enabled=False):  # or it rounds the statistics' products
            found = [_statistics(tile, targets[rows], outputs) for rows, tile in _tiles(states, cast)]
        joined = _join(found)
        ctx.save_for_backward(states, weight, targets, joined["log_z"])
        ctx.dtype = dtype
        statistics = [joined.get(name) for name in OPTIONAL_OUTPUTS]
        ctx.mark_non_differentiable(*(each for each in statistics if each is not None))
        return joined["log_probs"], *statistics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The derivative of log p(target) with respect to logit v is 1[v = target] − p(v)."""
        grad = grads[0]  # of the log-probs
        states, weight, targets, log_z = ctx.saved_tensors
        with maybe_gather_lm_head_ctx(weight):
            cast = weight.to(ctx.dtype)
            grad_states = torch.empty_like(states)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for rows, tile in _tiles(states, cast):
                _differentiate(tile, targets[rows], log_z[rows], grad[rows])
                grad_states[rows] = _product(tile, cast)
                if grad_weight is not None:
                    grad_weight += _product(tile.t(), states[rows].to(ctx.dtype))
        return grad_states, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _tiles(states: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their `(m, V)` logits."""
    size = max(_TILE_BYTES // (weight.size(0) * weight.element_size()), 1)
    for start in range(0, max(len(states), 1), size):
        rows = slice(start, start + size)
        yield rows, torch.mm(states[rows].to(weight.dtype), weight.t())


def _blocks(tile: Tensor) -> Iterator[slice]:
    size = max(_BLOCK_NUMBERS // tile.size(1), 1)
    return (slice(start, start + size) for start in range(0, max(len(tile), 1), size))


def _statistics(tile: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """`(m,)` each by name: log Z, log-probs, and of the statistics those that are wanted."""
    found = []
    for rows in _blocks(tile):
        logits = tile[rows].float()
        target = logits.gather(1, targets[rows, None])[:, 0]
        top, first = logits.max(dim=1)  # the first of equal ones, on CPU
        each = {"mean_logits": logits.mean(dim=1)} if "mean_logits" in outputs else {}
        logits -= top[:, None]
        probs = logits.exp()
        sums = probs.sum(dim=1)
        log_z = top + sums.log()
        each |= {"log_z": log_z, "log_probs": target - log_z}
        if "entropy" in outputs:
            each["entropy"] = sums.log() - torch.linalg.vecdot(probs, logits) / sums
        if "log_sum_sq_probs" in outputs:
            each["log_sum_sq_probs"] = torch.linalg.vecdot(probs, probs).log() - 2 * sums.log()
        if "is_top1" in outputs:
            each["is_top1"] = first == targets[rows]
        found.append(each)
    return _join(found)


def _join(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def _differentiate(tile: Tensor, targets: Tensor, log_z: Tensor, grad: Tensor) -> None:
    """Replace the logits by the gradient of the loss with respect to them."""
    for rows in _blocks(tile):
        probs = tile[rows].float().sub_(log_z[rows, None]).exp_()
        at = torch.arange(len(probs)), targets[rows]
        probs[at] -= 1
        tile[rows] = probs.mul_(-grad[rows, None])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; in float32 where the processor has no product of the type."""
    if a.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return a.float() @ b.float()
    return a @ b


class _Dispatch:
    """Replaces TRL's function while a model of sampo is scored."""

    def __init__(self, function: Any):
        self._function = function

    def apply(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """With TRL's arguments."""
        plain = bias is None and softcap is None and (temperature, scale) == (1.0, 1.0)
        if plain and states.device.type == "cpu":
            return TokenLogProbs.apply(states, weight, targets, outputs)
        return self._function.apply(states, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)


@contextmanager
def fast_head() -> Iterator[None]:
    """Within it, TRL's fused head computes by [`TokenLogProbs`] on CPU."""
    module: Any = trl.trainer.utils
    function = module._ChunkedLogProbFunction
    module._ChunkedLogProbFunction = _Dispatch(function)
    try:
        yield
    finally:
        module._ChunkedLogProbFunction = function
