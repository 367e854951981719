"""Verdicts of a judge, and the comparison of each pair of answers that follows from them.

A verdict is one answer of the judge; a comparison is the mean of its verdicts on one answer of the system and one of
the baseline, over both orders; a score is the mean comparison of one prompt, and the prompt is the unit of every
interval. Preferences are the system's: 1 a win, 0 a loss, ½ a tie, NaN a failure. A failure is counted and omitted,
never counted as a tie.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ...stats.intervals import Estimate, codes_of, prompt_means, rate_interval, undefined

Ids = Sequence[Hashable] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The verdicts of one judge on a system and a baseline, one row per verdict.

    Attributes:
        prompt: `(n,)` id of the prompt.
        preference: `(n,)` in [0, 1], of the system, whichever answer was shown first; NaN where the judge failed.
        order: `(n,)` 0 where the system's answer was shown first, 1 where the baseline's was; None for a judge
            that sees no order (a reward model).
        sample: `(n,)` which of several samples of the prompt; None where there is one.
        system_length: `(n,)` length of the system's answer, in the unit named; None if not known.
        baseline_length: `(n,)` length of the baseline's answer.
        length_unit: `characters`, `words` or `tokens of NAME`.
        style: by feature, `(n, 2)` how much of it the system's answer has and the baseline's; {} if not known.
    """

    prompt: Ids
    preference: np.ndarray
    order: np.ndarray | None = None
    sample: Ids | None = None
    system_length: np.ndarray | None = None
    baseline_length: np.ndarray | None = None
    length_unit: str = "characters"
    style: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, judgements: Iterable[Any], *, length_unit: str = "characters") -> "Verdicts":
        """From the rows of a file of judgements.

        Args:
            judgements: of one judge; each has `prompt_id`, `sample`, `order` (`ab`: the system's answer was shown
                first, `ba`), `preference` (of the system, or None), `judge`, and `system_chars`, `baseline_chars`,
                `system_words` and so on.
            length_unit: `characters`, `words` or `tokens`.
        """
        rows = list(judgements)
        judges = sorted({row.judge for row in rows})
        if len(judges) > 1:
            raise ValueError(f"Judgements must be of one judge, got {judges}. Make one summary of each.")
        if length_unit not in LENGTHS:
            raise ValueError(f"`length_unit` must be one of {sorted(LENGTHS)}, got {length_unit!r}.")
        return cls(
            prompt=[row.prompt_id for row in rows],
            sample=[row.sample for row in rows],
            order=np.array([("ab", "ba").index(row.order) for row in rows], dtype=int),
            preference=np.array([np.nan if row.preference is None else row.preference for row in rows]),
            system_length=_column(rows, f"system_{LENGTHS[length_unit]}"),
            baseline_length=_column(rows, f"baseline_{LENGTHS[length_unit]}"),
            length_unit=length_unit,
        )

    def __post_init__(self) -> None:
        for name in ("preference", "system_length", "baseline_length"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        _check_columns(self, ("preference", "order", "sample", "system_length", "baseline_length"))
        if self.order is not None:
            object.__setattr__(self, "order", np.asarray(self.order))
            if not np.isin(self.order, (0, 1)).all():
                raise ValueError(f"`order` must be 0 or 1 in every row, got {sorted(set(self.order.tolist()))}.")

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """`(n,)` lengths of the system's answers and of the baseline's."""
        return _known_lengths(self)


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """One row per pair of answers, both orders averaged; failures are counted, not kept.

    Attributes:
        prompt: `(m,)` id of the prompt; several samples of a prompt repeat it.
        preference: `(m,)` in [0, 1], of the system.
        system_length: `(m,)` or None.
        baseline_length: `(m,)` or None.
        length_unit: what lengths are counted in.
        failed: pairs of answers without any verdict.
        half_failed: pairs that lack the verdict of one order, and are therefore omitted.
        lost_prompts: prompts of which no comparison is left.
        orders: which orders were seen: `both`, `system first`, `baseline first` or `none`.
        style: by feature, `(m, 2)` how much of it the system's answer has and the baseline's; {} if not known.
    """

    prompt: Ids
    preference: np.ndarray
    system_length: np.ndarray | None = None
    baseline_length: np.ndarray | None = None
    length_unit: str = "characters"
    failed: int = 0
    half_failed: int = 0
    lost_prompts: int = 0
    orders: str = "none"
    style: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("preference", "system_length", "baseline_length"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        _check_columns(self, ("preference", "system_length", "baseline_length"))
        missing = int(np.isnan(self.preference).sum())
        if missing:
            raise ValueError(
                f"`preference` of comparisons must be a number in every row, got {missing} NaN. "
                "Use `Verdicts(...)` and `compare_orders`, which count failures."
            )

    def __len__(self) -> int:
        return len(self.preference)

    @cached_property
    def codes(self) -> np.ndarray:
        """`(m,)` number of each row's prompt."""
        return codes_of(self.prompt)[0]

    @cached_property
    def ids(self) -> list[Hashable]:
        """Prompts by their number."""
        return codes_of(self.prompt)[1]

    @cached_property
    def scores(self) -> np.ndarray:
        """`(P,)` mean preference of each prompt."""
        return prompt_means(self.preference, self.codes) if len(self) else np.empty(0)

    @cached_property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """`(m,)` lengths of the system's answers and of the baseline's."""
        return _known_lengths(self)

    def where(self, keep: np.ndarray) -> "Comparisons":
        """The comparisons where `keep`, `(m,)` of bool, holds. Failures belong to no part and are not repeated."""
        rows = np.flatnonzero(keep)

        def take(column: np.ndarray | None) -> np.ndarray | None:
            return None if column is None else column[rows]

        return Comparisons(
            prompt=[self.prompt[i] for i in rows.tolist()],
            preference=self.preference[rows],
            system_length=take(self.system_length),
            baseline_length=take(self.baseline_length),
            length_unit=self.length_unit,
            orders=self.orders,
            style={name: column[rows] for name, column in self.style.items()},
        )


LENGTHS = {"characters": "chars", "words": "words", "tokens": "tokens"}  # unit -> end of a column's name


def _column(rows: list[Any], name: str) -> np.ndarray:
    values = [getattr(row, name) for row in rows]
    if None in values:
        raise ValueError(
            f"`{name}` must be known in every row, got none in {values.count(None)} of {len(values)}. "
            "Use `length_unit` `characters` or `words`."
        )
    return np.array(values, dtype=float)


def _known_lengths(table: Verdicts | Comparisons) -> tuple[np.ndarray, np.ndarray]:
    if table.system_length is None or table.baseline_length is None:
        raise ValueError("`system_length` and `baseline_length` must be given for this, got none.")
    return table.system_length, table.baseline_length


def _check_columns(table: Verdicts | Comparisons, names: tuple[str, ...]) -> None:
    for name in names:
        column = getattr(table, name)
        if column is not None and len(column) != len(table.prompt):
            raise ValueError(
                f"`{name}` must have one row per verdict, got {len(column)} rows for {len(table.prompt)} of `prompt`."
            )
    wrong = np.flatnonzero((table.preference < 0) | (table.preference > 1))
    if len(wrong):
        raise ValueError(
            f"`preference` must lie in [0, 1] or be NaN, got {table.preference[wrong[0]]} in row {wrong[0]} "
            f"({len(wrong)} such rows). AlpacaEval's 1 to 2 become that by taking 1 away."
        )
    for name in ("system_length", "baseline_length"):
        column = getattr(table, name)
        if column is not None and not (np.isfinite(column) & (column >= 0)).all():
            row = int(np.flatnonzero(~(np.isfinite(column) & (column >= 0)))[0])
            raise ValueError(f"`{name}` must be 0 or more in every row, got {column[row]} in row {row}.")
    for name, column in table.style.items():
        if column.shape != (len(table.prompt), 2) or not np.isfinite(column).all():
            raise ValueError(
                f"`style` must have two finite numbers per row, got {column.shape} for {len(table.prompt)} rows of "
                f"`{name}`{'' if np.isfinite(column).all() else ', some not finite'}."
            )


def compare_orders(verdicts: Verdicts) -> Comparisons:
    """Average the orders of each pair of answers.

    Several verdicts in one order are averaged first, so that a repeated request does not weigh twice. Where the
    verdicts cover both orders, a pair with a verdict in one order only is omitted and counted in `half_failed`:
    kept, it would bring the judge's bias for a position back in.
    """
    table = _by_order(verdicts)
    has = table.seen[:, table.asked] > 0
    kept = np.flatnonzero(has.all(axis=1)) if table.asked else np.empty(0, dtype=int)
    rows = table.first_row[kept]
    prompts = [table.pairs[i][0] for i in kept]
    names = {(0,): "system first", (1,): "baseline first", (0, 1): "both"}
    return Comparisons(
        prompt=prompts,
        preference=table.mean[kept][:, table.asked].mean(axis=1) if len(kept) else np.empty(0),
        system_length=None if verdicts.system_length is None else verdicts.system_length[rows],
        baseline_length=None if verdicts.baseline_length is None else verdicts.baseline_length[rows],
        length_unit=verdicts.length_unit,
        failed=int((~has.any(axis=1)).sum()),
        half_failed=int((has.any(axis=1) & ~has.all(axis=1)).sum()),
        lost_prompts=len({pair[0] for pair in table.pairs}) - len(set(prompts)),
        orders="none" if verdicts.order is None else names.get(tuple(table.asked), "none"),
        style={name: column[rows] for name, column in verdicts.style.items()},
    )


@dataclass(frozen=True)
class _ByOrder:
    """Verdicts by pair of answers and order: `pairs` of (prompt, sample), the others `(pairs, 2)` or `(pairs,)`."""

    pairs: list[tuple[Hashable, Hashable]]
    seen: np.ndarray
    mean: np.ndarray
    first_row: np.ndarray
    asked: list[int]


def _by_order(verdicts: Verdicts) -> _ByOrder:
    sample = [0] * len(verdicts.prompt) if verdicts.sample is None else _as_list(verdicts.sample)
    keys = list(zip(_as_list(verdicts.prompt), sample, strict=True))
    codes, pairs = codes_of(keys)[0], list(dict.fromkeys(keys))
    first_row = np.full(len(pairs), len(codes))
    np.minimum.at(first_row, codes, np.arange(len(codes)))
    for name in ("system_length", "baseline_length"):
        lengths = getattr(verdicts, name)
        if lengths is not None and (lengths != lengths[first_row[codes]]).any():
            row = int(np.flatnonzero(lengths != lengths[first_row[codes]])[0])
            raise ValueError(
                f"`{name}` must be the same in all verdicts on one pair of answers, got {lengths[row]} in row {row} "
                f"and {lengths[first_row[codes[row]]]} before it. Several samples of a prompt need `sample`."
            )
    order = np.zeros(len(codes), dtype=int) if verdicts.order is None else verdicts.order.astype(int)
    known = ~np.isnan(verdicts.preference)
    seen, total = np.zeros((len(pairs), 2)), np.zeros((len(pairs), 2))
    np.add.at(seen, (codes[known], order[known]), 1)
    np.add.at(total, (codes[known], order[known]), verdicts.preference[known])
    with np.errstate(invalid="ignore"):
        mean = total / seen
    return _ByOrder(pairs, seen, mean, first_row, sorted(set(order.tolist())))


def _as_list(values: Ids) -> list[Hashable]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def length_ratios(comparisons: Comparisons) -> np.ndarray:
    """`(m,)` length of the system's answer over the baseline's; 1 where both are empty."""
    ours, theirs = comparisons.lengths
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(ours == theirs, 1.0, ours / theirs)


@dataclass(frozen=True, kw_only=True)
class OrderConsistency:
    """What the order of the two answers does to the judge.

    Attributes:
        consistent: share of pairs with the same verdict (win, tie, loss) in both orders.
        first_shown: mean preference for the answer that is shown first, whosever it is; ½ is no bias.
        flipped_to_first: pairs in which each order's first answer won.
        flipped_to_second: pairs in which each order's second answer won.
        pairs: pairs with verdicts in both orders.
    """

    consistent: Estimate
    first_shown: Estimate
    flipped_to_first: int
    flipped_to_second: int
    pairs: int


def order_consistency(verdicts: Verdicts, *, confidence: float = 0.95) -> OrderConsistency:
    """Compare the verdicts of the two orders: does the judge prefer the same answer in both?"""
    if verdicts.order is None:
        raise ValueError("`order` must be given for the consistency of orders, got None.")
    table = _by_order(verdicts)
    kept = np.flatnonzero((table.seen > 0).all(axis=1))
    if not len(kept):
        return OrderConsistency(
            consistent=undefined(0), first_shown=undefined(0), flipped_to_first=0, flipped_to_second=0, pairs=0
        )
    mean = table.mean[kept]
    side = np.sign(np.where(np.abs(mean - 0.5) < 1e-9, 0, mean - 0.5))
    prompts = codes_of([table.pairs[i][0] for i in kept])[0]
    of_first = (mean[:, 0] + 1 - mean[:, 1]) / 2
    return OrderConsistency(
        consistent=rate_interval(prompt_means((side[:, 0] == side[:, 1]).astype(float), prompts), confidence),
        first_shown=rate_interval(prompt_means(of_first, prompts), confidence),
        flipped_to_first=int(((side[:, 0] > 0) & (side[:, 1] < 0)).sum()),
        flipped_to_second=int(((side[:, 0] < 0) & (side[:, 1] > 0)).sum()),
        pairs=len(kept),
    )
