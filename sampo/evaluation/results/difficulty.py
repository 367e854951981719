"""How hard prompts are, from the verdicts on other systems."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.special import expit

from ...stats.intervals import codes_of, prompt_means
from ...stats.logistic import sum_by_prompt
from .controlled_fit import RIDGE, FitData
from .length_control import length_differences
from .verdicts import Comparisons


def difficulty_from(others: Sequence[Comparisons], *, prior_sd: float = 1.5) -> dict[Hashable, float]:
    """How prompts differ in what they are to systems other than the one that is to be controlled.

    Fits logit P(system m wins on prompt i) = strength_m + slope_m · tanh(Δ / s_m) + difficulty_i to the other systems
    at once, against the same baseline and by the same judge, difficulty being normal around 0. Leave the system under
    control out: with its own verdicts inside, the difficulty would explain them.

    Args:
        others: comparisons of the other systems, with lengths.
        prior_sd: standard deviation of the difficulty, in logits.

    Returns:
        Difficulty by prompt (higher: the baseline is easier to beat), of every prompt that one of them has.
    """
    if not others:
        raise ValueError("`others` must hold at least one other system, got none.")
    y, codes, design, weight, ids = _joint_rows(others)
    prompts, k = len(ids), design.shape[1]
    beta, hard = np.zeros(k), np.zeros(prompts)
    ridge = np.full(k, RIDGE)
    for _ in range(100):
        p = expit(design @ beta + hard[codes])
        curve = weight * p * (1 - p)
        residual = weight * (y - p)
        g_beta = design.T @ residual - ridge * beta
        g_hard = np.bincount(codes, weights=residual, minlength=prompts) - hard / prior_sd**2
        d = np.bincount(codes, weights=curve, minlength=prompts) + prior_sd**-2
        cross = sum_by_prompt(design * curve[:, None], codes)  # (P, k)
        schur = design.T @ (design * curve[:, None]) + np.diag(ridge) - cross.T @ (cross / d[:, None])
        step = np.linalg.solve(schur, g_beta - cross.T @ (g_hard / d))
        step_hard = (g_hard - cross @ step) / d
        size = max(1.0, np.abs(step).max() / 4, np.abs(step_hard).max() / 4)
        beta, hard = beta + step / size, hard + step_hard / size
        if max(np.abs(step).max(), np.abs(step_hard).max()) < 1e-10:
            break
    return dict(zip(ids, hard.tolist(), strict=True))


def length_correlation(comparisons: Comparisons, difficulty: Mapping[Hashable, float]) -> float | None:
    """Correlation over prompts of the difficulty and the length term of the control; None where one is constant.

    Where it is not 0, a control of length without the difficulty is biased: see docs/evaluation.md for how far.
    """
    data = FitData.of(comparisons, length_differences(comparisons))
    term = prompt_means(_length_term(data), data.codes)
    hard = np.array([difficulty[prompt] for prompt in comparisons.ids])
    if min(term.std(), hard.std()) < 1e-9:
        return None
    return float(np.corrcoef(term, hard)[0, 1])


def _length_term(data: FitData) -> np.ndarray:
    """`(n,)` the length term of the control."""
    return data.terms(data.scale(np.ones((1, data.prompts)))[0])[:, 0]


def _joint_rows(
    others: Sequence[Comparisons],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[Hashable]]:
    """Stack the rows of all systems, with two columns of the design for each system.

    Returns:
        `(n,)` preferences, `(n,)` numbers of the prompts, `(n, 2 · systems)` design, `(n,)` weights, and the prompts.
    """
    ids = codes_of([prompt for other in others for prompt in other.ids])[1]
    number = {prompt: i for i, prompt in enumerate(ids)}
    y, codes, weight, blocks = [], [], [], []
    for position, other in enumerate(others):
        data = FitData.of(other, length_differences(other))
        block = np.zeros((len(other), 2 * len(others)))
        block[:, 2 * position] = _length_term(data)
        block[:, 2 * position + 1] = 1.0
        blocks.append(block)
        y.append(data.y)
        weight.append(data.weight)
        codes.append(np.array([number[prompt] for prompt in other.ids])[other.codes])
    return np.concatenate(y), np.concatenate(codes), np.concatenate(blocks), np.concatenate(weight), ids
