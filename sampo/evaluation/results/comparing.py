"""Several systems against one baseline by one judge: their numbers, and every two of them prompt by prompt."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ...io.records import Record, provenance
from ...io.tables import Table
from ...stats.intervals import holm
from .cells import BEHIND, show_estimate
from .difficulty import difficulty_from, length_correlation
from .judged import Judged
from .length_control import ExtrapolationWarning, length_controlled
from .summary import Summary, records
from .verbosity import Verbosity
from .verdicts import Comparisons, compare_orders
from .win_rate import PairedComparison, paired

# of the correlation of difficulty and length: below either there is no note
NOTABLE, NOTABLE_ERRORS = 0.1, 3.0  # the correlation, and how many of its standard errors


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Two systems on the prompts that both have.

    Attributes:
        first: name.
        second: name.
        paired: their difference, from the verdicts against the common baseline.
        p_holm: p-value adjusted for all duels of the comparison; None where no prompt differs.
    """

    first: str
    second: str
    paired: PairedComparison
    p_holm: float | None

    def row(self) -> dict[str, Any]:
        """One flat row for CSV or JSON."""
        difference = self.paired.difference
        return {
            "first": self.first,
            "second": self.second,
            "prompts": difference.n,
            "difference": difference.value,
            "difference_low": difference.low,
            "difference_high": difference.high,
            **{name: getattr(self.paired, name) for name in ("better", "worse", "equal", "unpaired", "correlation")},
            "p_value": self.paired.p_value,
            "p_holm": self.p_holm,
        }


def shared_runs(runs: Mapping[str, Judged], *, matched_only: bool = False) -> dict[str, Judged]:
    """Runs that may be compared: of one judge, against the same answers, on the same prompts.

    Args:
        runs: by the name of the system.
        matched_only: omit prompts that one of them lacks.

    Raises:
        ValueError: they may not, and why.
    """
    first_name, first = next(iter(runs.items()))
    for name, run in runs.items():
        if run.baseline.sha256 != first.baseline.sha256:
            raise ValueError(
                f"All systems must stand against the same baseline, got {first.baseline.file} for {first_name} and "
                f"{run.baseline.file} for {name} with other contents. Judge them against one file."
            )
        if dict(run.judge) != dict(first.judge):
            other = sorted(key for key in {*run.judge, *first.judge} if run.judge.get(key) != first.judge.get(key))
            raise ValueError(
                f"All systems must have the same judge, got {first.judge_name} for {first_name} and {run.judge_name} "
                f"for {name}, which differ in {', '.join(f'`{key}`' for key in other)}. Judge them with one judge."
            )
    shared = shared_prompts({name: [row.prompt_id for row in run.rows] for name, run in runs.items()}, matched_only)
    return {name: run.on(shared) for name, run in runs.items()}


def shared_prompts(prompts: Mapping[str, Iterable[str]], matched_only: bool = False) -> set[str]:
    """The prompts that all systems have.

    Args:
        prompts: ids by the name of the system.
        matched_only: omit prompts that one of them lacks.

    Raises:
        ValueError: there is none, or one of them lacks some.
    """
    own = {name: set(ids) for name, ids in prompts.items()}
    shared = set.intersection(*own.values())
    apart = {name: len(ids - shared) for name, ids in own.items()}
    if not shared or (any(apart.values()) and not matched_only):
        others = ", ".join(f"{count} further ones in {name}" for name, count in apart.items())
        raise ValueError(
            f"All systems must have the same prompts, got {len(shared)} that all have, and {others}. "
            + ("To leave these out, set `matched_only`." if shared else "Use one file of prompts.")
        )
    return shared


def compare(
    runs: Mapping[str, Judged], *, length_unit: str = "characters", difficulty: bool = False
) -> tuple[list[Summary], list[Duel]]:
    """Summaries of all systems, and every two of them compared on the prompts they share.

    Args:
        runs: by the name of the system; of `shared_runs`.
        length_unit: of all lengths.
        difficulty: let the control of length know how hard each prompt is to the other systems.
    """
    if difficulty and len(runs) < 2:
        raise ValueError("`difficulty` needs the verdicts on other systems, got one system. Leave it out.")
    comparisons = {name: compare_orders(run.verdicts(length_unit)) for name, run in runs.items()}
    summaries = []
    for name, run in runs.items():
        others = [one for other, one in comparisons.items() if other != name and len(one)]
        hard = difficulty_from(others) if others else {}
        summary = run.summary(name, length_unit=length_unit, difficulty=hard if difficulty else None)
        summaries.append(_with_note(summary, comparisons[name], hard, len(others), used=difficulty))
    return summaries, compare_pairs(comparisons, combinations(comparisons, 2))


