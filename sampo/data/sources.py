"""Where preference data comes from: files, folders, the hub, and data sets already loaded.

Every source is a dict of splits, each a function that reads it into a [`SourceTable`].
"""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .columns import PairRows, pair_rows
from .issues import PreferenceDataError, suggest
from .json_files import BrokenLine, unreadable
from .layouts import PAIR_COLUMNS
from .readers import DATA_SUFFIXES, JsonRows, ParquetRows, data_suffix, read_parquet, stream_files

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MAX_COLUMNS = 1000  # every row gets a cell in every column

# Words in a file's name that name its split, as the `datasets` library reads them.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class SourceTable:
    """Rows as they were found: an Arrow data set, or parsed JSON (whose columns need not have one type)."""

    rows: "Dataset | list[dict | BrokenLine]"
    columns: list[str]

    @property
    def total(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def cells(self, names: list[str]) -> Iterator[tuple | BrokenLine]:
        """The values of the named columns, row by row; None for a column that is not there."""
        if isinstance(self.rows, list):
            yield from (row if isinstance(row, BrokenLine) else tuple(map(row.get, names)) for row in self.rows)
            return
        present = [name for name in dict.fromkeys(names) if name in self.columns]
        for batch in self.rows.with_format(None).select_columns(present).iter(batch_size=1000):
            nothing = [None] * len(batch[present[0]])
            yield from zip(*(batch.get(name, nothing) for name in names), strict=True)

    def of_pairs(self, columns: dict[str, str], label: str) -> "SourceTable":
        """Return the table with columns `prompt`, `chosen` and `rejected`, by the rules of `sampo.data.columns`.

        Raises:
            ValueError: `columns` names something else, or it is not clear what a column means.
        """
        made = pair_rows(self, columns, label)
        if isinstance(made, PairRows) and made.makes:
            logger.info("%s: pairs are made of the columns %s", label, ", ".join(made.parts.values()))
            return SourceTable(made.dicts(), made.columns)
        if not isinstance(made, PairRows):
            return self
        return self._renamed({ours: theirs for ours, theirs in made.parts.items() if ours in PAIR_COLUMNS}, label)

    def _renamed(self, columns: dict[str, str], label: str) -> "SourceTable":
        """`columns` maps our names to those of the source; a column that already has our name makes room."""
        theirs_to_ours = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
        replaced = {ours for ours in theirs_to_ours.values() if ours in self.columns and ours not in theirs_to_ours}
        if replaced:
            logger.warning("%s: column(s) %s replaced as `columns` asks", label, ", ".join(sorted(replaced)))
        names = [theirs_to_ours.get(column, column) for column in self.columns if column not in replaced]
        if not isinstance(self.rows, list):
            kept = self.rows.remove_columns(sorted(replaced))
            return SourceTable(kept.rename_columns(theirs_to_ours) if theirs_to_ours else kept, names)
        rows = [
            row
            if isinstance(row, BrokenLine)
            else {theirs_to_ours.get(key, key): value for key, value in row.items() if key not in replaced}
            for row in self.rows
        ]
        return SourceTable(rows, names)

    def select(self, kept: list[int]) -> "Dataset":
        """The kept rows as an Arrow data set."""
        table = self.rows
        if not isinstance(table, list):
            return table if len(kept) == len(table) else table.select(kept)
        import pyarrow as pa
        from datasets import Dataset

        complete = [row for row in (table[i] for i in kept) if isinstance(row, dict)]
        assert len(complete) == len(kept)  # a broken line is an issue, and no row with an issue is kept
        rows = [{column: row.get(column) for column in self.columns} for row in complete]
        try:
            # `use_json`: an extra column whose values have different types, or the arguments of different tools, must
            # neither fail nor be filled up with nulls.
            return Dataset.from_list(rows, on_mixed_types="use_json")
        except (OverflowError, pa.ArrowException) as error:
            raise ValueError(
                f"Each column must hold values that Arrow can store, got columns {self.columns} and: {error}. Take "
                "the column that is meant out of the file."
            ) from error


@dataclass(frozen=True)
class Files:
    """The data files of one split: read into a [`SourceTable`] when called, or row by row."""

    paths: list[Path]

    def __call__(self) -> SourceTable:
        """All rows."""
        rows = stream_files(self.paths)
        if isinstance(rows, JsonRows):
            read = list(rows)
            columns = list(dict.fromkeys(key for row in read if isinstance(row, dict) for key in row))
            if len(columns) > MAX_COLUMNS:
                raise PreferenceDataError(
                    f"{self.paths[0]} must have at most {MAX_COLUMNS:,} columns, got {len(columns):,}: keys that "
                    "differ from row to row are values. Put them into one column, as an object or a list."
                )
            return SourceTable(read, columns)
        from datasets import concatenate_datasets

        parts = [part for part in map(read_parquet, self.paths) if len(part)]
        if not parts:
            raise unreadable(self.paths[0], "has no rows")
        try:
            return _of_dataset(concatenate_datasets(parts) if len(parts) > 1 else parts[0])
        except ValueError as error:
            names = [path.name for path in self.paths]
            raise ValueError(
                f"The files of a split must have the same columns of the same types, got {names} and: {error}. "
                "Write them with one schema, or load them as several data sets."
            ) from error

    def stream(self) -> "JsonRows | ParquetRows | SourceTable":
        """The rows one by one, for what is too large for memory; a table has its rows on disk."""
        rows = stream_files(self.paths)
        return self() if isinstance(rows, ParquetRows) and rows.has_json else rows


def open_source(source: Any, name: str | None) -> tuple[str, dict[str, Callable[[], SourceTable]]]:
    """Return a name of the source for messages, and its splits, each to be read when called."""
    from datasets import Dataset, DatasetDict

    if isinstance(source, Dataset):
        return "the data set", {str(source.split or "train"): partial(_of_dataset, source)}
    if isinstance(source, DatasetDict):
        return "the data set", _of_datasets(source)
    if not isinstance(source, str | Path):
        raise TypeError(
            "`source` must be a path, a data set id on the hub, a `Dataset` or a `DatasetDict`, got "
            f"{type(source).__name__}. A stream cannot be checked: load the data without `streaming`."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, name)
    if path.exists():
        data_suffix(path)
        return path.name, {"train": Files([path])}
    return _open_hub(str(source), name)


def _of_datasets(splits: "dict[str, Dataset]") -> dict[str, Callable[[], SourceTable]]:
    return {str(split): partial(_of_dataset, dataset) for split, dataset in splits.items()}


def _of_dataset(dataset: "Dataset") -> SourceTable:
    return SourceTable(dataset, dataset.column_names)


def _open_hub(source: str, name: str | None) -> tuple[str, dict[str, Callable[[], SourceTable]]]:
    import datasets

    looks_like_path = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    if looks_like_path or data_suffix(Path(source), required=False):
        raise FileNotFoundError(
            f"`source` must be a file, a folder or a data set id on the hub, got {source!r}, which looks like a path "
            f"and does not exist (the working directory is {Path.cwd()}). Check the spelling."
        )
    try:
        loaded = datasets.load_dataset(source, name)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise type(error)(
            f"`source` must be a file, a folder or a data set id on the hub, got {source!r}: there is no such path in "
            f"{Path.cwd()}, and the hub gave: {error}. Check the spelling, the connection and `hf auth login`."
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            f"`source` must be a data set that can be read, got {source!r} with a damaged file: {error.__cause__}. "
            "Download the data set again, or give its files one by one."
        ) from error
    return source, _of_datasets(loaded)


def _open_folder(folder: Path, name: str | None) -> tuple[str, dict[str, Callable[[], SourceTable]]]:
    """A folder of `save_to_disk`, or of data files, whose splits are named in the file names."""
    if name is not None:
        if not (folder / name).is_dir():
            inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            raise ValueError(f"`name` must be a sub-folder of {folder}, got {name!r}; it has {inside}.")
        folder = folder / name
    if (folder / "dataset_dict.json").exists():
        return folder.name, _of_datasets(_load_from_disk(folder))
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        dataset = _load_from_disk(folder)
        return folder.name, {str(dataset.split or "train"): partial(_of_dataset, dataset)}
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and data_suffix(path, required=False) and not any(part.startswith(".") for part in parts):
            splits.setdefault(_split_of(parts), []).append(path)
    if not splits:
        raise FileNotFoundError(
            f"A data folder must hold files that end in {', '.join(DATA_SUFFIXES)} (or those with .gz), or be written "
            f"by `save_to_disk`; {folder} is neither."
        )
    for split, paths in splits.items():
        logger.info("split `%s` of %s: %s", split, folder, ", ".join(str(path.relative_to(folder)) for path in paths))
    return folder.name, {split: Files(paths) for split, paths in splits.items()}


def _load_from_disk(folder: Path) -> Any:
    """What `save_to_disk` wrote. Its Arrow files are validated: to read damaged ones may crash the process."""
    import datasets
    import pyarrow as pa

    try:
        loaded = datasets.load_from_disk(str(folder))
        for dataset in loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]:
            dataset.data.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise unreadable(folder, f"is a damaged or incomplete folder of `save_to_disk` ({what})") from error
    return loaded


