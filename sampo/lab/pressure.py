"""Length pressure of a method on its pairs before training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..weighting import WEIGHTINGS, balance_end, length_pressure, token_weights
from .world import EOS


def mean_weights(lengths: Sequence[int], options: dict[str, Any]) -> Tensor:
    """`(2B, T)` mean weight of each answer token over all draws; that of a random subset is `expected`'s.

    Under `balance_end_token` the end tokens' weights are still to be balanced.

    Args:
        lengths: of 2B answers, chosen ones first; the last token of each is its end token. With `token_budget:
            dataset` they are those of the data set.
        options: of `SamPOConfig`.
    """
    counts = torch.tensor(lengths)
    position = torch.arange(int(counts.max()))
    mask, end = position < counts[:, None], position == counts[:, None] - 1  # (2B, T)
    name, balanced = options["token_weighting"], options.get("balance_end_token", False)
    n_pairs, by_dataset = len(lengths) // 2, options.get("token_budget") == "dataset"
    weights = token_weights(
        {"sampo": "expected"}.get(name, name),
        mask,
        end=end,
        sampled_sides=options.get("sampled_sides", "both"),
        token_totals=(sum(lengths[:n_pairs]), sum(lengths[n_pairs:])) if by_dataset else None,
        keep_end_token=options.get("keep_end_token", False) or (balanced and WEIGHTINGS[name].can_keep_end),
        gamma=options.get("decay_gamma", 1.0),
        tail_weight=options.get("ld_tail_weight", 0.0),
    )
    if "ld_alpha" in options:  # LD-DPO, arXiv 2409.06411: the tokens after T_m weigh alpha
        weights = torch.where(token_weights("prefix", mask) > 0, weights, options["ld_alpha"] * weights)
    return weights.double()


def mean_pressures(
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    end_probs: Sequence[np.ndarray],
    options: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Length pressure of each pair, (B,), at the start of training; negative lengthens.

    Args:
        chosen: token ids of B answers.
        rejected: likewise.
        end_probs: the start's probability of the end token at each position of the 2B answers, chosen ones first.
        options: of `SamPOConfig`.

    Returns:
        `pressure`, of the weights alone; and `push`, in which each pair counts as in the gradient of the sigmoid loss:
        times 2σ(−m), where m is what a length penalty adds to the logit before training. Without one they are equal.
    """
    answers = [*chosen, *rejected]
    weights = mean_weights([len(answer) for answer in answers], options)
    ends, probs = torch.zeros(weights.shape, dtype=torch.bool), torch.zeros_like(weights)
    for row, (answer, p) in enumerate(zip(answers, end_probs, strict=True)):
        ends[row, : len(answer)] = torch.tensor(answer) == EOS
        probs[row, : len(answer)] = torch.from_numpy(p)
    if options.get("balance_end_token"):
        weights = balance_end(weights, ends, probs)
    pressure = length_pressure(weights, ends, probs).numpy()
    difference = np.array([len(a) - len(b) for a, b in zip(chosen, rejected, strict=True)])
    penalty = options.get("length_penalty", 0.0)
    per_token = options.get("length_penalty_start", 0.0) if penalty == "learned" else penalty
    return {"pressure": pressure, "push": pressure * 2 / (1 + np.exp(per_token * difference))}


def logistic_slope(differences: Sequence[float]) -> float:
    """The s that maximises Σ log σ(s·(T_w − T_l)): log-odds of being chosen per token more.

    Raises:
        ValueError: all differences have one sign, and the likelihood has no maximum.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    d = np.asarray(differences, dtype=float)
    if not (d.min() < 0 < d.max()):
        raise ValueError(
            "A logistic slope of preference on length needs pairs with longer and with shorter chosen answers, got "
            f"differences from {d.min():g} to {d.max():g}. Start `length_penalty: learned` at 0."
        )

    def gradient(slope: float) -> float:
        return float((d * expit(-slope * d)).mean())

    reach = 1.0
    while gradient(-reach) * gradient(reach) > 0:
        reach *= 2
    return float(brentq(gradient, -reach, reach))
