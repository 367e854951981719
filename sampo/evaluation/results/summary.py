"""The statistics of the verdicts on a system and a baseline, as rows, records and one sentence to quote."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...io.records import Record, provenance
from ...io.tables import Table
from ...stats.intervals import Estimate, mean_interval, prompt_means
from .cells import NONE, mean_length, percent, percent_cell
from .length_control import ExtrapolationError, ExtrapolationWarning, LengthControlled, length_controlled, length_slope
from .style_control import StyleControlled, style_controlled
from .verbosity import Verbosity
from .verdicts import OrderConsistency, Verdicts, compare_orders, order_consistency
from .win_rate import WinRate, by_length_ratio, length_matched, longer_wins, win_rate, winner_is_longer

POSITION = 0.1  # mean preference for the answer shown first, this near to 0 or 1: the judge looks at the position
CONSISTENT = 0.7  # share of pairs with the same verdict in both orders, below which a reader is warned
CUT = 0.05  # share of answers cut off by the limit of tokens, above which a reader is warned
MATCHED_MIN = 30  # comparisons below which a length-matched win rate is not shown


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `summarise` found.

    Attributes:
        system: name.
        baseline: name.
        judge: name.
        raw: raw win rate.
        controlled: win rate at equal length; None where lengths are not known or control was refused.
        refused: why control was refused, or "".
        styled: win rate at equal style; None where no features were asked for or control was refused.
        style_refused: why control of style was refused, or "".
        matched: win rate among answers of about the same length, or None.
        bins: win rate by ratio of lengths, lower and upper edge with each.
        slope: the judge's slope on log2 of the ratio of lengths, or None.
        longer_wins: control: win rate by a judge that always prefers the longer answer, or None.
        winner_is_longer: how often the judge's winner is the longer answer, or None.
        empty: control: win rate of an empty answer instead of the system's, should be near 0; None if not judged.
        orders: consistency of the two orders, or None.
        order_note: text for the sentence without `orders`, or "".
        failed_verdicts: verdicts that failed; a pair has one in each order.
        cut: share of the system's answers and of the baseline's that the limit of tokens cut off, or None.
        remarks: further notes.
        judge_check: how far the judge agrees with people, in one sentence, or "".
        lengths: mean length of the system's answers and of the baseline's, of those compared, or None.
        length_unit: of the lengths.
        confidence: of all intervals.
    """

    system: str
    baseline: str
    judge: str
    raw: WinRate
    controlled: LengthControlled | None = None
    refused: str = ""
    styled: StyleControlled | None = None
    style_refused: str = ""
    matched: WinRate | None = None
    bins: tuple[tuple[float, float, WinRate], ...] = ()
    slope: Estimate | None = None
    longer_wins: WinRate | None = None
    winner_is_longer: Estimate | None = None
    empty: WinRate | None = None
    orders: OrderConsistency | None = None
    order_note: str = ""
    failed_verdicts: int = 0
    cut: tuple[Estimate, Estimate] | None = None
    remarks: tuple[str, ...] = ()
    judge_check: str = ""
    lengths: tuple[Estimate, Estimate] | None = None
    length_unit: str = "characters"
    confidence: float = 0.95

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know, in sentences."""
        notes = [*self.raw.notes, *self.remarks, *(note for _, note in self._doubts)]
        notes += self.controlled.notes if self.controlled else ()
        if self.refused:
            notes.append(f"No win rate at equal length: {self.refused}")
        notes += self.styled.notes if self.styled else ()
        if self.style_refused:
            notes.append(f"No win rate at equal style: {self.style_refused}")
        return tuple(dict.fromkeys(notes))

    @property
    def _doubts(self) -> list[tuple[str, str]]:
        return [*_doubts_of_order(self.orders), *_doubts_of_cuts(self.cut)]

    @property
    def empty_failed(self) -> int:
        """Pairs of the control with an empty answer that lack a verdict."""
        return self.empty.failed + self.empty.half_failed if self.empty else 0

    def estimates(self) -> dict[str, Estimate]:
        """Every number by its name."""
        found = {"win_rate": self.raw.rate}
        if self.lengths:
            found |= {"length/system": self.lengths[0], "length/baseline": self.lengths[1]}
        if self.controlled:
            found |= {"win_rate/equal_length": self.controlled.rate, "length/slope_in_model": self.controlled.slope}
        if self.styled:
            found["win_rate/equal_style"] = self.styled.rate
            found |= {f"style/slope_{feature.name}": feature.slope for feature in self.styled.features}
        if self.matched:
            found["win_rate/length_matched"] = self.matched.rate
        for low, high, part in self.bins:
            found[f"win_rate/length_ratio_{low:g}_{high:g}"] = part.rate
        if self.slope:
            found["length/slope_per_doubling"] = self.slope
        if self.longer_wins:
            found["win_rate/control_longer_wins"] = self.longer_wins.rate
        if self.winner_is_longer:
            found["length/winner_is_longer"] = self.winner_is_longer
        if self.empty:
            found["win_rate/control_empty"] = self.empty.rate
        if self.cut:
            found |= {"cut/system": self.cut[0], "cut/baseline": self.cut[1]}
        if self.orders:
            found |= {"order/consistent": self.orders.consistent, "order/first_shown": self.orders.first_shown}
        return found

    def row(self) -> dict[str, Any]:
        """One flat row for CSV or JSON."""
        row: dict[str, Any] = {
            "system": self.system,
            "baseline": self.baseline,
            "judge": self.judge,
            "length_unit": self.length_unit,
        }
        row |= {name: getattr(self.raw, name) for name in ("wins", "ties", "losses", "failed", "half_failed")}
        row |= {"prompts": self.raw.rate.n, "control_empty_failed": self.empty_failed}
        row |= {"failed_verdicts": self.failed_verdicts}
        for name, estimate in self.estimates().items():
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return row | {"judge_check": self.judge_check, "notes": " ".join(self.notes)}

    def sentence(self) -> str:
        """The result in one sentence, with lengths, failures and controls."""
        rate = self.raw
        text = (
            f"{self.system} wins {percent(rate.rate)} against {self.baseline} by {self.judge} on "
            f"{rate.rate.n:,} prompts ({_orders(self)}; {rate.wins} wins, {rate.ties} ties, {rate.losses} losses"
        )
        lost = rate.failed + rate.half_failed
        text += f"; {lost} pairs left out for {self.failed_verdicts} failed verdicts)" if lost else ")"
        if self.lengths:
            ours, theirs = (mean_length(length) for length in self.lengths)
            text += f"; with {ours} {self.length_unit} per answer against {theirs}"
        if self.controlled:
            text += f"; at equal length {percent(self.controlled.rate)}"
        if self.styled:
            text += f"; at equal style {percent(self.styled.rate)}"
        if self.longer_wins:
            text += f"; always taking the longer answer would give {percent(self.longer_wins.rate, bounds=NONE)}"
        if self.empty:
            text += f", an empty answer {percent(self.empty.rate, bounds=NONE)}"
        text += "." if self.controlled or not self.refused else "; lengths overlap too little for a control of length."
        bounds = rate.rate.interval
        if bounds and bounds[0] <= 0.5 <= bounds[1]:
            text += " The interval holds 50 %: this does not show which of the two is better."
        if doubts := [doubt for doubt, _ in self._doubts]:
            text += f" Doubtful: {'; '.join(doubts)}."
        text += f" {self.judge_check}" if self.judge_check else ""
        return text + f" Intervals are {100 * self.confidence:g} %, over prompts."


def summarise(
    verdicts: Verdicts,
    *,
    system: str = "system",
    baseline: str = "baseline",
    judge: str = "judge",
    empty: Verdicts | None = None,
    difficulty: Mapping[Any, float] | None = None,
    cut: tuple[Estimate, Estimate] | None = None,
    order_note: str = "",
    remarks: Sequence[str] = (),
    judge_check: str = "",
    confidence: float = 0.95,
) -> Summary:
    """Everything at once; where lengths do not overlap the control is omitted, with the reason.

    Args:
        verdicts: of one judge on one system and one baseline.
        system: name.
        baseline: name.
        judge: name.
        empty: verdicts of the same judge on empty answers instead of the system's.
        difficulty: of the prompts, from other systems (`difficulty_from`), for the control of length.
        cut: share of the system's answers and of the baseline's that the limit of tokens cut off.
        order_note: text on the order for the sentence, where there is no consistency of orders.
        remarks: further notes.
        judge_check: how far the judge agrees with people, in one sentence.
        confidence: of all intervals.
    """
    comparisons = compare_orders(verdicts)
    parts: dict[str, Any] = {
        "cut": cut,
        "order_note": order_note,
        "remarks": tuple(remarks),
        "judge_check": judge_check,
    }
    parts["failed_verdicts"] = int(np.isnan(verdicts.preference).sum())
    if verdicts.order is not None and comparisons.orders == "both":
        parts["orders"] = order_consistency(verdicts, confidence=confidence)
    if comparisons.system_length is not None and comparisons.baseline_length is not None and len(comparisons):
        parts["lengths"] = tuple(
            mean_interval(prompt_means(column, comparisons.codes), confidence) for column in comparisons.lengths
        )
        parts["length_unit"] = comparisons.length_unit
        parts["bins"] = tuple(by_length_ratio(comparisons, confidence=confidence))
        parts["slope"] = length_slope(comparisons, confidence=confidence)
        parts["longer_wins"] = win_rate(longer_wins(comparisons), confidence=confidence)
        parts["winner_is_longer"] = winner_is_longer(comparisons, confidence=confidence)
        matched = length_matched(comparisons, confidence=confidence)
        parts["matched"] = matched if matched.comparisons >= MATCHED_MIN else None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExtrapolationWarning)  # the notes have it
                parts["controlled"] = length_controlled(comparisons, difficulty=difficulty, confidence=confidence)
        except ExtrapolationError as error:
            parts["refused"] = str(error)
    if comparisons.style and len(comparisons):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExtrapolationWarning)  # the notes have it
                parts["styled"] = style_controlled(comparisons, difficulty=difficulty, confidence=confidence)
        except ExtrapolationError as error:
            parts["style_refused"] = str(error)
    if empty is not None:
        parts["empty"] = win_rate(compare_orders(empty), confidence=confidence)
    raw = win_rate(comparisons, confidence=confidence)
    return Summary(system=system, baseline=baseline, judge=judge, raw=raw, confidence=confidence, **parts)


def _doubts_of_order(orders: OrderConsistency | None) -> list[tuple[str, str]]:
    """If the order of the answers affects the judge too much: a phrase for the sentence, and a note."""
    if orders is None or orders.first_shown.value is None or orders.consistent.value is None:
        return []
    first, same = orders.first_shown.value, orders.consistent.value
    if min(first, 1 - first) < POSITION:
        doubt = (
            f"the judge names the answer shown {'first' if first > 0.5 else 'second'} in {max(first, 1 - first):.1%}"
        )
        note = f"{doubt[0].upper()}{doubt[1:]} of its verdicts: they are about the position and not about the answers."
        return [(f"{doubt} of its verdicts", f"{note} Use another judge or template.")]
    if same < CONSISTENT:
        note = (
            f"The judge says the same in both orders in only {same:.1%} of the pairs, and the answer shown first gets "
        )
        note += f"{first:.1%}: this pulls the rate towards 50 %. Use another judge or template."
        return [(f"the judge contradicts itself in {1 - same:.1%} of the pairs", note)]
    return []


def _doubts_of_cuts(cut: tuple[Estimate, Estimate] | None) -> list[tuple[str, str]]:
    """The same for answers that the limit of tokens cut off."""
    found = []
    for whose, share in zip(("the system's", "the baseline's"), cut or (), strict=False):
        if share.value is not None and share.value > CUT:
            doubt = f"{share.value:.1%} of {whose} answers are cut off by the limit of tokens"
            note = f"{doubt}: they were judged unfinished, and their length is the limit's."
            found.append((doubt, f"{note} Generate them with a higher `max_tokens`."))
    return found


def summary_table(found: Sequence[Summary]) -> Table:
    """What fits on a screen, one line per system; `Summary.row` has everything."""
    opponents = sorted({f"{one.baseline} by {one.judge}" for one in found})
    units = sorted({one.length_unit for one in found if one.lengths})
    of_style = any(one.styled or one.style_refused for one in found)
    rates = ("win\nrate, %", "at equal\nlength, %", *(["at equal\nstyle, %"] if of_style else []))
    heads = ("prompts", *rates, " / ".join(units) or "length", "baseline's")
    controls = ("longer one\nwins, %", "empty one\nwins, %", "orders\nagree, %", "ties", "pairs\nfailed")
    table = Table(f"Win rates against {'; '.join(opponents)}", ["system", *heads, *controls])
    for one in found:
        lengths = [mean_length(length) for length in one.lengths] if one.lengths else ["–", "–"]
        table.add(
            one.system,
            f"{one.raw.rate.n:,}",
            percent_cell(one.raw.rate),
            _controlled_cell(one.controlled, one.refused),
            *([_controlled_cell(one.styled, one.style_refused)] if of_style else []),
            *lengths,
            percent_cell(one.longer_wins.rate, bounds=NONE) if one.longer_wins else "–",
            percent_cell(one.empty.rate, bounds=NONE) if one.empty else "–",
            percent_cell(one.orders.consistent, bounds=NONE) if one.orders else "–",
            f"{one.raw.ties:,}",
            f"{one.raw.failed + one.raw.half_failed:,}",
        )
    return table


def _controlled_cell(controlled: LengthControlled | StyleControlled | None, refused: str) -> str:
    return percent_cell(controlled.rate) if controlled else "refused" if refused else "–"


def _orders(summary: Summary) -> str:
    if summary.orders:
        return f"both orders, consistent in {percent(summary.orders.consistent, bounds=NONE)}"
    if any(note.startswith("Only one order") for note in summary.raw.notes):
        return "one order only"
    return summary.order_note or "the order of the answers plays no part"


def records(
    found: Summary | Verbosity, *, config: Mapping[str, Any], seed: int | None = None, command: str = ""
) -> list[Record]:
    """One record per number, with its interval.

    Args:
        found: of `summarise` or of `verbosity`.
        config: every setting that the numbers depend on: files and their hashes, judge, prompt of the judge.
        seed: of generation or judging.
        command: that gives these numbers again.
    """
    where = provenance()
    names: dict[str, str | None]
    if isinstance(found, Summary):
        estimates = found.estimates()
        names = {
            "system": found.system,
            "baseline": found.baseline,
            "judge": found.judge,
            "length_unit": found.length_unit,
        }
        counts = {name: getattr(found.raw, name) for name in ("ties", "failed", "half_failed", "lost_prompts")}
        rows = [(name, estimate) for name, estimate in estimates.items()]
        rows += [
            (f"count/{name}", Estimate(float(count), None, None, None, found.raw.rate.n))
            for name, count in counts.items()
        ]
    else:
        names = {"system": found.system, "baseline": found.baseline, "tokenizer": found.tokenizer}
        rows = [(f"verbosity/{name}", estimate) for name, estimate in found.measures.items()]
    return [
        Record(
            name=name,
            value=estimate.value,
            n=estimate.n,
            config={**config, **names},
            interval=estimate.interval,
            seed=seed,
            command=command,
            **where,
        )
        for name, estimate in rows
    ]
