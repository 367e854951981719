"""Data files row by row: JSON lines, JSON lists and Parquet, each also packed with gzip.

Files of JSON lines and Parquet files are streamed: what is in memory is one line or one batch. A JSON list and a
packed Parquet file are read as a whole, for their formats allow no less.
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pair_rows import Fault, PreferenceDataError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
HEAD = 1000  # rows whose keys are taken for the columns of a stream of JSON
BATCH = 1000  # rows of a Parquet file at a time
_BOM = b"\xef\xbb\xbf"
_PACKED_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class BrokenLine:
    """A line of a JSONL file, or an element of a JSON list, that holds no row."""

    kind: str
    place: str


def data_suffix(path: Path, *, required: bool = True) -> str:
    """Which kind of data file a name says; the empty text for none."""
    name = path.name.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), "")
    if required and not suffix:
        raise ValueError(f"A data file must end in {', '.join(DATA_SUFFIXES)} (or those with .gz), got {path}.")
    return suffix


def stream_files(paths: list[Path]) -> "JsonRows | ParquetRows":
    """The rows of files that are all JSON or all Parquet."""
    kinds = {data_suffix(path) == ".parquet" for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"The files of a split must be all JSON or all Parquet, got {[path.name for path in paths]}.")
    return ParquetRows(paths) if kinds == {True} else JsonRows(paths)


class JsonRows:
    """Rows of JSON files, read anew by each iteration."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __iter__(self) -> "Iterator[dict | BrokenLine]":
        return itertools.chain.from_iterable(map(_json_rows, self.paths))

    @cached_property
    def columns(self) -> list[str]:
        """Keys of the first rows. What comes up later only is no column."""
        head = itertools.islice((row for row in self if isinstance(row, dict)), HEAD)
        return list(dict.fromkeys(key for row in head for key in row))

    @cached_property
    def total(self) -> int:
        """Lines of the files, counted without parsing: for a bar, not for a number."""
        return sum(map(_count_lines, self.paths))

    def cells(self, names: list[str]) -> "Iterator[tuple | BrokenLine]":
        """The values of the named columns, row by row; None for a column that is not there."""
        for row in self:
            yield row if isinstance(row, BrokenLine) else tuple(map(row.get, names))


class ParquetRows:
    """Rows of Parquet files, read anew by each iteration."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    @cached_property
    def columns(self) -> list[str]:
        """The columns of the first file."""
        with _open_parquet(self.paths[0]) as file:
            return list(file.schema_arrow.names)

    @cached_property
    def has_json(self) -> bool:
        """Whether a column is of the `Json` type of `datasets`, which Arrow alone gives back as quoted text."""
        for path in self.paths:
            with _open_parquet(path) as file:
                if b'"_type": "Json"' in (file.schema_arrow.metadata or {}).get(b"huggingface", b""):
                    return True
        return False

    @cached_property
    def total(self) -> int:
        """Rows of all files."""
        total = 0
        for path in self.paths:
            with _open_parquet(path) as file:
                total += file.metadata.num_rows
        return total

    def cells(self, names: list[str]) -> Iterator[tuple]:
        """The values of the named columns, row by row; None for a column that is not there."""
        import pyarrow as pa

        for path in self.paths:
            try:
                with _open_parquet(path) as file:
                    present = [name for name in dict.fromkeys(names) if name in file.schema_arrow.names]
                    for batch in file.iter_batches(batch_size=BATCH, columns=present):
                        columns = batch.to_pydict()
                        nothing = [None] * len(batch)
                        yield from zip(*(columns.get(name, nothing) for name in names), strict=True)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(path, f"is damaged ({error}), so rows are lost") from error


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        packed = path.suffix.lower() == ".gz"
        return pq.ParquetFile(pa.BufferReader(_unpacked(path)) if packed else path, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(path, f"is no complete Parquet file ({error})") from error


def read_parquet(path: Path) -> "Dataset":
    """A Parquet file as an Arrow data set that lies on disk (in memory if the file is packed)."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        if path.suffix.lower() != ".gz":
            pq.read_metadata(path)  # a clear error before `datasets` hides it behind its own
            dataset = Dataset.from_parquet(str(path))
        else:
            dataset = Dataset(pq.read_table(pa.BufferReader(_unpacked(path))))
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(path, f"is no complete Parquet file ({error})") from error
    if not len(dataset):
        raise unreadable(path, "has no rows")
    return dataset


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _unpacked(path: Path) -> bytes:
    """The content of a gzip file. One that is cut off is an error: who knows how many rows it lacks."""
    try:
        with _open(path) as file:
            return file.read()
    except _PACKED_ERRORS as error:
        raise _damaged(path, error) from error


