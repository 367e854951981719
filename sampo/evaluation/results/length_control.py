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

from ...stats.bootstrap import bootstrap
from ...stats.intervals import FEW, Estimate, prompt_weights, rate_interval, undefined
from ...stats.logistic import newton
from .controlled_fit import FLAT, RIDGE, SEPARATED, ControlledFit, FitData, sandwich
from .verdicts import Comparisons, length_ratios

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
    return overlap_of(ratio > 1, ratio < 1, (ratio <= SIMILAR) & (ratio >= 1 / SIMILAR), comparisons.codes)


def overlap_of(more: np.ndarray, fewer: np.ndarray, similar: np.ndarray, codes: np.ndarray) -> Overlap:
    """The overlap of any measure: `(m,)` where the system's answer has more of it, less, and about as much."""
    if not len(codes):
        raise ValueError("There must be at least one comparison, got none.")
    weight = prompt_weights(codes)
    weight /= weight.sum()
    return Overlap(
        longer=float(weight @ more),
        shorter=float(weight @ fewer),
        similar=float(weight @ similar),
        share=float(min(weight @ (more | similar), weight @ (fewer | similar))),
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
    hard = None if difficulty is None else difficulty_column(comparisons, difficulty)
    data = FitData.of(comparisons, length_differences(comparisons), hard)
    raw = float(comparisons.scores.mean())
    if raw in (0.0, 1.0):
        return _one_sided(comparisons, data, lengths, notes, confidence)
    fit = data.fit(np.ones((1, data.prompts)))
    rate, (slope,) = sandwich(data, fit, confidence)
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
        scale=float(fit.scale[0, 0]),
        difficulty_weight=None if hard is None else float(fit.beta[0, 2]),
        overlap=lengths,
        notes=tuple(notes),
    )


def length_differences(comparisons: Comparisons) -> np.ndarray:
    """`(m, 1)` length of the system's answer minus the baseline's."""
    ours, theirs = comparisons.lengths
    return (ours - theirs)[:, None]


def _one_sided(
    comparisons: Comparisons, data: FitData, lengths: Overlap, notes: list[str], confidence: float
) -> LengthControlled:
    rate = rate_interval(comparisons.scores, confidence)
    return LengthControlled(
        rate=rate,
        raw=float(comparisons.scores.mean()),
        slope=undefined(rate.n),
        scale=float(data.scale(np.ones((1, data.prompts)))[0, 0]),
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


def difficulty_column(comparisons: Comparisons, difficulty: Mapping[Hashable, float]) -> np.ndarray:
    """`(m,)` difficulty of each comparison's prompt; every prompt must have one."""
    missing = [prompt for prompt in comparisons.ids if prompt not in difficulty]
    if missing:
        raise ValueError(
            f"`difficulty` must know every prompt, got none for {len(missing)} of {len(comparisons.ids)}, "
            f"first {missing[:3]}. Judge the other systems on the same prompts."
        )
    return np.array([difficulty[prompt] for prompt in comparisons.ids])[comparisons.codes]


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
    ridge = np.array([RIDGE, FLAT])
    beta = newton(design, part.preference, weight[None], ridge)
    data = FitData(part.preference, doublings[:, None], part.codes, weight, None, n)
    return sandwich(data, ControlledFit(beta, np.ones((1, 1)), np.full(1, 0.5), design, ridge), confidence)[1][0]
