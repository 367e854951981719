"""A panel: several judges on the same pairs as one judge, how far they agree, and the panel without each of them.

A member's verdict on a pair is kept if it has one in every order that it judged. A member without a verdict is absent,
which is not a tie: the others decide, if at least `quorum` of them are there; otherwise the panel fails on that pair,
and the pair is counted and omitted as with any other judge. Following arXiv 2404.18796, the verdicts of the members
are pooled by their mean or by a vote.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from ...io.tables import Table
from ...stats.intervals import Estimate, codes_of, prompt_means, rate_interval, undefined
from ..judging.judges import ONCE, Judgement
from .agreement import cohen_kappa
from .cells import NONE, percent_cell, show_estimate
from .comparing import shared_prompts
from .judged import Judged, sees_no_order
from .verdicts import compare_orders
from .win_rate import TIE, PairedComparison, paired, win_rate

PairKey = tuple[str, int]  # prompt and sample
_Rows = Mapping[PairKey, Mapping[str, Judgement]]  # the judgements of each pair, by order


def _mean(preferences: Sequence[float]) -> float:
    return sum(preferences) / len(preferences)


def _majority(preferences: Sequence[float]) -> float:
    """1 or 0 if more than half of the members prefer the same answer, else ½."""
    for outcome in (1.0, -1.0):
        if sum(_outcome(p) == outcome for p in preferences) > len(preferences) / 2:
            return (1 + outcome) / 2
    return 0.5


RULES: dict[str, Callable[[Sequence[float]], float]] = {"mean": _mean, "majority": _majority}


def combine(runs: Mapping[str, Judged], rule: str = "mean", *, quorum: int | None = None) -> Judged:
    """The judgements of the panel, as those of one judge.

    Args:
        runs: of the members, by name; of `check_members`.
        rule: `mean` of the preferences, or `majority`: more than half of the members prefer the same answer.
        quorum: members that must have a verdict on a pair; all of them without it.

    Raises:
        ValueError: the rule is unknown, or `quorum` is not a number of members.
    """
    quorum = len(runs) if quorum is None else quorum
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {sorted(RULES)}, got {rule!r}.")
    if not 1 <= quorum <= len(runs):
        raise ValueError(f"`quorum` must be from 1 to the number of judges, {len(runs)}, got {quorum}.")
    first = next(iter(runs.values()))
    name = f"{rule} of {len(runs)} judges"
    members = sorted((dict(run.judge) for run in runs.values()), key=str)  # whatever the order of the files

    def pooled(rows: Callable[[Judged], Sequence[Judgement]]) -> list[Judgement]:
        return _pool({member: rows(run) for member, run in runs.items()}, runs, rule, quorum, name)

    about = {"name": name, "rule": rule, "quorum": quorum, "members": members}
    rows, empty = pooled(lambda run: run.rows), pooled(lambda run: run.empty)
    return replace(first, judge=about, cost=total_cost(runs), rows=rows, empty=empty)


def check_members(runs: Mapping[str, Judged], *, matched_only: bool = False) -> dict[str, Judged]:
    """Runs that may form a panel: of different judges on the same pairs of answers.

    Args:
        runs: by the name of the judge.
        matched_only: omit prompts that one of them lacks.

    Raises:
        ValueError: they may not, and why.
    """
    if len(runs) < 2:
        raise ValueError(f"A panel must have at least two judges, got {len(runs)}. Name more files of judgements.")
    (first_name, first), *others = runs.items()
    for name, run in others:
        for which in ("system", "baseline"):
            ours, theirs = getattr(first, which), getattr(run, which)
            if ours.sha256 != theirs.sha256:
                raise ValueError(
                    f"All judges must have judged the same answers, got {ours.file} as `{which}` of {first_name} and "
                    f"{theirs.file} of {name} with other contents. Judge the same two files."
                )
    for (a, one), (b, other) in combinations(runs.items(), 2):
        if dict(one.judge) == dict(other.judge):
            raise ValueError(f"The judges of a panel must differ, got {a} and {b} with the same settings.")
    shared = shared_prompts({name: [row.prompt_id for row in run.rows] for name, run in runs.items()}, matched_only)
    kept = {name: run.on(shared) for name, run in runs.items()}
    pairs = {name: {(row.prompt_id, row.sample) for row in run.rows} for name, run in kept.items()}
    for name, own in pairs.items():
        if own != pairs[first_name]:
            raise ValueError(
                f"All judges must have judged the same samples of each prompt, got {len(pairs[first_name])} pairs of "
                f"{first_name} and {len(own)} of {name}, {len(own ^ pairs[first_name])} of which one of them lacks."
            )
    if len({(run.n, run.seed) for run in runs.values()}) > 1:
        kept = {name: replace(run, n=len(shared)) for name, run in kept.items()}
    return kept


def _pool(
    rows: Mapping[str, Sequence[Judgement]], runs: Mapping[str, Judged], rule: str, quorum: int, name: str
) -> list[Judgement]:
    """The panel's row for each pair and order that all members were shown."""
    by_member = {member: _by_pair(judgements) for member, judgements in rows.items()}
    present = {member: _complete(by_pair) for member, by_pair in by_member.items()}
    pooled = []
    for row in next(iter(rows.values())):
        pair = (row.prompt_id, row.sample)
        if not all(row.order in by_pair.get(pair, {}) for by_pair in by_member.values()):
            continue  # of the control with an empty answer, which judges have on different prompts
        there = {member: by_pair[pair][row.order] for member, by_pair in by_member.items() if pair in present[member]}
        preferences = [one.preference for one in there.values() if one.preference is not None]
        made: dict[str, Any] = {"judge": name, "preference": None, "failure": "no_quorum", "detail": ""}
        if len(preferences) >= quorum:
            once = [one.detail == ONCE for one in there.values()]
            orderless = [sees_no_order(runs[member].judge) for member in there]
            only_once = any(once) and all(a or b for a, b in zip(once, orderless, strict=True))
            made |= {"preference": RULES[rule](preferences), "failure": None, "detail": ONCE if only_once else ""}
        else:
            made["detail"] = f"no verdict of {', '.join(member for member in rows if member not in there)}"
        pooled.append(replace(row, **made))
    return pooled


