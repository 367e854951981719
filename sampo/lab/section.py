"""The section of `sampo report` on the lab: a figure, a table and sentences of each experiment."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial

from ..io.records import Record
from ..report.collect import Found, RecordFile
from ..report.page import MAX_RUNS, Listing, PageTable, Section, Text, origins_of
from .report import (
    FIGURE_SIZE,
    LEGEND,
    cells,
    collect_lines,
    describe_runs,
    draw_into,
    heads,
    outcomes_of,
    summarise_findings,
)
from .settings import SFT, Settings


def lab_section(found: Found) -> Section:
    """The lab's figure, table and sentences."""
    section = Section("lab", "The lab")
    for file in found.labs:
        section.guarded(file.file, partial(_add_experiments, section, file))
    return section


def _add_experiments(section: Section, file: RecordFile) -> None:
    experiments = _split_experiments(file.records)
    if not experiments:
        raise ValueError("records of the lab must be of runs, got those of starts alone")
    for records in experiments[:MAX_RUNS]:
        _add_experiment(section, records, file.file)
    if len(experiments) > MAX_RUNS:
        section.add(Text(f"These are {MAX_RUNS} of {len(experiments)} experiments in {file.file}."))


def _split_experiments(records: Sequence[Record]) -> list[list[Record]]:
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


def _add_experiment(section: Section, records: Sequence[Record], file: str) -> None:
    outcomes = outcomes_of(records)
    lines = collect_lines(outcomes)
    origins = origins_of(records, file)
    n = "1 run" if len(outcomes) == 1 else f"{len(outcomes):,} runs"
    titles = [head.replace("\n", " ") for head in heads()]
    rows = [[line.title, line.group or "–", *cells(line)[2:]] for line in lines]
    section.add(
        PageTable("Methods against the truth", [titles[1], titles[0], *titles[2:]], rows, origins, n), Text(LEGEND)
    )
    section.draw(
        lambda figure: draw_into(figure, lines),
        title="Length and win rate of each method",
        description="Two panels: tokens per answer, and win rate against the start judged by the truth, of each "
        "method on each group of pairs: mean, a dot per seed, and a dashed line for the start. The table has the "
        "numbers.",
        origins=origins,
        n=n,
        size=FIGURE_SIZE,
    )
    section.add(Listing(summarise_findings(lines)), Text(describe_runs(outcomes, records[-1].command)))