def _with_note(
    summary: Summary, comparisons: Comparisons, hard: Mapping[Any, float], others: int, *, used: bool
) -> Summary:
    """The summary, with a note where hard prompts have longer or shorter answers than easy ones."""
    if summary.controlled is None or any(prompt not in hard for prompt in comparisons.ids):
        return summary
    r, n = length_correlation(comparisons, hard), len(comparisons.ids)
    if r is None or abs(r) < max(NOTABLE, NOTABLE_ERRORS / math.sqrt(n)):
        return summary
    note = f"Length goes with difficulty (r = {r:+.2f} by {others} other {'system' if others == 1 else 'systems'}): "
    if used:
        note += "a difficulty from few systems removes only a part of the bias that this brings at equal length."
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExtrapolationWarning)  # the notes have it already
            other = length_controlled(comparisons, difficulty=hard).rate.value or 0.0
        note += (
            f"the rate at equal length is biased. With `difficulty`, which removes a part of it, it is {other:.1%}."
        )
    controlled = replace(summary.controlled, notes=(*summary.controlled.notes, note))
    return replace(summary, controlled=controlled)


def compare_pairs(comparisons: Mapping[str, Comparisons], pairs: Iterable[tuple[str, str]]) -> list[Duel]:
    """Compare systems two by two, with p-values adjusted for all these pairs.

    Args:
        comparisons: of each system with the common baseline, by its name.
        pairs: names.
    """
    found = [(a, b, paired(comparisons[a], comparisons[b])) for a, b in pairs]
    tested = [i for i, (_, _, one) in enumerate(found) if one.p_value is not None]
    adjusted = dict(zip(tested, holm([found[i][2].p_value or 0.0 for i in tested]), strict=True))
    return [Duel(first=a, second=b, paired=one, p_holm=adjusted.get(i)) for i, (a, b, one) in enumerate(found)]


def rows_of(summaries: Sequence[Summary], lengths: Sequence[Verbosity]) -> list[dict[str, Any]]:
    """One flat row per system, win rates and lengths together."""
    by_name = {one.system: one.row() for one in lengths}
    rows = []
    for summary in summaries:
        row, more = summary.row(), by_name.pop(summary.system, {})
        notes = " ".join(text for text in (row.pop("notes"), more.pop("notes", "")) if text)
        rows.append({**row, **{k: v for k, v in more.items() if k not in row}, "notes": notes})
    return [*rows, *by_name.values()]


def all_records(
    summaries: Sequence[Summary],
    lengths: Sequence[Verbosity],
    duels: Sequence[Duel],
    *,
    configs: Mapping[str, Mapping[str, Any]],
    seed: int,
    command: str,
) -> list[Record]:
    """One record per number; `configs` are what the numbers of each system depend on, by its name."""
    made: list[Record] = []
    found: list[Summary | Verbosity] = [*summaries, *lengths]
    for one in found:
        made += records(one, config=configs[one.system], seed=seed, command=command)
    where = provenance()
    for duel in duels:
        config = {"first": duel.first, "second": duel.second, "of": [configs[duel.first], configs[duel.second]]}
        difference = duel.paired.difference
        numbers = (
            ("paired/difference", difference.value, difference.interval),
            ("paired/p_value", duel.paired.p_value, None),
            ("paired/p_holm", duel.p_holm, None),
        )
        made += [
            Record(
                name=name,
                value=value,
                n=difference.n,
                config={**config, "duels": len(duels)},
                interval=interval,
                seed=seed,
                command=command,
                **where,
            )
            for name, value, interval in numbers
        ]
    return made


def duel_table(duels: Sequence[Duel]) -> Table:
    """Every two systems, one line each."""
    title = f"Differences in win rate, prompt by prompt; p by the exact sign test, by Holm for all {len(duels)}"
    heads = ("first − second", "prompts", "difference, points", "better", "worse", "equal", "p", "p, Holm")
    table = Table(title, heads)
    for duel in duels:
        one = duel.paired
        table.add(
            f"{duel.first} − {duel.second}",
            f"{one.difference.n:,}",
            show_estimate(one.difference, "+.1f", bounds=BEHIND, scale=100),
            *(f"{count:,}" for count in (one.better, one.worse, one.equal)),
            *("–" if p is None else f"{p:.2g}" for p in (one.p_value, duel.p_holm)),
        )
    return table
