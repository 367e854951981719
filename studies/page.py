"""Tables and figures of a study, made from its records alone. docs/build.py writes them into docs/results.md."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sampo.io.files import replacing
from sampo.lab.methods import STUDY_METHODS
from sampo.lab.settings import GROUPS, STUDY_GROUPS

from .analysis import (
    HEADLINE,
    KL_LEVELS,
    WIN_RATES,
    Cell,
    Spread,
    Study,
    complete_grids,
    first_reaching,
    frontier,
    interpolate_grid,
    over_seeds,
    paired,
    tuned,
)
from .claims import claims
from .plan import BIAS_METHODS, BIASES, PENALTY_BIASES, PENALTY_METHODS, PENALTY_RATES, PENALTY_STARTS

COLUMNS = {  # number -> head, digits
    "tokens": ("tokens", 1),
    "stops": ("stops", 2),
    "quality": ("true quality", 2),
    "win_rate": ("win rate", 3),
    "kl": ("KL", 1),
    "accuracy": ("accuracy", 2),
    "correlation": ("corr. with length", 2),
    "pressure": ("pressure before", 2),
}
SUMMARISED = (  # methods of the short table
    *("dpo", "sampo", "rdpo_02", "mean", "otpo", "dpo_learned_balanced"),
    *("rejected_learned_balanced", "rejected_learned_dataset_balanced"),
)
_AT_BEST = {"win_rate": 3, "tokens": 1, "kl": 1}  # number -> digits
NONE = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def format_spread(spread: Spread | None, digits: int, *, sign: bool = False) -> str:
    """Mean and interval."""
    if spread is None:
        return NONE
    form = f"{'+' if sign else ''}.{digits}f"
    text = format(spread.mean, form)
    return text if spread.low is None else f"{text} [{spread.low:{form}}, {spread.high:{form}}]"


def format_mean(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return NONE
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def about(study: Study) -> str:
    """What has been run."""
    headline = [c for c in study.cells if c.is_headline]
    biased = [c for c in study.cells if c.bias != HEADLINE.bias and not c.changes]
    changed = [c for c in study.cells if c.changes]
    rest = len(study.cells) - len(headline) - len(biased) - len(changed)
    hours = sum(cell.numbers["train_seconds"] for cell in study.cells) / 3600
    setting = f"learning rate {HEADLINE.learning_rate:g}, beta {HEADLINE.beta:g}, annotators' bias {HEADLINE.bias:g}"
    return (
        f"{len(study.cells)} runs and {len(study.starts)} supervised starts: {len(headline)} in the headline setting "
        f"({setting}), {rest} in other cells of the grid, {len(biased)} with other annotators, {len(changed)} with "
        f"another start or rate of the learned penalty. None was left out. Training took {hours:.1f} hours of a core."
    )


def summary(study: Study) -> str:
    """Win rate, tokens and KL of a few methods on each group, and with annotators of a strong length bias."""
    worst = max(BIASES)
    places = {f"`{group}`": (group, HEADLINE.bias) for group in GROUPS} | {f"`all`, bias {worst:g}": ("all", worst)}

    def cell(method: str, group: str, bias: float) -> str:
        def where(one: Cell) -> bool:
            return (one.method, one.group) == (method, group) and one.is_at(
                HEADLINE.learning_rate, HEADLINE.beta, bias
            )

        means = [(list(study.values(name, where).values()), digits) for name, digits in _AT_BEST.items()]
        return " / ".join(f"{statistics.mean(found):.{digits}f}" for found, digits in means if found) or NONE

    rows = [
        [STUDY_METHODS[method].title, *(cell(method, *place) for place in places.values())] for method in SUMMARISED
    ]
    start = [statistics.mean(study.start(name).values()) for name in ("win_rate", "tokens")]
    return f"{table(['method', *places], rows)}\n\nThe start: {start[0]:.3f} / {start[1]:.1f}."


def headline(study: Study) -> str:
    """Every method on every group."""
    head = ["trained on", "method", "seeds", *(title for title, _ in COLUMNS.values())]
    numbers = [format_mean(list(study.start(name).values()), digits) for name, (_, digits) in COLUMNS.items()]
    rows = [[NONE, "start", str(len(study.starts)), *numbers]]
    for group in STUDY_GROUPS:
        for method in _methods_of(study, group):
            found = {name: list(study.headline(method, group, name).values()) for name in COLUMNS}
            cells = [format_mean(found[name], digits) for name, (_, digits) in COLUMNS.items()]
            rows.append([f"`{group}`", STUDY_METHODS[method].title, str(len(found["tokens"])), *cells])
    return table(head, rows)


def _methods_of(study: Study, group: str) -> list[str]:
    present = {c.method for c in study.cells if c.is_headline and c.group == group}
    return [method for method in STUDY_METHODS if method in present]


def against_dpo(study: Study) -> str:
    """Differences from DPO in the same seed."""
    names = {"tokens": ("tokens", 1), "quality": ("true quality", 2), "win_rate": ("win rate", 3), "kl": ("KL", 1)}
    rows = []
    for group in GROUPS:
        for method in _methods_of(study, group):
            if method != "dpo":
                spreads = [
                    (paired(study.headline(method, group, name), study.headline("dpo", group, name)), digits)
                    for name, (_, digits) in names.items()
                ]
                cells = [format_spread(spread, digits, sign=True) for spread, digits in spreads]
                rows.append([f"`{group}`", STUDY_METHODS[method].title, *cells])
    return table(["trained on", "method", *(title for title, _ in names.values())], rows)


def equal_kl(study: Study) -> str:
    """Win rate and tokens at the same distance from the start."""
    rows = []
    for group in GROUPS:
        for method in _methods_of(study, group):
            cells = []
            for level in KL_LEVELS:
                wins = over_seeds(list(interpolate_grid(study, method, group, "win_rate", level=level).values()))
                tokens = over_seeds(list(interpolate_grid(study, method, group, "tokens", level=level).values()))
                text = NONE if wins is None or tokens is None else f"{wins.mean:.3f} / {tokens.mean:.1f} ({wins.n})"
                cells.append(text)
            if any(cell != NONE for cell in cells):
                rows.append([f"`{group}`", STUDY_METHODS[method].title, *cells])
    if not rows:
        return "The grid has not been run yet."
    return table(["trained on", "method", *(f"KL {level:g}" for level in KL_LEVELS)], rows)


def equal_win_rate(study: Study) -> str:
    """Tokens and KL where a method first reaches a win rate."""
    rows = []
    for group, level in WIN_RATES.items():
        for method in _methods_of(study, group):
            seeds = len(complete_grids(study, method, group))
            there = first_reaching(study, method, group, level).values()
            if seeds:
                numbers = [format_mean([numbers[name] for numbers in there], 1) for name in ("tokens", "kl")]
                reached = f"{len(there)} of {seeds}"
                rows.append([f"`{group}`", f"{level:g}", STUDY_METHODS[method].title, reached, *numbers])
    if not rows:
        return "The grid has not been run yet."
    return table(["trained on", "win rate", "method", "seeds that reach it", "tokens", "KL"], rows)


def at_best(study: Study) -> str:
    """Every method in its best cell of the grid, compared with DPO in its own best cell."""
    rows = []
    for group in GROUPS:
        dpo = tuned(study, "dpo", group)
        for method in _methods_of(study, group):
            best = tuned(study, method, group)
            if not best:
                continue
            numbers = [format_mean([c.numbers[n] for c in best.values()], d) for n, d in _AT_BEST.items()]
            against = [
                format_spread(
                    paired(*({s: c.numbers[n] for s, c in cells.items()} for cells in (best, dpo))), d, sign=True
                )
                for n, d in _AT_BEST.items()
                if n != "kl"
            ]
            chosen = Counter((c.learning_rate, c.beta) for c in best.values()).most_common()
            places = ", ".join(
                f"{rate:g} / {beta:g}" + (f" ({n})" if n < len(best) else "") for (rate, beta), n in chosen
            )
            title = STUDY_METHODS[method].title
            compared = [NONE, NONE] if method == "dpo" else against
            rows.append([f"`{group}`", title, str(len(best)), *numbers, *compared, places])
    if not rows:
        return "The grid has not been run with two seeds yet."
    head = ["trained on", "method", "seeds", "win rate", "tokens", "KL", "win rate against DPO", "tokens against DPO"]
    return table([*head, "learning rate / beta (seeds)"], rows)


def frontiers(study: Study) -> str:
    """Methods and cells that no other one beats in both tokens and true quality, by means over seeds."""
    rows = []
    for group in GROUPS:
        means = _grid_means(study, group)
        best = frontier([(tokens, quality) for tokens, quality, _, _ in means.values()])
        for i in sorted(best, key=lambda i: list(means.values())[i][0]):
            (method, rate, beta), (tokens, quality, wins, n) = list(means.items())[i]
            numbers = [f"{tokens:.1f}", f"{quality:.2f}", f"{wins:.3f}", str(n)]
            rows.append([f"`{group}`", STUDY_METHODS[method].title, f"{rate:g}", f"{beta:g}", *numbers])
    return table(
        ["trained on", "method", "learning rate", "beta", "tokens", "true quality", "win rate", "seeds"], rows
    )


def _grid_means(study: Study, group: str) -> dict[tuple[str, float, float], tuple[float, float, float, int]]:
    found: dict[tuple[str, float, float], list[Cell]] = {}
    for cell in study.cells:
        if cell.group == group and cell.bias == HEADLINE.bias and not cell.changes:
            found.setdefault((cell.method, cell.learning_rate, cell.beta), []).append(cell)

    def mean(cells: list[Cell], name: str) -> float:
        return statistics.mean(cell.numbers[name] for cell in cells)

    return {
        key: (mean(cells, "tokens"), mean(cells, "quality"), mean(cells, "win_rate"), len(cells))
        for key, cells in found.items()
    }


def biases(study: Study) -> str:
    """Tokens, win rate and accuracy by annotators' bias, on mixed pairs."""
    levels = sorted({HEADLINE.bias, *BIASES})
    rows = []
    for method in BIAS_METHODS:
        cells = []
        for bias in levels:
            numbers = [
                list(study.headline(method, "all", name, bias=bias).values())
                for name in ("tokens", "win_rate", "accuracy")
            ]
            means = [f"{statistics.mean(v):.{d}f}" if v else NONE for v, d in zip(numbers, (1, 2, 2), strict=True)]
            cells.append(f"{' / '.join(means)} ({len(numbers[0])})")
        rows.append([STUDY_METHODS[method].title, *cells])
    return table(["method", *(f"bias {bias:g}" for bias in levels)], rows)