def _by_pair(rows: Sequence[Judgement]) -> _Rows:
    found: dict[PairKey, dict[str, Judgement]] = defaultdict(dict)
    for row in rows:
        found[row.prompt_id, row.sample][row.order] = row
    return found


def _complete(by_pair: _Rows) -> set[PairKey]:
    """Pairs without a failure: a verdict in one order alone would bring the judge's bias for a position in."""
    return {pair for pair, rows in by_pair.items() if all(row.preference is not None for row in rows.values())}


def total_cost(runs: Mapping[str, Judged]) -> dict[str, Any] | None:
    """The tokens of all members together; the price is None if that of one of them is not known."""
    costs = [run.paid for run in runs.values() if run.paid]
    if not costs:
        return None
    prices = [cost["price"] for cost in costs]
    tokens = {name: sum(cost[name] for cost in costs) for name in ("tokens_in", "tokens_out")}
    return {**tokens, "price": None if None in prices else sum(prices)}


# --- agreement -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PairAgreement:
    """How far two judges say the same of a pair, each with the mean of its orders.

    Attributes:
        first: name.
        second: name.
        same: share of pairs with the same outcome (win, tie, loss), over prompts.
        kappa: Cohen's κ of the outcomes; None where chance alone would agree on all of them.
        pairs: pairs on which both have a verdict.
    """

    first: str
    second: str
    same: Estimate
    kappa: float | None
    pairs: int


def agreement(runs: Mapping[str, Judged]) -> list[PairAgreement]:
    """Every two judges on the pairs on which both have a verdict."""
    outcomes = {name: member_outcomes(run) for name, run in runs.items()}
    return [_agreement(a, b, outcomes[a], outcomes[b]) for a, b in combinations(runs, 2)]


def member_outcomes(run: Judged) -> dict[PairKey, float]:
    """1, 0 or −1 of each pair without a failure: the system wins, ties or loses in the mean of the orders."""
    rows = _by_pair(run.rows)
    kept = _complete(rows)
    return {pair: _mean_outcome(orders.values()) for pair, orders in rows.items() if pair in kept}


def _mean_outcome(rows: Iterable[Judgement]) -> float:
    return _outcome(_mean([row.preference for row in rows if row.preference is not None]))


def _outcome(preference: float) -> float:
    return 0.0 if abs(preference - 0.5) < TIE else float(np.sign(preference - 0.5))


def _agreement(
    first: str, second: str, ours: Mapping[PairKey, float], theirs: Mapping[PairKey, float]
) -> PairAgreement:
    both = [pair for pair in ours if pair in theirs]
    if not both:
        return PairAgreement(first=first, second=second, same=undefined(0), kappa=None, pairs=0)
    same = np.array([float(ours[pair] == theirs[pair]) for pair in both])
    codes = codes_of([prompt for prompt, _ in both])[0]
    values = np.array([[ours[pair], theirs[pair]] for pair in both])  # (n, 2)
    kinds, numbers = np.unique(values, return_inverse=True)
    table = np.zeros((len(kinds), len(kinds)))
    np.add.at(table, tuple(numbers.reshape(-1, 2).T), 1)
    kappa = float(cohen_kappa(table))
    return PairAgreement(
        first=first,
        second=second,
        same=rate_interval(prompt_means(same, codes)),
        kappa=None if np.isnan(kappa) else kappa,
        pairs=len(both),
    )


