"""One pass over the rows of a split: faults are counted, and of each good pair a few numbers are kept.

What stays in memory is 64 bytes a pair (whole numbers and 64-bit hashes), the first rows of each kind of fault, and
one batch of rows.
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np

from ..data.columns import nearest_column
from ..data.json_files import BrokenLine
from ..data.layouts import (
    EXTRA_COLUMNS,
    KINDS,
    PAIR_COLUMNS,
    READERS,
    Fault,
    Faults,
    Pair,
    PreferenceDataError,
    fault_of_options,
    guess,
    has_other_content,
    layout_of,
)
from ..data.load import as_text, missing_columns
from ..data.repeated_prompts import FEW_BYTES, are_many
from ..data.tokenize import note_of_text
from ..data.treatment import Treatment, repeats_in_plain_text
from .tokens import TokenCounter, WordCounter

HEAD = 1000  # rows that the layout is decided by
BATCH = 250  # pairs that are tokenised at a time
ROWS_NAMED = 10  # of each kind of fault
MAX_GROUPS = 1000
NO_VALUE, OTHERS = "(no value)", "(further values)"
Advance = Callable[[int, int], None]


class Rows(Protocol):
    """Where the rows of a split come from: files, or an Arrow data set."""

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        ...

    def cells(self, names: list[str]) -> "Iterator[Any]":
        """The values of the named columns, row by row."""
        ...


@dataclass(frozen=True)
class PairNumbers:
    """What is kept of each good pair: `(n,)` arrays.

    Attributes:
        row: number of its row in the split, from 0.
        group: number of its group; 0 without groups.
        prompt: length of the prompt.
        chosen: length T_w of the chosen response.
        rejected: length T_l of the rejected one.
        chosen_end: place of the last end token in the chosen response, from 0; -1 for none.
        rejected_end: the same of the rejected one.
        shared_start: tokens that both responses begin with.
        shared_end: tokens that both responses end with.
        prompt_hash: 64-bit hash of the prompt.
        pair_hash: 64-bit hash of prompt, chosen and rejected.
        swapped_hash: 64-bit hash of prompt, rejected and chosen.
    """

    row: np.ndarray
    group: np.ndarray
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_end: np.ndarray
    rejected_end: np.ndarray
    shared_start: np.ndarray
    shared_end: np.ndarray
    prompt_hash: np.ndarray
    pair_hash: np.ndarray
    swapped_hash: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def where(self, which: np.ndarray) -> "PairNumbers":
        """Some of the pairs: `which` is `(n,)` of truth values."""
        return replace(self, **{column.name: getattr(self, column.name)[which] for column in fields(self)})

    @classmethod
    def joined(cls, parts: "Iterable[PairNumbers]") -> "PairNumbers":
        """The pairs of several splits, one after the other."""
        parts = list(parts)
        columns = {c.name: np.concatenate([getattr(part, c.name) for part in parts]) for c in fields(cls)}
        return cls(**columns)


# 64 bits for what can be large, 32 for what cannot: the type codes of `array`
_CODES = {c.name: "q" if c.name == "row" else "Q" if "hash" in c.name else "i" for c in fields(PairNumbers)}


class Groups:
    """Values of the column that pairs are grouped by, in the order of their first appearance."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def number(self, value: Any) -> int:
        """The number of a value; beyond `MAX_GROUPS` all further ones share one."""
        if value is None:
            name = NO_VALUE
        else:
            name = value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True)
            name = name[:80]
        if name not in self.names and len(self.names) >= MAX_GROUPS:
            name = OTHERS
        return self.names.setdefault(name, len(self.names))


@dataclass
class SplitScan:
    """What one pass over a split found.

    Attributes:
        name: of the split.
        rows: number of rows, good and bad.
        layout: how the rows say what a pair is, as in docs/data.md.
        faults: by kind, with the first rows and the number of all.
        pairs: the good ones.
        notes: what a reader has to know, in sentences.
    """

    name: str
    rows: int
    layout: str
    faults: list[Fault]
    pairs: PairNumbers
    notes: list[str] = field(default_factory=list)


