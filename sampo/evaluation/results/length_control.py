"""Win rate at equal length, on the user's own prompts and judge.

The model is the one of length-controlled AlpacaEval (arXiv 2404.04475) without what only AlpacaEval has:

    logit P(system wins on prompt i) = slope · tanh(Δ_i / s) + weight · difficulty_i + strength

with Δ the length of the system's answer minus the baseline's, not centred, and s a robust standard deviation of Δ. The
length-controlled win rate is the mean prediction at Δ = 0. Deviations from AlpacaEval's own fit:

1. no rows of "gamed" baselines pull the slope to a known value, so all that is known of the slope is in these data;
   where one side is nearly always longer, Δ = 0 lies outside them, and the control is refused or warned of;
2. the fit is maximum likelihood with a ridge that only keeps separable data finite, not an L1 path chosen by
   cross-validation; `strength` is not shrunk;
3. difficulty is optional, and comes from other systems of the user (`difficulty_from`);
4. intervals hold the uncertainty of the coefficients; the published standard errors leave it out;
5. s is 1.4826 times the median of the absolute deviations from the median, those that are 0 omitted: 2 % of answers
   that repeat themselves up to a limit multiply the standard deviation, and tanh(Δ / s) is then near 0 for all others.

So the number does not compare with AlpacaEval's, and is never called by its name.
"""

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from ...stats.bootstrap import bootstrap
from ...stats.intervals import FEW, Estimate, prompt_weights, rate_interval, undefined
from ...stats.logistic import curvature_of, newton, sum_by_prompt
from .verdicts import Comparisons, length_ratios

RIDGE = 1e-4  # on the slope and on the weight of the difficulty; in a fit of 100 prompts it moves nothing visible
FLAT = 1e-10  # on the strength: only labels that are all the same feel it
SEPARATED = 10.0  # a slope beyond it: lengths separate wins from losses, and nothing is known at equal length
NORMAL_MAD = 1.4826  # standard deviation over median absolute deviation, of a normal distribution
ROUNDING = 1e-9  # relative; below it two differences of length are the same
SIMILAR = 1.1  # lengths within this factor count as longer and as shorter
REFUSE_BELOW, WARN_BELOW = 0.05, 0.20  # of the overlap: docs/evaluation.md has the errors by simulation


class ExtrapolationError(ValueError):
    """Control of length would be extrapolation: one side is nearly always longer."""


class ExtrapolationWarning(UserWarning):
    """Control of length rests on few prompts."""


@dataclass(frozen=True)
class Overlap:
    """How far the lengths of the two sides overlap.

    Attributes:
        longer: share of comparisons in which the system's answer is longer.
        shorter: share in which it is shorter.
        similar: share in which the lengths differ by no more than 10 %.
        share: the smaller of the shares that are longer or similar, and shorter or similar. What control rests on.
    """

    longer: float
    shorter: float
    similar: float
    share: float


def overlap(comparisons: Comparisons) -> Overlap:
    """The overlap of lengths. Multiplying all lengths by a number changes nothing."""
    ratio = length_ratios(comparisons)
    if not len(ratio):
        raise ValueError("There must be at least one comparison, got none.")
    weight = prompt_weights(comparisons.codes) / len(comparisons.scores)
    similar = (ratio <= SIMILAR) & (ratio >= 1 / SIMILAR)
    return Overlap(
        longer=float(weight @ (ratio > 1)),
        shorter=float(weight @ (ratio < 1)),
        similar=float(weight @ similar),
        share=float(min(weight @ ((ratio > 1) | similar), weight @ ((ratio < 1) | similar))),
    )


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """A win rate at equal length.

    Attributes:
        rate: mean prediction at equal length, with its interval.
        raw: the raw win rate of the same comparisons.
        slope: of the logit on tanh(Δ / s); above 0 the judge prefers longer answers, given what the model knows.
        scale: s, in the unit of length.
        difficulty_weight: coefficient of the difficulty, or None.
        overlap: of the lengths.
        notes: what a reader has to know, in sentences.
    """

    rate: Estimate
    raw: float
    slope: Estimate
    scale: float
    difficulty_weight: float | None
    overlap: Overlap
    notes: tuple[str, ...] = field(default=())


