"""The sections of the page on benchmarks, and on records of anything else."""

from collections.abc import Callable

from ..io.names import readable_name
from ..io.records import Record
from .collect import Found, RecordFile
from .numbers import estimate, number
from .page import PageTable, Section, build_section, origins_of, shorten

MAX_RECORDS = 200  # rows of a table of records


def benchmark_section(found: Found) -> Section:
    """Numbers of `sampo bench`."""
    return build_section("benchmarks", "Benchmarks", found.benchmarks, _add_benchmarks)


def _add_benchmarks(section: Section, file: RecordFile) -> None:
    heads = ["model", "benchmark", "number", "value (95 % interval)", "n"]
    section.add(_records_table("Benchmarks", file, heads, _benchmark_cells, names=3))


def _benchmark_cells(record: Record) -> list[str]:
    model, benchmark = readable_name(str(record.config.get("model", "–"))), str(record.config["benchmark"])
    return [model, benchmark, record.name, number(estimate(record), "%"), f"{record.n:,}"]


def other_section(found: Found) -> Section:
    """Records of anything else, as they are."""
    return build_section("records", "Other records", found.others, _add_others)


def _add_others(section: Section, file: RecordFile) -> None:
    heads = ["number", "value", "95 % interval", "n", "settings"]
    section.add(_records_table("Records", file, heads, _other_cells))


def _other_cells(record: Record) -> list[str]:
    value = "–" if record.value is None else f"{record.value:.6g}"
    interval = "" if record.interval is None else f"{record.interval[0]:.6g} to {record.interval[1]:.6g}"
    settings = shorten(", ".join(f"{key} {value}" for key, value in record.config.items()), 120)
    return [record.name, value, interval, f"{record.n:,}", settings]


def _records_table(
    what: str, file: RecordFile, heads: list[str], cells: Callable[[Record], list[str]], *, names: int = 1
) -> PageTable:
    """A row for each of the first `MAX_RECORDS` records of a file."""
    count, rows = len(file.records), [cells(record) for record in file.records[:MAX_RECORDS]]
    cut = f": the first {MAX_RECORDS} of {count:,}" if count > MAX_RECORDS else ""
    origins = origins_of(file.records, file.file)
    return PageTable(f"{what} in {file.file}{cut}", heads, rows, origins, f"{count:,} records", names=names)
