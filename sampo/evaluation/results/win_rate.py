"""Win rates: how often a judge prefers a system to a baseline, alone, beside another system's, and by length."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from ...stats.bootstrap import bootstrap
from ...stats.intervals import FEW, Estimate, difference_interval, prompt_means, rate_interval, undefined
from .verdicts import Comparisons, length_ratios

TIE = 1e-9  # scores that differ from ½ by less are ½: means of several verdicts are not exact


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """A win rate with all that must be reported with it.

    Attributes:
        rate: mean score over prompts, with its interval.
        wins: prompts whose score is above ½.
        ties: prompts whose score is ½.
        losses: prompts whose score is below ½.
        comparisons: pairs of answers that count.
        failed: pairs without any verdict.
        half_failed: pairs without a verdict in one of the orders.
        lost_prompts: prompts without any comparison.
        notes: what a reader has to know, in sentences.
    """

    rate: Estimate
    wins: int
    ties: int
    losses: int
    comparisons: int
    failed: int = 0
    half_failed: int = 0
    lost_prompts: int = 0
    notes: tuple[str, ...] = field(default=())


def win_rate(
    comparisons: Comparisons,
    *,
    interval: str = "wilson",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Raw win rate over prompts.

    Args:
        comparisons: of one system and one baseline.
        interval: `wilson`, at the variance of the prompts' scores, or `bootstrap`, resampling prompts. Both respect
            that samples of one prompt belong together; the bootstrap is too narrow below 50 prompts and near 0 and 1.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    if interval not in ("wilson", "bootstrap"):
        raise ValueError(f"`interval` must be `wilson` or `bootstrap`, got {interval!r}.")
    scores = comparisons.scores
    rate = rate_interval(scores, confidence)
    if interval == "bootstrap" and len(scores):
        [drawn] = bootstrap(
            [lambda counts: counts @ scores / len(scores)],
            len(scores),
            resamples=resamples,
            seed=seed,
            confidence=confidence,
        )
        rate = replace(drawn, value=rate.value)
    tie = np.abs(scores - 0.5) < TIE
    return WinRate(
        rate=rate,
        wins=int((~tie & (scores > 0.5)).sum()),
        ties=int(tie.sum()),
        losses=int((~tie & (scores < 0.5)).sum()),
        comparisons=len(comparisons),
        failed=comparisons.failed,
        half_failed=comparisons.half_failed,
        lost_prompts=comparisons.lost_prompts,
        notes=_notes_on_comparisons(comparisons),
    )


def _notes_on_comparisons(comparisons: Comparisons) -> tuple[str, ...]:
    n, notes = len(comparisons.scores), []
    if n < FEW:
        notes.append(f"{n} prompts: below {FEW} the interval is a hint only, and shows differences of thirty points.")
    if comparisons.orders in ("system first", "baseline first"):
        notes.append(f"Only one order was judged ({comparisons.orders}): the judge's bias for a position is included.")
    left_out = comparisons.failed + comparisons.half_failed
    if left_out:
        total = left_out + len(comparisons)
        notes.append(
            f"{left_out} of {total} pairs of answers are left out because a verdict failed "
            f"({comparisons.half_failed} of them in one order only)."
        )
    return tuple(notes)


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Two systems against one baseline, on the prompts that both have.

    Attributes:
        difference: mean score of the first minus that of the second, with its paired interval.
        better: prompts where the first scores higher.
        worse: prompts where the second scores higher.
        equal: prompts where both score the same.
        p_value: exact two-sided sign test on `better` and `worse`; for wins and losses this is McNemar's exact test.
            None where no prompt differs.
        unpaired: prompts that only one of them has; they do not count.
        correlation: of the two scores over prompts, or None.
    """

    difference: Estimate
    better: int
    worse: int
    equal: int
    p_value: float | None
    unpaired: int
    correlation: float | None


def paired(first: Comparisons, second: Comparisons, *, confidence: float = 0.95) -> PairedComparison:
    """Compare two systems that the same judge compared with the same baseline."""
    a, b = dict(zip(first.ids, first.scores, strict=True)), dict(zip(second.ids, second.scores, strict=True))
    both = [prompt for prompt in first.ids if prompt in b]
    if not both:
        raise ValueError(
            f"The two systems must share prompts, got {len(a)} and {len(b)} without one in common. "
            "Judge both on the same prompt file."
        )
    x, y = np.array([a[prompt] for prompt in both]), np.array([b[prompt] for prompt in both])
    difference = x - y
    equal = np.abs(difference) < TIE
    better, worse = int((difference[~equal] > 0).sum()), int((difference[~equal] < 0).sum())
    varied = x.std() > 1e-12 and y.std() > 1e-12
    return PairedComparison(
        difference=difference_interval(difference, confidence),
        better=better,
        worse=worse,
        equal=int(equal.sum()),
        p_value=float(stats.binomtest(better, better + worse).pvalue) if better + worse else None,
        unpaired=len(a) + len(b) - 2 * len(both),
        correlation=float(np.corrcoef(x, y)[0, 1]) if varied else None,
    )


RATIO_EDGES = (0.5, 0.8, 1.25, 2.0)


def by_length_ratio(
    comparisons: Comparisons, *, edges: Sequence[float] = RATIO_EDGES, confidence: float = 0.95
) -> list[tuple[float, float, WinRate]]:
    """Win rate by the ratio of lengths, system over baseline.

    Returns:
        For each bin its lower edge (included), its upper edge and the win rate of the comparisons inside. An empty
        answer of the system has ratio 0, one of the baseline ratio ∞; two empty ones have ratio 1.
    """
    if list(edges) != sorted(set(edges)) or not all(edge > 0 for edge in edges):
        raise ValueError(f"`edges` must rise and lie above 0, got {list(edges)}.")
    ratio = length_ratios(comparisons)
    bounds = [0.0, *edges, np.inf]
    bins = np.searchsorted(edges, ratio, side="right")
    return [
        (bounds[i], bounds[i + 1], win_rate(comparisons.where(bins == i), confidence=confidence))
        for i in range(len(bounds) - 1)
    ]


def length_matched(comparisons: Comparisons, *, ratio: float = 1.25, confidence: float = 0.95) -> WinRate:
    """Win rate among answers whose lengths differ by no more than a factor.

    A check of robustness, not a main result: it covers only the prompts on which both answers are about as long.
    """
    if ratio < 1:
        raise ValueError(f"`ratio` must be at least 1, got {ratio}.")
    ratios = length_ratios(comparisons)
    return win_rate(comparisons.where((ratios <= ratio) & (ratios >= 1 / ratio)), confidence=confidence)


def longer_wins(comparisons: Comparisons) -> Comparisons:
    """The control that every result needs: a judge that always prefers the longer answer."""
    ours, theirs = comparisons.lengths
    return Comparisons(
        prompt=comparisons.prompt,
        preference=np.where(ours > theirs, 1.0, np.where(ours < theirs, 0.0, 0.5)),
        system_length=ours,
        baseline_length=theirs,
        length_unit=comparisons.length_unit,
    )


def winner_is_longer(comparisons: Comparisons, *, confidence: float = 0.95) -> Estimate:
    """How often the judge's winner is the longer answer, where there is a winner and the lengths differ."""
    ours, theirs = comparisons.lengths
    decided = comparisons.where((np.abs(comparisons.preference - 0.5) >= TIE) & (ours != theirs))
    ours, theirs = decided.lengths
    longer = ((decided.preference > 0.5) == (ours > theirs)).astype(float)
    return rate_interval(prompt_means(longer, decided.codes), confidence) if len(decided) else undefined(0)