class _Faults:
    """Faults by kind and column: the first rows and the number of all."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[list[int], int]] = {}
        self.places: dict[str, list[str]] = {}

    def add_many(self, kind: str, column: str, rows: "list[int]") -> None:
        """Rows that are found bad when all are read."""
        self.found[kind, column] = rows[:ROWS_NAMED], len(rows)

    def add(self, kind: str, column: str, row: int, place: str | None = None) -> None:
        rows, count = self.found.get((kind, column), ([], 0))
        if count < ROWS_NAMED:
            rows.append(row)
            if place:
                self.places.setdefault(kind, []).append(place)
        self.found[kind, column] = rows, count + 1

    def list(self, reasons: "dict[str, str]") -> "list[Fault]":
        return [
            Fault(kind, column, sorted(rows), count, self._cure(kind, count, reasons.get(kind)))
            for (kind, column), (rows, count) in self.found.items()
        ]

    def _cure(self, kind: str, count: int, reason: str | None) -> str:
        places, cure = self.places.get(kind, []), KINDS[kind][1]
        if reason:
            cure = f"The first: {reason}. {cure}"
        more = "; …" if count > len(places) else ""
        return f"See {'; '.join(places)}{more}. {cure}" if places else cure


def scan_split(
    name: str,
    rows: Rows,
    counter: WordCounter | TokenCounter,
    *,
    by: str | None,
    groups: Groups,
    advance: Advance,
    treatment: Treatment,
) -> SplitScan:
    """Read every row of a split once.

    Args:
        name: of the split.
        rows: where they come from.
        counter: what measures a pair.
        by: column to group by, or None.
        groups: of all splits; new values are added.
        advance: is told (rows done, rows in all).
        treatment: what is done to a pair before it is measured.

    Raises:
        PreferenceDataError: `chosen` or `rejected` is no column, or nothing at all can be read.
    """
    return _Scan(name, rows, counter, by, groups, advance, treatment).run()


class _Scan:
    def __init__(self, name, rows, counter, by, groups, advance, treatment):
        self.name, self.rows, self.counter = name, rows, counter
        self.by, self.groups, self.advance, self.treatment = by, groups, advance, treatment
        self.options: dict[str, Any] | None = None  # of the template, in the first good row
        self.repeating: list[int] = []  # good rows whose responses both begin with their prompt, as text
        self.telling = 0  # how many of them have a prompt that is long enough to tell something
        self.cuts_plain = False  # whether those are a mistake of the data, by its first rows
        self.read = 0
        self.lost: PreferenceDataError | None = None
        self.faults = _Faults()
        self.notes: list[str] = []
        self.arrays = {name: array(code) for name, code in _CODES.items()}
        self.waiting: list[tuple[int, int, Pair, dict[str, Any]]] = []  # row, group, pair, extras

    def run(self) -> SplitScan:
        self._check_columns()
        cells = self._until_lost(self.rows.cells([*PAIR_COLUMNS, *([self.by] if self.by else []), *EXTRA_COLUMNS]))
        head = list(itertools.islice(cells, HEAD))
        layout = self._layout(head)
        self.treatment.check_layout(layout)
        self.cuts_plain = self._repeats(head, READERS[layout])
        for row in itertools.chain(head, cells):
            self._take(row, READERS[layout])
        self._measure()
        if self.lost is not None and not self.read:
            raise self.lost
        self.advance(self.read, self.read)
        self._note_nearby_prompt(layout)
        self._note_text()
        if not self.cuts_plain and are_many(self.telling, self.read):
            for column in ("chosen", "rejected"):
                self.faults.add_many("repeated_prompt", column, self.repeating)
        template = getattr(self.counter, "template", None)
        faults = self.faults.list(template.reasons if template is not None else {})
        if self.lost is not None:
            faults.insert(0, Fault("unreadable_file", "", [], 1, str(self.lost)))
        pairs = PairNumbers(**{name: np.asarray(values) for name, values in self.arrays.items()})
        return SplitScan(self.name, self.read, layout, faults, pairs, self.notes)

    def _until_lost(self, cells: Iterator[Any]) -> Iterator[Any]:
        """The rows, up to where a file cannot be read any further."""
        try:
            yield from cells
        except PreferenceDataError as error:
            self.lost = error

    def _check_columns(self) -> None:
        """Whether the source has both responses, and the column to group by."""
        there = self.rows.columns
        if faults := missing_columns(there):
            cures = " ".join(f"There is no column `{fault.column}`. {fault.cure}" for fault in faults)
            raise PreferenceDataError(f"Split `{self.name}` must have both sides of a pair. {cures}", faults)
        if self.by and self.by not in there:
            raise PreferenceDataError(
                f"`by` must be a column of the data, got {self.by!r}; split `{self.name}` has {there}."
                f"{guess(self.by, there)}"
            )

    def _layout(self, head: list[Any]) -> str:
        rows = [row[:3] for row in head if not isinstance(row, BrokenLine)]
        return layout_of([column for column in PAIR_COLUMNS if column in self.rows.columns], rows)

    def _take(self, row: Any, reader: Callable) -> None:
        number = self.read
        self.read += 1
        if isinstance(row, BrokenLine):
            self.faults.add(row.kind, "", number, row.place)
            return
        extras = dict(zip(EXTRA_COLUMNS, row[-len(EXTRA_COLUMNS) :], strict=True))
        pair, faults = self._checked(reader(*row[:3]), extras)
        for kind, column in faults:
            self.faults.add(kind, column, number)
        if not faults:
            group = self.groups.number(row[3]) if self.by else 0
            self.waiting.append((number, group, pair, extras))
        if len(self.waiting) == BATCH:
            self._measure()
        if self.read % HEAD == 0:
            self.advance(self.read, max(self._total(), self.read))

    def _repeats(self, head: list[Any], reader: Callable) -> bool:
        """Whether so many of the first rows begin with their prompt in plain text that this is a mistake."""
        pairs = [self.treatment.take(*reader(*row[:3])) for row in head if not isinstance(row, BrokenLine)]
        telling = sum(not faults and repeats_in_plain_text(pair) >= FEW_BYTES for pair, faults in pairs)
        return are_many(telling, len(head))

    def _checked(self, read: tuple[Pair, Faults], extras: dict[str, Any]) -> tuple[Pair, Faults]:
        """The pair as `load_preferences` makes it, or its faults."""
        pair, faults = self.treatment.take(*read, plain_repeats=self.cuts_plain)
        if faults:
            return pair, faults
        if not self.cuts_plain and (size := repeats_in_plain_text(pair)):
            self.repeating.append(self.read - 1)
            self.telling += size >= FEW_BYTES
        given = {name: value for name, value in extras.items() if name in self.rows.columns}
        if self.options is None:
            self.options = given
        if fault := fault_of_options(given, self.options):
            return pair, [fault]
        if {"image", "images"} & set(self.rows.columns):
            return pair, []
        return pair, [
            ("not_text", column) for column, part in zip(PAIR_COLUMNS, pair, strict=True) if has_other_content(part)
        ]

    def _total(self) -> int:
        return getattr(self.rows, "total", self.read)

    def _measure(self) -> None:
        measured = self.counter.measure([pair for _, _, pair, _ in self.waiting], [e for *_, e in self.waiting])
        for (number, group, pair, _), numbers in zip(self.waiting, measured, strict=True):
            if len(numbers) == 2:
                kind, column = map(str, numbers)
                self.faults.add(kind, column, number)
                continue
            values = (number, group, *numbers, *_hashes(pair))
            for kept, value in zip(self.arrays.values(), values, strict=True):
                kept.append(value)
        self.waiting.clear()

    def _note_text(self) -> None:
        """Pairs of text beside the tokenizer of a chat model; and where their tokens merge."""
        if isinstance(self.counter, TokenCounter) and self.counter.texts:
            has_template = bool(self.counter.tokenizer.chat_template)
            if note := note_of_text(self.counter.merged, self.counter.texts, has_template=has_template):
                self.notes.append(f"Split `{self.name}`: {note}")
            self.counter.texts = self.counter.merged = 0

    def _note_nearby_prompt(self, layout: str) -> None:
        near = nearest_column("prompt", self.rows.columns)
        if layout == "shared_text" and near:
            self.notes.append(
                f"Split `{self.name}` has no column `prompt`, so what both sides begin with was taken for it. If "
                f"`{near}` is meant, run the audit with `columns` prompt={near}."
            )


def _hashes(pair: Pair) -> tuple[int, int, int]:
    """Of the prompt, the pair, and the pair with its sides swapped."""
    prompt, chosen, rejected = (hashlib.blake2b(as_text(part).encode(), digest_size=8).digest() for part in pair)
    return _number(prompt), _number(prompt + chosen + rejected), _number(prompt + rejected + chosen)


def _number(content: bytes) -> int:
    if len(content) > 8:
        content = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(content, "little")
