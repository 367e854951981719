"""The length bias of a trained model: numbers with intervals, from the rows that `pair_scores` has written.

Needs numpy, scipy and pyarrow alone. The unit of every interval is the prompt: pairs of one prompt count as one
observation. Which numbers there are, and what each means, is in `QUANTITIES` and in docs/diagnose.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..stats.bootstrap import Statistic, bootstrap
from ..stats.intervals import Estimate, codes_of, mean_interval, prompt_means, rate_interval, undefined

MATCHED = 0.1  # lengths that differ by at most this share of the longer one are matched
CURVE_BINS = 10
CLASSES = ("first", "inner", "end", "after")  # of a completion's tokens; `after`: what a template writes after the end
SIDES = ("chosen", "rejected")
PLAIN = "all"  # the weighting of the plain sums, whose scores are DPO's implicit rewards

_NOTHING = np.zeros((2, 0, 0))

QUANTITIES = {
    "pressure": "length pressure, mean over pairs; below 0, training lengthens (nats per unit of the end logit)",
    "accuracy": "share of pairs whose margin is above 0, half for 0",
    "reward": "implicit reward β·Σ log-ratio of responses of some lengths, mean",
    "reward_slope": "slope of the implicit reward of a response on its length, per 100 tokens",
    "reward_r2": "share of the variance of the implicit reward of responses that their length explains",
    "margin_correlation": "correlation of the margin with T_w - T_l",
    "margin_partial": "the same at equal quality: partial correlation given the difference of quality",
    "margin_r2": "share of the variance of the margin that T_w - T_l explains",
    "log_ratio_at": "mean log-ratio of the tokens at some places of a response (nats)",
    "log_ratio_of": "mean log-ratio of the first, inner and end tokens of a response (nats)",
}


@dataclass(frozen=True)
class Finding:
    """One number.

    Attributes:
        quantity: a key of `QUANTITIES`.
        labels: of what: `method`, `group`, `side`, `tokens`, …
        estimate: value, interval, and the number of prompts.
    """

    quantity: str
    labels: dict[str, Any]
    estimate: Estimate


@dataclass(frozen=True)
class PairScores:
    """The rows of one policy: n pairs.

    Attributes:
        prompts: `(n,)` number of each pair's prompt.
        tokens: `(2, n)` T_w and T_l.
        pressure: method -> `(n,)` length pressure.
        margins: method -> `(n,)` S_w − S_l in nats, without β; empty without a reference.
        log_ratio: `(2, n)` Σ log-ratio over all tokens. This and what follows is empty without a reference.
        place_sums: `(2, n, K)` Σ log-ratio over the tokens 2^k − 1 … 2^(k+1) − 2 of a response, from 0.
        place_counts: `(2, n, K)` how many those are.
        class_sums: `(2, n, 4)` the same over `CLASSES`.
        class_counts: `(2, n, 4)`.
    """

    prompts: np.ndarray
    tokens: np.ndarray
    pressure: dict[str, np.ndarray]
    margins: dict[str, np.ndarray]
    log_ratio: np.ndarray
    place_sums: np.ndarray
    place_counts: np.ndarray
    class_sums: np.ndarray
    class_counts: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """`(n,)` T_w − T_l."""
        return self.tokens[0] - self.tokens[1]


# --- reading -------------------------------------------------------------------------------------------------------


def read_scores(paths: Sequence[Path]) -> PairScores:
    """Read shards, one after the other: of the token lists only sums are kept.

    Raises:
        ValueError: a file is not what `sampo.diagnostics.pair_scores` writes, or damaged.
    """
    parts = [_read_shard(path) for path in paths]
    together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name not in _TOKEN_SUMS}
    sums = {}
    for name in set(_TOKEN_SUMS) & set(parts[0]):
        widest = max(part[name].shape[2] for part in parts)
        sums[name] = np.concatenate([_widened(part[name], widest) for part in parts], axis=1)
    methods = [name.removeprefix("pressure/") for name in together if name.startswith("pressure/")]

    def sides(name: str) -> np.ndarray:
        return np.stack([together[f"{side}_{name}"] for side in SIDES])

    scored = methods if sums else []
    return PairScores(
        prompts=codes_of(together["prompt"])[0],
        tokens=sides("tokens"),
        pressure={method: together[f"pressure/{method}"] for method in methods},
        margins={method: np.subtract(*sides(f"score/{method}")) for method in scored},
        log_ratio=sides("log_ratio") if sums else _NOTHING,
        **(dict.fromkeys(_TOKEN_SUMS, _NOTHING) | sums),
    )


def _widened(values: np.ndarray, width: int) -> np.ndarray:
    """`(…, K)` -> `(…, width)` with zeros."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])


_TOKEN_SUMS = ("place_sums", "place_counts", "class_sums", "class_counts")


