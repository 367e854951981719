"""Table, figure and sentences of the lab, computed from its records."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import replacing
from ..io.records import Record
from ..io.tables import Table
from .methods import STUDY_METHODS
from .settings import GROUPS, MIN_QUALITY, SFT, UNEQUAL_TOKENS, Run, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {  # record -> head of its column, digits
    "tokens": ("tokens", 1),
    "stops": ("stops", 2),
    "quality": ("true\nquality", 2),
    "win_rate": ("win rate\nvs SFT", 2),
    "accuracy": ("accuracy", 2),
    "accuracy_better_shorter": ("accuracy,\nbetter is\nshorter", 2),
    "correlation": ("corr. with\nlength", 2),
    "pressure": ("length\npressure", 2),
    "kl": ("KL", 1),
}
METHOD_COLOURS = (
    "#666666",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
)  # of the methods; distinct for colour-blind readers
FIGURE_SIZE = (9.0, 3.4)  # inches
LEGEND = (
    "tokens: mean length of a sampled answer, end token included. stops: share of answers that end before the cap. "
    "true quality: distinct requested facts stated rightly minus distinct facts stated wrongly. win rate: true "
    "quality against the SFT model's own answer, ties one half. accuracy: share of held-out pairs whose truly better "
    "answer has the higher implicit reward (sum of log-ratios), of all and of those whose better answer is shorter by "
    f"more than {UNEQUAL_TOKENS} tokens. corr. with length: of the margin there with the length difference. length "
    "pressure: derivative of the margin by the end token's logit, per training pair before the first step; negative "
    "lengthens. "
    "KL: of complete answers from the SFT model, in nats."
)


@dataclass(frozen=True)
class Line:
    """One line of the table: a method on a group, with one record per seed and number."""

    group: str
    method: str
    numbers: dict[str, list[Record]]

    @property
    def title(self) -> str:
        """The method's name for people."""
        return "SFT (start)" if self.method == SFT else STUDY_METHODS[self.method].title

    def values(self, name: str) -> list[float]:
        """One value per seed, without undefined ones."""
        return [record.value for record in self.numbers.get(name, []) if record.value is not None]

    def mean(self, name: str) -> float | None:
        """Mean over seeds."""
        return statistics.mean(self.values(name)) if self.values(name) else None

    def cell(self, name: str) -> str:
        """Mean ± sd over seeds; for one seed the value, with the interval of the win rate."""
        values, digits = self.values(name), COLUMNS[name][1]
        if not values:
            return "–"
        if len(values) > 1:
            return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
        interval = self.numbers[name][0].interval
        if name == "win_rate" and interval:
            return f"{values[0]:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
        return f"{values[0]:.{digits}f}"


def outcomes_of(records: Iterable[Record]) -> list[tuple[Run, list[Record]]]:
    """Runs with their records, from the records of one experiment; of duplicates the last one."""
    found: dict[tuple[str, str, int], dict[str, Record]] = {}
    for record in records:
        config = record.config
        found.setdefault((config["group"], config["method"], config["seed"]), {})[record.name] = record
    configs = [next(iter(numbers.values())).config for (_, method, _), numbers in found.items() if method != SFT]
    names = [field.name for field in fields(Settings)]
    settings = {Settings(**{name: config[name] for name in names}) for config in configs}
    if len(settings) != 1:
        raise ValueError(f"The records must be of one experiment, got {len(settings)} different settings. Split them.")
    (shared,) = settings
    order = ["", *GROUPS], [SFT, *STUDY_METHODS]
    runs = sorted(found, key=lambda run: (order[0].index(run[0]), order[1].index(run[1]), run[2]))
    return [
        (Run(seed, group, method, shared), list(found[group, method, seed].values())) for group, method, seed in runs
    ]


def collect_lines(outcomes: Sequence[tuple[Run, list[Record]]]) -> list[Line]:
    """Lines in the order of the runs, the start first."""
    lines: dict[tuple[str, str], Line] = {}
    for run, records in outcomes:
        line = lines.setdefault((run.group, run.method), Line(run.group, run.method, {}))
        for record in records:
            line.numbers.setdefault(record.name, []).append(record)
    return list(lines.values())


def heads(names: Iterable[str] = COLUMNS) -> list[str]:
    """Heads of the table's columns, with line breaks."""
    return ["trained\non", "method", *(COLUMNS[name][0] for name in names)]


def cells(line: Line, names: Iterable[str] = COLUMNS) -> list[str]:
    """The line as text."""
    return [line.group or "–", line.title, *(line.cell(name) for name in names)]


def table(lines: Sequence[Line]) -> Table:
    """The table for a terminal, a section per group."""
    made = Table("", heads(), keys=2)
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        made.add(*cells(line))
        if following is not None and following.group != line.group:
            made.end_section()
    return made


