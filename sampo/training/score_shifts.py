"""What a loss adds to the chosen score, where that depends on the policy: the terms of DPOP and TDPO.

As a length penalty, they enter through the reference sums that TRL is given. Here they have a gradient of their own.
"""

from torch import Tensor


def dpop_shift(chosen_scores: Tensor, *, coefficient: float) -> Tensor:
    """−λ·max(0, −S_w), `(B,)`: the term of DPO-Positive, arXiv 2402.13228.

    Differences from the paper:

    1. S_w is the score that is in the margin, Σ_t w_t·(log π − log π_ref), which with `token_weighting: all` is the
       paper's sum over the response. A method that omits tokens omits them here too, so nothing more is scored.
    2. At S_w = 0, where the policy is its reference, the gradient is that of DPO.

    Args:
        chosen_scores: `(B,)` S_w, with the gradient of the policy.
        coefficient: λ.
    """
    return -coefficient * (-chosen_scores).relu()


def tdpo_shift(divergences: Tensor, *, variant: str, alpha: float) -> Tensor:
    """D_w − D_l (`tdpo1`) or −α·(D_l − sg(D_w)) (`tdpo2`), `(B,)`; sg has no gradient. TDPO, arXiv 2404.11999.

    As in `dpop_shift`, the weights are those of the score: D = Σ_t w_t·KL(π_ref(·|y_<t) ‖ π(·|y_<t)), which with
    `token_weighting: all` is the paper's sequential KL divergence.

    Args:
        divergences: `(2B,)` D in nats, chosen rows first, with the gradient of the policy.
        variant: `tdpo1` or `tdpo2`.
        alpha: α of `tdpo2`.
    """
    chosen, rejected = divergences.chunk(2)
    return chosen - rejected if variant == "tdpo1" else alpha * (chosen.detach() - rejected)
