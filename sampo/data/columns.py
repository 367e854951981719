r"""From the columns of a source to `prompt`, `chosen` and `rejected`: names, system prompts, inputs, ShareGPT.

Other columns of a source are used by these rules, the same for loading, audit and generation:

| in the source | becomes |
|---|---|
| `system` or `system_prompt` | a system message in front; text becomes messages then. Rows without one have none |
| `input` (Alpaca), or `context`, beside `instruction` | `instruction`, a line break and `input`, as in LLaMA-Factory |
| `input` or `context` beside another `prompt` | an error, unless `columns` names it: it may be the prompt again |
| `conversations` | the prompt |
| `{"from": "human", "value": …}` | `{"role": "user", "content": …}` (ShareGPT) |
| one message as `chosen` or `rejected`, not in a list; text beside `conversations` | a list of one message |

A [`PairRows`] wraps the rows of a source and applies the rules, one row at a time.
"""

import difflib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .issues import PreferenceDataError, suggest
from .json_files import BrokenLine
from .layouts import HEAD_ROWS, PAIR_COLUMNS

if TYPE_CHECKING:
    from datasets import IterableDataset

SYSTEM_COLUMNS = ("system", "system_prompt")
INPUT_COLUMNS = ("input", "context")
SOURCE_PARTS = (*PAIR_COLUMNS, "system", "input")  # what `columns` can name

# `from` of ShareGPT and its relatives -> role
SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "tool"),
}
CALLS = ("function_call", "tool_call")


# Names that other collections give to the three columns, which are not similar to ours in spelling.
OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context"),
    "chosen": ("chosen_response", "preferred", "accepted", "response_chosen", "winner", "better", "positive"),
    "rejected": ("rejected_response", "dispreferred", "response_rejected", "loser", "worse", "negative"),
}


class TableRows(Protocol):
    """Rows of a source: a file that is streamed, a table, or a [`PairRows`] in front of one."""

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        ...

    def cells(self, names: list[str]) -> "Iterator[Any]":
        """The values of the named columns row by row; a `BrokenLine` for a row that could not be read."""
        ...