def markdown_table(lines: Sequence[Line], names: Iterable[str] = COLUMNS) -> str:
    """The table in Markdown."""
    names = list(names)
    head = [title.replace("\n", " ") for title in heads(names)]
    rows = [head, ["---"] * len(head), *(cells(line, names) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown(lines: Sequence[Line], *, about: str) -> str:
    """The table in Markdown, with a description of its columns and its origin."""
    return f"{markdown_table(lines)}\n\n{about}\n\n{LEGEND}\n"


def describe_runs(outcomes: Sequence[tuple[Run, list[Record]]], command: str) -> str:
    """Describe how the numbers were measured."""
    settings, seeds = outcomes[0][0].settings, sorted({run.seed for run, _ in outcomes})
    spread = f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
    if len(seeds) == 1:
        spread = f"seed {seeds[0]}; the interval of the win rate is over questions"
    return (
        f"Measured by `{command}` ({spread}): {settings.steps} steps of "
        f"{settings.batch_size} pairs, learning rate {settings.learning_rate:g}, beta {settings.beta:g}, annotators' "
        f"length bias {settings.bias:g}; supervised start of {settings.sft_steps} steps; {settings.questions} "
        f"questions and {settings.judged_pairs} judged pairs, all held out."
    )


def summarise_findings(lines: Sequence[Line]) -> list[str]:
    """Sentences about the measurements, computed from their numbers."""
    start = lines[0]
    n_seeds = len(start.values("tokens"))
    sentences = [
        f"The start answers in {start.mean('tokens'):.1f} tokens with a true quality of {start.mean('quality'):.2f}."
    ]
    for group in GROUPS:
        found = {line.method: line for line in lines if line.group == group}
        if "dpo" in found:
            baseline = found.pop("dpo")
            sentences += [_compare(line, baseline, n_seeds) for line in found.values()]
            sentences += [_describe_accuracy([baseline, *found.values()])] if group == "all" else []
    if n_seeds == 1:
        sentences.append("This is one seed: a difference of a few tokens can change its sign with another.")
    return sentences


def _compare(line: Line, baseline: Line, n_seeds: int) -> str:
    differences = [a - b for a, b in zip(line.values("tokens"), baseline.values("tokens"), strict=True)]
    mean = statistics.mean(differences)
    same_sign = sum((d > 0) == (mean > 0) for d in differences)
    seeds = f" ({same_sign} of {n_seeds} seeds)" if n_seeds > 1 else ""
    compared = f"{abs(mean):.1f} tokens {'longer' if mean > 0 else 'shorter'} than"
    if abs(mean) < 0.05:  # would read as 0.0 tokens longer
        compared, seeds = "as long as", ""
    return (
        f"On `{line.group}` ({GROUPS[line.group]}), the answers of {line.title} are {compared} those of "
        f"{baseline.title}{seeds}, {line.mean('tokens'):.1f} against {baseline.mean('tokens'):.1f}; "
        f"{line.mean('stops'):.0%} of them end against {baseline.mean('stops'):.0%}; "
        f"the win rate against the start is {line.cell('win_rate')} against {baseline.cell('win_rate')}."
    )


def _describe_accuracy(lines: Sequence[Line]) -> str:
    parts = []
    for line in lines:
        shorter, longer = line.mean("accuracy_better_shorter"), line.mean("accuracy_better_longer")
        if shorter is not None and longer is not None:
            parts.append(f"{line.title} {shorter:.0%} and {longer:.0%}")
    return (
        f"On `{lines[0].group}`, the implicit reward is right about this share of held-out pairs whose better answer "
        f"is shorter, and of those whose better answer is longer: {'; '.join(parts)}."
    )


def weak_start(lines: Sequence[Line]) -> str | None:
    """A warning if the start knows too few facts for quality to be meaningful."""
    low = [quality for quality in lines[0].values("quality") if quality <= MIN_QUALITY]
    if not low:
        return None
    return (
        f"The supervised start must have a true quality above {MIN_QUALITY} for quality and win rate to mean "
        f"something, got {', '.join(f'{quality:.2f}' for quality in low)}. With a start that states mostly wrong "
        "facts, saying less wins. Raise `--sft_steps`."
    )


def draw_figure(lines: Sequence[Line], path: Path) -> None:
    """The figure as an SVG file. Needs matplotlib (`pip install "sampo-dpo[report]"`)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "sampo", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        draw_into(figure, lines)
        with replacing(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})


def draw_into(figure: "Figure", lines: Sequence[Line]) -> None:
    """Length and win rate per group and method: a bar for the mean, a dot per seed, a dashed line for the start.

    For one seed, a narrow line shows the 95 % interval.
    """
    panels = {"tokens": "tokens per answer", "win_rate": "win rate against the start, judged by the truth"}
    groups = [group for group in GROUPS if any(line.group == group for line in lines)]
    methods = [method for method in STUDY_METHODS if any(line.method == method for line in lines)]
    for axes, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for line in lines[1:]:
            x = groups.index(line.group) + 0.25 * (methods.index(line.method) - (len(methods) - 1) / 2)
            _mark(
                axes,
                line,
                name,
                x,
                METHOD_COLOURS[list(STUDY_METHODS).index(line.method) % len(METHOD_COLOURS)],
                in_legend=line.group == groups[0],
            )
        axes.axhline(lines[0].mean(name), color="black", linewidth=0.8, linestyle="--", label="SFT (start)")
        names = {"all": "all\nmixed pairs", "short": "short\nchosen shorter", "long": "long\nchosen longer"}
        axes.set_xticks(range(len(groups)), [names[group] for group in groups])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.12)  # room for the last figure
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _mark(axes: Any, line: Line, name: str, x: float, colour: str, *, in_legend: bool) -> None:
    values, stops = line.values(name), statistics.mean(line.values("stops"))
    mean = statistics.mean(values)
    label = line.title if in_legend else None
    axes.plot([x - 0.1, x + 0.1], [mean, mean], color=colour, linewidth=3, solid_capstyle="butt", label=label)
    interval = line.numbers[name][0].interval
    if len(values) > 1:
        axes.plot([x] * len(values), values, "o", markersize=4.5, color=colour, markeredgecolor="white", zorder=3)
    elif interval:
        axes.plot([x, x], interval, color=colour, linewidth=1)
    top = max(*values, *(interval or ()))
    text = f"{mean:.{0 if name == 'tokens' else 2}f}"
    if name == "tokens" and stops < 0.9:
        text += f"\n({stops:.0%} end)"
    axes.annotate(text, (x, top), (0, 4), textcoords="offset points", ha="center", fontsize=7.5, color=colour)
