"""How well the lengths of two responses predict which of them was chosen.

Every pair has the same weight, as in training. Pairs of one prompt are not independent evidence, so the unit of every
interval is the prompt: the influence of each pair on the estimate is summed over the pairs of a prompt, and the
variance is that of these sums.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..stats.intervals import Estimate, undefined, wilson
from ..stats.logistic import slope_through_zero

PER = 100  # the slope is per this many units of length


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts, chosen or rejected responses: mean with interval, median, 90th percentile, largest."""

    mean: Estimate
    median: float | None
    p90: float | None
    longest: int | None


@dataclass(frozen=True)
class LengthBias:
    """How far length explains the preference in a set of pairs.

    Attributes:
        pairs: their number.
        prompts: number of different prompts among them.
        unit: `tokens` (end token and template of the response included) or `words`.
        prompt: lengths of the prompts.
        chosen: lengths T_w of the chosen responses.
        rejected: lengths T_l of the rejected responses.
        longer: share of pairs whose chosen response is longer.
        equal: share of pairs whose responses have equal lengths.
        shorter: share of pairs whose chosen response is shorter.
        difference: mean of T_w − T_l.
        rms_difference: root mean square of T_w − T_l, the scale s of a learned length penalty.
        auc: chance that the length difference ranks a pair shown in the order of preference above one shown in the
            opposite order, ties one half; 1/2 where length has no relation to preference.
        slope: of the log-odds of being chosen, per 100 units of length that a response is longer than its rival; None
            where all differences have one sign.
        counted: share of all completion tokens that SamPO selects, Σ 2 T_m / Σ (T_w + T_l).
        counted_chosen: the same share of chosen tokens, Σ T_m / Σ T_w.
        counted_rejected: the same share of rejected tokens, Σ T_m / Σ T_l.
        end_chosen: mean of T_m / T_w, the probability that SamPO selects the end token of a chosen response, over
            the responses that have one; None if none has one.
        end_rejected: mean of T_m / T_l, likewise.
    """

    pairs: int
    prompts: int
    unit: str
    prompt: Lengths
    chosen: Lengths
    rejected: Lengths
    longer: Estimate
    equal: Estimate
    shorter: Estimate
    difference: Estimate
    rms_difference: float | None
    auc: Estimate
    slope: Estimate
    counted: float | None
    counted_chosen: float | None
    counted_rejected: float | None
    end_chosen: float | None
    end_rejected: float | None

    def numbers(self) -> Mapping[str, Estimate]:
        """Return every number by the name of its record."""
        numbers = {name: getattr(self, name) for name in ("longer", "equal", "shorter", "difference", "auc", "slope")}
        for part in ("prompt", "chosen", "rejected"):
            lengths: Lengths = getattr(self, part)
            numbers[f"{part}_mean"] = lengths.mean
            for name in ("median", "p90", "longest"):
                numbers[f"{part}_{name}"] = self._plain(getattr(lengths, name))
        counts = ("counted", "counted_chosen", "counted_rejected", "end_chosen", "end_rejected")
        return numbers | {name: self._plain(getattr(self, name)) for name in ("rms_difference", *counts)}

    def _plain(self, value: float | None) -> Estimate:
        return Estimate(None if value is None else float(value), None, None, None, self.pairs)


def length_bias(
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    prompt_ids: np.ndarray,
    *,
    unit: str = "tokens",
    ended: tuple[np.ndarray, np.ndarray] | None = None,
) -> LengthBias:
    """Describe pairs by their lengths.

    Args:
        prompt: `(n,)` lengths of the prompts, integers in `unit`, 0 or more.
        chosen: `(n,)` lengths of the chosen responses.
        rejected: `(n,)` lengths of the rejected responses.
        prompt_ids: `(n,)` integers, equal for pairs of one prompt: the unit of the intervals.
        unit: unit of the lengths.
        ended: `(n,)` bool of the chosen and of the rejected responses, whether each has an end token; None
            if unknown; then all count as ended.
    """
    prompt, chosen, rejected = (np.asarray(x, dtype=np.int64) for x in (prompt, chosen, rejected))
    _, codes = np.unique(prompt_ids, return_inverse=True)
    difference = chosen - rejected
    shorter_length = np.minimum(chosen, rejected)
    ended_chosen, ended_rejected = ended or (np.full(len(chosen), True),) * 2
    return LengthBias(
        pairs=len(chosen),
        prompts=int(codes.max()) + 1 if len(codes) else 0,
        unit=unit,
        prompt=_describe_lengths(prompt, codes),
        chosen=_describe_lengths(chosen, codes),
        rejected=_describe_lengths(rejected, codes),
        longer=estimate_share(difference > 0, codes),
        equal=estimate_share(difference == 0, codes),
        shorter=estimate_share(difference < 0, codes),
        difference=estimate_mean(difference, codes),
        rms_difference=float(np.sqrt((difference.astype(float) ** 2).mean())) if len(difference) else None,
        auc=preference_auc(difference, codes),
        slope=preference_slope(difference, codes),
        counted=_ratio_of_sums(2 * shorter_length, chosen + rejected),
        counted_chosen=_ratio_of_sums(shorter_length, chosen),
        counted_rejected=_ratio_of_sums(shorter_length, rejected),
        end_chosen=_mean_of_ratios(shorter_length[ended_chosen], chosen[ended_chosen]),
        end_rejected=_mean_of_ratios(shorter_length[ended_rejected], rejected[ended_rejected]),
    )


