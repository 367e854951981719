"""Helpers of all figures: axes without pyplot, colours and markers, and a legend above the axes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHOSEN, REJECTED, NEUTRAL = "#0072b2", "#d55e00", "#666666"  # distinct for the colour-blind, and in grey
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito
MARKERS = ("o", "^", "v", "s", "D", "P", "X", "<", ">")
NEW_SIZE = (6.0, 3.6)  # inches, of a new figure
BINS = 40  # of a histogram
WIDEST = 99  # percentile of lengths that the axis of a histogram ends at; the last bin holds what is longer
LEGEND_GAP = 0.06  # inches between the axes and the legend above them
LEGEND_WIDTH = 0.9  # of the figure: the axes that it is centred on are not in its middle


def given_or_new(ax: "Axes | None", size: tuple[float, float] | None = NEW_SIZE) -> "Axes":
    """The axes given, or those of a new figure, which pyplot does not know: it is not shown and need not be closed.

    Args:
        ax: the axes given.
        size: of a new figure in inches; None for matplotlib's own.
    """
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").add_subplot()


def draw_level(ax: "Axes", level: float) -> None:
    """A dotted horizontal line to compare with."""
    ax.axhline(level, color="grey", linewidth=0.8, linestyle=":")


def legend_above(ax: "Axes") -> None:
    """A legend above the axes, where it crosses nothing, in as many columns as the figure has room for."""
    from matplotlib.transforms import ScaledTranslation

    handles, labels = ax.get_legend_handles_labels()
    figure = ax.figure
    above = ax.transAxes + ScaledTranslation(0, LEGEND_GAP, figure.dpi_scale_trans)
    for ncols in range(min(4, len(labels)), 0, -1):
        layout: Any = {
            "loc": "lower center",
            "bbox_to_anchor": (0.5, 1),
            "bbox_transform": above,
            "ncols": ncols,
            "fontsize": "small",
        }
        legend = ax.legend(handles, labels, frameon=False, borderaxespad=0, **layout)
        if ncols == 1 or legend.get_window_extent().width <= LEGEND_WIDTH * figure.bbox.width:
            return
