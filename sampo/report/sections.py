"""The sections of the page on the lab, on benchmarks, and on records of anything else."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial

from ..io.records import Record
from ..lab import report as lab
from ..lab.settings import SFT, Settings
from .collect import Found, RecordFile
from .numbers import count_runs, estimate, number
from .page import MAX_RUNS, Listing, Section, Table, Text, build_section, origins_of, shorten

MAX_RECORDS = 200  # rows of a table of records


def lab_section(found: Found) -> Section:
    """The lab's figure, table and sentences."""
    section = Section("lab", "The lab")
    for file in found.labs:
        section.guarded(file.file, partial(_lab, section, file))
    return section


def _lab(section: Section, file: RecordFile) -> None:
    experiments = _experiments(file.records)
    if not experiments:
        raise ValueError("records of the lab must be of runs, got those of starts alone")
    for records in experiments[:MAX_RUNS]:
        _experiment(section, records, file.file)
    if len(experiments) > MAX_RUNS:
        section.add(Text(f"These are {MAX_RUNS} of {len(experiments)} experiments in {file.file}."))


def _experiments(records: Sequence[Record]) -> list[list[Record]]:
    """Runs with the same settings, each with the starts that they were made from; none of starts alone."""
    names = [field.name for field in fields(Settings)]
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.config["method"] != SFT:
            found.setdefault(repr([record.config.get(name) for name in names]), []).append(record)
    starts = [(r, {k: v for k, v in r.config.items() if k in names}) for r in records if r.config["method"] == SFT]
    return [
        [*(start for start, shared in starts if shared.items() <= some[0].config.items()), *some]
        for some in found.values()
    ]


def _experiment(section: Section, records: Sequence[Record], file: str) -> None:
    outcomes = lab.outcomes_of(records)
    lines = lab.collect(outcomes)
    origins = origins_of(records, file)
    n = count_runs(len(outcomes))
    heads = [head.replace("\n", " ") for head in lab.heads()]
    rows = [[line.title, line.group or "–", *lab.cells(line)[2:]] for line in lines]
    section.add(
        Table("Methods against the truth", [heads[1], heads[0], *heads[2:]], rows, origins, n), Text(lab.LEGEND)
    )
    section.draw(
        lambda figure: lab.draw_into(figure, lines),
        title="Length and win rate of each method",
        description="Two panels: tokens per answer, and win rate against the start judged by the truth, of each "
        "method on each group of pairs: mean, a dot per seed, and a dashed line for the start. The table has the "
        "numbers.",
        origins=origins,
        n=n,
        size=lab.FIGURE_SIZE,
    )
    section.add(Listing(lab.findings(lines)), Text(lab.describe(outcomes, records[-1].command)))


def benchmark_section(found: Found) -> Section:
    """Numbers of `sampo bench`."""
    return build_section("benchmarks", "Benchmarks", found.benchmarks, _add_benchmarks)


def _add_benchmarks(section: Section, file: RecordFile) -> None:
    heads = ["model", "benchmark", "number", "value (95 % interval)", "n"]
    section.add(_records_table("Benchmarks", file, heads, _benchmark_cells, names=3))


def _benchmark_cells(record: Record) -> list[str]:
    model, benchmark = str(record.config.get("model", "–")), str(record.config["benchmark"])
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
) -> Table:
    """A row for each of the first `MAX_RECORDS` records of a file."""
    count, rows = len(file.records), [cells(record) for record in file.records[:MAX_RECORDS]]
    cut = f": the first {MAX_RECORDS} of {count:,}" if count > MAX_RECORDS else ""
    origins = origins_of(file.records, file.file)
    return Table(f"{what} in {file.file}{cut}", heads, rows, origins, f"{count:,} records", names=names)
