"""Figures of judged and of unjudged answers: each function draws into matplotlib Axes and returns them.

A *row* comes from `Summary.row`, and from the files of `sampo judge` and `sampo compare`: one flat mapping per system,
with `_low` and `_high` for every number.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import BINS, COLOURS, MARKERS, NEUTRAL, WIDEST, draw_level, given_or_new, legend_above
from .numbers import SummaryRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RATIO = re.compile(r"win_rate/length_ratio_([^_]+)_([^_]+)$")


def frontier(rows: Sequence[SummaryRow], *, ax: "Axes | None" = None) -> "Axes":
    """Verbosity against win rate: each system at the mean length of its answers, with both 95 % intervals.

    A full marker is the raw win rate, a hollow one at the same length the win rate at equal length; the grey cross is
    the baseline, whose win rate against itself is one half.

    Args:
        rows: of systems judged against one baseline by one judge.
        ax: Axes to draw into; a new figure without it.

    Raises:
        ValueError: no system has both a length and a win rate.
    """
    judged = [
        row for row in rows if _number(row, "win_rate") is not None and _number(row, "length/system") is not None
    ]
    if not judged:
        raise ValueError("At least one system must have a length and a win rate, got none.")
    ax = given_or_new(ax)
    for number, row in enumerate(judged):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        x, y = row["length/system"], row["win_rate"]
        bars: dict[str, Any] = {"xerr": _distances(row, "length/system"), "yerr": _distances(row, "win_rate")}
        style: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": "none"}
        ax.errorbar([x], [y], **bars, **style, capsize=2, elinewidth=0.9, label=str(row["system"]))
        fair = _number(row, "win_rate/equal_length")
        if fair is not None:
            ax.plot([x, x], [y, fair], color=colour, linewidth=0.8, linestyle=":")
            ax.plot([x], [fair], markerfacecolor="none", **style)
    base = _number(judged[0], "length/baseline")
    if base is not None:
        ax.plot([base], [0.5], "x", color=NEUTRAL, markersize=8, label=f"{judged[0]['baseline']} (baseline)")
    draw_level(ax, 0.5)
    ax.set_xlabel(f"mean length of an answer, {judged[0].get('length_unit', 'characters')}")
    ax.set_ylabel("win rate (hollow: at equal length)")
    legend_above(ax)
    return ax


def ratio_bins(row: SummaryRow) -> list[tuple[float, float, str]]:
    """The bins of a row's win rates by ratio of lengths, as lower edge, upper edge and the key of the win rate."""
    found = []
    for key in row:
        if match := _RATIO.match(key):
            found.append((float(match[1]), float(match[2]), key))
    return sorted(found)


def bin_name(low: float, high: float) -> str:
    """A bin of ratios for a reader: `< 0.5×`, `0.8–1.25×`, `≥ 2×`."""
    if low == 0:
        return f"< {high:g}×"
    return f"≥ {low:g}×" if math.isinf(high) else f"{low:g}–{high:g}×"


def win_rate_by_length_ratio(rows: Sequence[SummaryRow], *, ax: "Axes | None" = None) -> "Axes":
    """Win rate where the system's answer is shorter, about as long, and longer than the baseline's.

    Args:
        rows: of systems judged against one baseline by one judge.
        ax: Axes to draw into; a new figure without it.

    Raises:
        ValueError: no row has a win rate in any bin.
    """
    names = sorted(
        {(low, high) for row in rows for low, high, key in ratio_bins(row) if _number(row, key) is not None}
    )
    if not names:
        raise ValueError("The rows must have win rates by the ratio of lengths, got none: were lengths known?")
    ax = given_or_new(ax)
    for number, row in enumerate(rows):
        some = [(low, high, key) for low, high, key in ratio_bins(row) if _number(row, key) is not None]
        if not some:
            continue
        shift = 0.12 * (number - (len(rows) - 1) / 2)
        ax.errorbar(
            [names.index((low, high)) + shift for low, high, _ in some],
            [row[key] for _, _, key in some],
            yerr=np.hstack([_distances(row, key) for _, _, key in some]),
            linestyle="none",
            capsize=2,
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            label=str(row["system"]),
        )
    draw_level(ax, 0.5)
    ax.set_xticks(range(len(names)), [bin_name(*bounds) for bounds in names])
    ax.set_ylim(0, 1)
    ax.set_xlabel("length of the system's answer over the baseline's")
    ax.set_ylabel("win rate")
    legend_above(ax)
    return ax


def answer_lengths(lengths: Mapping[str, np.ndarray], *, unit: str, ax: "Axes | None" = None) -> "Axes":
    """How long the answers of one or several systems are.

    Args:
        lengths: name -> `(n,)` lengths.
        unit: unit of the lengths.
        ax: Axes to draw into; a new figure without it.

    Raises:
        ValueError: there are no answers.
    """
    some = {name: np.asarray(values, dtype=float) for name, values in lengths.items() if len(values)}
    if not some:
        raise ValueError("A figure of lengths needs at least one answer, got none.")
    ax = given_or_new(ax)
    top = max(float(np.percentile(np.concatenate(list(some.values())), WIDEST)), 1.0)
    # lengths are integers: no bin is narrower than one
    edges = np.linspace(0, top, BINS + 1) if top > BINS else np.arange(-0.5, np.ceil(top) + 1)
    for number, (name, values) in enumerate(some.items()):
        colour = COLOURS[number % len(COLOURS)]
        weights = np.full(len(values), 1 / len(values))  # systems may have different numbers of answers
        shown = np.minimum(values, edges[-1])
        label = f"{name}, mean {values.mean():.0f}"
        ax.hist(shown, edges.tolist(), weights=weights, histtype="step", linewidth=1.5, color=colour, label=label)
        ax.axvline(float(values.mean()), color=colour, linewidth=0.9, linestyle="--")
    ax.set_xlabel(f"length of an answer ({unit}; the last bin holds all longer ones)")
    ax.set_ylabel("share of answers")
    legend_above(ax)
    return ax


def _number(row: SummaryRow, key: str) -> float | None:
    value = row.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _distances(row: SummaryRow, key: str) -> np.ndarray:
    """`(2, 1)` from the value down and up to the bounds of its interval."""
    value = float(row[key])
    low, high = (_number(row, f"{key}_{end}") for end in ("low", "high"))
    return np.array(
        [[0.0 if low is None else max(0.0, value - low)], [0.0 if high is None else max(0.0, high - value)]]
    )
