"""Length against quality at the same KL, and the figure of both.

The grid values of a method are points on its path away from the start. Between two of them, length and quality are
interpolated linearly in the KL; beyond them nothing is said.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..io.files import replacing
from ..report.axes import COLOURS, MARKERS, draw_level
from ..report.svg import RC_SETTINGS
from .lines import Lines, ResultLine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONTIER_SIZE = (9.0, 3.4)  # inches


def quality_of(lines: Lines) -> str:
    """The record that stands for quality: the judge's if there is one."""
    return next((name for name in ("win_rate", "accuracy") if any(name in one.numbers for one in lines.methods)), "")


def paths_of(lines: Lines) -> dict[str, list[ResultLine]]:
    """The cells of each method that have a KL, a length and a quality, by rising KL."""
    wanted = ("kl", "tokens_ratio", quality_of(lines))
    found: dict[str, list[ResultLine]] = {}
    for line in lines.methods:
        if all(line.get(name).value is not None for name in wanted):
            found.setdefault(line.config["method"], []).append(line)
    return {method: sorted(some, key=lambda one: one.get("kl").value or 0.0) for method, some in found.items()}


def matched_kl(lines: Lines) -> float | None:
    """The largest KL that lies between measured cells of every method; None where there is none.

    A method with one grid value is at one KL alone, and no KL is common to all.
    """
    ranges = [[one.get("kl").value or 0.0 for one in path] for path in paths_of(lines).values()]
    if len(ranges) < 2 or any(len(one) < 2 for one in ranges):
        return None
    low, high = max(one[0] for one in ranges), min(one[-1] for one in ranges)
    return high if low <= high else None


def at_kl(path: Sequence[ResultLine], name: str, kl: float) -> float:
    """A number of a method, interpolated at a KL."""
    kls, values = ([one.get(each).value or 0.0 for one in path] for each in ("kl", name))
    return float(np.interp(kl, kls, values))


def draw_frontier(lines: Lines, figure: "Figure") -> None:
    """Two panels: quality against length, and length against KL; a line per method, a hollow marker at the same KL."""
    quality, kl = quality_of(lines), matched_kl(lines)
    left, right = figure.subplots(1, 2)
    for number, (method, path) in enumerate(paths_of(lines).items()):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        for axes, x, y in ((left, "tokens_ratio", quality), (right, "kl", "tokens_ratio")):
            xs, ys = ([one.get(name).value or 0.0 for one in path] for name in (x, y))
            bars = {
                f"{axis}err": np.hstack([_distances(one, name) for one in path]) for axis, name in (("x", x), ("y", y))
            }
            axes.errorbar(xs, ys, **bars, **style, linewidth=0.9, capsize=2, elinewidth=0.7, label=method)
            if kl is not None:
                point = [kl if name == "kl" else at_kl(path, name, kl) for name in (x, y)]
                axes.plot(*[[value] for value in point], **style, markerfacecolor="white", markersize=9)
    draw_level(left, 0.5)
    draw_level(right, 1.0)
    left.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    left.set_xlabel("length of an answer, over the start's")
    left.set_ylabel("win rate against the start" if quality == "win_rate" else "held-out accuracy")
    right.set_xlabel("KL from the start (nats per answer)")
    right.set_ylabel("length of an answer, over the start's")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, max(1, len(labels))), frameon=False)


def _distances(line: ResultLine, name: str) -> np.ndarray:
    """`(2, 1)` from a value to the bounds of its interval."""
    one = line.get(name)
    value = one.value or 0.0
    low, high = one.interval or (value, value)
    return np.array([[max(0.0, value - low)], [max(0.0, high - value)]])


def write_frontier(lines: Lines, folder: Path) -> list[str]:
    """Write `frontier.svg` and `frontier.pdf`; returns their names. Needs matplotlib (extra `report`)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**RC_SETTINGS, "svg.hashsalt": "sampo", "font.size": 9}):
        figure = Figure(figsize=FRONTIER_SIZE, layout="constrained")
        draw_frontier(lines, figure)
        for kind, dates in (("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
            with replacing(folder / f"frontier.{kind}") as file:
                figure.savefig(file, format=kind, metadata=dates)
    return ["frontier.svg", "frontier.pdf"]
