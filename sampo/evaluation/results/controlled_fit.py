"""The logistic fit behind the win rates at equal length and at equal style.

    logit P(system wins row i) = Σ_j slope_j · tanh(Δ_ij / s_j) + strength + weight · extra_i

Δ_ij is what the system's answer has more of feature j than the baseline's, s_j a robust standard deviation of it. The
controlled win rate is the mean prediction with all Δ = 0. Each prompt weighs 1; intervals are clustered by prompt.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from ...stats.intervals import Estimate, prompt_weights
from ...stats.logistic import curvature_of, newton, sum_by_prompt
from .verdicts import Comparisons

RIDGE = 1e-4  # on the slopes and on the weight of the extra column; in a fit of 100 prompts it moves nothing visible
FLAT = 1e-10  # on the strength: only labels that are all the same feel it
SEPARATED = 10.0  # a slope beyond it: a feature separates wins from losses, and nothing is known without it
NORMAL_MAD = 1.4826  # standard deviation over median absolute deviation, of a normal distribution
SAME = 1e-9  # relative; below it two differences are the same


@dataclass(frozen=True)
class ControlledFit:
    """Fits of R weightings of the prompts.

    `beta` `(R, k)` in the order slopes, strength, weight; `scale` `(R, p)`; `rate` `(R,)`; `design` `(R, n, k)`;
    `ridge` `(k,)`.
    """

    beta: np.ndarray
    scale: np.ndarray
    rate: np.ndarray
    design: np.ndarray
    ridge: np.ndarray


@dataclass(frozen=True)
class FitData:
    """One row per comparison: `y`, `codes`, `weight` `(n,)`, `differences` `(n, p)`, `extra` `(n,)` or None."""

    y: np.ndarray
    differences: np.ndarray
    codes: np.ndarray
    weight: np.ndarray
    extra: np.ndarray | None
    prompts: int

    @classmethod
    def of(cls, comparisons: Comparisons, differences: np.ndarray, extra: np.ndarray | None = None) -> "FitData":
        """Rows of comparisons with their `(n, p)` differences, and with the difficulty of each as `extra`."""
        codes = comparisons.codes
        return cls(comparisons.preference, differences, codes, prompt_weights(codes), extra, len(comparisons.scores))

    def scale(self, counts: np.ndarray) -> np.ndarray:
        """`(R, P)` weights of prompts -> `(R, p)` robust standard deviations of the differences."""
        rows = counts[:, self.codes] * self.weight
        return np.array([[robust_scale(column, w) for column in self.differences.T] for w in rows])

    def terms(self, scale: np.ndarray) -> np.ndarray:
        """`(p,)` scales -> `(n, p)` terms tanh(Δ / s); 0 for a feature that never differs."""
        return np.where(scale > 0, np.tanh(self.differences / np.where(scale > 0, scale, 1.0)), 0.0)

    def fit(self, counts: np.ndarray, ridge: float = RIDGE) -> ControlledFit:
        """Maximum likelihood for each of `(R, P)` weightings of the prompts, with a ridge on the slopes."""
        w = counts[:, self.codes] * self.weight  # (R, n)
        scale = self.scale(counts)
        ones = np.ones((len(self.y), 1))
        more = [] if self.extra is None else [self.extra[:, None]]
        design = np.stack([np.concatenate([self.terms(s), ones, *more], axis=1) for s in scale])  # (R, n, k)
        p = self.differences.shape[1]
        ridges = np.array([ridge] * p + [FLAT] + [RIDGE] * len(more))
        beta = newton(design, self.y, w, ridges)
        level = design.copy()
        level[:, :, :p] = 0.0
        rate = (w * expit(np.einsum("rnk,rk->rn", level, beta))).sum(axis=1) / w.sum(axis=1)
        return ControlledFit(beta, scale, rate, design, ridges)

    def curvature(self, fit: ControlledFit) -> np.ndarray:
        """`(k, k)` second derivative of the objective of the first fit."""
        p = expit(fit.design[0] @ fit.beta[0])
        return curvature_of(fit.design[:1], (self.weight * p * (1 - p))[None], fit.ridge)[0]


def robust_scale(values: np.ndarray, weight: np.ndarray) -> float:
    """1.4826 times the median absolute deviation, which is the standard deviation where values are normal.

    Deviations of 0 are omitted: where more than half of the differences are the same, the others still have a scale.

    Args:
        values: `(n,)`.
        weight: `(n,)`, 0 or more.

    Returns:
        The scale, in the unit of the values; 0 where all of them are the same.
    """
    deviation = np.abs(values - _weighted_median(values, weight))
    weight = np.where(deviation > SAME * np.abs(values).max(), weight, 0.0)
    return NORMAL_MAD * _weighted_median(deviation, weight) if weight.any() else 0.0


def _weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    """The middle value; the mean of both neighbours where the weight below equals the weight above."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weight[order])
    half, slack = below[-1] / 2, SAME * below[-1]
    ranks = np.searchsorted(below, (half - slack, half + slack)).clip(max=len(values) - 1)
    return float(values[order[ranks]].mean())


def sandwich(data: FitData, fit: ControlledFit, confidence: float) -> tuple[Estimate, tuple[Estimate, ...]]:
    """Intervals of the rate (on the logit scale) and of the slopes from the influence of each prompt; s as known.

    A ridge biases the slopes. With the slopes normal around 0 with variance 1 / ridge, the expected square of that
    bias is H⁻¹ R H⁻¹, with H the curvature and R the ridge; it is added to the sandwich.
    """
    x, beta, rate = fit.design[0], fit.beta[0], float(fit.rate[0])
    k, n, features = x.shape[1], data.prompts, data.differences.shape[1]
    inverse = np.linalg.inv(data.curvature(fit))
    scores = sum_by_prompt(x * (data.weight * (data.y - expit(x @ beta)))[:, None], data.codes)  # (P, k)
    influence = n * scores @ inverse
    level = x.copy()
    level[:, :features] = 0.0
    q = expit(level @ beta)
    gradient = (level * (data.weight * q * (1 - q))[:, None]).sum(axis=0) / n
    of_rate = influence @ gradient + sum_by_prompt((data.weight * (q - rate))[:, None], data.codes)[:, 0]
    freedom = max(n - k, 1)
    squares = inverse * np.where(fit.ridge > RIDGE, fit.ridge, 0.0) @ inverse  # of the bias; 0 without a real ridge
    t = stats.t.ppf((1 + confidence) / 2, freedom)

    def se_of(one: np.ndarray, bias: float) -> float:
        return float(np.sqrt(n / freedom * (one**2).sum() / n**2 + bias))

    se_rate = se_of(of_rate, float(gradient @ squares @ gradient))
    half_width = t * se_rate / max(rate * (1 - rate), 1e-12)
    bounds = (float(expit(logit(rate) - half_width)), float(expit(logit(rate) + half_width)))
    slopes = []
    for j in range(features):
        value, se = float(beta[j]), se_of(influence[:, j], float(squares[j, j]))
        slopes.append(Estimate(value, float(value - t * se), float(value + t * se), se, n))
    return Estimate(rate, *bounds, se_rate, n), tuple(slopes)
