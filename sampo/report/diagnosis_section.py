"""The section of the page on checkpoints, from records of `sampo diagnose`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..diagnostics.findings import PLAIN, Finding, read_scores
from ..io.names import readable_name
from ..io.records import Record
from ..stats.intervals import Estimate
from . import diagnostic_figures
from .collect import Found, RecordFile
from .numbers import estimate, number
from .page import MAX_RUNS, Heading, Origin, PageTable, Section, build_section, origins_of, shorten

MAX_GROUP_COLUMNS = 20  # columns of a table of groups
_NOT_LABELS = {  # of the config of a record of `sampo diagnose`: settings; the rest labels the number
    *("reference", "data", "split", "beta", "dtype", "bf16", "seed", "max_length", "truncation_mode", "resamples"),
    *("quality", "policy", "pairs"),
}


def diagnosis_section(found: Found) -> Section:
    """Length pressure, rewards and log-ratios of checkpoints."""
    return build_section("model", "Length pressure and rewards of a model", found.diagnoses, _add_diagnosis)


def _add_diagnosis(section: Section, file: RecordFile) -> None:
    pages: dict[str, dict[str, list[Record]]] = {}
    for record in file.records:
        settings = {key: record.config.get(key) for key in sorted(_NOT_LABELS - {"policy", "pairs"})}
        page = pages.setdefault(repr(settings), {})
        page.setdefault(f"{record.config['policy']}\0{record.config['pairs']}", []).append(record)
    for page in pages.values():
        names = _short_names([key.partition("\0")[0] for key in page])
        _diagnosed_page(section, file, dict(zip(names, page.values(), strict=True)))


def _short_names(policies: Sequence[str]) -> list[str]:
    """Unique names for a legend."""
    last = [shorten(Path(readable_name(name)).name or name) for name in policies]
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
    against = f", against {readable_name(reference)}" if reference else ", without a reference"
    section.add(Heading(f"{', '.join(found)} on {readable_name(str(first.config.get('data')))}{against}"))
    section.add(_pressure_table(found, origins, n))
    rewarded = {name: some for name, some in found.items() if any(f.quantity == "accuracy" for f in some)}
    if rewarded:
        section.add(_margin_table(rewarded, origins, n))
    drawn = dict(list(found.items())[:MAX_RUNS])
    for name, some in drawn.items():
        section.draw(
            partial(_draw_pressure, some),
            title=f"Length pressure of every weighting: {name}",
            description="Left of 0, a first step of training lengthens the answers. " + _describe_pressures(some),
            origins=origins,
            n=n,
            size=(5.0, 5.2),
        )
    if rewarded:
        _reward_figures(
            section, {name: some for name, some in drawn.items() if name in rewarded}, page, file, origins, n
        )


def _draw_pressure(found: Sequence[Finding], figure: Any) -> None:
    diagnostic_figures.draw_length_pressure(found, axes=figure.add_subplot())


def _estimate_of(found: Sequence[Finding], quantity: str, **labels: str) -> Estimate | None:
    some = [f for f in found if f.quantity == quantity and labels.items() <= f.labels.items()]
    return some[0].estimate if some else None


def _labels(found: Mapping[str, Sequence[Finding]], quantity: str, label: str) -> list[str]:
    every = (f for some in found.values() for f in some if f.quantity == quantity)
    return list(dict.fromkeys(str(f.labels[label]) for f in every))


def _pressure_table(found: Mapping[str, Sequence[Finding]], origins: tuple[Origin, ...], n: str) -> PageTable:
    groups = _labels(found, "pressure", "group")[:MAX_GROUP_COLUMNS]
    rows = [
        [name, method, *(number(_estimate_of(some, "pressure", method=method, group=g), sign=True) for g in groups)]
        for name, some in found.items()
        for method in _labels({name: some}, "pressure", "method")
    ]
    return PageTable(
        "Length pressure; below 0, training lengthens", ["checkpoint", "method", *groups], rows, origins, n, names=2
    )


def _margin_table(found: Mapping[str, Sequence[Finding]], origins: tuple[Origin, ...], n: str) -> PageTable:
    groups = _labels(found, "accuracy", "group")
    columns = {"correlation": "corr(margin, T_w − T_l)", "partial": "at equal quality"}
    if not any(f.quantity == "margin_partial" for some in found.values() for f in some):
        del columns["partial"]
    rows = []
    for name, some in found.items():
        for method in _labels({name: some}, "accuracy", "method"):
            shares = [number(_estimate_of(some, "accuracy", method=method, group=group), "%") for group in groups]
            more = [number(_estimate_of(some, f"margin_{what}", method=method), 2) for what in columns]
            rows.append([name, method, *shares, *more])
    heads = ["checkpoint", "method", *groups, *columns.values()]
    return PageTable("Margins above 0, by lengths, and how much of them is length", heads, rows, origins, n, names=2)


def _describe_pressures(found: Sequence[Finding]) -> str:
    values = [
        f"{f.labels['method']} {number(f.estimate, sign=True)}"
        for f in found
        if f.quantity == "pressure" and f.labels.get("group") == "all"
    ]
    return f"Over all pairs: {'; '.join(values)}."


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
            f"{name}: {_plain_accuracy(some, 'chosen longer')} where the chosen one is longer, "
            f"{_plain_accuracy(some, 'chosen shorter')} where shorter."
            for name, some in found.items()
        ),
        **about,
    )
    for name, some in found.items():
        slope, explained = _estimate_of(some, "reward_slope"), _estimate_of(some, "reward_r2")
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


def _plain_accuracy(found: Sequence[Finding], group: str) -> str:
    return number(_estimate_of(found, "accuracy", method=PLAIN, group=group), "%")


def _draw_rewards(found: Sequence[Finding], paths: Sequence[Path], beta: float, figure: Any) -> None:
    axes = figure.add_subplot()
    diagnostic_figures.reward_against_length(found, read_scores(paths), beta=beta, axes=axes)


def _draw_profile(draw: Callable[..., Any], found: Sequence[Finding], figure: Any) -> None:
    draw(found, axes=figure.add_subplot())


_PROFILES: dict[Callable[..., Any], str] = {
    diagnostic_figures.log_ratio_by_position: "Log-ratio by the position of the token",
    diagnostic_figures.log_ratio_by_class: "Log-ratio of first, inner and end tokens",
}


def _shards(folder: Path, record: Record) -> list[Path]:
    """The Parquet files behind a record; none if they do not exist any more."""
    digest = str(record.config["pairs"])
    if not digest.isalnum():  # it becomes part of a pattern
        raise ValueError(f"`pairs` of a record must be a digest, got {digest[:80]!r}")
    return sorted((folder / "pairs").glob(f"*-{digest}/*.parquet"))
