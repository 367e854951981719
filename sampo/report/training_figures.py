"""Curves of training runs, from the log that transformers keeps: each function draws into Axes and returns them."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .axes import COLOURS, draw_level, given_or_new, legend_above

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("-", "--", ":")
Log = Sequence[Mapping[str, Any]]  # `log_history` of a trainer_state.json


class Curve(NamedTuple):
    """A figure of some metrics: its title, its axis, metric -> name in the legend, and a level to compare with."""

    title: str
    axis: str
    metrics: dict[str, str]
    level: float | None = None


CURVES = {
    "loss": Curve("Loss", "loss, nats", {"loss": ""}),
    "margins": Curve("Margin of the implicit rewards", "margin β(S_w − S_l)", {"rewards/margins": ""}, 0),
    "rewards": Curve(
        "Implicit reward of each response",
        "reward β·S",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        0,
    ),
    "accuracy": Curve("Pairs with a margin above 0", "share of pairs", {"rewards/accuracies": ""}, 0.5),
    "accuracy_by_length": Curve(
        "Pairs with a margin above 0, by the order of their lengths",
        "share of held-out pairs",
        {"accuracies/chosen_longer": "chosen longer", "accuracies/chosen_shorter": "chosen shorter"},
        0.5,
    ),
    "lengths": Curve(
        "Length of the responses that were trained on",
        "tokens",
        {"length/chosen": "chosen", "length/rejected": "rejected"},
    ),
    "length_gap": Curve(
        "Length gap: correlation of the margin with T_w − T_l", "correlation", {"length_gap/correlation": ""}, 0
    ),
    "length_slope": Curve(
        "Length gap: slope of the margin on T_w − T_l", "reward per token", {"length_gap/slope": ""}, 0
    ),
    "pressure": Curve(
        "Length pressure of the method; below 0 it lengthens", "nats per unit of logit", {"length_gap/pressure": ""}, 0
    ),
    "generated": Curve("Length of generated answers to held-out prompts", "tokens", {"length/generated": ""}),
    "generated_ratio": Curve(
        "Length of generated answers, as a multiple of the start's", "ratio", {"length/generated_ratio": ""}, 1
    ),
    "generated_ended": Curve(
        "Generated answers that end by themselves", "share of answers", {"length/generated_ended": ""}
    ),
    "theta": Curve("Learned length penalty θ", "θ, logit", {"length_penalty/theta": ""}, 0),
}


def points(log: Log, metric: str, *, evaluation: bool = False) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, in training or in evaluation; values that are not finite are omitted.

    Args:
        log: of one run.
        metric: as docs/metrics.md names it.
        evaluation: those with the prefix `eval_`, or `eval_<name>_` where there are several sets.
    """
    steps, values = [], []
    for entry in log:
        for name, value in entry.items():
            wanted = name.startswith("eval_") and name.endswith(f"_{metric}") if evaluation else name == metric
            if wanted and _finite(value) and _finite(entry.get("step")):
                steps.append(float(entry["step"]))
                values.append(float(value))
    return steps, values


def has_curve(runs: Mapping[str, Log], name: str) -> bool:
    """Whether any run has something to draw for a key of `CURVES`."""
    metrics = CURVES[name].metrics
    return any(points(log, m, evaluation=held)[0] for log in runs.values() for m in metrics for held in (False, True))


def training_curve(runs: Mapping[str, Log], name: str, *, ax: "Axes | None" = None) -> "Axes":
    """One of `CURVES` for one or several runs: lines in training, dots in evaluation.

    The colour shows the run, the line style the metric.

    Args:
        runs: name -> `log_history`.
        name: key of `CURVES`.
        ax: Axes to draw into; a new figure without it.

    Raises:
        ValueError: no run has logged that.
    """
    if name not in CURVES:
        raise ValueError(f"`name` must be one of {list(CURVES)}, got {name!r}.")
    curve = CURVES[name]
    if not has_curve(runs, name):
        raise ValueError(f"The runs must have logged one of {list(curve.metrics)}, got none of them.")
    ax = given_or_new(ax)
    for number, (run, log) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        for line, (metric, part) in zip(LINES, curve.metrics.items(), strict=False):
            label = ", ".join(text for text in (run if len(runs) > 1 else "", part) if text)
            for held_out in (False, True):
                steps, values = points(log, metric, evaluation=held_out)
                if steps:
                    parts = [text for text in (label, "evaluation" if held_out else "") if text]
                    ax.plot(
                        steps,
                        values,
                        linestyle=line,
                        color=colour,
                        marker="o" if held_out or len(steps) == 1 else "",
                        markersize=4,
                        linewidth=0.8 if held_out else 1.4,
                        label=", ".join(parts) or "training",
                    )
    if curve.level is not None:
        draw_level(ax, curve.level)
    ax.set_xlabel("step")
    ax.set_ylabel(curve.axis)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        legend_above(ax)
    return ax


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
