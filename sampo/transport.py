"""Token weights by unbalanced optimal transport between the hidden states of two responses (OTPO, arXiv 2505.18720).

Differences from the authors' code (github.com/Mimasss2/OTPO, which calls POT):

1. All pairs of a batch are solved at once, in the log domain.
2. The number of iterations follows from the coefficients and not from a tolerance, so that a pair has the same weights
   in any batch, and nothing waits for the device.
3. The cost is divided by its largest element between tokens of the two responses. The authors' largest element can be
   one of a padded position.
"""

import math

import torch
from torch import Tensor

_PRECISION = 1e-9  # by which the error of the first iterate is reduced
_OFFSET = 1e-6  # of the cost


def count_iterations(reg: float, mass_reg: float) -> int:
    """Iterations of Sinkhorn's algorithm; each reduces the error of the log-scalings by `factor` squared."""
    factor = mass_reg / (mass_reg + reg)
    return max(math.ceil(math.log(_PRECISION) / (2 * math.log(factor))), 1)


@torch.no_grad()
def transport_weights(states: Tensor, mask: Tensor, *, reg: float, mass_reg: float) -> Tensor:
    """The marginals of the transport plan G of each pair, scaled so that those of either response sum to T_m.

    G minimises Σ C·G + reg·KL(G | 1) + mass_reg·(KL(Σ_j G_ij | 1) + KL(Σ_i G_ij | 1)) with C the Euclidean distance of
    the states, divided by its largest element where that is above 1.

    Args:
        states: `(2B, N, H)` hidden states of the policy that predict the tokens, chosen rows first.
        mask: `(2B, N)` bool, completion tokens.
        reg: coefficient of the entropy, above 0.
        mass_reg: coefficient of the marginals, above 0.

    Returns:
        `(2B, N)` float32 ≥ 0, zero where `mask` is.
    """
    longest = max(int(mask.sum(dim=1).max()), 1)
    place = mask.long().argsort(dim=1, descending=True, stable=True)[:, :longest]  # (2B, M), completions first
    chosen, rejected = states.float().gather(1, place[:, :, None].expand(-1, -1, states.size(2))).chunk(2)
    rows, columns = mask.gather(1, place).chunk(2)
    both = rows[:, :, None] & columns[:, None, :]  # (B, M, M)
    # by differences: a distance from a matrix product is not 0 between equal states, as those after one prompt
    cost = torch.cdist(chosen, rejected, compute_mode="donot_use_mm_for_euclid_dist") + _OFFSET
    largest = cost.masked_fill(~both, 0.0).amax(dim=(1, 2), keepdim=True).clamp(min=1.0)
    kernel = (-cost / (largest * reg)).masked_fill(~both, -torch.inf)
    factor = mass_reg / (mass_reg + reg)
    left, right = torch.zeros_like(kernel[:, :, 0]), torch.zeros_like(kernel[:, 0])  # log-scalings, (B, M)
    for _ in range(count_iterations(reg, mass_reg)):
        left = (-factor * (kernel + right[:, None, :]).logsumexp(dim=2)).masked_fill(~rows, 0.0)
        right = (-factor * (kernel + left[:, :, None]).logsumexp(dim=1)).masked_fill(~columns, 0.0)
    plan = (kernel + left[:, :, None] + right[:, None, :]).exp()
    least = torch.minimum(rows.sum(dim=1), columns.sum(dim=1))  # (B,): T_m
    scale = (least / plan.sum(dim=(1, 2)))[:, None]
    weights = torch.cat((plan.sum(dim=2) * scale, plan.sum(dim=1) * scale))  # (2B, M)
    return torch.zeros_like(mask, dtype=weights.dtype).scatter(1, place, weights) * mask