def penalties(study: Study) -> str:
    """Start and rate of the learned penalty: tokens, win rate, correlation, and where the penalty ended."""
    rows = []
    names = {"tokens": 1, "win_rate": 2, "accuracy": 2, "correlation": 2, "penalty_per_token": 3}
    for bias in PENALTY_BIASES:
        for method in PENALTY_METHODS:
            for start in PENALTY_STARTS:
                for rate in PENALTY_RATES:
                    where = _changed(method, bias, start, rate)
                    found = {name: list(study.values(name, where).values()) for name in names}
                    if found["tokens"]:
                        cells = [format_mean(found[name], digits) for name, digits in names.items()]
                        title = STUDY_METHODS[method].title
                        rows.append([f"{bias:g}", title, str(start), f"{rate:g}", str(len(found["tokens"])), *cells])
    head = ["bias", "method", "start", "rate", "seeds", "tokens", "win rate", "accuracy", "corr. with length"]
    return table([*head, "penalty per token at the end"], rows) if rows else "Not run yet."


def _changed(method: str, bias: float, start: object, rate: float) -> Callable[[Cell], bool]:
    def where(cell: Cell) -> bool:
        if (cell.learning_rate, cell.beta) != (HEADLINE.learning_rate, HEADLINE.beta):
            return False
        changes = dict(cell.changes)
        here = changes.get("length_penalty_start", 0.0), changes.get("length_penalty_lr", 0.05)
        return (cell.method, cell.group, cell.bias) == (method, "all", bias) and here == (start, rate)

    return where


