"""Win rate at equal style: the control of length with several features at once.

    logit P(system wins on prompt i) = Σ_j slope_j · tanh(Δ_ij / s_j) + weight · difficulty_i + strength

Δ_ij is what the system's answer has more of feature j than the baseline's; with the length as the only feature this is
the win rate at equal length. The idea is LMArena's style control (Li, Angelopoulos and Chiang, 2024), which adds
differences of style to a Bradley-Terry model of many systems. Deviations from it:

1. two systems and no ranking, so one strength; each prompt weighs 1 and intervals are clustered by prompt;
2. differences, not differences over sums, and tanh of them: see `length_control` on answers that repeat themselves;
3. where a slope is poorly known, because a feature separates wins from losses, features go together or prompts are
   few, a ridge on the slopes is chosen by cross-validation over prompts. The interval includes its expected bias.

What was said of confounding by difficulty in `length_control` holds for every feature. A slope is no proof of a bias:
an answer with a list may be the better one.
"""

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ...io.tables import Table
from ...stats.bootstrap import bootstrap
from ...stats.intervals import FEW, Estimate, rate_interval
from .cells import BEHIND, show_estimate
from .controlled_fit import RIDGE, SEPARATED, ControlledFit, FitData, sandwich
from .length_control import (
    REFUSE_BELOW,
    WARN_BELOW,
    ExtrapolationError,
    ExtrapolationWarning,
    Overlap,
    difficulty_column,
    overlap,
    overlap_of,
)
from .style import LENGTH
from .verdicts import Comparisons

UNSURE = 1.0  # standard error of a slope, in logits, above which a ridge is chosen by cross-validation
RIDGES = RIDGE * 10.0 ** np.arange(0, 6.5, 0.5)  # standard deviations of the slopes from 100 down to 0.1 logits
FOLDS_OF_PROMPTS = 5
ABOUT_AS_MUCH = 0.1  # of the robust standard deviation of a difference: smaller ones count as more and as less
NULL = 1e-9  # eigenvalue of the covariance of the terms, of the largest; below it features are the same


@dataclass(frozen=True, kw_only=True)
class StyleFeature:
    """What the fit says of one feature.

    Attributes:
        name: of it.
        slope: of the logit on tanh(Δ / s); above 0 the judge prefers more of it, given the other features.
        scale: s, in the unit of the feature.
        overlap: of the feature; `longer` is the share of comparisons in which the system has more of it.
    """

    name: str
    slope: Estimate
    scale: float
    overlap: Overlap


@dataclass(frozen=True, kw_only=True)
class StyleControlled:
    """A win rate at equal style.

    Attributes:
        rate: mean prediction at equal style, with its interval.
        raw: the raw win rate of the same comparisons.
        features: those that differ, in the order of the comparisons' `style`.
        support: share of comparisons whose style is at least as far from the mean difference as equal style is
            (Mahalanobis distance of the terms). What the joint control rests on.
        ridge: on the slopes; above `RIDGE` where cross-validation chose it.
        difficulty_weight: coefficient of the difficulty, or None.
        notes: what a reader has to know, in sentences.
    """

    rate: Estimate
    raw: float
    features: tuple[StyleFeature, ...]
    support: float
    ridge: float
    difficulty_weight: float | None
    notes: tuple[str, ...] = field(default=())