class _BadRow(ValueError):
    """A row that no pair can be made of: the kind of issue, and the reason."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind = kind


def read_columns(arguments: Sequence[str]) -> dict[str, str]:
    """Parse `["prompt=question"]` of a command line to a mapping of our names to those of the source.

    Raises:
        ValueError: an argument has another form.
    """
    wrong = [each for each in arguments if each.count("=") != 1 or each.startswith("=")]
    if wrong:
        raise ValueError(f"`columns` must be given as OURS=THEIRS, such as prompt=question, got {wrong[0]!r}.")
    return dict(each.split("=", 1) for each in arguments)


def check_columns(columns: Mapping[str, str], there: Sequence[str], label: str) -> None:
    """Raise unless `columns` names parts that we know, and different existing columns.

    An empty name excludes a part.
    """
    given = [theirs for theirs in columns.values() if theirs]
    empty = [ours for ours, theirs in columns.items() if not theirs and ours in PAIR_COLUMNS]
    if set(columns) - set(SOURCE_PARTS) or set(given) - set(there) or len(set(given)) < len(given) or empty:
        odd = sorted(set(given) - set(there)) or sorted(set(columns) - set(SOURCE_PARTS)) or [""]
        raise ValueError(
            "`columns` must map names among `prompt`, `chosen`, `rejected`, `system`, `input` to different columns of "
            f"the source, got {dict(columns)}; {label} has {list(there)}.{suggest(odd[0], [*there, *SOURCE_PARTS])}"
        )


def pair_rows(rows: TableRows, columns: Mapping[str, str] | None = None, label: str = "the data") -> TableRows:
    """Return rows with columns `prompt`, `chosen` and `rejected`, made by the rules above if any applies.

    Args:
        rows: of a source.
        columns: our names -> those of the source; an empty name excludes a part.
        label: of the source, for messages.

    Raises:
        ValueError: `columns` names something else.
        PreferenceDataError: it is not clear what a column means.
    """
    columns = dict(columns or {})
    check_columns(columns, rows.columns, label)
    parts = _find_parts(rows, columns, label)
    makes = bool({"system", "input"} & parts.keys()) or parts.get("prompt") == "conversations"
    makes = makes or _has_other_messages(rows, parts)
    if not makes and all(theirs == ours for ours, theirs in parts.items()):
        return rows
    return PairRows(rows, parts, makes, text_as_messages="system" in parts and "chosen" in parts)


def pairs_of_stream(stream: "IterableDataset", columns: Mapping[str, str] | None = None) -> "IterableDataset":
    """Apply the same rules to a stream, whose first rows decide which apply.

    Raises:
        PreferenceDataError: of a row, when it is reached.
    """
    first = list(itertools.islice(stream, 100))
    names = list(stream.column_names or (first[0] if first else ()))
    head = _Listed(names, first)
    made = pair_rows(head, columns, "the stream")
    if made is head:
        return stream
    assert isinstance(made, PairRows)
    maker, used = made, made.parts

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        try:
            pair = maker.make({part: row.get(theirs) for part, theirs in used.items()})
        except _BadRow as issue:
            what = f"A row of the stream is bad: {issue}. Load the data without streaming for a list of all."
            raise PreferenceDataError(what) from None
        kept = {name: value for name, value in row.items() if name not in set(used.values())}
        return {**kept, **{name: value for name, value in zip(PAIR_COLUMNS, pair, strict=True) if name in used}}

    return stream.map(convert, remove_columns=sorted(set(used.values()) - set(PAIR_COLUMNS)))


@dataclass(frozen=True)
class _Listed:
    """Rows in a list."""

    columns: list[str]
    rows: list[dict[str, Any]]

    def cells(self, names: list[str]) -> Iterator[tuple]:
        """The values of the named columns, row by row."""
        return (tuple(map(row.get, names)) for row in self.rows)


@dataclass(frozen=True)
class PairRows:
    """The rows of a source, with our three columns.

    Attributes:
        rows: of the source.
        parts: part (`prompt`, `chosen`, `rejected`, `system`, `input`) -> its column in the source.
        makes: whether anything is made of the cells; else columns get our names and that is all.
        text_as_messages: some rows have a system message, so text becomes messages in all of them.
    """

    rows: TableRows
    parts: dict[str, str]
    makes: bool
    text_as_messages: bool = False

    @property
    def columns(self) -> list[str]:
        """Our columns first, then those of the source that are not used for them."""
        ours = [name for name in PAIR_COLUMNS if name in self.parts]
        used = {*self.parts.values(), *ours}
        return [*ours, *(name for name in self.rows.columns if name not in used)]

    @property
    def total(self) -> int:
        """Number of rows of the source."""
        return getattr(self.rows, "total", 0)

    def cells(self, names: list[str]) -> Iterator[Any]:
        """The values of the named columns, row by row; None for a column that is not there."""
        known = set(self.columns)
        others = [name for name in dict.fromkeys(names) if name in known and name not in PAIR_COLUMNS]
        parts = list(self.parts)
        for number, row in enumerate(self.rows.cells([*self.parts.values(), *others])):
            if isinstance(row, BrokenLine):
                yield row
                continue
            try:
                made = self.make(dict(zip(parts, row[: len(parts)], strict=True)))
            except _BadRow as issue:
                yield BrokenLine(issue.kind, f"row {number} ({issue})")
                continue
            found = dict(zip(PAIR_COLUMNS, made, strict=True)) | dict(zip(others, row[len(parts) :], strict=True))
            yield tuple(found.get(name) for name in names)

    def dicts(self) -> "list[dict | BrokenLine]":
        """All rows, as parsed JSON."""
        names = self.columns
        return [
            row if isinstance(row, BrokenLine) else dict(zip(names, row, strict=True)) for row in self.cells(names)
        ]

    def make(self, cells: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Make prompt, chosen and rejected of a row; None for a part that the source does not have.

        Raises:
            _BadRow: they cannot be made.
        """
        prompt, chosen, rejected = (_as_chat(cells.get(name)) for name in PAIR_COLUMNS)
        if _is_filled(more := cells.get("input")):
            if not isinstance(prompt, str):
                raise _BadRow("bad_input", "its prompt is not text that `input` could follow")
            if self._is_conversation(chosen) and self._is_conversation(rejected):
                raise _BadRow("bad_input", "its prompt is what the conversations share, without `input`")
            prompt = f"{prompt}\n{_text('input', more)}"
        system = _text("system", cells["system"]) if _is_filled(cells.get("system")) else None
        if self.parts.get("prompt") == "conversations":  # LLaMA-Factory's responses may be text beside it
            chosen, rejected = (
                [{"role": "assistant", "content": response}] if isinstance(response, str) else response
                for response in (chosen, rejected)
            )
        if self.text_as_messages and isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            prompt = _as_turn(prompt)
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        if system is None:
            return prompt, chosen, rejected
        if isinstance(prompt, str) and not self._is_conversation(chosen):
            prompt = _as_turn(prompt)
        if prompt == []:
            return prompt, chosen, rejected  # the row scanner reports that it is empty
        if isinstance(prompt, list):
            return _with_system(prompt, system), chosen, rejected
        if self._is_conversation(chosen) and self._is_conversation(rejected):
            return prompt, _with_system(chosen, system), _with_system(rejected, system)
        raise _BadRow("bad_system", "there is no prompt to put the system message before")

    @staticmethod
    def _is_conversation(response: Any) -> bool:
        """Whether a response is a conversation from its beginning."""
        return isinstance(response, list) and bool(response) and response[0].get("role") != "assistant"