def length_controlled(
    comparisons: Comparisons,
    *,
    difficulty: Mapping[Hashable, float] | None = None,
    interval: str = "sandwich",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    allow_extrapolation: bool = False,
) -> LengthControlled:
    """Win rate at equal length.

    Args:
        comparisons: of one system and one baseline, with lengths.
        difficulty: per prompt, from other systems (`difficulty_from`); every prompt must have one.
        interval: `sandwich`, clustered by prompt, or `bootstrap` over prompts with refits. The difficulty is taken
            as known by both.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        allow_extrapolation: compute even where the lengths do not overlap.

    Raises:
        ExtrapolationError: where fewer than 5 % of the comparisons lie on one side, or where all differences of
            length are the same and not 0. Below 20 % there is an `ExtrapolationWarning`.
    """
    if interval not in ("sandwich", "bootstrap"):
        raise ValueError(f"`interval` must be `sandwich` or `bootstrap`, got {interval!r}.")
    if not len(comparisons):
        raise ValueError("There must be at least one comparison, got none.")
    lengths = overlap(comparisons)
    notes = _check_overlap(comparisons, lengths, allow_extrapolation)
    hard = None if difficulty is None else _difficulty_column(comparisons, difficulty)
    data = FitData.of(comparisons, hard)
    raw = float(comparisons.scores.mean())
    if raw in (0.0, 1.0):
        return _one_sided(comparisons, data, lengths, notes, confidence)
    fit = data.fit(np.ones((1, data.prompts)))
    rate, slope = _sandwich(data, fit, confidence)
    if interval == "bootstrap":
        [drawn] = bootstrap(
            [lambda counts: data.fit(counts).rate],
            data.prompts,
            resamples=resamples,
            seed=seed,
            confidence=confidence,
        )
        rate = replace(drawn, value=rate.value)
    if abs(fit.beta[0, 0]) > SEPARATED:
        rate = Estimate(rate.value, 0.0, 1.0, None, rate.n)
        notes.append("Length nearly separates wins from losses: at equal length these data say nothing.")
    if data.prompts < FEW:
        notes.append(f"{data.prompts} prompts: below {FEW} a fit of lengths is not to be relied on.")
    return LengthControlled(
        rate=rate,
        raw=raw,
        slope=slope,
        scale=float(fit.scale[0]),
        difficulty_weight=None if hard is None else float(fit.beta[0, 2]),
        overlap=lengths,
        notes=tuple(notes),
    )


def _one_sided(
    comparisons: Comparisons, data: "FitData", lengths: Overlap, notes: list[str], confidence: float
) -> LengthControlled:
    rate = rate_interval(comparisons.scores, confidence)
    return LengthControlled(
        rate=rate,
        raw=float(comparisons.scores.mean()),
        slope=undefined(rate.n),
        scale=float(data.scale(np.ones((1, data.prompts)))[0]),
        difficulty_weight=None,
        overlap=lengths,
        notes=(*notes, "One side won every comparison: there is nothing for lengths to explain."),
    )


def _check_overlap(comparisons: Comparisons, lengths: Overlap, allowed: bool) -> list[str]:
    ours, theirs = comparisons.lengths
    constant = bool(np.ptp(ours - theirs) == 0 and (ours != theirs).all())
    text = (
        f"the system's answer is longer in {lengths.longer:.1%} and shorter in {lengths.shorter:.1%} of the "
        f"comparisons, {lengths.similar:.1%} differ by no more than 10 %"
    )
    if constant and not allowed:
        raise ExtrapolationError(
            "Differences of length must vary for a control, got the same difference everywhere. Report the raw win "
            "rate, or pass `allow_extrapolation=True` to get that number from here."
        )
    if lengths.share < REFUSE_BELOW and not allowed:
        raise ExtrapolationError(
            f"Lengths must overlap for a control, got an overlap of {lengths.share:.1%}: {text}. Report the raw win "
            "rate beside both lengths, or pass `allow_extrapolation=True`."
        )
    if constant:
        return ["All differences of length are the same: nothing was controlled, this is the raw win rate."]
    if lengths.share < WARN_BELOW:
        note = f"The control rests on few comparisons (overlap {lengths.share:.1%}): {text}."
        warnings.warn(f"{note} Report the raw win rate beside it.", ExtrapolationWarning, stacklevel=3)
        return [note]
    return []


def _difficulty_column(comparisons: Comparisons, difficulty: Mapping[Hashable, float]) -> np.ndarray:
    missing = [prompt for prompt in comparisons.ids if prompt not in difficulty]
    if missing:
        raise ValueError(
            f"`difficulty` must know every prompt, got none for {len(missing)} of {len(comparisons.ids)}, "
            f"first {missing[:3]}. Judge the other systems on the same prompts."
        )
    return np.array([difficulty[prompt] for prompt in comparisons.ids])[comparisons.codes]


@dataclass(frozen=True)
class _Fit:
    """Fits of R weightings of the prompts.

    `beta` `(R, k)` in the order slope, strength, weight; `scale` and `rate` `(R,)`; `design` `(R, n, k)`.
    """

    beta: np.ndarray
    scale: np.ndarray
    rate: np.ndarray
    design: np.ndarray