def _read_shard(path: Path) -> dict[str, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} must be a Parquet file as it was written, got: {error}. Delete it.") from None
    lists = [f"{side}_token_log_ratios" for side in SIDES]
    columns = {n: table.column(n).to_numpy() for n in table.column_names if n not in lists}
    if lists[0] in table.column_names:
        sides = [_token_sums(table.column(f), columns[f"{s}_end_place"]) for f, s in zip(lists, SIDES, strict=True)]
        for i, name in enumerate(_TOKEN_SUMS):
            width = max(side[i].shape[1] for side in sides)
            columns[name] = np.stack([_widened(side[i], width) for side in sides])
    return columns


def _token_sums(column: Any, end_places: np.ndarray) -> list[np.ndarray]:
    """Sums and counts of the responses' log-ratios by place and by class, `(n, K)`, `(n, K)`, `(n, 4)`, `(n, 4)`."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    values = lists.flatten().to_numpy().astype(float)
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    end = end_places[row]
    kind = np.select([place == end, (end >= 0) & (place > end), place == 0], [2, 3, 0], default=1)
    found = []
    for by, width in ((np.log2(place + 1).astype(int), int(np.log2(lengths.max())) + 1), (kind, len(CLASSES))):
        flat, size = row * width + by, len(lengths) * width
        found += [np.bincount(flat, w, size).reshape(-1, width) for w in (values, None)]
    return found


# --- what is found -------------------------------------------------------------------------------------------------


def findings(
    scores: PairScores,
    *,
    beta: float,
    by: dict[str, np.ndarray] | None = None,
    quality: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Finding]:
    """All numbers that the rows define.

    Args:
        scores: of one policy.
        beta: of the implicit reward.
        by: column -> `(n,)` values, whose groups get a length pressure of their own.
        quality: `(n,)` quality of the chosen minus that of the rejected response, if known.
        resamples: of the bootstrap over prompts.
        seed: of the bootstrap.
    """
    found = list(_pressures(scores, by or {}))
    if scores.margins:
        found += [*_accuracies(scores), *_curve(scores, beta), *_profiles(scores)]
        found += _moment_statistics(scores, beta, quality, resamples, seed)
    return found


def groups(scores: PairScores, by: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name -> `(n,)` bool: all pairs, those of each order of lengths, and those of each value of a column."""
    difference = scores.difference
    found = {"all": np.ones(len(difference), dtype=bool), "chosen longer": difference > 0}
    found |= {"chosen shorter": difference < 0, "equal length": difference == 0}
    for column, values in by.items():
        texts = np.array([str(value) for value in values])
        found |= {f"{column}: {value}": texts == value for value in sorted(set(texts))}
    return {name: inside for name, inside in found.items() if inside.any()}


def _pressures(scores: PairScores, by: dict[str, np.ndarray]) -> Iterator[Finding]:
    for group, inside in groups(scores, by).items():
        codes = _recode(scores.prompts[inside])
        for method, values in scores.pressure.items():
            estimate = mean_interval(prompt_means(values[inside], codes))
            yield Finding("pressure", {"method": method, "group": group}, estimate)


def _accuracies(scores: PairScores) -> Iterator[Finding]:
    some = {name: inside for name, inside in groups(scores, {}).items() if name != "equal length"}
    matched = np.abs(scores.difference) <= MATCHED * scores.tokens.max(axis=0)
    for group, inside in {**some, "matched length": matched}.items():
        codes = _recode(scores.prompts[inside])
        for method, margins in scores.margins.items():
            right = (np.sign(margins[inside]) + 1) / 2
            estimate = rate_interval(prompt_means(right, codes)) if inside.any() else undefined(0)
            yield Finding("accuracy", {"method": method, "group": group}, estimate)


def _curve(scores: PairScores, beta: float) -> Iterator[Finding]:
    """The reward of responses in bins of about as many, by length."""
    tokens, reward = scores.tokens.ravel(), beta * scores.log_ratio.ravel()
    prompts = np.tile(scores.prompts, 2)
    borders = np.unique(np.quantile(tokens, np.arange(1, CURVE_BINS) / CURVE_BINS))
    bins = np.searchsorted(borders, tokens, side="left")
    for number in np.unique(bins):
        inside = bins == number
        labels = {"tokens": float(tokens[inside].mean())}
        labels |= {"from": int(tokens[inside].min()), "to": int(tokens[inside].max())}
        yield Finding("reward", labels, mean_interval(prompt_means(reward[inside], _recode(prompts[inside]))))


def _profiles(scores: PairScores) -> Iterator[Finding]:
    for i, side in enumerate(SIDES):
        for k, (sums, counts) in enumerate(zip(scores.place_sums[i].T, scores.place_counts[i].T, strict=True)):
            if counts.any():
                labels = {"side": side, "from": 2**k - 1, "to": 2 ** (k + 1) - 2}
                yield Finding("log_ratio_at", labels, _ratio(sums, counts, scores.prompts))
        for kind, sums, counts in zip(CLASSES, scores.class_sums[i].T, scores.class_counts[i].T, strict=True):
            if counts.any():
                yield Finding("log_ratio_of", {"side": side, "class": kind}, _ratio(sums, counts, scores.prompts))


