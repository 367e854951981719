"""The percentile bootstrap over prompts: each draw of a prompt includes all its samples, pairs or rows.

A statistic is a function of how often each prompt was drawn, so that all resamples are computed at once.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .intervals import Estimate, undefined

Statistic = Callable[[np.ndarray], np.ndarray]  # `(R, P)` how often each prompt was drawn -> `(R,)` values
COUNTS_AT_ONCE = 2_000_000  # numbers in one array of counts: some 16 MB
MIN_RESAMPLES = 100


def bootstrap(
    statistics: Sequence[Statistic], n_prompts: int, *, resamples: int, seed: int, confidence: float = 0.95
) -> list[Estimate]:
    """Percentile intervals of several statistics, from the same draws.

    Args:
        statistics: each takes `(R, P)` counts of how often each prompt was drawn and returns `(R,)` values.
        n_prompts: P, at least 1.
        resamples: number of resamples, at least 100.
        seed: of the draws.
        confidence: of the intervals.

    Returns:
        An estimate for each statistic; its value is that of all prompts, each drawn once. A value of NaN is undefined.
        Where a resample has no value (too few prompts), the estimate has no interval.
    """
    if resamples < MIN_RESAMPLES:
        raise ValueError(f"`resamples` must be at least {MIN_RESAMPLES} for an interval, got {resamples}.")
    values = [float(statistic(np.ones((1, n_prompts)))[0]) for statistic in statistics]
    draws = _draw(statistics, n_prompts, resamples, seed)
    return [_estimate(value, row, n_prompts, confidence) for value, row in zip(values, draws, strict=True)]


def _draw(statistics: Sequence[Statistic], n_prompts: int, resamples: int, seed: int) -> np.ndarray:
    """`(S, resamples)` values of each statistic on each resample."""
    generator = np.random.default_rng(seed)
    draws = np.empty((len(statistics), resamples))
    step = max(1, min(resamples, COUNTS_AT_ONCE // n_prompts))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        counts = generator.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=size).astype(float)
        for row, statistic in zip(draws, statistics, strict=True):
            row[start : start + size] = statistic(counts)
    return draws


def _estimate(value: float, draws: np.ndarray, n_prompts: int, confidence: float) -> Estimate:
    if np.isnan(value):
        return undefined(n_prompts)
    if np.isnan(draws).any():
        return Estimate(value, None, None, None, n_prompts)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), float(draws.std(ddof=1)), n_prompts)