def estimate_mean(values: np.ndarray, codes: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean over pairs, with a t interval over prompts: `(n,)` values, `(n,)` numbers of prompts from 0."""
    if not len(values):
        return undefined(0)
    value = float(values.mean())
    clusters = int(codes.max()) + 1
    if clusters == 1:
        return Estimate(value, None, None, None, 1)
    se = float(np.sqrt(_variance(values - value, codes) * clusters / (clusters - 1)))
    half_width = float(stats.t.ppf((1 + confidence) / 2, clusters - 1)) * se
    return Estimate(value, value - half_width, value + half_width, se, clusters)


def estimate_share(which: np.ndarray, codes: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Share of pairs for which a condition holds, with Wilson's interval for the effective number of trials."""
    if not len(which):
        return undefined(0)
    value = float(which.mean())
    return _in_unit_interval(value, which - value, codes, confidence)


def preference_auc(difference: np.ndarray, codes: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Area under the ROC curve of the length difference as a score for "the first one was chosen".

    Each pair is shown in both orders: with T_w − T_l where the first response was chosen, with T_l − T_w where the
    second one was. The area is then the share of all (i, j), i = j included, with d_i + d_j > 0, ties one half,
    as in Wilcoxon's signed-rank statistic.

    Args:
        difference: `(n,)` T_w − T_l.
        codes: `(n,)` number of each pair's prompt, from 0.
        confidence: of the interval.
    """
    n = len(difference)
    if not n:
        return undefined(0)
    ranked = np.sort(-difference)
    below = np.searchsorted(ranked, difference, side="left")  # number of j with -d_j < d_i
    ties = np.searchsorted(ranked, difference, side="right") - below
    beaten = (below + ties / 2) / n  # (n,) share of pairs that the pair i outranks
    value = float(beaten.mean())
    return _in_unit_interval(value, 2 * (beaten - value), codes, confidence)


def preference_slope(difference: np.ndarray, codes: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Slope of the log-odds of being chosen, per 100 units of length: P(chosen) = σ(slope · difference / 100).

    Undefined where no pair, or every unequal pair, has the longer response chosen.
    """
    slope, _ = slope_through_zero(difference / PER, np.ones(len(difference)), codes, confidence)
    return slope


def _in_unit_interval(value: float, influence: np.ndarray, codes: np.ndarray, confidence: float) -> Estimate:
    """Wilson's interval of a rate whose mean influence is 0, for as many independent trials as give its variance.

    The variance is corrected for few prompts: by P / (P − 1), and with the quantile of t instead of that of the
    normal distribution. Without this correction, the coverage was too low with 60 prompts of several pairs.
    """
    clusters, variance = int(codes.max()) + 1, _variance(influence, codes)
    value = min(1.0, max(0.0, value))
    trials = float(clusters)
    if clusters > 1 and variance > 1e-15:
        level = (1 + confidence) / 2
        t_to_z = float(stats.t.ppf(level, clusters - 1) / stats.norm.ppf(level))
        variance *= clusters / (clusters - 1)
        trials = value * (1 - value) / (variance * t_to_z**2)
    return Estimate(value, *wilson(value, max(trials, 1.0), confidence), float(np.sqrt(variance)), clusters)


def _variance(influence: np.ndarray, codes: np.ndarray) -> float:
    """Variance of a mean from the influence of each pair, summed by prompt."""
    return float((np.bincount(codes, weights=influence) ** 2).sum()) / len(codes) ** 2


def _describe_lengths(values: np.ndarray, codes: np.ndarray) -> Lengths:
    if not len(values):
        return Lengths(undefined(0), None, None, None)
    median, p90 = np.quantile(values, [0.5, 0.9])
    return Lengths(estimate_mean(values, codes), float(median), float(p90), int(values.max()))


def _ratio_of_sums(part: np.ndarray, total: np.ndarray) -> float | None:
    return float(part.sum() / total.sum()) if total.sum() else None


def _mean_of_ratios(part: np.ndarray, total: np.ndarray) -> float | None:
    some = total > 0
    return float((part[some] / total[some]).mean()) if some.any() else None


def sign_of_effect(estimate: Estimate, centre: float) -> int:
    """Return 1 if the complete interval lies above `centre`, −1 if below, 0 otherwise."""
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > centre) - int(estimate.high < centre)
