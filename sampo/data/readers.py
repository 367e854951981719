"""Data files row by row: JSON and Parquet, each also packed with gzip.

Parquet files are streamed, one batch in memory at a time; a packed one is read completely. `json_files` reads JSON.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .issues import MAX_NESTING, PreferenceDataError
from .json_files import BrokenLine, count_lines, is_packed, refuse_other_formats, rows_of_files, unpacked, unreadable
from .layouts import HEAD_ROWS

if TYPE_CHECKING:
    from datasets import Dataset

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
PARQUET_BATCH = 1000  # rows of a Parquet file at a time


def data_suffix(path: Path, *, required: bool = True) -> str:
    """Return the suffix of a data file by its name; empty for none."""
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
    """Rows of JSON files, read again by each iteration."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __iter__(self) -> "Iterator[dict | BrokenLine]":
        return rows_of_files(self.paths)

    @cached_property
    def columns(self) -> list[str]:
        """Keys of the first rows. What comes up later only is no column."""
        head: dict[str, None] = {}
        try:
            for row in itertools.islice((row for row in self if isinstance(row, dict)), HEAD_ROWS):
                head.update(dict.fromkeys(row))
        except PreferenceDataError:  # raised again after the rows that can be read
            if not head:
                raise
        return list(head)

    @cached_property
    def total(self) -> int:
        """Lines of the files, counted without parsing: for a progress bar, not exact."""
        return sum(map(count_lines, self.paths))

    def cells(self, names: list[str]) -> "Iterator[tuple | BrokenLine]":
        """The values of the named columns, row by row; None for a column that is not there."""
        for row in self:
            yield row if isinstance(row, BrokenLine) else tuple(map(row.get, names))


class ParquetRows:
    """Rows of Parquet files, read again by each iteration."""

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
        for path in self.paths:
            with _open_parquet(path) as file:
                present = [name for name in dict.fromkeys(names) if name in file.schema_arrow.names]
                for batch in _read_batches(path, file, present):
                    try:
                        columns = batch.to_pydict()
                    except (ValueError, OverflowError) as error:  # a date that Python cannot represent
                        raise unreadable(path, f"has a value that cannot be read ({error})") from error
                    nothing = [None] * len(batch)
                    yield from zip(*(columns.get(name, nothing) for name in names), strict=True)


def _open_parquet(path: Path) -> Any:
    """The file, if its schema can be worked with."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not is_packed(path):
        with path.open("rb") as start:
            head = start.read(64)
        content: Any = path
    else:
        data = unpacked(path)
        head, content = data[:64], pa.BufferReader(data)
    if not head.startswith(b"PAR1"):
        refuse_other_formats(path, head)
    try:
        file = pq.ParquetFile(content, pre_buffer=False, page_checksum_verification=True)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, f"is not a complete Parquet file ({error})") from error
    _check_fields(path, list(schema), "column", 1)
    return file


def _check_fields(path: Path, fields: list[Any], what: str, depth: int) -> None:
    """Raise where two columns, or two fields of a struct, have one name, or fields are nested too deeply."""
    again = [name for name, count in Counter(field.name for field in fields).items() if count > 1]
    if again:
        raise unreadable(path, f"has {what} `{again[0]}` more than once", "Rename or remove one of them.")
    if depth > MAX_NESTING:
        raise unreadable(path, f"nests values deeper than {MAX_NESTING} levels", "Store what is nested as JSON text.")
    for field in fields:
        inner = [field.type.field(i) for i in range(field.type.num_fields)]
        if inner:
            _check_fields(path, inner, f"in column `{field.name}` the field", depth + 1)


def _read_batches(path: Path, file: Any, columns: list[str] | None = None) -> Iterator[Any]:
    """The record batches of a file; its values are validated, which reading alone does not do."""
    import pyarrow as pa

    try:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=columns):
            batch.validate(full=True)
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, f"is damaged ({error}), so rows are lost") from error


def read_parquet(path: Path) -> "Dataset":
    """A Parquet file as an Arrow data set that lies on disk (in memory if the file is packed)."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    packed = is_packed(path)
    with _open_parquet(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        # Read once before `datasets` does, whose errors do not name the file.
        batches = [batch for batch in _read_batches(path, file) if packed]
    try:
        if packed:
            return Dataset(pa.Table.from_batches(batches, schema))
        return Dataset.from_parquet(str(path)) if rows else Dataset(schema.empty_table())
    except (pa.ArrowException, DatasetsError, OSError, ValueError, TypeError, KeyError) as error:
        raise unreadable(path, f"cannot be read as a data set ({type(error).__name__}: {error})") from error
