"""Rows of JSON files: one object a line, one list of objects, or objects one after the other (pretty-printed).

The text is UTF-8, or UTF-16 or UTF-32, which RFC 4627 (section 3) distinguishes by the zeros of the first
characters, with or without a byte order mark. Lines of UTF-8 are streamed; a list, pretty-printed objects and
other encodings are read completely.
"""

import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .issues import MAX_NESTING, ROWS_NAMED, Issue, PreferenceDataError, phrase

_WHITESPACE = re.compile(r"[ \t\n\r]*")  # that JSON allows between values
LOOK_AHEAD = 1 << 24  # bytes in which the first of several pretty-printed objects must end
_PACKED_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
_MARK = b"\xef\xbb\xbf"
# first bytes -> (what a file is, what to do): none of them can begin JSON
KNOWN_FORMATS = {
    b"\x1f\x8b": ("is packed with gzip", "Unpack it, or let its name end in `.gz` (once for each time it is packed)."),
    b"PK\x03\x04": ("is a zip archive", "Unpack it."),
    b"\x28\xb5\x2f\xfd": ("is packed with zstandard", "Unpack it."),
    b"BZh": ("is packed with bzip2", "Unpack it."),
    b"\xfd7zXZ": ("is packed with xz", "Unpack it."),
    b"PAR1": ("is a Parquet file", "Let its name end in `.parquet`."),
    b"ARROW1": ("is an Arrow file", "Load it with `datasets.Dataset.from_file` and give the data set."),
    b"version https://git-lfs": ("is a Git LFS pointer, not the data", "Fetch the data with `git lfs pull`."),
    b"<": ("is HTML or XML", "It may be the error page of a server. Fetch the data again."),
}


@dataclass(frozen=True)
class BrokenLine:
    """A line of a JSONL file, or an element of a JSON list, that holds no row.

    Attributes:
        kind: of the error, a key of `KINDS`.
        position: file, line, and its issue.
        cut_off: whether it is the last line, and the file ends inside it.
    """

    kind: str
    position: str
    cut_off: bool = False


def unreadable(path: Path, what: str, fix: str = "Fetch or write the file again.") -> PreferenceDataError:
    """Make the error for a file of which rows are lost."""
    return PreferenceDataError(f"{path} {what}. {fix}", [Issue("unreadable_file", "", [], 1, fix)])


def refuse_other_formats(path: Path, head: bytes) -> None:
    """Raise a [`PreferenceDataError`] if the first bytes are those of a format that does not match its name."""
    start = head.removeprefix(_MARK).lstrip()
    for magic, (what, fix) in KNOWN_FORMATS.items():
        if start.startswith(magic):
            raise unreadable(path, what, fix)


def is_packed(path: Path) -> bool:
    """Whether the name marks the file as compressed with gzip."""
    return path.suffix.lower() == ".gz"


def unpacked(path: Path) -> bytes:
    """The content of a gzip file. One that is cut off is an error: the number of rows that it lacks is not known."""
    try:
        with gzip.open(path) as file:
            return file.read()
    except _PACKED_ERRORS as error:
        raise _damaged(path, error) from error


def count_lines(path: Path) -> int:
    """Lines of a file, counted without parsing."""
    lines, last = 0, b""
    try:
        with _open_json(path) as file:
            while chunk := file.read(1 << 20):
                lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    except _PACKED_ERRORS:  # reported when the rows are read
        pass
    return lines + (last not in (b"\n", b""))


def json_rows(path: Path, *, lone_surrogates: bool = False) -> Iterator[dict | BrokenLine]:
    r"""The rows of one file.

    Args:
        path: of the file; packed with gzip if the name ends in `.gz`.
        lone_surrogates: accept half of a surrogate pair (`"\ud83d"` alone), which Arrow and tokenizers refuse.

    Raises:
        PreferenceDataError: the file is empty, damaged, or of another format.
    """
    try:
        with _open_json(path) as file:
            yield from _Reader(path, lone_surrogates).rows(_utf8_lines(path, file))
    except _PACKED_ERRORS as error:
        raise _damaged(path, error) from error


