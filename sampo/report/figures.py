"""Figures as matplotlib Axes, for papers, notebooks and pages. Each takes arrays, draws into `ax` and returns it.

Without `ax` a new figure is made without pyplot, so it is not shown and need not be closed.
"""

from typing import TYPE_CHECKING

import numpy as np

from ..audit.bias import PER, preference_slope
from ..stats.intervals import wilson
from .axes import BINS, CHOSEN, NEUTRAL, REJECTED, WIDEST, given_or_new, legend_above

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def length_histogram(
    chosen: np.ndarray, rejected: np.ndarray, *, unit: str = "tokens", ax: "Axes | None" = None
) -> "Axes":
    """How long chosen and rejected responses are.

    Args:
        chosen: `(n,)` lengths T_w.
        rejected: `(n,)` lengths T_l.
        unit: unit of the lengths.
        ax: Axes to draw into; a new figure without it.
    """
    ax = given_or_new(ax)
    both = np.concatenate([_some(chosen), rejected])
    bins = np.linspace(0, max(float(np.percentile(both, WIDEST)), 1.0), BINS + 1).tolist()
    for values, colour, name in ((chosen, CHOSEN, "chosen"), (rejected, REJECTED, "rejected")):
        label = f"{name}, mean {np.mean(values):.1f}"
        ax.hist(np.minimum(values, bins[-1]), bins, histtype="step", linewidth=1.6, color=colour, label=label)
        ax.axvline(float(np.mean(values)), color=colour, linewidth=1, linestyle="--")
    ax.set_xlabel(f"length of the response ({unit}; the last bin holds all longer ones)")
    ax.set_ylabel("responses")
    legend_above(ax)
    return ax


def difference_histogram(
    chosen: np.ndarray, rejected: np.ndarray, *, unit: str = "tokens", ax: "Axes | None" = None
) -> "Axes":
    """How much longer the chosen response is than the rejected one. Arguments are those of `length_histogram`."""
    ax = given_or_new(ax)
    difference = _some(chosen).astype(np.int64) - rejected
    limit = max(float(np.percentile(np.abs(difference), WIDEST)), 1.0)
    shown = np.clip(difference, -limit, limit)
    ax.hist(shown, np.linspace(-limit, limit, BINS + 1).tolist(), color=NEUTRAL)
    ax.axvline(0, color="black", linewidth=1)
    longer, shorter = 100 * np.mean(difference > 0), 100 * np.mean(difference < 0)
    ax.set_title(f"chosen shorter {shorter:.1f} %, longer {longer:.1f} %", fontsize="medium")
    ax.set_xlabel(f"T_w − T_l ({unit}; the outer bins hold all further ones)")
    ax.set_ylabel("pairs")
    return ax


def preference_by_difference(
    chosen: np.ndarray,
    rejected: np.ndarray,
    prompt_ids: np.ndarray | None = None,
    *,
    bins: int = 10,
    unit: str = "tokens",
    ax: "Axes | None" = None,
) -> "Axes":
    """How often the longer response is the chosen one, by how much longer it is, with the logistic curve.

    Pairs of equal lengths are omitted. The bins hold about equally many pairs; bars are 95 % intervals of each bin.
    The curve is P(longer chosen) = σ(slope · |T_w − T_l| / 100), fitted to all pairs.

    Args:
        chosen: `(n,)` lengths T_w.
        rejected: `(n,)` lengths T_l.
        prompt_ids: `(n,)` equal for pairs of one prompt, for the interval of the slope; None: every pair its own.
        bins: their number, at most.
        unit: unit of the lengths.
        ax: Axes to draw into; a new figure without it.
    """
    ax = given_or_new(ax)
    difference = _some(chosen).astype(np.int64) - rejected
    ids = np.arange(len(difference)) if prompt_ids is None else prompt_ids
    slope = preference_slope(difference, np.unique(ids, return_inverse=True)[1])
    unequal = difference[difference != 0]
    if len(unequal):
        sizes, rates, below, above = _binned(np.abs(unequal), unequal > 0, bins)
        ax.errorbar(sizes, rates, [below, above], fmt="o", color=CHOSEN, capsize=2, label="share, 95 % interval")
    if slope.value is not None:
        grid = np.linspace(0, float(np.abs(unequal).max()), 200)
        label = f"logistic, {slope.value:+.2f}"
        label += f" ({slope.low:+.2f} to {slope.high:+.2f})" if slope.interval else ""
        ax.plot(grid, 1 / (1 + np.exp(-slope.value * grid / PER)), color=REJECTED, label=f"{label} per {PER} {unit}")
    ax.axhline(0.5, color="black", linewidth=1, linestyle=":")
    ax.set_ylim(0, 1)
    ax.set_xlabel(f"how much longer the longer response is, |T_w − T_l| ({unit})")
    ax.set_ylabel("share of pairs with the longer one chosen")
    legend_above(ax)
    return ax


def _binned(size: np.ndarray, won: np.ndarray, bins: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Mean size, rate, and distance to both bounds of the rate, of each bin."""
    edges = np.unique(np.quantile(size, np.linspace(0, 1, bins + 1)))
    number = np.clip(np.searchsorted(edges, size, side="right") - 1, 0, max(len(edges) - 2, 0))
    sizes, rates, below, above = [], [], [], []
    for one in np.unique(number):
        inside = number == one
        rate = float(won[inside].mean())
        low, high = wilson(rate, int(inside.sum()))
        sizes.append(float(size[inside].mean()))
        rates.append(rate)
        below.append(max(0.0, rate - low))
        above.append(max(0.0, high - rate))
    return sizes, rates, below, above


def _some(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if not len(values):
        raise ValueError("A figure needs at least one pair, got none.")
    return values