def verdicts(study: Study) -> str:
    """One row per claim."""
    rows = [[claim.text, claim.source, f"**{claim.verdict}**"] for claim in claims(study)]
    return table(["claim", "whose", "verdict"], rows)


def forecast(study: Study) -> str:
    """How well the length pressure before training predicts the change of length, under each condition."""
    kinds = ("pressure of the weights", "pairs weighted as in the first gradient")
    found = [claim for claim in claims(study) if claim.text.startswith("The length pressure")]
    lines = []
    for name, claim in zip(kinds, found, strict=True):
        cells = [f"{f.condition} {f.evidence.removeprefix('rank correlation ')}" for f in claim.findings]
        lines.append(f"- {name}: {'; '.join(cells)}")
    return "\n".join(lines)


def details(study: Study) -> str:
    """Rule and numbers of every claim."""
    return "\n\n".join(claim.details for claim in claims(study))


PARTS: dict[str, Callable[[Study], str]] = {
    **{"about": about, "summary": summary, "forecast": forecast},
    **{"verdicts": verdicts, "details": details},
    **{"headline": headline, "against_dpo": against_dpo},
    **{"at_best": at_best, "equal_kl": equal_kl, "equal_win_rate": equal_win_rate, "frontiers": frontiers},
    **{"biases": biases, "penalties": penalties},
}
# colours of methods in figures; the others are grey
COLOURS = {
    **{"dpo": "#666666", "sampo": "#0072b2", "sampo_rejected_learned": "#d55e00", "rdpo_02": "#009e73"},
    **{"dpo_learned": "#cc79a7", "sampo_rejected": "#e69f00", "dpo_balanced": "#56b4e9"},
    **{"rejected_learned_balanced": "#6a3d9a", "rejected_learned_dataset_balanced": "#b2182b"},
    **{"dpo_learned_balanced": "#a6761d"},
}
OTHERS = "#c8c8c8"