def rows_of_files(paths: list[Path]) -> Iterator[dict | BrokenLine]:
    """The rows of several files.

    Raises:
        PreferenceDataError: a file cannot be read, or no line of any file holds a row.
    """
    broken: list[BrokenLine] = []
    kinds: Counter[str] = Counter()
    found = False
    for row in itertools.chain.from_iterable(map(json_rows, paths)):
        if isinstance(row, dict):
            found = True
        elif not found:
            kinds[row.kind] += 1
            broken += [row] if len(broken) < ROWS_NAMED else []
        yield row
    if not found:
        raise _make_error_of_no_rows(paths[0], broken, kinds)


def _make_error_of_no_rows(path: Path, broken: list[BrokenLine], kinds: Counter[str]) -> PreferenceDataError:
    fix = 'Write each row as an object, like {"prompt": …}, in UTF-8.'
    first = broken[0]
    got = f"none in {kinds.total():,} lines or elements: the first {phrase(first.kind, '', 1)}, {first.position}"
    issues = []
    for kind, count in kinds.items():
        rows = [row for row, line in enumerate(broken) if line.kind == kind]
        positions = "; ".join(broken[row].position for row in rows)
        issues.append(Issue(kind, "", rows, count, f"See {positions or broken[0].position}. {fix}"))
    return PreferenceDataError(f"{path} must hold JSON objects, got {got}. {fix}", issues)


def _open_json(path: Path) -> Any:
    return gzip.open(path) if is_packed(path) else path.open("rb")


def _damaged(path: Path, error: BaseException) -> PreferenceDataError:
    fix = "Fetch or write the file again."
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            fix = "If it is not packed, remove `.gz` from its name; else fetch or write it again."
    return unreadable(path, f"is a damaged or cut-off gzip file ({error}), so rows are lost", fix)


def _utf8_lines(path: Path, file: Any) -> Iterable[bytes]:
    """The lines in UTF-8, without a mark at the start."""
    head = file.peek(64)[:64]
    refuse_other_formats(path, head)
    encoding = json.detect_encoding(head)
    if not encoding.startswith("utf-8") and head.decode(encoding, "ignore")[:1] in (*"{[ \t\r\n",):
        return _recoded(path, file.read(), encoding)
    if head.startswith(_MARK):
        file.read(len(_MARK))
    return file


def _recoded(path: Path, content: bytes, encoding: str) -> io.BytesIO:
    try:
        return io.BytesIO(content.decode(encoding).encode())
    except UnicodeError as error:
        raise unreadable(path, f"is not valid {encoding.upper()} ({error})", "Save it as UTF-8.") from error