def _split_of(parts: tuple[str, ...]) -> str:
    """Return the split of a file in a folder, from its name, else from its folders, else `train`."""
    stem = re.split(r"\.(?:jsonl?|parquet)", parts[-1], flags=re.IGNORECASE)[0]
    shard = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}(?:-\w+)?", stem)
    if shard:
        return shard[1]
    for part in (stem, *reversed(parts[:-1])):
        words = set(re.split(r"[^a-z0-9]+|(?<=[a-z])(?=[0-9])", part.lower()))
        for split, keywords in SPLIT_WORDS.items():
            if words & set(keywords):
                return split
    return "train"


def pick_split(tables: dict[str, Callable[[], SourceTable]], split: str | None, label: str) -> SourceTable:
    """One split, or a slice of it in the spelling of `datasets`: `train[:100]`, `train[10%:20%]`."""
    from datasets import ReadInstruction

    if split is None:
        split = "train" if "train" in tables else next(iter(tables))
        if split != "train" and len(tables) > 1:
            raise ValueError(f"`split` must say which one to load: {label} has {sorted(tables)}.")
    base = split.split("[")[0]
    if base not in tables:
        raise ValueError(f"`split` must be one of {sorted(tables)} for {label}, got {split!r}.{suggest(base, tables)}")
    table = tables[base]()
    if base == split:
        return table
    slices = ReadInstruction.from_spec(split).to_absolute({base: len(table.rows)})
    rows = [row for part in slices for row in range(part.from_ or 0, len(table.rows) if part.to is None else part.to)]
    picked = [table.rows[row] for row in rows] if isinstance(table.rows, list) else table.rows.select(rows)
    return SourceTable(picked, table.columns)
