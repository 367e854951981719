"""Estimates with intervals that respect the unit of an evaluation: the prompt.

Every function takes one value per prompt, or values with the prompt of each. Values of one prompt are averaged first,
so that several samples of one prompt never count as independent evidence.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

FEW = 20  # with fewer prompts an interval is unreliable: docs/evaluation.md has the coverage


@dataclass(frozen=True)
class Estimate:
    """A number and its uncertainty.

    Attributes:
        value: the point estimate; None where the data do not define it.
        low: lower bound of the interval, or None.
        high: upper bound of the interval, or None.
        se: standard error, or None.
        n: number of prompts.
    """

    value: float | None
    low: float | None
    high: float | None
    se: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both bounds, or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def kept_estimate(value: float | None, interval: tuple[float, float] | None, n: int) -> Estimate:
    """An estimate as files keep it, without its standard error."""
    low, high = interval or (None, None)
    return Estimate(value, low, high, None, n)


def undefined(n: int) -> Estimate:
    """An estimate without a value."""
    return Estimate(None, None, None, None, n)


def codes_of(prompts: Sequence[Hashable] | np.ndarray) -> tuple[np.ndarray, list[Hashable]]:
    """Number prompts in the order of their first appearance.

    Returns:
        `(n,)` number of each row's prompt, and the prompts by number.
    """
    numbers: dict[Hashable, int] = {}
    keys = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
    codes = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return codes, list(numbers)


def prompt_means(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Mean value of each prompt, by its number: `(n,)` and `(n,)` -> `(P,)`."""
    return np.bincount(codes, weights=values) / np.bincount(codes)


def prompt_weights(codes: np.ndarray) -> np.ndarray:
    """Weight of each row such that each prompt weighs 1: `(n,)` -> `(n,)`."""
    return 1 / np.bincount(codes)[codes]


def wilson(rate: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a rate among `n` yes-or-no observations; `n` may be an effective number."""
    if not 0 <= rate <= 1 or n <= 0:
        raise ValueError(f"`rate` must lie in [0, 1] and `n` above 0, got {rate} and {n}.")
    z2 = stats.norm.ppf((1 + confidence) / 2) ** 2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half_width = np.sqrt(z2) / (1 + z2 / n) * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n**2))
    return max(0.0, float(centre - half_width)), min(1.0, float(centre + half_width))


def effective_coins(scores: np.ndarray) -> float:
    """The number of coin flips whose mean has the same variance as the mean of these scores in [0, 1], one per prompt.

    A tie, the mean of two orders or of several samples, and a judge's probability all vary less than a coin with the
    same mean. The ratio of the two variances is taken with one coin more in numerator and denominator: without
    that, scores that happen to be all equal would count as infinitely many. For scores of 0 and 1 the
    result is their number.
    """
    n, rate = len(scores), float(np.mean(scores))
    coin = rate * (1 - rate)
    if coin <= 1e-15:
        return n
    spread = float(((scores - rate) ** 2).sum())
    return n / min(1.0, (spread + coin) / ((n + 1) * coin))


def rate_interval(scores: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean of scores in [0, 1], one per prompt, with Wilson's interval for `effective_coins` observations.

    Wilson's interval with `n` coins is too wide for anything but wins and losses: it covers 99 % where half of the
    prompts are ties.
    """
    n = len(scores)
    if n == 0:
        return undefined(0)
    rate = min(1.0, max(0.0, float(np.mean(scores))))
    low, high = wilson(rate, effective_coins(scores), confidence)
    se = float(np.std(scores, ddof=1) / np.sqrt(n)) if n > 1 else None
    return Estimate(rate, low, high, se, n)


def difference_interval(differences: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean of differences in [-1, 1], one per prompt: `rate_interval` on (d + 1) / 2."""
    rate = rate_interval((np.asarray(differences) + 1) / 2, confidence)
    if rate.value is None or rate.low is None or rate.high is None:
        return rate
    return Estimate(2 * rate.value - 1, 2 * rate.low - 1, 2 * rate.high - 1, rate.se and 2 * rate.se, rate.n)


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean of values of any range, one per prompt, with a t interval corrected for skewness.

    Lengths are skewed to the right, where the plain t interval misses the mean too often from below. Hall's
    transformation (1992, eq. 2.2) removes the first term of that error.
    """
    n = len(values)
    if n == 0:
        return undefined(0)
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, None, None, None, 1)
    sd = float(np.std(values, ddof=1))
    se = sd / float(np.sqrt(n))
    if sd <= 1e-12 * abs(mean):
        return Estimate(mean, mean, mean, 0.0, n)
    quantile = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    skew = float(np.mean(((values - mean) / np.std(values)) ** 3)) / np.sqrt(n)

    def back(w: float) -> float:  # inverse of g(t) = t + skew t²/3 + skew² t³/27 + skew/6
        return w if abs(skew) < 1e-6 else float(3 / skew * (np.cbrt(1 + skew * (w - skew / 6)) - 1))

    return Estimate(mean, mean - se * back(quantile), mean - se * back(-quantile), se, n)


def quantile_interval(values: np.ndarray, codes: np.ndarray, quantile: float, *, confidence: float = 0.95) -> Estimate:
    """Quantile of all values, each prompt weighing the same, with the exact interval between two ranks.

    How many values lie below the true quantile is binomial, which gives the two ranks; the number
    of values is `effective_coins`. A bound is None if the values are too few: the 90th percentile of 30 values has no
    upper bound.
    """
    n = int(codes.max()) + 1 if len(codes) else 0
    if n == 0:
        return undefined(0)
    order = np.argsort(values, kind="stable")
    ranked, weight = values[order], prompt_weights(codes)[order]
    cumulative = np.cumsum(weight) / weight.sum()

    def at(level: float) -> float:
        return float(ranked[min(int(np.searchsorted(cumulative, level - 1e-9)), len(ranked) - 1)])

    value = at(quantile)
    size = round(effective_coins(prompt_means((values <= value).astype(float), codes)))
    low = int(stats.binom.ppf((1 - confidence) / 2, size, quantile))
    high = int(stats.binom.ppf((1 + confidence) / 2, size, quantile)) + 1
    return Estimate(value, at(low / size) if low else None, at(high / size) if high <= size else None, None, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the given order, for several tests at once."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[index] = largest
    return [float(p) for p in adjusted]


def prompts_needed(difference: float, *, sd: float = 0.5, power: float = 0.8, confidence: float = 0.95) -> int:
    """Number of prompts that show a difference in mean score with a given power, by the two-sided normal test.

    Args:
        difference: between the true mean and what it is compared with, in score (0.03 is three points).
        sd: standard deviation of the score over prompts. 0.5 is a coin, the worst case; the paired difference of two
            systems has its own, to be taken from a pilot: `np.std(differences, ddof=1)`.
        power: probability of finding the difference.
        confidence: of the interval that has to exclude no difference.
    """
    if not 0 < abs(difference) < 1 or sd <= 0 or not 0 < power < 1:
        raise ValueError(
            "`difference` must lie in (0, 1), `sd` above 0 and `power` in (0, 1), "
            f"got {difference}, {sd} and {power}. Three points are 0.03."
        )
    z = stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)
    return int(np.ceil((z * sd / difference) ** 2))


def detectable_difference(n: int, *, sd: float = 0.5, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest difference that `n` prompts show with a given power: the inverse of `prompts_needed`."""
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    return float((stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)) * sd / np.sqrt(n))