class _Reader:
    """Parses the text of one file. `json` keeps the last of two equal keys; here both are recorded."""

    def __init__(self, path: Path, lone_surrogates: bool):
        self.path, self.lone_surrogates = path, lone_surrogates
        self.repeated: list[str] = []  # duplicate keys in an object of the current row
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.repeated += [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        return made

    def rows(self, lines: Iterable[bytes]) -> Iterator[dict | BrokenLine]:
        """Read lines; the first character distinguishes a list from objects, because both are called `.json`."""
        numbered = enumerate(lines, 1)
        first = next(((number, line) for number, line in numbered if line.strip()), None)
        if first is None:
            raise unreadable(self.path, "is empty")
        number, line = first
        rest: Iterator[bytes] = (line for _, line in numbered)
        if line.lstrip().startswith(b"["):
            yield from self._documents(b"".join([b"\n" * (number - 1), line, *rest]))
            return
        if line.lstrip().startswith(b"{") and isinstance(self._line(line, number), BrokenLine):
            ahead = _take(LOOK_AHEAD, line, rest)
            if self._is_pretty_printed(b"".join(ahead)):
                yield from self._documents(b"".join([b"\n" * (number - 1), *ahead, *rest]))
                return
            rest = itertools.chain(ahead[1:], rest)
        for here, each in enumerate(itertools.chain([line], rest), number):
            if each.strip():
                yield self._line(each, here)

    def _is_pretty_printed(self, start: bytes) -> bool:
        """Whether an object begins that ends in a later line."""
        text = start.decode("utf-8", "replace").lstrip()
        try:
            return "\n" in text[: self.decoder.raw_decode(text)[1]]
        except (ValueError, RecursionError):
            return False

    def _line(self, line: bytes, number: int) -> dict | BrokenLine:
        position, content = f"{self.path.name}, line {number}", line.removesuffix(b"\n")
        last = content == line
        try:
            text = content.decode("utf-8")
            self.repeated.clear()
            return self._row(self.decoder.decode(text.removeprefix("\ufeff")), position, text)
        except UnicodeDecodeError as error:
            cut_off = last and error.reason == "unexpected end of data"
            return BrokenLine("bad_utf8", f"{position} (byte {error.start + 1})", cut_off)
        except json.JSONDecodeError as error:
            at_end = error.msg.startswith("Unterminated") or len(error.doc.rstrip()) - error.pos < len("-Infinity")
            cut_off = last and at_end and error.doc.lstrip().startswith("{")
            return BrokenLine("broken_line", f"{position} ({_why_no_json(error, cut_off)})", cut_off)
        except RecursionError:
            return BrokenLine("too_deep", position)
        except ValueError as error:  # a number of thousands of digits
            return BrokenLine("broken_line", f"{position} ({str(error).split(';')[0]})")

    def _documents(self, content: bytes) -> Iterator[dict | BrokenLine]:
        """The elements of a list, or objects one after the other."""
        text = self._decoded(content)
        start = _skip_blanks(text, 0)
        listed = text[start] == "["
        start = _skip_blanks(text, start + listed)
        if listed and text.startswith("]", start):
            raise unreadable(self.path, "has no rows")
        line, counted = 1, 0
        for number in itertools.count():
            line, counted = line + text.count("\n", counted, start), start
            value, end = self._value(text, start, listed)
            position = f"{self.path.name}, {f'element {number}' if listed else f'line {line}'}"
            yield self._row(value, position, text[start:end])
            start = _skip_blanks(text, end)
            if listed and text.startswith(",", start):
                start = _skip_blanks(text, start + 1)
            elif listed:
                closed = text.startswith("]", start)
                if not closed or _skip_blanks(text, start + 1) < len(text):
                    what = "Extra data" if closed else "Expecting ',' delimiter"
                    raise self._incomplete(json.JSONDecodeError(what, text, start + closed), listed)
                return
            elif start == len(text):
                return

    def _value(self, text: str, start: int, listed: bool) -> tuple[Any, int]:
        self.repeated.clear()
        try:
            return self.decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise self._incomplete(error, listed) from error
        except RecursionError as error:
            raise unreadable(self.path, "is nested too deeply") from error
        except ValueError as error:  # a number of thousands of digits
            raise unreadable(self.path, f"has a number that cannot be read ({str(error).split(';')[0]})") from error

    def _incomplete(self, error: json.JSONDecodeError, listed: bool) -> PreferenceDataError:
        position = f"line {error.lineno}, column {error.colno}"
        what = "list" if listed else "object"
        return unreadable(self.path, f"is not a complete JSON {what} ({error.msg.removesuffix(' at')} at {position})")

    def _decoded(self, content: bytes) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise unreadable(self.path, f"is not valid UTF-8 at line {line}; save it as UTF-8") from error

    def _row(self, value: Any, position: str, text: str) -> dict | BrokenLine:
        if not isinstance(value, dict):
            return BrokenLine("not_an_object", f"{position} ({type(value).__name__})")
        if self.repeated:
            return BrokenLine("repeated_key", f"{position} ({', '.join(f'`{key}`' for key in self.repeated[:3])})")
        if text.count("[") + text.count("{") > MAX_NESTING and is_deeper(value, MAX_NESTING):
            return BrokenLine("too_deep", position)
        try:
            # Half of a surrogate pair ("\\ud83d" alone) is legal JSON but not text: Arrow and tokenizers refuse it.
            if "\\u" in text and not self.lone_surrogates:
                json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return BrokenLine("bad_utf8", f"{position} (half a surrogate pair)")
        return value


def is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` times; computed without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _take(size: int, line: bytes, rest: Iterator[bytes]) -> list[bytes]:
    """Take a line, and as many of the next ones as add up to `size` bytes."""
    taken, total = [line], len(line)
    while total < size and (more := next(rest, None)) is not None:
        taken.append(more)
        total += len(more)
    return taken


def _skip_blanks(text: str, start: int) -> int:
    found = _WHITESPACE.match(text, start)
    return start if found is None else found.end()


def _why_no_json(error: json.JSONDecodeError, cut_off: bool) -> str:
    start = error.doc[:2]
    if start == "{'":
        return "Python, not JSON: write it with `json.dumps`"
    if start[:1] not in ("{", "[", '"') and "," in error.doc:
        return "not JSON; if the file is CSV, load it with `datasets.load_dataset('csv', ...)` and give the data set"
    return "the file ends inside it: cut off" if cut_off else f"{error.msg}, column {error.colno}"