def _count_lines(path: Path) -> int:
    lines, last = 0, b""
    try:
        with _open(path) as file:
            while chunk := file.read(1 << 20):
                lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    except _PACKED_ERRORS:  # said when the rows are read
        pass
    return lines + (last not in (b"\n", b""))


def _json_rows(path: Path) -> "Iterator[dict | BrokenLine]":
    """One object a line, or one list of objects; the first character tells, since both go by the name `.json`."""
    blank: bytes | None = b""  # what stands before the first row; None behind it
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(_BOM) if number == 1 else line
                if not text.strip():
                    blank = None if blank is None else blank + text
                    continue
                if blank is not None and text.lstrip()[:1] == b"[":
                    yield from _json_list(path, blank + text + file.read())
                    return
                blank = None
                whole = text.removesuffix(b"\n")
                yield _parse_line(whole, f"{path.name}, line {number}", cut_off=whole == text)
    except _PACKED_ERRORS as error:
        raise _damaged(path, error) from error
    if blank is not None:
        raise unreadable(path, "is empty")


def _json_list(path: Path, content: bytes) -> "Iterator[dict | BrokenLine]":
    try:
        elements = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise unreadable(path, f"is not valid UTF-8 at line {line}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise unreadable(path, f"is no complete JSON list ({error.msg.removesuffix(' at')} at {place})") from error
    except RecursionError as error:
        raise unreadable(path, "is nested too deeply") from error
    if not elements:
        raise unreadable(path, "has no rows")
    escaped = b"\\u" in content
    for number, row in enumerate(elements):
        yield _row_or_broken(row, f"{path.name}, element {number}", escaped)


def _parse_line(line: bytes, place: str, *, cut_off: bool) -> dict | BrokenLine:
    try:
        return _row_or_broken(json.loads(line.decode("utf-8")), place, b"\\u" in line)
    except UnicodeDecodeError as error:
        return BrokenLine("bad_utf8", f"{place} (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        why = "the file ends inside it: cut off" if cut_off else f"{error.msg}, column {error.colno}"
        return BrokenLine("broken_line", f"{place} ({why})")
    except (RecursionError, ValueError) as error:  # brackets in brackets; a number of thousands of digits
        return BrokenLine("broken_line", f"{place} ({type(error).__name__})")


def _row_or_broken(value: Any, place: str, escaped: bool) -> dict | BrokenLine:
    if not isinstance(value, dict):
        return BrokenLine("not_an_object", f"{place} ({type(value).__name__})")
    try:
        # Half of a surrogate pair ("\\ud83d" alone) is legal JSON and no text: Arrow and tokenizers refuse it.
        if escaped:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return BrokenLine("bad_utf8", f"{place} (half a surrogate pair)")
    return value


def _damaged(path: Path, error: BaseException) -> PreferenceDataError:
    return unreadable(path, f"is a damaged or cut-off gzip file ({error}), so rows are lost")


def unreadable(path: Path, what: str) -> PreferenceDataError:
    """The error for a file of which rows are lost."""
    cure = "Fetch or write the file again."
    return PreferenceDataError(f"{path} {what}. {cure}", [Fault("unreadable_file", "", [], 1, cure)])