def nearest_column(wanted: str, columns: list[str]) -> str | None:
    """Return the column that is probably meant, by spelling or by a name that other collections give it."""
    free = {column.lower(): column for column in columns if column not in PAIR_COLUMNS}
    known = [free[name] for name in OTHER_NAMES[wanted] if name in free]
    # 0.82: `prompts`, `Prompt`, `promt`, `choosen`, `reject` are near; `prompt_id` is not
    close = difflib.get_close_matches(wanted, list(free), n=1, cutoff=0.82)
    return free[close[0]] if close else next(iter(known), None)


def _find_parts(rows: TableRows, columns: dict[str, str], label: str) -> dict[str, str]:
    there = rows.columns
    parts = {name: columns.get(name, name) for name in PAIR_COLUMNS if columns.get(name, name) in there}
    if "prompt" not in parts and "conversations" in there and {"chosen", "rejected"} <= parts.keys():
        parts["prompt"] = "conversations"
    taken = set(parts.values())
    if "system" not in columns:
        system = next((name for name in SYSTEM_COLUMNS if name in there and name not in taken), "")
        columns["system"] = system if system and _is_used(rows, system) else ""
    more = columns.get("input")
    if more is None:
        more = next((name for name in INPUT_COLUMNS if name in there and name not in taken), "")
        beside_instruction = parts.get("prompt") == "instruction"
        if more and not ((beside_instruction or "prompt" in parts) and _is_used(rows, more)):
            more = ""
        if more and not beside_instruction:
            raise PreferenceDataError(
                f"It must be clear whether `{more}` belongs to the prompt, got both columns in {label}. Add it to the "
                f"prompt with `columns` input={more} (a line break goes between), or leave it out with `columns` "
                "input=."
            )
    parts |= {part: name for part, name in (("system", columns["system"]), ("input", more)) if name}
    if "system" in parts and "prompt" not in parts and not _are_conversations(rows, parts):
        near = nearest_column("prompt", there) or "NAME"
        raise PreferenceDataError(
            f"A column `{parts['system']}` must come with a column of prompts, got {there} in {label}. Name it with "
            f"`columns` prompt={near}, or leave the system messages out with `columns` system=."
        )
    return parts


def _is_used(rows: TableRows, column: str) -> bool:
    """Whether any cell is not empty; the search ends at the first."""
    return any(_is_filled(row[0]) for row in rows.cells([column]) if not isinstance(row, BrokenLine))


def _head(rows: TableRows, parts: dict[str, str]) -> Iterator[Any]:
    names = [parts[name] for name in PAIR_COLUMNS if name in parts]
    cells = itertools.islice(rows.cells(names), HEAD_ROWS)
    return itertools.chain.from_iterable(row for row in cells if not isinstance(row, BrokenLine))


def _has_other_messages(rows: TableRows, parts: dict[str, str]) -> bool:
    return any(
        isinstance(value, dict) or (isinstance(value, list) and any(map(_is_sharegpt, value)))
        for value in _head(rows, parts)
    )


def _are_conversations(rows: TableRows, parts: dict[str, str]) -> bool:
    values = [value for value in _head(rows, parts) if value is not None]
    return bool(values) and all(isinstance(value, list) for value in values)


def _is_sharegpt(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") is None and message.get("from") is not None


def _as_chat(value: Any) -> Any:
    """Return messages in our spelling, in a list; any other value is returned unchanged."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list) or not any(map(_is_sharegpt, value)):
        return value
    return [_message(each) if _is_sharegpt(each) else each for each in value]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    speaker, value = message["from"], message.get("value")
    if speaker in CALLS:
        call = {"type": "function", "function": _read_call(value)}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if speaker not in SPEAKERS:
        raise _BadRow("unknown_speaker", f"`from` is {str(speaker)[:40]!r}")
    return {"role": SPEAKERS[speaker], "content": value}


def _read_call(value: Any) -> dict[str, Any]:
    try:
        call = json.loads(value) if isinstance(value, str) else value
        return {"name": call["name"], "arguments": call["arguments"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _BadRow("bad_call", "the function call is not a JSON object with `name` and `arguments`") from None


def _as_turn(prompt: str) -> list[Any]:
    """Make messages of a text prompt: none of a blank one, which a system message must not hide."""
    return [{"role": "user", "content": prompt}] if prompt.strip() else []


def _with_system(messages: list[Any], system: str) -> list[Any]:
    first = messages[0] if isinstance(messages[0], dict) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise _BadRow("bad_system", "its messages begin with another system message than the column has")
    return messages


def _is_filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip()) and value == value


def _text(part: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"bad_{part}", f"`{part}` is not text but {type(value).__name__}")
    return value
