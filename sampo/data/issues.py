"""What can be wrong with a row: the kinds of issues, their descriptions and counts, and the error that lists them."""

import difflib
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_NESTING = 32  # levels of lists and objects in one row: `datasets` fails at about 50, Parquet at 100
ON_BAD_ROWS = ("error", "drop")
ROWS_NAMED = 10  # first rows that an error lists of each kind of issue

DROP_FIX = "To leave them out, set `on_bad_rows: drop` (in Python `load_preferences(..., on_bad_rows='drop')`)"
# kind of issue -> (its description after "12 of 2,312 pairs", the fix)
KINDS = {
    "bad_utf8": ("{are} not valid UTF-8", f"Save the file as UTF-8. {DROP_FIX}."),
    "broken_line": ("{are} not complete JSON", f"Fix the line, or fetch the file again. {DROP_FIX}."),
    "not_an_object": (
        "{are} valid JSON but not an object",
        f'Each must look like {{"prompt": …, "chosen": …, "rejected": …}}. {DROP_FIX}.',
    ),
    "repeated_key": (
        "{have} a key twice in one object",
        f"It is not known which of the two values is meant: rename or remove one. {DROP_FIX}.",
    ),
    "too_deep": (
        f"{{are}} nested deeper than {MAX_NESTING} levels",
        f"Store what is nested as JSON text. {DROP_FIX}.",
    ),
    "null": ("{have} no value (null) in `{column}`", f"Fill it in. {DROP_FIX}."),
    "nan": ("{have} NaN in `{column}`", f"An empty cell of a table is read as NaN; fill it in. {DROP_FIX}."),
    "wrong_type": (
        "{have} a `{column}` of the wrong type",
        "`prompt`, `chosen` and `rejected` must all be strings, or all lists of messages "
        f'{{"role": …, "content": …}}. {DROP_FIX}.',
    ),
    "empty": ("{have} an empty `{column}`", f"Fill it in. {DROP_FIX}."),
    "not_a_transcript": (
        "{have} a `{column}` that does not begin with `Human:`, while most rows do",
        f"Do not mix transcripts with other text. {DROP_FIX}.",
    ),
    "bad_roles": (
        "{have} bad roles in `{column}`",
        "After the system message, user and assistant must take turns, and a completion must end with the assistant. "
        f"{DROP_FIX}.",
    ),
    "prompt_role": (
        "{have} a `{column}` that begins with a system or user message",
        "A response must begin with the assistant: what comes before it belongs to `prompt`, for all of a response is "
        f"trained on. {DROP_FIX}.",
    ),
    "repeated_prompt": (
        "{have} the prompt again at the start of `{column}`",
        "A response must hold the answer alone, because all of it is trained on. Set `repeated_prompt: cut` "
        "(`repeated_prompt='cut'` of `load_preferences`) to cut the prompt there, and the role tags around it. "
        f"{DROP_FIX}.",
    ),
    "role_tags": (
        "{have} role tags of a chat template at the start of `{column}`",
        "The tags belong to the template, or to a `prompt` that is rendered already. Set `repeated_prompt: cut` "
        f"(`repeated_prompt='cut'` of `load_preferences`) to cut them. {DROP_FIX}.",
    ),
    "rendered_text": (
        "{have} role tags of a chat template around `{column}`",
        "With `text_as_messages` the template would be applied to text that is rendered already. Leave the option "
        f"out, or remove the tags from the text. {DROP_FIX}.",
    ),
    "not_text": (
        "{have} content in `{column}` that is not text",
        "Images, audio and the like need a column `images` and a model for them; here content must be a string or "
        f"blocks of type `text`. {DROP_FIX}.",
    ),
    "bad_kwargs": (
        "{have} no object of options in `{column}`",
        f"Each row must have one, with the same keys: fill them in, or remove the column. {DROP_FIX}.",
    ),
    "uneven_kwargs": (
        "{have} other keys in `{column}` than the first row",
        f"A missing key would reach the template as null: give each row the same keys. {DROP_FIX}.",
    ),
    "bad_tools": (
        "{have} `{column}` that are not a list of JSON schemas",
        'Each must look like [{"type": "function", "function": {"name": …}}], or be the JSON text of such a list; '
        f"null is no tools. {DROP_FIX}.",
    ),
    "system_lost": (
        "{have} a system message that the tokenizer's chat template leaves out",
        "Use a template that shows system messages (`chat_template`), or put their text into the first user message. "
        f"{DROP_FIX}.",
    ),
    "message_lost": (
        "{have} a message in `{column}` that the tokenizer's chat template does not show",
        f"Use a template for this kind of content (`chat_template`). {DROP_FIX}.",
    ),
    "blocks_as_python": (
        "{have} content blocks in `{column}` that the tokenizer's chat template prints as Python",
        f"Write the content as strings, or use a template for blocks (`chat_template`). {DROP_FIX}.",
    ),
    "prompt_not_shared": (
        "{have} no shared beginning of `chosen` and `rejected` to serve as `prompt`",
        f"Without a `prompt` column both responses must begin with the same prompt. {DROP_FIX}.",
    ),
    "not_rendered": (
        "{are} refused by the tokenizer's chat template",
        f"Use a tokenizer whose template knows these roles and messages. {DROP_FIX}.",
    ),
    "no_tokens": ("{have} a `{column}` without a token", f"The tokenizer leaves nothing of the text. {DROP_FIX}."),
    "unknown_speaker": (
        "{have} a message of an unknown speaker",
        "`from` must be human, gpt, system, observation or function_call; or write messages as "
        f'{{"role": …, "content": …}}. {DROP_FIX}.',
    ),
    "bad_call": (
        "{have} a function call that cannot be read",
        f'Its `value` must be JSON like {{"name": …, "arguments": {{…}}}}. {DROP_FIX}.',
    ),
    "bad_system": (
        "{have} a system message that cannot be put before the prompt",
        f"Correct the row, or leave the column out with `columns` system=. {DROP_FIX}.",
    ),
    "bad_input": (
        "{have} an input that cannot be added to the prompt",
        f"Correct the row, or leave the column out with `columns` input=. {DROP_FIX}.",
    ),
    "identical": (
        "{have} the same text in `chosen` and `rejected`",
        f"A pair without a difference has no preference to learn. {DROP_FIX}.",
    ),
}


