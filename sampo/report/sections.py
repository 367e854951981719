"""From what was found to the sections of the page: the data, training, what length says of a model, the lab, the rest.

Numbers are those of the records; nothing is measured here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..audit.report import CUT_COUNTS, GROUP_COLUMNS, MEASURES, PART_KEYS, format_interval, format_value, overall_rows
from ..data.issues import Issue
from ..diagnostics.findings import PLAIN, Finding, read_scores
from ..io.records import Record
from ..lab import report as lab
from ..lab.settings import SFT, Settings
from ..stats.intervals import Estimate
from . import diagnostic_figures, figures, training_figures
from .collect import Audited, Found, RecordFile, TrainingRun
from .page import Heading, Listing, Origin, Section, Table, Text, origins_of, shorten

MAX_RUNS = 6  # in one figure: more colours are not told apart
MAX_PARTS = 20  # rows of a table of groups
MAX_RECORDS = 200  # rows of the table of other records
MAX_PAIRS = 2_000_000  # of an audit, that are read for its figures


def estimate(record: Record) -> Estimate:
    """The number of a record."""
    low, high = record.interval or (None, None)
    return Estimate(record.value, low, high, None, record.n)


def number(one: Estimate | None, how: str | int = 3, *, sign: bool = False) -> str:
    """A value with its interval: `0.123 (0.100 to 0.150)`, `12.3 % (11.0 to 14.0)`, or a dash."""
    if one is None or one.value is None:
        return "–"
    plus = "+" if sign and one.value > 0 else ""
    bounds = format_interval(one.interval, how).replace(" %", "")
    return plus + format_value(one.value, how) + (f" ({bounds})" if bounds else "")


# --- data ------------------------------------------------------------------------------------------------------------


def data_section(found: Found) -> Section:
    """Audits."""
    section = Section("data", "Preference data")
    for audit in found.audits:
        section.guarded(audit.file, partial(_audit, section, audit))
    return section


def _audit(section: Section, audit: Audited) -> None:
    origins = origins_of(audit.records, _at(audit.file, "records.jsonl"))
    whole = {r.name.removeprefix("audit/"): r for r in audit.records if not PART_KEYS & set(r.config)}
    first = whole["longer"]
    unit, n = str(first.config["unit"]), f"{first.n:,} pairs"
    section.add(Heading(str(audit.about["data"])), Text(str(audit.about["conclusion"])))
    if issues := [issue for split in audit.about["splits"] for issue in _list_issues(split)]:
        section.add(Listing(issues))
    numbers = {name: estimate(whole[name]) for name in MEASURES}
    section.add(Table("All pairs", ["", "value", "95 % interval"], overall_rows(numbers, unit), origins, n))
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


def _parts_table(records: Sequence[Record], key: str, title: str, origins: tuple[Origin, ...]) -> Table | None:
    parts: dict[str, dict[str, Record]] = {}
    for record in records:
        if key in record.config and "max_length" not in record.config:
            parts.setdefault(str(record.config[key]), {})[record.name.removeprefix("audit/")] = record
    parts = {name: numbers for name, numbers in parts.items() if set(GROUP_COLUMNS) <= set(numbers)}
    if not parts:
        return None
    largest = sorted(parts.items(), key=lambda item: -item[1]["longer"].n)
    heads = ["", "pairs", "T_w", "T_l", "longer", "shorter", "AUC", "slope", "counted"]
    rows = [
        [name, f"{found['longer'].n:,}", *(format_value(found[c].value, MEASURES[c][1]) for c in GROUP_COLUMNS)]
        for name, found in largest[:MAX_PARTS]
    ]
    more = f"; the {MAX_PARTS} largest of {len(largest)}" if len(largest) > MAX_PARTS else ""
    return Table(f"{title}{more}", heads, rows, origins, f"{sum(f['longer'].n for _, f in largest):,} pairs")


def _cut_table(records: Sequence[Record], origins: tuple[Origin, ...]) -> Table:
    cuts: dict[Any, dict[str, Record]] = {}
    for record in records:
        if "max_length" in record.config:
            cuts.setdefault(record.config["max_length"], {})[record.name.removeprefix("audit/")] = record
    heads = ["", *("none" if length is None else f"{length:,}" for length in cuts)]
    rows = [
        [title, *(format_value(found[name].value, 0) for found in cuts.values())] for name, title in CUT_COUNTS.items()
    ]
    return Table("What `max_length` cuts", heads, rows, origins, f"{next(iter(cuts.values()))['dropped'].n:,} pairs")


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


# --- training --------------------------------------------------------------------------------------------------------


def training_section(found: Found) -> Section:
    """Curves of all runs in common figures."""
    section = Section("training", "Training")
    runs = found.runs[:MAX_RUNS]
    if runs:
        section.guarded(runs[0].file, partial(_training, section, runs, found))
    return section


def _training(section: Section, runs: Sequence[TrainingRun], found: Found) -> None:
    if len(found.runs) > MAX_RUNS:
        others = ", ".join(run.name for run in found.runs[MAX_RUNS:])
        found.notes.append(f"Training curves of {MAX_RUNS} runs are shown; left out: {others}.")
    logs = {shorten(run.name): run.log for run in runs}
    if len(logs) < len(runs):  # names that are alike in their beginnings
        logs = {f"{n}: {shorten(run.name, 28)}": run.log for n, run in enumerate(runs, 1)}
    origins = tuple(_origin(run) for run in runs)
    columns = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = [  # a line for each setting: their names are many and long, runs are few
        ["steps", *(f"{run.step:,}" for run in runs)],
        ["last loss", *(_last(run, "loss") for run in runs)],
        *([name, *(run.settings.get(name, "–") for run in runs)] for name in columns),
    ]
    section.add(Table("Runs", ["run", *(run.name for run in runs)], rows, origins, _runs(len(runs))))
    steps = " and ".join(dict.fromkeys(f"{run.step:,}" for run in runs))
    n = f"{_runs(len(runs))} of {steps} steps"
    for name, curve in training_figures.CURVES.items():
        if training_figures.has_curve(logs, name):
            section.draw(
                partial(_draw_curve, logs, name),
                title=curve.title,
                description=_ends(logs, curve),
                origins=origins,
                n=n,
            )


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count:,} runs"


def _draw_curve(logs: Mapping[str, training_figures.Log], name: str, figure: Any) -> None:
    training_figures.training_curve(logs, name, ax=figure.add_subplot())


def _origin(run: TrainingRun) -> Origin:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))
    return Origin(run.file, versions=versions, dates=f"file of {run.date}")


def _last(run: TrainingRun, metric: str) -> str:
    values = training_figures.points(run.log, metric)[1]
    return f"{values[-1]:.4f}" if values else "–"


def _ends(logs: Mapping[str, Any], curve: training_figures.Curve) -> str:
    """What the curves of a figure begin and end with."""
    said = []
    for run, log in logs.items():
        for metric, part in curve.metrics.items():
            for held_out in (False, True):
                steps, values = training_figures.points(log, metric, evaluation=held_out)
                if steps:
                    name = ", ".join(text for text in (run, part, "evaluation" if held_out else "") if text)
                    said.append(
                        f"{name}: {values[0]:.3g} at step {steps[0]:.0f}, {values[-1]:.3g} at {steps[-1]:.0f}."
                    )
    return f"Curves over the steps of training. {' '.join(said)}"


# --- what length says of a model -------------------------------------------------------------------------------------

_NOT_LABELS = {  # of the config of a record of `sampo diagnose`: settings; the rest says of what the number is
    *("reference", "data", "split", "beta", "dtype", "bf16", "seed", "max_length", "truncation_mode", "resamples"),
    *("quality", "policy", "pairs"),
}


def diagnosis_section(found: Found) -> Section:
    """Length pressure, rewards and log-ratios of checkpoints."""
    section = Section("model", "What length says of a model")
    for file in found.diagnoses:
        section.guarded(file.file, partial(_diagnosis, section, file))
    return section


def _diagnosis(section: Section, file: RecordFile) -> None:
    pages: dict[str, dict[str, list[Record]]] = {}
    for record in file.records:
        settings = {key: record.config.get(key) for key in sorted(_NOT_LABELS - {"policy", "pairs"})}
        page = pages.setdefault(repr(settings), {})
        page.setdefault(f"{record.config['policy']}\0{record.config['pairs']}", []).append(record)
    for page in pages.values():
        names = _short_names([key.partition("\0")[0] for key in page])
        _diagnosed_page(section, file, dict(zip(names, page.values(), strict=True)))


def _short_names(policies: Sequence[str]) -> list[str]:
    """Names for a legend, each its own."""
    last = [shorten(Path(name).name or name) for name in policies]
    return [name if last.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(last, 1)]


def _findings(records: Sequence[Record]) -> list[Finding]:
    return [
        Finding(
            record.name.removeprefix("diagnose/"),
            {key: value for key, value in record.config.items() if key not in _NOT_LABELS},
            estimate(record),
        )
        for record in records
    ]


def _diagnosed_page(section: Section, file: RecordFile, page: Mapping[str, list[Record]]) -> None:
    """The checkpoints that were scored with the same settings on the same data."""
    first = next(iter(page.values()))[0]
    origins = origins_of([record for records in page.values() for record in records], file.file)
    found = {name: _findings(records) for name, records in page.items()}
    n = f"{max(record.n for records in page.values() for record in records):,} prompts"
    reference = first.config.get("reference")
    against = f", against {reference}" if reference else ", without a reference"
    section.add(Heading(f"{', '.join(found)} on {first.config.get('data')}{against}"))
    section.add(_pressure_table(found, origins, n))
    rewarded = {name: some for name, some in found.items() if any(f.quantity == "accuracy" for f in some)}
    if rewarded:
        section.add(_margin_table(rewarded, origins, n))
    drawn = dict(list(found.items())[:MAX_RUNS])
    for name, some in drawn.items():
        section.draw(
            partial(_draw_pressure, some),
            title=f"Length pressure of every weighting: {name}",
            description="Left of 0, a first step of training lengthens the answers. " + _pressures_said(some),
            origins=origins,
            n=n,
            size=(5.0, 5.2),
        )
    if rewarded:
        _reward_figures(
            section, {name: some for name, some in drawn.items() if name in rewarded}, page, file, origins, n
        )


def _draw_pressure(found: Sequence[Finding], figure: Any) -> None:
    diagnostic_figures.length_pressure(found, axes=figure.add_subplot())


def _one(found: Sequence[Finding], quantity: str, **labels: str) -> Estimate | None:
    some = [f for f in found if f.quantity == quantity and labels.items() <= f.labels.items()]
    return some[0].estimate if some else None


def _labels(found: Mapping[str, Sequence[Finding]], quantity: str, label: str) -> list[str]:
    every = (f for some in found.values() for f in some if f.quantity == quantity)
    return list(dict.fromkeys(str(f.labels[label]) for f in every))


def _pressure_table(found: Mapping[str, Sequence[Finding]], origins: tuple[Origin, ...], n: str) -> Table:
    groups = _labels(found, "pressure", "group")[:MAX_PARTS]
    rows = [
        [name, method, *(number(_one(some, "pressure", method=method, group=g), sign=True) for g in groups)]
        for name, some in found.items()
        for method in _labels({name: some}, "pressure", "method")
    ]
    return Table(
        "Length pressure; below 0, training lengthens", ["checkpoint", "method", *groups], rows, origins, n, names=2
    )


def _margin_table(found: Mapping[str, Sequence[Finding]], origins: tuple[Origin, ...], n: str) -> Table:
    groups = _labels(found, "accuracy", "group")
    columns = {"correlation": "corr(margin, T_w − T_l)", "partial": "at equal quality"}
    if not any(f.quantity == "margin_partial" for some in found.values() for f in some):
        del columns["partial"]
    rows = []
    for name, some in found.items():
        for method in _labels({name: some}, "accuracy", "method"):
            shares = [number(_one(some, "accuracy", method=method, group=group), "%") for group in groups]
            more = [number(_one(some, f"margin_{what}", method=method), 2) for what in columns]
            rows.append([name, method, *shares, *more])
    heads = ["checkpoint", "method", *groups, *columns.values()]
    return Table("Margins above 0, by lengths, and how much of them is length", heads, rows, origins, n, names=2)


def _pressures_said(found: Sequence[Finding]) -> str:
    said = [
        f"{f.labels['method']} {number(f.estimate, sign=True)}"
        for f in found
        if f.quantity == "pressure" and f.labels.get("group") == "all"
    ]
    return f"Over all pairs: {'; '.join(said)}."


def _reward_figures(
    section: Section,
    found: Mapping[str, Sequence[Finding]],
    page: Mapping[str, list[Record]],
    file: RecordFile,
    origins: tuple[Origin, ...],
    n: str,
) -> None:
    about: dict[str, Any] = {"origins": origins, "n": n}
    section.draw(
        lambda figure: diagnostic_figures.accuracy_by_length(found, axes=figure.add_subplot()),
        title="Margins above 0, by the order of the lengths",
        description="Share of pairs whose chosen response has the higher implicit reward, with 95 % intervals. "
        + " ".join(
            f"{name}: {number(_one(some, 'accuracy', method=PLAIN, group='chosen longer'), '%')} where the chosen one "
            f"is longer, {number(_one(some, 'accuracy', method=PLAIN, group='chosen shorter'), '%')} where shorter."
            for name, some in found.items()
        ),
        **about,
    )
    for name, some in found.items():
        slope, explained = _one(some, "reward_slope"), _one(some, "reward_r2")
        if (paths := _shards(file.folder, page[name][0])) and slope is not None:
            beta = float(page[name][0].config["beta"])
            section.draw(
                partial(_draw_rewards, some, paths, beta),
                title=f"Implicit reward against length: {name}",
                description=f"A point per response, and the means of bins of equal size. Slope per 100 tokens "
                f"{number(slope)}; length explains {number(explained, '%')} of the variance.",
                **about,
            )
        for draw, title in _PROFILES.items():
            section.draw(
                partial(_draw_profile, draw, some),
                title=f"{title}: {name}",
                description="Mean log-ratio of policy and reference in nats, chosen and rejected responses, with 95 % "
                "intervals.",
                **about,
            )


def _draw_rewards(found: Sequence[Finding], paths: Sequence[Path], beta: float, figure: Any) -> None:
    axes = figure.add_subplot()
    diagnostic_figures.reward_against_length(found, read_scores(paths), beta=beta, axes=axes)


def _draw_profile(draw: Callable[..., Any], found: Sequence[Finding], figure: Any) -> None:
    draw(found, axes=figure.add_subplot())


_PROFILES: dict[Callable[..., Any], str] = {
    diagnostic_figures.log_ratio_by_place: "Log-ratio by the place of the token",
    diagnostic_figures.log_ratio_by_class: "Log-ratio of first, inner and end tokens",
}


def _shards(folder: Path, record: Record) -> list[Path]:
    """The Parquet files behind a record; none if they are not there any more."""
    digest = str(record.config["pairs"])
    if not digest.isalnum():  # it becomes part of a pattern
        raise ValueError(f"`pairs` of a record must be a digest, got {digest[:80]!r}")
    return sorted((folder / "pairs").glob(f"*-{digest}/*.parquet"))


# --- the lab, benchmarks, the rest -----------------------------------------------------------------------------------


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
    n = _runs(len(outcomes))
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
    section = Section("benchmarks", "Benchmarks")
    for file in found.benchmarks:
        section.guarded(file.file, partial(_benchmarks, section, file))
    return section


def _benchmarks(section: Section, file: RecordFile) -> None:
    rows = [
        [str(r.config.get("model", "–")), str(r.config["benchmark"]), r.name, number(estimate(r), "%"), f"{r.n:,}"]
        for r in file.records[:MAX_RECORDS]
    ]
    section.add(
        Table(
            f"Benchmarks in {file.file}{_cut(file)}",
            ["model", "benchmark", "number", "value (95 % interval)", "n"],
            rows,
            origins_of(file.records, file.file),
            f"{len(file.records):,} records",
            names=3,
        )
    )


def other_section(found: Found) -> Section:
    """Records of anything else, as they are."""
    section = Section("records", "Other records")
    for file in found.others:
        section.guarded(file.file, partial(_others, section, file))
    return section


def _others(section: Section, file: RecordFile) -> None:
    rows = [
        [
            record.name,
            "–" if record.value is None else f"{record.value:.6g}",
            "" if record.interval is None else f"{record.interval[0]:.6g} to {record.interval[1]:.6g}",
            f"{record.n:,}",
            shorten(", ".join(f"{key} {value}" for key, value in record.config.items()), 120),
        ]
        for record in file.records[:MAX_RECORDS]
    ]
    heads = ["number", "value", "95 % interval", "n", "settings"]
    origins = origins_of(file.records, file.file)
    section.add(Table(f"Records in {file.file}{_cut(file)}", heads, rows, origins, f"{len(file.records):,} records"))


def _cut(file: RecordFile) -> str:
    return f": the first {MAX_RECORDS} of {len(file.records):,}" if len(file.records) > MAX_RECORDS else ""
