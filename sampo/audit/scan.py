"""One pass over the rows of a split: counts issues and keeps a few numbers of each good pair.

Memory holds 64 bytes per pair (integers and 64-bit hashes), the first rows of each kind of issue, and one batch of
rows. `sampo.data.validate` checks the rows; this module measures the good ones.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..data.columns import TableRows
from ..data.issues import Issue, PreferenceDataError, suggest
from ..data.layouts import HEAD_ROWS, Pair, serialize
from ..data.tokenize import note_of_text
from ..data.treatment import Treatment
from ..data.validate import CheckedRow, RowScanner, find_missing_columns
from .tokens import TokenCounter, WordCounter

PAIRS_PER_BATCH = 250  # tokenised at a time
MAX_GROUPS = 1000
NO_VALUE, OTHERS = "(no value)", "(further values)"
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class PairNumbers:
    """The numbers of each good pair, as `(n,)` arrays.

    Attributes:
        row: number of its row in the split, from 0.
        group: number of its group; 0 without groups.
        prompt: length of the prompt.
        chosen: length T_w of the chosen response.
        rejected: length T_l of the rejected response.
        chosen_end: position of the last end token in the chosen response, from 0; -1 for none.
        rejected_end: the same for the rejected response.
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

    def select(self, which: np.ndarray) -> "PairNumbers":
        """Select pairs by `which`, `(n,)` bool."""
        return replace(self, **{column.name: getattr(self, column.name)[which] for column in fields(self)})

    @classmethod
    def concatenate(cls, parts: "Iterable[PairNumbers]") -> "PairNumbers":
        """Join the pairs of several splits, one after the other."""
        parts = list(parts)
        columns = {c.name: np.concatenate([getattr(part, c.name) for part in parts]) for c in fields(cls)}
        return cls(**columns)


# type codes of `array`: 64 bits for row numbers and hashes, 32 for lengths and positions
_CODES = {c.name: "q" if c.name == "row" else "Q" if "hash" in c.name else "i" for c in fields(PairNumbers)}


class Groups:
    """Values of the column by which pairs are grouped, in the order of their first appearance."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def number_of(self, value: Any) -> int:
        """Return the number of a value; beyond `MAX_GROUPS` all further values share one."""
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
    """The result of one pass over a split.

    Attributes:
        name: of the split.
        rows: number of rows, good and bad.
        layout: of the rows, as in docs/data.md.
        issues: by kind, each with its first rows and its number of rows.
        pairs: the good ones.
        notes: remarks for the reader, in sentences.
    """

    name: str
    rows: int
    layout: str
    issues: list[Issue]
    pairs: PairNumbers
    notes: list[str] = field(default_factory=list)


def scan_split(
    name: str,
    rows: TableRows,
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
        rows: its source.
        counter: measures a pair.
        by: column to group by, or None.
        groups: of all splits; new values are added.
        advance: called with (rows done, rows in all).
        treatment: changes of a pair before it is measured.

    Raises:
        PreferenceDataError: `chosen` or `rejected` is no column, or no row can be read.
    """
    _check_split_columns(name, rows.columns, by)
    readable = _ReadableRows(rows)
    by_columns = (by,) if by else ()
    scanner = RowScanner(readable, treatment, repeats_by_head=True, other_columns=by_columns)
    measured = _Measured(scanner, counter)
    for row in scanner:
        if not row.issues:
            measured.add(row, groups.number_of(row.cells[-1]) if by else 0)
        if scanner.total % HEAD_ROWS == 0:
            advance(scanner.total, max(getattr(rows, "total", 0), scanner.total))
    measured.flush()
    if readable.error is not None and not scanner.total:
        raise readable.error
    advance(scanner.total, scanner.total)
    notes = [f"Split `{name}`{note}" for note in (_note_of_prompt(scanner), _note_of_text(counter)) if note]
    scanner.settle_repeats()
    issues = scanner.list_row_issues(getattr(counter, "template", None))
    if readable.error is not None:
        issues.insert(0, Issue("unreadable_file", "", [], 1, str(readable.error)))
    return SplitScan(name, scanner.total, scanner.layout, issues, measured.pairs(), notes)