def style_controlled(
    comparisons: Comparisons,
    *,
    difficulty: Mapping[Hashable, float] | None = None,
    interval: str = "sandwich",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    allow_extrapolation: bool = False,
) -> StyleControlled:
    """Win rate at equal style.

    Args:
        comparisons: of one system and one baseline, with `style`.
        difficulty: per prompt, from other systems (`difficulty_from`); every prompt must have one.
        interval: `sandwich`, clustered by prompt, or `bootstrap` over prompts with refits, the ridge as known.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap and of the folds of the cross-validation.
        allow_extrapolation: compute even where the styles do not overlap.

    Raises:
        ExtrapolationError: where a feature, or all together, leave fewer than 5 % of the comparisons on one side of
            equal style, or a feature differs by the same amount everywhere. Below 20 % there is an
            `ExtrapolationWarning`.
    """
    if interval not in ("sandwich", "bootstrap"):
        raise ValueError(f"`interval` must be `sandwich` or `bootstrap`, got {interval!r}.")
    if not len(comparisons) or not comparisons.style:
        raise ValueError("There must be at least one comparison, with `style`, got none.")
    names, data, notes = _prepare(comparisons, difficulty)
    raw = float(comparisons.scores.mean())
    if not names or raw in (0.0, 1.0):
        return _not_controlled(comparisons, names, notes, confidence)
    scale = data.scale(np.ones((1, data.prompts)))[0]
    overlaps = [_overlap_of_feature(comparisons, name, data, j, scale[j]) for j, name in enumerate(names)]
    joint = support(data.terms(scale), data.weight)
    notes += _check_styles(names, scale, overlaps, joint, allow_extrapolation)
    fit, ridge = _fit_with_ridge(data, seed, notes)
    rate, slopes = sandwich(data, fit, confidence)
    if interval == "bootstrap":
        [drawn] = bootstrap(
            [lambda counts: data.fit(counts, ridge).rate],
            data.prompts,
            resamples=resamples,
            seed=seed,
            confidence=confidence,
        )
        rate = replace(drawn, value=rate.value)
    if separating := [name for name, value in zip(names, fit.beta[0], strict=False) if abs(value) > SEPARATED]:
        rate = Estimate(rate.value, 0.0, 1.0, None, rate.n)
        named = ", ".join(separating)
        notes.append(f"Style ({named}) nearly separates wins from losses: at equal style these data say nothing.")
    if data.prompts < FEW:
        notes.append(f"{data.prompts} prompts: below {FEW} a fit of style is not to be relied on.")
    features = zip(names, slopes, scale.tolist(), overlaps, strict=True)
    return StyleControlled(
        rate=rate,
        raw=raw,
        features=tuple(StyleFeature(name=a, slope=b, scale=c, overlap=d) for a, b, c, d in features),
        support=joint,
        ridge=ridge,
        difficulty_weight=None if difficulty is None else float(fit.beta[0, -1]),
        notes=tuple(notes),
    )


def _prepare(
    comparisons: Comparisons, difficulty: Mapping[Hashable, float] | None
) -> tuple[list[str], FitData, list[str]]:
    """The features that differ anywhere, the data of the fit, and a note on the other features."""
    differences = {name: column[:, 0] - column[:, 1] for name, column in comparisons.style.items()}
    names = [name for name, column in differences.items() if column.any()]
    same = [name for name in differences if name not in names]
    notes = [f"Left out, as it never differs between the two answers: {', '.join(same)}."] if same else []
    hard = None if difficulty is None else difficulty_column(comparisons, difficulty)
    columns = np.array([differences[name] for name in names]).reshape(len(names), len(comparisons)).T
    return names, FitData.of(comparisons, columns, hard), notes


def _not_controlled(
    comparisons: Comparisons, names: list[str], notes: list[str], confidence: float
) -> StyleControlled:
    if names:
        notes.append("One side won every comparison: there is nothing for style to explain.")
    else:
        notes.append("No feature differs: nothing was controlled, this is the raw win rate.")
    return StyleControlled(
        rate=rate_interval(comparisons.scores, confidence),
        raw=float(comparisons.scores.mean()),
        features=(),
        support=1.0,
        ridge=RIDGE,
        difficulty_weight=None,
        notes=tuple(notes),
    )


def _overlap_of_feature(comparisons: Comparisons, name: str, data: FitData, j: int, scale: float) -> Overlap:
    if name == LENGTH:
        return overlap(comparisons)
    difference = data.differences[:, j]
    return overlap_of(difference > 0, difference < 0, np.abs(difference) <= ABOUT_AS_MUCH * scale, data.codes)


def support(terms: np.ndarray, weight: np.ndarray) -> float:
    """Share of rows that are at least as far from the weighted mean as 0 is, by Mahalanobis' distance.

    Margins may overlap where together they do not: with longer answers that always have fewer lists, no answers are
    alike in both.

    Args:
        terms: `(n, p)`.
        weight: `(n,)`, above 0.

    Returns:
        A share in [0, 1]; 0 where 0 lies outside of the space that the rows span.
    """
    weight = weight / weight.sum()
    mean = weight @ terms
    centred = terms - mean
    values, vectors = np.linalg.eigh(centred.T @ (centred * weight[:, None]))
    spanned = values > NULL * max(values[-1], NULL)
    of_zero, of_rows = mean @ vectors, centred @ vectors
    if (np.abs(of_zero[~spanned]) > np.sqrt(NULL)).any():
        return 0.0
    distance = (of_zero[spanned] ** 2 / values[spanned]).sum()
    return float(weight @ ((of_rows[:, spanned] ** 2 / values[spanned]).sum(axis=1) >= distance * (1 - NULL)))