def write_figures(study: Study, folder: Path) -> list[Path]:
    """The figures of docs/results.md as SVG. Needs matplotlib (`pip install "sampo-dpo[report]"`)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    drawn: dict[str, tuple[int, Callable]] = {
        "frontier": (len(GROUPS), draw_frontier),
        "prediction": (len(GROUPS), draw_prediction),
        "biases": (2, draw_biases),
    }
    with rc_context({"svg.hashsalt": "sampo", "svg.fonttype": "none", "font.size": 9}):
        for name, (n_panels, draw) in drawn.items():
            figure = Figure(figsize=(3.3 * n_panels, 3.4), layout="constrained")
            FigureCanvasSVG(figure)
            panels = figure.subplots(1, n_panels)
            draw(panels, study)
            handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            legend_below(figure, handles)
            path = folder / f"{name}.svg"
            with replacing(path) as file:
                figure.savefig(file, format="svg", metadata={"Date": None})
            written.append(path)
    return written


def legend_below(figure: Any, handles: Mapping[str, object]) -> None:
    """A legend below the panels, in as many columns as the figure has room for."""
    for ncols in range(min(4, len(handles)), 0, -1):
        place = {"loc": "outside lower center", "ncols": ncols, "frameon": False}
        legend = figure.legend(handles.values(), handles.keys(), **place)
        if ncols == 1 or legend.get_window_extent().width <= 0.9 * figure.bbox.width:  # glyphs differ once it is saved
            return
        legend.remove()


def draw_frontier(panels: Sequence[Any], study: Study) -> None:
    """Tokens against true quality: a point per method and cell of the grid, means over seeds, per group."""
    for axes, group in zip(panels, GROUPS, strict=True):
        for (method, rate, beta), (tokens, quality, _, _) in _grid_means(study, group).items():
            is_headline = (rate, beta) == (HEADLINE.learning_rate, HEADLINE.beta)
            colour, title = COLOURS.get(method, OTHERS), STUDY_METHODS[method].title
            label = (title if method in COLOURS else "other methods") if is_headline else None
            axes.plot(
                tokens, quality, "o" if is_headline else ".", color=colour, label=label, zorder=2 + (method in COLOURS)
            )
        start = [(numbers["tokens"], numbers["quality"]) for numbers in study.starts.values()]
        axes.plot(*map(statistics.mean, zip(*start, strict=True)), "k*", label="start")
        axes.set(title=f"trained on {group}", xlabel="tokens per answer", ylabel="true quality")
        axes.spines[["top", "right"]].set_visible(False)


def draw_prediction(panels: Sequence[Any], study: Study) -> None:
    """Length pressure before training against the change of length after it, a point per run, per group."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axes, group in zip(panels, GROUPS, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for cell in study.cells:
            if cell.group == group and "pressure" in cell.numbers:
                ratio = cell.numbers["tokens"] / study.starts[cell.seed]["tokens"]
                method = cell.method if cell.method in COLOURS else ""
                points.setdefault(method, []).append((cell.numbers["pressure"], ratio))
        for method, found in sorted(points.items()):  # the others below
            title = STUDY_METHODS[method].title if method else "other methods"
            axes.plot(*zip(*found, strict=True), ".", color=COLOURS.get(method, OTHERS), label=title)
        axes.axhline(1, color="black", linewidth=0.6)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(title=f"trained on {group}", xlabel="length pressure before", ylabel="tokens / tokens of the start")
        axes.spines[["top", "right"]].set_visible(False)


def draw_biases(panels: Sequence[Any], study: Study) -> None:
    """Tokens and win rate by annotators' bias, means over seeds."""
    for axes, name, title in zip(panels, ("tokens", "win_rate"), ("tokens per answer", "win rate"), strict=True):
        for method in BIAS_METHODS:
            points = {
                bias: list(study.headline(method, "all", name, bias=bias).values())
                for bias in {HEADLINE.bias, *BIASES}
            }
            known = sorted((bias, statistics.mean(values)) for bias, values in points.items() if values)
            if known:
                axes.plot(*zip(*known, strict=True), "o-", color=COLOURS[method], label=STUDY_METHODS[method].title)
        axes.set(title=title, xlabel="annotators' length bias")
        axes.spines[["top", "right"]].set_visible(False)