def _ratio(sums: np.ndarray, counts: np.ndarray, prompts: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Σ sums / Σ counts with a t interval of the linearised ratio, prompts being the observations."""
    sums, counts = np.bincount(prompts, sums), np.bincount(prompts, counts)
    inside = counts > 0
    sums, counts, n = sums[inside], counts[inside], int(inside.sum())
    value = float(sums.sum() / counts.sum())
    if n == 1:
        return Estimate(value, None, None, None, 1)
    rest = sums - value * counts
    se = float(np.sqrt(n / (n - 1) * (rest**2).sum()) / counts.sum())
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * se
    return Estimate(value, value - half, value + half, se, n)


def _recode(prompts: np.ndarray) -> np.ndarray:
    """Numbers without gaps for the prompts of a part."""
    return np.unique(prompts, return_inverse=True)[1]


# --- slopes and correlations, as functions of sums over prompts: a bootstrap draws how often each prompt counts ------


class Moments:
    """Covariances as functions of how often each prompt counts.

    Args:
        prompts: `(n,)` number of each row's prompt, 0 … P − 1.
        columns: name -> `(n,)`.
    """

    def __init__(self, prompts: np.ndarray, columns: dict[str, np.ndarray]):
        self._prompts = prompts
        # far from 0, sums of squares would lose their digits
        self._columns = {name: values - values.mean() for name, values in columns.items()}
        self._negligible = {name: 1e-20 * float(np.max(values**2)) for name, values in columns.items()}
        self._ones = np.ones(len(prompts))

    def covariance(self, x: str, y: str) -> Statistic:
        """Of two columns."""
        a, b = self._columns[x], self._columns[y]
        sums = [np.bincount(self._prompts, each) for each in (self._ones, a, b, a * b)]

        def of(counts: np.ndarray) -> np.ndarray:
            n, sx, sy, sxy = (counts @ each for each in sums)
            return sxy / n - sx * sy / n**2

        return of

    def variance(self, x: str) -> Statistic:
        """Nan where a column does not vary."""
        own, least = self.covariance(x, x), self._negligible[x]

        def of(counts: np.ndarray) -> np.ndarray:
            values = own(counts)
            return np.where(values > least, values, np.nan)

        return of

    def slope(self, x: str, y: str) -> Statistic:
        """Of y on x, by least squares."""
        xy, xx = self.covariance(x, y), self.variance(x)
        return lambda counts: xy(counts) / xx(counts)

    def correlation(self, x: str, y: str) -> Statistic:
        """Pearson's."""
        xy, xx, yy = self.covariance(x, y), self.variance(x), self.variance(y)
        return lambda counts: xy(counts) / np.sqrt(xx(counts) * yy(counts))

    def partial(self, x: str, y: str, given: str) -> Statistic:
        """Correlation of x and y after what `given` explains of each, linearly."""
        xy, xz, yz = self.correlation(x, y), self.correlation(x, given), self.correlation(y, given)

        def of(counts: np.ndarray) -> np.ndarray:
            a, b = xz(counts), yz(counts)
            left = (1 - a**2) * (1 - b**2)
            return (xy(counts) - a * b) / np.sqrt(np.where(left > 1e-12, left, np.nan))

        return of


def _moment_statistics(
    scores: PairScores, beta: float, quality: np.ndarray | None, resamples: int, seed: int
) -> list[Finding]:
    n = scores.tokens.shape[1]
    responses = Moments(
        np.tile(scores.prompts, 2),
        {"tokens": scores.tokens.ravel() / 100, "reward": beta * scores.log_ratio.ravel()},
    )
    columns = {"difference": scores.difference.astype(float), **scores.margins}
    pairs = Moments(scores.prompts, columns if quality is None else {**columns, "quality": quality})
    wanted: dict[tuple[str, str | None], Statistic] = {
        ("reward_slope", None): responses.slope("tokens", "reward"),
        ("reward_r2", None): _squared(responses.correlation("tokens", "reward")),
    }
    for method in scores.margins:
        correlation = pairs.correlation("difference", method)
        wanted |= {("margin_correlation", method): correlation, ("margin_r2", method): _squared(correlation)}
        if quality is not None:
            wanted["margin_partial", method] = pairs.partial("difference", method, "quality")
    n_prompts = int(scores.prompts.max()) + 1 if n else 0
    estimates = bootstrap(list(wanted.values()), n_prompts, resamples=resamples, seed=seed)
    return [
        Finding(quantity, {} if method is None else {"method": method}, estimate)
        for (quantity, method), estimate in zip(wanted, estimates, strict=True)
    ]


def _squared(statistic: Statistic) -> Statistic:
    return lambda counts: statistic(counts) ** 2