def _check_split_columns(name: str, columns: list[str], by: str | None) -> None:
    """Raise unless the source has both responses, and the column to group by."""
    if missing := find_missing_columns(columns):
        fixes = " ".join(f"There is no column `{issue.column}`. {issue.fix}" for issue in missing)
        raise PreferenceDataError(f"Split `{name}` must have both responses of a pair. {fixes}", missing)
    if by and by not in columns:
        raise PreferenceDataError(
            f"`by` must be a column of the data, got {by!r}; split `{name}` has {columns}.{suggest(by, columns)}"
        )


class _ReadableRows:
    """The rows of a split up to the first unreadable one; `error` then holds the reason."""

    def __init__(self, rows: TableRows):
        self.rows = rows
        self.columns = rows.columns
        self.error: PreferenceDataError | None = None

    def cells(self, names: list[str]) -> Iterator[Any]:
        """The values of the named columns, row by row."""
        try:
            yield from self.rows.cells(names)
        except PreferenceDataError as error:
            self.error = error


class _Measured:
    """Measures good pairs, a batch at a time; pairs that cannot be measured are counted as issues."""

    def __init__(self, scanner: RowScanner, counter: WordCounter | TokenCounter):
        self.scanner, self.counter = scanner, counter
        self.arrays = {name: array(code) for name, code in _CODES.items()}
        self.waiting: list[tuple[int, int, Pair, dict[str, Any]]] = []  # row, group, pair, extra

    def add(self, row: CheckedRow, group: int) -> None:
        """Add a good pair to the batch, and measure the batch when it is full."""
        self.waiting.append((row.number, group, row.pair, row.extra))
        if len(self.waiting) == PAIRS_PER_BATCH:
            self.flush()

    def flush(self) -> None:
        """Measure the pairs of an incomplete batch."""
        measured = self.counter.measure([pair for _, _, pair, _ in self.waiting], [e for *_, e in self.waiting])
        for (number, group, pair, _), numbers in zip(self.waiting, measured, strict=True):
            if len(numbers) == 2:
                kind, column = map(str, numbers)
                self.scanner.issues.add(number, [(kind, column)])
                continue
            values = (number, group, *numbers, *_hash_pair(pair))
            for kept, value in zip(self.arrays.values(), values, strict=True):
                kept.append(value)
        self.waiting.clear()

    def pairs(self) -> PairNumbers:
        """The numbers of all pairs measured so far."""
        return PairNumbers(**{name: np.asarray(values) for name, values in self.arrays.items()})


def _note_of_text(counter: WordCounter | TokenCounter) -> str | None:
    """Describe text pairs with the tokenizer of a chat model, and merged tokens at the start of the response."""
    if not isinstance(counter, TokenCounter) or not counter.texts:
        return None
    note = note_of_text(counter.merged, counter.texts, has_template=bool(counter.tokenizer.chat_template))
    counter.texts = counter.merged = 0
    return note and f": {note}"


def _note_of_prompt(scanner: RowScanner) -> str | None:
    """Name a column that may hold the prompts."""
    near = scanner.prompt_like_column
    return near and (
        " has no column `prompt`, so the beginning that both responses share was taken for it. If "
        f"`{near}` is meant, run the audit with `columns` prompt={near}."
    )


def _hash_pair(pair: Pair) -> tuple[int, int, int]:
    """Hash the prompt, the pair, and the pair with its responses swapped."""
    prompt, chosen, rejected = (hashlib.blake2b(serialize(part).encode(), digest_size=8).digest() for part in pair)
    return _to_int(prompt), _to_int(prompt + chosen + rejected), _to_int(prompt + rejected + chosen)


def _to_int(content: bytes) -> int:
    if len(content) > 8:
        content = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(content, "little")
