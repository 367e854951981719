"""Checks of a loss: it is finite, and the first one is that of a policy that is its reference."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..logs import get_logger
from ..weighting import fingerprints
from .batch import PairBatch, Scored
from .length_metrics import margins

logger = get_logger(__name__)

TOLERANCE = 0.02  # mean |margin| of a start: rounding in bf16 stays well below; ln 2 would move by 0.01


def check_finite(loss: Tensor, batch: PairBatch, scored: Scored, when: str) -> None:
    """Stop at a loss that is NaN or infinite.

    Args:
        loss: of the batch.
        batch: whose rows are named.
        scored: their log-probs.
        when: the step, for the message.

    Raises:
        FloatingPointError: such a loss.
    """
    if torch.isfinite(loss):
        return
    bad = ~torch.isfinite(scored.mean_scores)
    rows = fingerprints(batch.inputs["input_ids"], batch.inputs["attention_mask"])
    names = [f"{row & (2**64 - 1):016x}" for row in (rows[bad] if bad.any() else rows).tolist()]
    raise FloatingPointError(
        f"The loss must be finite, got {loss.item()} at {when}, in rows with the fingerprints {names}. Look at these "
        "rows (`sampo.weighting.fingerprints`), lower `learning_rate`, or use bf16 or fp32 instead of fp16."
    )


def check_first_loss(
    loss: Tensor,
    scores: list[Tensor],
    score_without_noise: Callable[[], Tensor],
    *,
    beta: float,
    gather: Callable[[Tensor], Tensor],
    reference_is_base: bool,
) -> None:
    """Warn if policy and reference, which should be one model, are not.

    Args:
        loss: the first one.
        scores: `(2B,)` of the batch, for each draw.
        score_without_noise: gives the scores of one draw by the policy in evaluation mode.
        beta: of the implicit reward.
        gather: a tensor of all processes.
        reference_is_base: the reference is the policy with its adapter disabled.
    """

    def mean_margin(draws: list[Tensor]) -> float:
        sizes = torch.stack([margins(beta, each) for each in draws]).abs()  # (draws, B)
        return gather(sizes.mean()).mean().item()

    if mean_margin(scores) <= TOLERANCE:
        return
    size = mean_margin([score_without_noise()])
    if size <= TOLERANCE:
        logger.info(
            f"The first loss is {loss.item():.4f} and not ln 2 = 0.6931, because the policy has noise in training "
            "(dropout, `neftune_noise_alpha` or a router's jitter). Without it, it is its reference."
        )
        return
    found = (
        f"The first loss is {loss.item():.4f}, and the implicit rewards are not 0 (mean |margin| {size:.3f}), but "
        "policy and reference should be the same model at the first step, where the sigmoid loss is ln 2 = 0.6931."
    )
    if reference_is_base:
        logger.warning(
            f"{found} The reference is the base model without the adapter, and the adapter changes it before it "
            "is trained. If that is not meant, choose an initialisation that begins with no change."
        )
        return
    logger.warning(
        f"{found} The reference is not the configured one: check `model`, `ref_model` and the adapter's "
        "initialisation."
    )