@dataclass(frozen=True)
class FitData:
    """One row per comparison: `y`, `difference`, `codes` and `weight` `(n,)`, `extra` `(n,)` or None."""

    y: np.ndarray
    difference: np.ndarray
    codes: np.ndarray
    weight: np.ndarray
    extra: np.ndarray | None
    prompts: int

    @classmethod
    def of(cls, comparisons: Comparisons, extra: np.ndarray | None) -> "FitData":
        """Rows of comparisons, with the difficulty of each as `extra`."""
        ours, theirs = comparisons.lengths
        codes = comparisons.codes
        return cls(comparisons.preference, ours - theirs, codes, prompt_weights(codes), extra, len(comparisons.scores))

    def scale(self, counts: np.ndarray) -> np.ndarray:
        """`(R, P)` weights of prompts -> `(R,)` robust standard deviation of Δ."""
        return np.array([robust_scale(self.difference, w) for w in counts[:, self.codes] * self.weight])

    def fit(self, counts: np.ndarray) -> _Fit:
        """Weighted maximum likelihood for each of `(R, P)` weightings of the prompts, by Newton steps together."""
        w = counts[:, self.codes] * self.weight  # (R, n)
        scale = self.scale(counts)
        safe = np.where(scale > 0, scale, 1.0)[:, None]
        length = np.where(scale[:, None] > 0, np.tanh(self.difference / safe), 0.0)
        columns = [length, np.ones_like(length)]
        if self.extra is not None:
            columns.append(np.broadcast_to(self.extra, length.shape))
        design = np.stack(columns, axis=2)  # (R, n, k)
        beta = newton(design, self.y, w, ridge_of(design.shape[2]))
        level = design.copy()
        level[:, :, 0] = 0.0
        rate = (w * expit(np.einsum("rnk,rk->rn", level, beta))).sum(axis=1) / w.sum(axis=1)
        return _Fit(beta, scale, rate, design)


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
    weight = np.where(deviation > ROUNDING * np.abs(values).max(), weight, 0.0)
    return NORMAL_MAD * _weighted_median(deviation, weight) if weight.any() else 0.0


def _weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    """The middle value; the mean of both neighbours where the weight below equals the weight above."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weight[order])
    half, slack = below[-1] / 2, ROUNDING * below[-1]
    ranks = np.searchsorted(below, (half - slack, half + slack)).clip(max=len(values) - 1)
    return float(values[order[ranks]].mean())


def _sandwich(data: FitData, fit: _Fit, confidence: float) -> tuple[Estimate, Estimate]:
    """Intervals of the rate (on the logit scale) and of the slope from the influence of each prompt; s as known."""
    x, beta, rate = fit.design[0], fit.beta[0], float(fit.rate[0])
    k, n = x.shape[1], data.prompts
    p = expit(x @ beta)
    curvature = curvature_of(fit.design, (data.weight * p * (1 - p))[None], ridge_of(k))[0]
    scores = sum_by_prompt(x * (data.weight * (data.y - p))[:, None], data.codes)  # (P, k)
    influence = n * np.linalg.solve(curvature, scores.T).T
    level = x.copy()
    level[:, 0] = 0.0
    q = expit(level @ beta)
    gradient = (level * (data.weight * q * (1 - q))[:, None]).sum(axis=0) / n
    of_rate = influence @ gradient + sum_by_prompt((data.weight * (q - rate))[:, None], data.codes)[:, 0]
    correction = n / max(n - k, 1)
    t = stats.t.ppf((1 + confidence) / 2, max(n - k, 1))
    se_rate, se_slope = (np.sqrt(correction * (v**2).sum()) / n for v in (of_rate, influence[:, 0]))
    centre, half_width = logit(rate), t * se_rate / max(rate * (1 - rate), 1e-12)
    return (
        Estimate(rate, float(expit(centre - half_width)), float(expit(centre + half_width)), float(se_rate), n),
        Estimate(float(beta[0]), float(beta[0] - t * se_slope), float(beta[0] + t * se_slope), float(se_slope), n),
    )


def ridge_of(k: int) -> np.ndarray:
    """Of the slope, the strength and the weight of the difficulty, as far as there are `k`."""
    return np.array([RIDGE, FLAT, RIDGE])[:k]


def length_slope(comparisons: Comparisons, *, confidence: float = 0.95) -> Estimate:
    """The judge's own slope: change of the logit of a win when the system's answer is twice as long.

    From a logistic regression of the preference on log2(system / baseline), clustered by prompt; comparisons with an
    empty answer are omitted. It measures correlation with length, not its effect: where longer answers are also
    better, an unbiased judge has a slope too. Compare it with the slope of the truth or of another judge.
    """
    ratio = length_ratios(comparisons)
    part = comparisons.where((ratio > 0) & np.isfinite(ratio))
    doublings = np.log2(length_ratios(part))
    n = len(part.scores)
    if n < 3 or np.ptp(doublings) == 0 or np.ptp(part.preference) == 0:
        return undefined(n)
    weight = prompt_weights(part.codes)
    design = np.stack([doublings, np.ones(len(part))], axis=1)[None]
    beta = newton(design, part.preference, weight[None], ridge_of(2))
    data = FitData(part.preference, doublings, part.codes, weight, None, n)
    return _sandwich(data, _Fit(beta, np.ones(1), np.full(1, 0.5), design), confidence)[1]
