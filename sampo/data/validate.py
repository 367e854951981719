"""The one row scanner: reads each row of a source once, checks it, and counts issues.

`load_preferences` keeps the good rows, `audit_preferences` measures them, and `check_preferences` (here) changes
nothing. All three read rows through [`RowScanner`], so that they agree on what a good row is.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .chat import ChatTemplate, template_of
from .columns import PairRows, TableRows, nearest_column, pair_rows
from .issues import ROWS_NAMED, Issue, IssueCounter, PreferenceDataError, RowIssues
from .json_files import BrokenLine
from .layouts import (
    EXTRA_COLUMNS,
    HEAD_ROWS,
    PAIR_COLUMNS,
    READERS,
    Pair,
    detect_layout,
    find_option_issue,
    has_other_content,
)
from .repeated_prompts import FEW_BYTES, are_many
from .sources import SourceTable
from .treatment import Treatment, plain_repeat_bytes

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

TOKENISED_COLUMNS = frozenset({"prompt_ids", "chosen_ids", "rejected_ids"})
IMAGE_COLUMNS = frozenset({"image", "images"})
_REPEATED: RowIssues = [("repeated_prompt", "chosen"), ("repeated_prompt", "rejected")]


class CheckedRow(NamedTuple):
    """A row and its issues.

    Attributes:
        number: of the row, from 0.
        pair: normalised, if there is no issue.
        extra: values of those of `EXTRA_COLUMNS` that the source has.
        issues: kinds and columns; empty for a good row.
        cells: values of `prompt`, `chosen`, `rejected` in the source, then those of `EXTRA_COLUMNS` that it has, then
            those of the other columns that were asked for.
    """

    number: int
    pair: Pair
    extra: dict[str, Any]
    issues: RowIssues
    cells: tuple


class RowScanner:
    """Checks the rows of a source, in their order.

    Some responses may quote their prompt. Whether the data set repeats its prompts in plain text is known
    after all rows, and `settle_repeats` then returns the rows that are bad; a caller that reads the rows once and uses
    each at once has the first rows decide instead (`repeats_by_head`).

    Args:
        rows: of the source, with columns `prompt`, `chosen` and `rejected`.
        treatment: what is done to a pair before it is checked.
        template: chat template that every pair of messages is checked with.
        strict: for a trainer, which takes the rows as they are: a text `prompt` beside messages is an issue.
        repeats_by_head: the first rows decide whether prompts are repeated.
        other_columns: further columns whose values each row gives.
        rows_named: how many rows are remembered of each kind of issue.

    Attributes:
        layout: of the data, by its first rows.
        missing: issues of missing columns. If there are any, the existing columns are still checked.
        issues: counts of issues of the rows read so far.
        total: number of rows read so far.
        cuts_plain_repeats: whether prompts are treated as repeated while rows are read, by the first rows.

    Raises:
        PreferenceDataError: the treatment is undefined for the layout, or the source cannot be read.
    """

    def __init__(
        self,
        rows: TableRows,
        treatment: Treatment,
        *,
        template: ChatTemplate | None = None,
        strict: bool = False,
        repeats_by_head: bool = False,
        other_columns: tuple[str, ...] = (),
        rows_named: int = ROWS_NAMED,
    ):
        self.columns, self.treatment, self.template, self.strict = rows.columns, treatment, template, strict
        self.missing = find_missing_columns(self.columns)
        self.issues = IssueCounter(rows_named)
        self.total = 0
        self._extra_columns = [name for name in EXTRA_COLUMNS if name in self.columns]
        names = [*PAIR_COLUMNS, *self._extra_columns, *other_columns]
        self._cells = iter(()) if len(self.missing) == 2 else rows.cells(names)
        self._head = list(itertools.islice(self._cells, HEAD_ROWS))
        readable = [row for row in self._head if not isinstance(row, BrokenLine)]
        self.layout = detect_layout(self.columns, readable)
        treatment.check_layout(self.layout)
        self._reader = READERS["messages" if strict and self.layout == "text_beside_messages" else self.layout]
        self._is_text_only = not IMAGE_COLUMNS & set(self.columns)
        self._first_options: dict[str, Any] | None = None  # of the template, in the first good row
        self._repeating: list[int] = []  # rows whose responses both begin with their prompt, in plain text
        self._n_conclusive = 0  # how many of them have a prompt long enough to prove something
        self._bad_when_cut: dict[int, RowIssues] = {}  # the same rows -> their issues without the prompt, if any
        self._by_head = repeats_by_head
        self.cuts_plain_repeats = repeats_by_head and self._repeats_prompts(readable)

    def __iter__(self) -> Iterator[CheckedRow]:
        missing = {issue.column for issue in self.missing}
        for row in itertools.chain(self._head, self._cells):
            number = self.total
            if isinstance(row, BrokenLine):
                checked = CheckedRow(number, (None, None, None), {}, [(row.kind, "")], ())
                self.issues.add(number, checked.issues, row.position)
            else:
                extra = dict(zip(self._extra_columns, row[3:], strict=False))
                pair, issues = self._read(row)
                if missing:
                    issues = [issue for issue in issues if issue[1] not in missing]
                elif not issues:
                    issues = self._find_template_issues(pair, extra)
                checked = CheckedRow(number, pair, extra, issues, row)
                if issues:
                    self.issues.add(number, issues)
            self.total += 1
            yield checked

    def _read(self, cells: tuple) -> tuple[Pair, RowIssues]:
        """Read the pair of the next row and apply the treatment."""
        pair, issues = self.treatment.apply(*self._reader(*cells[:3]), plain_repeats=self.cuts_plain_repeats)
        if not issues and not self.cuts_plain_repeats and (size := plain_repeat_bytes(pair)):
            self._repeating.append(self.total)
            self._n_conclusive += size >= FEW_BYTES
            if self.treatment.cuts and not self._by_head:
                _, issues_when_cut = self.treatment.apply(pair, [], plain_repeats=True)
                if issues_when_cut:
                    self._bad_when_cut[self.total] = issues_when_cut
        return pair, issues

    def _repeats_prompts(self, rows: list[tuple]) -> bool:
        """Whether so many of the first rows begin with their prompt in plain text that this is a mistake."""
        pairs = [self.treatment.apply(*self._reader(*row[:3])) for row in rows]
        conclusive = sum(not issues and plain_repeat_bytes(pair) >= FEW_BYTES for pair, issues in pairs)
        return are_many(conclusive, len(self._head))

    def _find_template_issues(self, pair: Pair, extra: dict[str, Any]) -> RowIssues:
        """Find what prevents a good pair from being rendered."""
        if self._first_options is None:
            self._first_options = extra
        if issue := find_option_issue(extra, self._first_options):
            return [issue]
        if isinstance(pair[0], str) or not self._is_text_only:
            return []
        found = [("not_text", name) for name, part in zip(PAIR_COLUMNS, pair, strict=True) if has_other_content(part)]
        if not found and self.template is not None and (issue := self.template.find_issue(pair, extra)):
            found = [issue]
        return found

    @property
    def repeats_prompts(self) -> bool:
        """Whether so many of the rows read so far begin with their prompt in plain text that this is a mistake."""
        return are_many(self._n_conclusive, self.total)

    def settle_repeats(self) -> set[int]:
        """After all rows: count those that are bad because the data set repeats its prompts, and return them.

        These are all rows that begin with their prompt, or with `repeated_prompt: cut` those that have an issue
        without it. No row is bad if few begin with their prompt.
        """
        if not self.repeats_prompts:
            return set()
        bad = dict.fromkeys(self._repeating, _REPEATED)
        if self.treatment.cuts and not self._by_head:
            bad = self._bad_when_cut
        for row, issues in bad.items():
            self.issues.add(row, issues)
        return set(bad)

    def list_issues(self) -> list[Issue]:
        """All issues, missing columns first."""
        missing = list(self.missing)
        # Some unshared beginnings are bad rows, many mean that the prompt is in another column.
        unshared = self.issues.count(("prompt_not_shared", "prompt"))
        if 10 * unshared > self.total and nearest_column("prompt", self.columns):
            missing.append(_missing_column("prompt", self.columns))
        return missing + self.list_row_issues(self.template)

    def list_row_issues(self, template: ChatTemplate | None) -> list[Issue]:
        """The issues of rows alone; `template` is the one that they were checked with."""
        found = self.issues.list_issues({} if template is None else template.reasons)
        if not self.strict or self.layout != "text_beside_messages":
            return found
        return [_mention_load_preferences(issue) if issue.kind == "wrong_type" else issue for issue in found]

    @property
    def prompt_like_column(self) -> str | None:
        """A column that may hold the prompts, where the beginning that the responses share was taken for them."""
        return nearest_column("prompt", self.columns) if self.layout == "shared_text" else None

    def warn_of_prompt_like_column(self) -> None:
        """Log a warning if there is such a column."""
        if near := self.prompt_like_column:
            logger.warning(
                "there is no column `prompt`, so the beginning that `chosen` and `rejected` share is taken for it. If "
                "`%s` is meant, set `columns` prompt=%s (in Python `columns={'prompt': '%s'}`)",
                *(near, near, near),
            )


def _mention_load_preferences(issue: Issue) -> Issue:
    fix = f"`load_preferences` makes a message of a text `prompt` beside messages. {issue.fix}"
    return Issue(issue.kind, issue.column, issue.rows, issue.count, fix)


def find_missing_columns(columns: list[str]) -> list[Issue]:
    """One issue for each response that has no column."""
    return [_missing_column(column, columns) for column in ("chosen", "rejected") if column not in columns]


def _missing_column(column: str, columns: list[str]) -> Issue:
    near = nearest_column(column, columns)
    option = f"`columns` {column}={near or 'NAME'} (in Python `columns={{{column!r}: {near or 'NAME'!r}}}`)"
    what = f"Did you mean `{near}`? Set {option}" if near else f"Name the right one with {option}"
    return Issue("missing_column", column, [], 0, f"The columns are {columns}. {what}.")


def make_error(label: str, issues: list[Issue], total: int) -> PreferenceDataError:
    """Make the error that lists all issues of a data set of `total` rows."""
    lines = [f"{label} cannot be trained on (rows count from 0):"]
    for issue in issues:
        if issue.kind == "missing_column":
            lines.append(f"- There is no column `{issue.column}`. {issue.fix}")
            continue
        lines.append(f"- {issue.describe(total)}")
    return PreferenceDataError("\n".join(lines), issues)


def check_preferences(
    dataset: "Dataset | IterableDataset", *, max_rows_named: int = ROWS_NAMED, chat_template_of: Any = None
) -> None:
    """Raise a [`PreferenceDataError`] that lists all issues of a data set, or return quietly; nothing is changed.

    Takes whatever TRL's `DPOTrainer` takes. Of streams, of data sets with images and of those with a transform only
    the columns are checked; data that is tokenised already is not checked. With a tokenizer in `chat_template_of`
    every pair of messages goes through its chat template.
    """
    from datasets import Dataset

    names = list(dataset.column_names or next(iter(dataset), ()))
    if set(names) >= TOKENISED_COLUMNS:
        return
    # A stream may be endless, and to read a transform or an image costs more than this check is worth.
    readable = isinstance(dataset, Dataset) and dataset.format["type"] != "custom" and not IMAGE_COLUMNS & set(names)
    if not readable:
        if missing := find_missing_columns(names):
            raise make_error("the preference data", missing, 0)
        return
    table = SourceTable(dataset, names)
    _check_format(table)
    scanner = RowScanner(
        table, Treatment(), template=template_of(chat_template_of), strict=True, rows_named=max_rows_named
    )
    for _ in scanner:
        pass
    scanner.settle_repeats()
    scanner.warn_of_prompt_like_column()
    if issues := scanner.list_issues():
        raise make_error("the preference data", issues, scanner.total)
    if not scanner.total:
        raise PreferenceDataError("A preference data set must have at least one pair, got none.")


def _check_format(table: SourceTable) -> None:
    """Raise for columns that `load_preferences` would make pairs of: a trainer takes three columns as they are."""
    made = pair_rows(table, label="the preference data")
    if isinstance(made, PairRows):
        used = ", ".join(f"`{name}`" for name in made.parts.values())
        raise PreferenceDataError(
            f"The preference data must be in TRL's format, got columns ({used}) of which pairs have to be made first: "
            "a system message, an input, or messages of ShareGPT. Load the data with `load_preferences`, or remove "
            "the columns that are not meant."
        )
