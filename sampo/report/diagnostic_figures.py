"""Figures of `sampo diagnose`: each function draws into matplotlib Axes, given or new, and returns them.

They take what `sampo.diagnostics.findings.findings` returns. The colour shows the checkpoint, the shape of the
marker the response (chosen or rejected) or the group; every bar is a 95 % interval.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..diagnostics.findings import PLAIN, SIDES, Finding, PairScores
from .axes import COLOURS, MARKERS, draw_level, given_or_new, legend_above

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 2000  # of a scatter plot: more are indistinct, and make a page of megabytes
Checkpoints = Mapping[str, Sequence[Finding]]


def reward_against_length(
    found: Sequence[Finding], scores: PairScores, *, beta: float, axes: "Axes | None" = None, seed: int = 0
) -> "Axes":
    """Implicit reward of each response against its length, and the means of ten bins.

    Args:
        found: of one checkpoint with a reference.
        scores: its rows.
        beta: of the findings.
        axes: to draw into.
        seed: which responses are shown, where there are more than `POINTS`.

    Raises:
        ValueError: there is no reward without a reference.
    """
    curve = _require(found, "reward")
    axes = given_or_new(axes, size=None)
    shown = np.arange(scores.tokens.shape[1])
    if len(shown) > POINTS // 2:
        shown = np.random.default_rng(seed).choice(len(shown), POINTS // 2, replace=False)
    for response, tokens, ratio, marker, colour in zip(
        SIDES, scores.tokens, scores.log_ratio, MARKERS[:2], COLOURS[:2], strict=True
    ):
        axes.scatter(tokens[shown], beta * ratio[shown], s=9, alpha=0.4, marker=marker, color=colour, label=response)
    _draw_intervals(
        axes, [f.labels["tokens"] for f in curve], curve, color="black", marker="o", linestyle="-", label="mean"
    )
    axes.set_xlabel("length of the response, tokens")
    axes.set_ylabel("implicit reward β·Σ log-ratio")
    legend_above(axes)
    return axes


def accuracy_by_length(page: Checkpoints, *, method: str = PLAIN, axes: "Axes | None" = None) -> "Axes":
    """Share of pairs that a method's scores order as the annotators did, by the order of their lengths.

    Args:
        page: checkpoint -> its findings, with a reference.
        method: whose scores.
        axes: to draw into.

    Raises:
        ValueError: no checkpoint has accuracies.
    """
    axes = given_or_new(axes, size=None)
    chosen = {name: _require(found, "accuracy", method=method) for name, found in page.items()}
    names = list(dict.fromkeys(f.labels["group"] for found in chosen.values() for f in found))
    _draw_columns(axes, chosen, names, "group")
    draw_level(axes, 0.5)
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"share of margins above 0 (`{method}`)")
    return axes


def log_ratio_by_position(found: Sequence[Finding], *, axes: "Axes | None" = None) -> "Axes":
    """Mean log-ratio of a token by its position in the response, on a logarithmic axis.

    Args:
        found: of one checkpoint with a reference.
        axes: to draw into.

    Raises:
        ValueError: there are no log-ratios without a reference.
    """
    axes = given_or_new(axes, size=None)
    for response, marker, colour in zip(SIDES, MARKERS, COLOURS, strict=False):
        rows = _require(found, "log_ratio_at", side=response)
        middle = [((f.labels["from"] + 1) * (f.labels["to"] + 1)) ** 0.5 for f in rows]
        _draw_intervals(axes, middle, rows, color=colour, marker=marker, linestyle="-", label=response)
    axes.set_xscale("log", base=2)
    draw_level(axes, 0)
    axes.set_xlabel("position of the token, from 1")
    axes.set_ylabel("mean log-ratio, nats")
    legend_above(axes)
    return axes


def log_ratio_by_class(found: Sequence[Finding], *, axes: "Axes | None" = None) -> "Axes":
    """Mean log-ratio of first, inner and end tokens, chosen and rejected; arguments as of `log_ratio_by_position`."""
    axes = given_or_new(axes, size=None)
    rows = {response: _require(found, "log_ratio_of", side=response) for response in SIDES}
    names = list(dict.fromkeys(f.labels["class"] for response in rows.values() for f in response))
    _draw_columns(axes, rows, names, "class")
    draw_level(axes, 0)
    axes.set_ylabel("mean log-ratio, nats")
    return axes


def draw_length_pressure(
    found: Sequence[Finding],
    *,
    groups: Sequence[str] = ("all", "chosen longer", "chosen shorter"),
    methods: Sequence[str] | None = None,
    axes: "Axes | None" = None,
) -> "Axes":
    """Length pressure of each weighting in some groups of pairs; left of 0, training lengthens.

    Args:
        found: of one checkpoint.
        groups: of pairs; those without pairs are omitted.
        methods: to show, from the top; None for all.
        axes: to draw into.

    Raises:
        ValueError: there is no pressure with these labels.
    """
    axes = given_or_new(axes, size=None)
    rows = [f for f in _require(found, "pressure") if f.labels["group"] in groups]
    names = list(methods or dict.fromkeys(f.labels["method"] for f in rows))
    rows = [f for f in rows if f.labels["method"] in names]
    if not rows:
        raise ValueError(f"`groups` and `methods` must name findings, got {list(groups)} and {names}.")
    shown = [group for group in groups if any(f.labels["group"] == group for f in rows)]
    for number, group in enumerate(shown):
        mine = [f for f in rows if f.labels["group"] == group]
        positions = [names.index(f.labels["method"]) + 0.2 * (number - (len(shown) - 1) / 2) for f in mine]
        _draw_intervals(
            axes, positions, mine, sideways=True, color=COLOURS[number % 6], marker=MARKERS[number % 9], label=group
        )
    axes.axvline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("length pressure (← lengthens, shortens →)")
    legend_above(axes)
    return axes


def _require(found: Sequence[Finding], quantity: str, **labels: str) -> list[Finding]:
    """The findings of a quantity that have a value."""
    some = [f for f in found if f.quantity == quantity and labels.items() <= f.labels.items()]
    some = [f for f in some if f.estimate.value is not None]
    if not some:
        raise ValueError(f"The findings must have `{quantity}` {labels or ''}, got none: was there a reference?")
    return some


def _draw_intervals(
    axes: "Axes", positions: Sequence[float], rows: Sequence[Finding], *, sideways: bool = False, **style: Any
) -> None:
    """Values with their intervals; values without an interval have no bar."""
    values = np.array([f.estimate.value for f in rows])
    bounds = np.array([f.estimate.interval or (f.estimate.value, f.estimate.value) for f in rows])
    errors = np.abs(bounds - values[:, None]).T
    style = {"linestyle": "none", "capsize": 2, "markersize": 4, **style}
    if sideways:
        axes.errorbar(values, positions, xerr=errors, **style)
    else:
        axes.errorbar(positions, values, yerr=errors, **style)


def _draw_columns(axes: "Axes", rows: Mapping[str, Sequence[Finding]], names: Sequence[str], label: str) -> None:
    """A column for each name, with the series side by side."""
    for number, (series, found) in enumerate(rows.items()):
        shift = 0.15 * (number - (len(rows) - 1) / 2)
        positions = [names.index(f.labels[label]) + shift for f in found]
        _draw_intervals(axes, positions, found, color=COLOURS[number % 6], marker=MARKERS[number % 9], label=series)
    axes.set_xticks(range(len(names)), names)
    legend_above(axes)