@dataclass(frozen=True, kw_only=True)
class Member:
    """One judge of a panel, alone and against the others.

    Attributes:
        name: of the judge.
        rate: win rate by it alone.
        failed: pairs on which it has no verdict.
        without: win rate by the panel without it.
        shift: what it changes: the panel's win rate minus `without`, prompt by prompt; None without shared prompts.
        others: its agreement with the panel without it.
        cost: tokens and price of its judgements, or None.
    """

    name: str
    rate: Estimate
    failed: int
    without: Estimate
    shift: PairedComparison | None
    others: PairAgreement
    cost: Mapping[str, Any] | None


def leave_one_out(runs: Mapping[str, Judged], rule: str = "mean", *, quorum: int | None = None) -> list[Member]:
    """Each member, and the panel without it; a `quorum` of all members becomes all of the others."""
    full = compare_orders(combine(runs, rule, quorum=quorum).verdicts())
    members = []
    for name, run in runs.items():
        rest = {other: one for other, one in runs.items() if other != name}
        others = combine(rest, rule, quorum=None if quorum is None else min(quorum, len(rest)))
        alone, without = compare_orders(run.verdicts()), compare_orders(others.verdicts())
        members.append(
            Member(
                name=name,
                rate=win_rate(alone).rate,
                failed=alone.failed + alone.half_failed,
                without=win_rate(without).rate,
                shift=paired(full, without) if set(full.ids) & set(without.ids) else None,
                others=_agreement(name, "the others", member_outcomes(run), member_outcomes(others)),
                cost=run.paid,
            )
        )
    return members


def member_table(members: Sequence[Member]) -> Table:
    """One line per judge, with what it cost where that is known."""
    heads = ["win\nrate, %", "pairs\nfailed", "as the\nothers, %", "κ", "panel without\nit, %", "it adds,\npoints"]
    costs = any(one.cost for one in members)
    table = Table("Judges of the panel", ["judge", *heads, *(["tokens read\n/ written", "price"] if costs else [])])
    for one in members:
        cells = [
            percent_cell(one.rate),
            f"{one.failed:,}",
            percent_cell(one.others.same),
            kappa_cell(one.others),
            percent_cell(one.without),
            show_estimate(one.shift.difference if one.shift else None, "+.1f", scale=100),
        ]
        if costs:
            cells.append(f"{one.cost['tokens_in']:,} / {one.cost['tokens_out']:,}" if one.cost else "–")
            cells.append("–" if not one.cost or one.cost["price"] is None else f"{one.cost['price']:.4f}")
        table.add(one.name, *cells)
    return table


def agreement_table(names: Sequence[str], found: Sequence[PairAgreement]) -> Table:
    """The matrix: share of the same outcome, and Cohen's κ below it."""
    cells = {(one.first, one.second): one for one in found}
    table = Table("Pairs with the same outcome, %, and Cohen's κ below", ["judge", *names])
    for a in names:
        row = [cells.get((a, b)) or cells.get((b, a)) for b in names]
        table.add(
            a, *("–" if one is None else f"{percent_cell(one.same, bounds=NONE)}\n{kappa_cell(one)}" for one in row)
        )
    return table


def kappa_cell(one: PairAgreement) -> str:
    """Cohen's κ with two digits; a dash where it is not defined."""
    return "–" if one.kappa is None else f"{one.kappa:.2f}"


def panel_rows(members: Sequence[Member], found: Sequence[PairAgreement]) -> dict[str, Any]:
    """Everything of a panel for a JSON file."""

    def bounds(name: str, estimate: Estimate | None) -> dict[str, Any]:
        parts = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
        return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))

    def row(one: PairAgreement) -> dict[str, Any]:
        return {**bounds("same", one.same), "kappa": one.kappa, "pairs": one.pairs}

    return {
        "agreement": [{"first": one.first, "second": one.second, **row(one)} for one in found],
        "members": [
            {
                "judge": one.name,
                **bounds("win_rate", one.rate),
                "failed": one.failed,
                **bounds("win_rate_without", one.without),
                **bounds("adds", one.shift.difference if one.shift else None),
                "others": row(one.others),
                "cost": one.cost,
            }
            for one in members
        ],
    }
