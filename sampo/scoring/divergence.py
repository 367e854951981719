"""KL(reference ‖ policy) over the full vocabulary at each position, from the hidden states of both models."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear
from torch.utils.checkpoint import checkpoint

from .scorer import Scores

CHUNK_NUMBERS = 2**26  # logits of one model at a time: 256 MiB in float32


def forward_kl(reference: Scores, policy: Scores, positions: Tensor, *, chunk_numbers: int = CHUNK_NUMBERS) -> Tensor:
    """KL(π_ref(·|y_<t) ‖ π(·|y_<t)), `(R, N)` nats, float32, with the gradient of the policy; 0 at other positions.

    The logits of a chunk of positions are in memory at a time. They are computed again in the backward pass.

    Args:
        reference: with its hidden states.
        policy: with its hidden states.
        positions: `(R, N)` bool, at which both were scored.
        chunk_numbers: logits of a chunk, of each model.
    """
    own, head = _at(positions, policy)
    ref, ref_head = _at(positions, reference)
    rows = max(chunk_numbers // len(head[0]), 1)
    chunks = [
        checkpoint(_kl, ref_chunk.detach(), *ref_head, own_chunk, *head, use_reentrant=False)
        for ref_chunk, own_chunk in zip(ref.split(rows), own.split(rows), strict=True)
    ]
    found = torch.cat(chunks)
    return found.new_zeros(positions.shape).masked_scatter(positions, found)


def _at(positions: Tensor, scores: Scores) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """States `(M, H)`, and weight and bias of the head."""
    assert scores.states is not None
    assert scores.head is not None
    return scores.states[positions], scores.head


def _kl(
    ref: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, own: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`(M,)` from states `(M, H)` and heads `(V, H)` and `(V,)`."""
    with torch.no_grad():
        target = linear(ref.to(ref_weight.dtype), ref_weight, ref_bias).float().log_softmax(dim=1)
    logps = linear(own.to(weight.dtype), weight, bias).float().log_softmax(dim=1)
    return kl_div(logps, target, reduction="none", log_target=True).sum(dim=1)
