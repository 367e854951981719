"""The section of `sampo report` on a sweep: conclusion, tables and the frontier."""

from functools import partial

from ..report.collect import Found, RecordFile
from ..report.numbers import count_runs
from ..report.page import Heading, Listing, PageTable, Section, Text, origins_of
from .conclusion import conclude
from .frontier import FRONTIER_SIZE, draw_frontier, paths_of
from .lines import SWEEP_LEGEND, read_lines
from .table import duel_rows, method_rows, run_rows


def sweep_section(found: Found) -> Section:
    """The outcome of each sweep."""
    section = Section("sweep", "Sweep")
    for file in found.sweeps:
        section.guarded(file.file, partial(_add_sweep, section, file))
    return section


def _add_sweep(section: Section, file: RecordFile) -> None:
    lines = read_lines(file.records)
    origins, n = origins_of(file.records, file.file), count_runs(len(lines.finished))
    section.add(Listing(conclude(lines)))
    for caption, (heads, rows) in (
        ("Methods over their seeds", method_rows(lines)),
        ("Methods prompt by prompt", duel_rows(lines)),
        ("Runs", run_rows(lines)),
    ):
        if rows:
            section.add(PageTable(caption, heads, rows, origins, n, names=3 if heads[0] == "quality" else 1))
    section.add(Heading("What the columns mean"), Text(SWEEP_LEGEND))
    if paths_of(lines):
        section.draw(
            lambda figure: draw_frontier(lines, figure),
            title="Length against quality, and against KL",
            description="Two panels: quality of each method against the length of its answers over the start's, and "
            "that length against the KL from the start. The tables have the numbers.",
            origins=origins,
            n=n,
            about="Hollow: at the largest KL that every method reaches, where there is one.",
            size=FRONTIER_SIZE,
        )