def _check_styles(
    names: list[str], scale: np.ndarray, overlaps: list[Overlap], joint: float, allowed: bool
) -> list[str]:
    """Notes, a warning and errors on equal style outside of the data."""
    constant = [name for name, one in zip(names, scale, strict=True) if one == 0]
    if constant and not allowed:
        raise ExtrapolationError(
            f"Differences of style must vary for a control, got the same everywhere for {', '.join(constant)}. Leave "
            "it out of the features, or pass `allow_extrapolation=True`."
        )
    parts = [
        (one.share, f"{name}: more in {one.longer:.1%}, less in {one.shorter:.1%}, similar in {one.similar:.1%}")
        for name, one in zip(names, overlaps, strict=True)
    ]
    if len(names) > 1:
        parts.append(
            (joint, f"all together: {joint:.1%} of the comparisons are as far from the mean as equal style is")
        )
    refused = [text for share, text in parts if share < REFUSE_BELOW]
    if refused and not allowed:
        raise ExtrapolationError(
            f"Styles must overlap for a control, got less than {REFUSE_BELOW:.0%} ({'; '.join(refused)}). Leave "
            "such a feature out, or pass `allow_extrapolation=True`."
        )
    if few := [text for share, text in parts if share < WARN_BELOW]:
        note = f"The control of style rests on few comparisons ({'; '.join(few)})."
        warnings.warn(f"{note} Report the raw win rate beside it.", ExtrapolationWarning, stacklevel=3)
        return [note]
    return []


def _fit_with_ridge(data: FitData, seed: int, notes: list[str]) -> tuple[ControlledFit, float]:
    """Maximum likelihood; where it knows a slope poorly, with a ridge that cross-validation chooses."""
    everyone = np.ones((1, data.prompts))
    fit = data.fit(everyone)
    errors = np.sqrt(np.diag(np.linalg.inv(data.curvature(fit))))[: data.differences.shape[1]]
    if errors.max() <= UNSURE:
        return fit, RIDGE
    ridge = choose_ridge(data, seed)
    if ridge > RIDGE:
        notes.append(
            f"These data know the effect of style poorly (a slope's standard error is {errors.max():.1f} logits): a "
            f"ridge of {ridge:.2g}, chosen by cross-validation, holds the slopes towards 0."
        )
    return data.fit(everyone, ridge), ridge


def choose_ridge(data: FitData, seed: int = 0) -> float:
    """The ridge of `RIDGES` with the least log loss on left-out prompts, in folds drawn with `seed`."""
    folds = min(FOLDS_OF_PROMPTS, data.prompts)
    fold = np.random.default_rng(seed).permutation(data.prompts) % folds
    kept = (fold != np.arange(folds)[:, None]).astype(float)  # (folds, P)
    left_out = (1 - kept[:, data.codes]) * data.weight

    def loss(ridge: float) -> float:
        fit = data.fit(kept, ridge)
        eta = np.einsum("rnk,rk->rn", fit.design, fit.beta)
        return float((left_out * (np.logaddexp(0, eta) - data.y * eta)).sum())

    return float(min(RIDGES, key=loss))


def style_table(found: Mapping[str, StyleControlled]) -> Table:
    """What the fits say of each feature, by the name of the system."""
    table = Table(
        "Slope of the logit of a win on more of each feature, the others equal",
        ("system", "feature", "slope", "more, %", "less, %", "scale of the\ndifference"),
    )
    for system, one in found.items():
        for feature in one.features:
            table.add(
                system,
                feature.name,
                show_estimate(feature.slope, "+.2f", bounds=BEHIND),
                f"{100 * feature.overlap.longer:.1f}",
                f"{100 * feature.overlap.shorter:.1f}",
                f"{feature.scale:,.3g}",
            )
    return table