@dataclass(frozen=True)
class Issue:
    """One kind of issue in one column.

    Attributes:
        kind: key of `KINDS`, or `missing_column` or `unreadable_file`.
        column: name of the column, empty for an issue of the row itself.
        rows: the first rows that have it, counted from 0.
        count: number of all rows that have it.
        fix: what to do about it.
    """

    kind: str
    column: str
    rows: list[int]
    count: int
    fix: str

    def describe(self, total: int) -> str:
        """`12 of 2,312 pairs have an empty `rejected`, first at rows [81, 90, …]`, and the fix."""
        if self.kind not in KINDS:
            return self.fix
        what = f"{self.count:,} of {total:,} pairs {phrase(self.kind, self.column, self.count)}"
        where, more = ("first at rows", ", …") if self.count > len(self.rows) else ("at rows", "")
        return f"{what}, {where} [{', '.join(map(str, self.rows))}{more}]. {self.fix}"


def phrase(kind: str, column: str, count: int) -> str:
    """What is wrong with `count` pairs, after their number."""
    one = count == 1
    return KINDS[kind][0].format(column=column, have="has" if one else "have", are="is" if one else "are")


class PreferenceDataError(ValueError):
    """Preference data that cannot be trained on; `issues` lists everything that is wrong with it."""

    def __init__(self, message: str, issues: Iterable[Issue] = ()):
        super().__init__(message)
        self.issues = list(issues)


RowIssue = tuple[str, str]  # kind and column
RowIssues = list[RowIssue]


class IssueCounter:
    """Counts the issues of rows by kind and column.

    Args:
        rows_named: how many rows are remembered of each.

    Attributes:
        first_issues: (kind, column) of the first issue of each bad row -> number of rows.
    """

    def __init__(self, rows_named: int = ROWS_NAMED):
        self.rows_named = rows_named
        self.first_issues: Counter[RowIssue] = Counter()
        self._found: dict[RowIssue, tuple[list[int], int]] = {}  # -> first rows in order, number of all
        self._positions: dict[str, list[str]] = {}  # kind -> file and line of unreadable rows

    def add(self, row: int, issues: RowIssues, position: str = "") -> None:
        """Count a bad row.

        Args:
            row: its number, from 0; the rows need not come in order.
            issues: kinds and columns, at least one.
            position: file and line, for a row that cannot be read.
        """
        self.first_issues[issues[0]] += 1
        for kind, column in issues:
            rows, count = self._found.get((kind, column), ([], 0))
            insort(rows, row)
            del rows[self.rows_named :]
            self._found[kind, column] = rows, count + 1
        if position and len(positions := self._positions.setdefault(issues[0][0], [])) < self.rows_named:
            positions.append(position)

    def count(self, issue: RowIssue) -> int:
        """Number of rows that have an issue."""
        return self._found.get(issue, ([], 0))[1]

    def list_issues(self, reasons: Mapping[str, str]) -> list[Issue]:
        """All issues in the order in which they were first found.

        Args:
            reasons: kind -> what a chat template raised on the first row that has it.
        """
        return [
            Issue(kind, column, list(rows), count, self._describe_fix(kind, count, reasons.get(kind)))
            for (kind, column), (rows, count) in self._found.items()
        ]

    def _describe_fix(self, kind: str, count: int, reason: str | None) -> str:
        positions, fix = self._positions.get(kind, []), KINDS[kind][1]
        if reason:
            fix = f"The first: {reason}. {fix}"
        more = "; …" if count > len(positions) else ""
        return f"See {'; '.join(positions)}{more}. {fix}" if positions else fix


def suggest(value: str, choices: Iterable) -> str:
    """End of an error message: the choice that was probably meant, if one is near."""
    close = difflib.get_close_matches(value, [str(choice) for choice in choices], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(option: str, value: Any, choices: tuple) -> None:
    """Raise a `ValueError` unless the value of an option is one of several."""
    if value not in choices:
        raise ValueError(f"`{option}` must be one of {list(choices)}, got {value!r}.{suggest(str(value), choices)}")
