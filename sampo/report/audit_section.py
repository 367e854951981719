"""The section of the page on preference data, from audits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..audit.report import CUT_COUNTS, GROUP_COLUMNS, MEASURES, PART_KEYS, format_value, overall_rows
from ..data.issues import Issue
from ..io.records import Record
from . import figures
from .collect import Audited, Found
from .numbers import estimate
from .page import Heading, Listing, Origin, PageTable, Section, Text, build_section, origins_of

MAX_PARTS = 20  # rows of a table of groups
MAX_PAIRS = 2_000_000  # of an audit; figures are drawn for at most so many


def data_section(found: Found) -> Section:
    """Each audit: its conclusion, its tables, and figures of the lengths."""
    return build_section("data", "Preference data", found.audits, _add_audit)


def _add_audit(section: Section, audit: Audited) -> None:
    origins = origins_of(audit.records, _at(audit.file, "records.jsonl"))
    overall = {r.name.removeprefix("audit/"): r for r in audit.records if not PART_KEYS & set(r.config)}
    first = overall["longer"]
    unit, n = str(first.config["unit"]), f"{first.n:,} pairs"
    section.add(Heading(str(audit.about["data"])), Text(str(audit.about["conclusion"])))
    if issues := [issue for split in audit.about["splits"] for issue in _list_issues(split)]:
        section.add(Listing(issues))
    numbers = {name: estimate(overall[name]) for name in MEASURES}
    section.add(PageTable("All pairs", ["", "value", "95 % interval"], overall_rows(numbers, unit), origins, n))
    for key, title in (("split", "Each split"), ("group", f"By {first.config.get('by')}")):
        if table := _parts_table(audit.records, key, title, origins):
            section.add(table)
    if any("max_length" in record.config for record in audit.records):
        section.add(_cut_table(audit.records, origins))
    if audit.pairs is not None:
        _audit_figures(section, audit.pairs, unit, origins)


def _at(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _list_issues(split: Mapping[str, Any]) -> list[str]:
    names = {"cure": "fix"}  # keys of audit.json -> attributes
    found = [Issue(**{names.get(key, key): value for key, value in issue.items()}) for issue in split["faults"]]
    issues = [f"Split `{split['split']}`: {issue.describe(split['rows'])}" for issue in found]
    return [*issues, *map(str, split["notes"])]


def _parts_table(records: Sequence[Record], key: str, title: str, origins: tuple[Origin, ...]) -> PageTable | None:
    parts: dict[str, dict[str, Record]] = {}
    for record in records:
        if key in record.config and "max_length" not in record.config:
            parts.setdefault(str(record.config[key]), {})[record.name.removeprefix("audit/")] = record
    parts = {name: numbers for name, numbers in parts.items() if set(GROUP_COLUMNS) <= set(numbers)}
    if not parts:
        return None
    largest = sorted(parts.items(), key=lambda item: -item[1]["longer"].n)
    heads = ["", "pairs", "T_w", "T_l", "longer", "shorter", "AUC", "slope", "selected"]
    rows = [
        [name, f"{found['longer'].n:,}", *(format_value(found[c].value, MEASURES[c][1]) for c in GROUP_COLUMNS)]
        for name, found in largest[:MAX_PARTS]
    ]
    more = f"; the {MAX_PARTS} largest of {len(largest)}" if len(largest) > MAX_PARTS else ""
    return PageTable(f"{title}{more}", heads, rows, origins, f"{sum(f['longer'].n for _, f in largest):,} pairs")


def _cut_table(records: Sequence[Record], origins: tuple[Origin, ...]) -> PageTable:
    cuts: dict[Any, dict[str, Record]] = {}
    for record in records:
        if "max_length" in record.config:
            cuts.setdefault(record.config["max_length"], {})[record.name.removeprefix("audit/")] = record
    heads = ["", *("none" if length is None else f"{length:,}" for length in cuts)]
    rows = [
        [title, *(format_value(found[name].value, 0) for found in cuts.values())] for name, title in CUT_COUNTS.items()
    ]
    return PageTable(
        "What `max_length` cuts", heads, rows, origins, f"{next(iter(cuts.values()))['dropped'].n:,} pairs"
    )


def _audit_figures(section: Section, path: Path, unit: str, origins: tuple[Origin, ...]) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_metadata(path).num_rows
    if rows > MAX_PAIRS:
        raise ValueError(f"{path.name} must have at most {MAX_PAIRS:,} pairs to be drawn, got {rows:,}")
    table = pq.read_table(path, columns=["chosen", "rejected", "prompt_hash"])
    chosen, rejected, prompts = (table.column(name).to_numpy() for name in table.column_names)
    about: dict[str, Any] = {"origins": origins, "n": f"{len(chosen):,} pairs"}
    section.draw(
        lambda figure: figures.length_histogram(chosen, rejected, unit=unit, ax=figure.add_subplot()),
        title="How long the responses are",
        description=f"Two histograms. Chosen responses have a mean of {chosen.mean():.1f} {unit} and a median of "
        f"{np.median(chosen):.0f}, rejected ones {rejected.mean():.1f} and {np.median(rejected):.0f}.",
        **about,
    )
    section.draw(
        lambda figure: figures.difference_histogram(chosen, rejected, unit=unit, ax=figure.add_subplot()),
        title="How much longer the chosen response is",
        description=f"A histogram of T_w − T_l in {unit}: the chosen response is longer in "
        f"{np.mean(chosen > rejected):.1%} of pairs and shorter in {np.mean(chosen < rejected):.1%}.",
        **about,
    )
    section.draw(
        lambda figure: figures.preference_by_difference(chosen, rejected, prompts, unit=unit, ax=figure.add_subplot()),
        title="How often the longer response is preferred",
        description="Share of pairs whose longer response is the chosen one, by the difference of lengths, with 95 % "
        "intervals and a logistic curve; the table has its slope.",
        **about,
    )
