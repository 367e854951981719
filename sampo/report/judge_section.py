"""The section of the page on judges: how far each agrees with people, and how reliable its verdicts are."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..evaluation.results.agreement import PARTS, number_head
from ..evaluation.results.judge_checks import PREFIX, check_sentence, judge_name, read_checks
from ..io.records import Record, config_key
from .collect import Found, JudgedRun, RecordFile
from .numbers import estimate, estimate_in_row, number
from .page import Heading, Listing, PageTable, Section, Text, origins_of

RELIABILITY = {  # number of a win rate -> head of its column
    "order/consistent": "orders agree",
    "order/first_shown": "first shown preferred",
    "cut/system": "cut off",
    "cut/baseline": "baseline's cut off",
}


def judge_section(found: Found) -> Section:
    """A part for each judge that has judged something or was checked."""
    section = Section("judges", "Judges")
    judges: dict[str, dict[str, Any]] = {}
    files: dict[str, list[RecordFile]] = {}
    runs: dict[str, list[JudgedRun]] = {}
    for file in found.agreements:
        _sort_checks(file, judges, files)
    for run in found.judged:
        key = config_key(run.run.judge)
        judges.setdefault(key, dict(run.run.judge))
        runs.setdefault(key, []).append(run)
    for key, judge in judges.items():
        named = [*(file.file for file in files.get(key, [])), *(run.file for run in runs.get(key, []))]
        section.guarded(named[0], partial(_add_judge, section, judge, files.get(key, []), runs.get(key, [])))
    return section


def _sort_checks(file: RecordFile, judges: dict[str, dict[str, Any]], files: dict[str, list[RecordFile]]) -> None:
    """File the records of each judge under it."""
    records: dict[str, list[Record]] = {}
    for record in file.records:
        records.setdefault(config_key(record.config["judged_by"]), []).append(record)
    for key, some in records.items():
        judges.setdefault(key, some[0].config["judged_by"])
        files.setdefault(key, []).append(RecordFile(file.file, file.folder, some))


def checked_sentence(run: JudgedRun, found: Found) -> str:
    """The sentence of a win rate with what the files say of its judge now: it may have been checked afterwards."""
    before, key = run.row.get("judge_check"), config_key(run.run.judge)
    checks = [check for file in found.agreements for check in read_checks(file.records, file.file)]
    own = [check for check in checks if config_key(check.judge) == key]
    return run.sentence.replace(str(before), check_sentence(run.run.judge, own)) if before and own else run.sentence


def _add_judge(
    section: Section, judge: dict[str, Any], files: Sequence[RecordFile], runs: Sequence[JudgedRun]
) -> None:
    section.add(Heading(f"Judge: {judge_name(judge)}"))
    checks = [check for file in files for check in read_checks(file.records, file.file)]
    if sentence := check_sentence(judge, checks):
        section.add(Text(sentence))
    for file in files:
        _add_check(section, file)
    if runs:
        section.add(_reliability_table(runs))
    if failures := [f"{run.row['system']}: {kinds}" for run in runs if (kinds := _kinds(run))]:
        section.add(Text("Failed verdicts by kind:"), Listing(failures))


def _add_check(section: Section, file: RecordFile) -> None:
    numbers = {record.name.removeprefix(PREFIX): record for record in file.records}
    origins, data = origins_of(file.records, file.file), str(file.records[0].config["data"])
    sizes = {name.removeprefix("count/pairs").removeprefix("/"): record.value for name, record in numbers.items()}
    total = f"{numbers['count/pairs'].value:,.0f} pairs"
    parts, others = [], []
    for name, record in numbers.items():
        kind, _, part = name.partition("/")
        if kind == "accuracy":
            size = sizes.get(part, sizes[""]) or 0
            parts.append([PARTS.get(part, part) or "all pairs", f"{size:,.0f}", number(estimate(record), "%")])
        elif kind != "count":
            others.append([number_head(name), number(estimate(record), 2)])
    section.add(
        PageTable(f"Agreement with people on {data}", ["pairs that count", "pairs", "accuracy"], parts, origins, total)
    )
    section.add(PageTable(f"Further numbers on {data}", ["number", "value"], others, origins, total))


def _reliability_table(runs: Sequence[JudgedRun]) -> PageTable:
    rows = [
        [
            str(run.row["system"]),
            str(run.row["baseline"]),
            *(number(estimate_in_row(run.row, key), "%") for key in RELIABILITY),
            f"{run.row.get('failed_verdicts', 0):,}",
        ]
        for run in runs
    ]
    heads = ["system", "baseline", *RELIABILITY.values(), "verdicts failed"]
    origins = tuple(origin for run in runs for origin in origins_of(run.records, run.file))
    n = f"{', '.join(dict.fromkeys(str(run.row.get('prompts', '–')) for run in runs))} prompts"
    return PageTable("Reliability of the verdicts (95 % intervals)", heads, rows, origins, n, names=2)


def _kinds(run: JudgedRun) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(run.run.failures.items()))
