"""Estimates as texts, for the cells of a table and for sentences."""

from ...stats.intervals import Estimate

BELOW, BEHIND, NONE = "\n{}–{}", " [{}, {}]", ""  # position of the bounds: below the value, behind it, nowhere


def show_estimate(
    estimate: Estimate | None, form: str, *, bounds: str = BELOW, scale: float = 1.0, unit: str = ""
) -> str:
    """A value and its bounds; a dash where there is no value.

    Args:
        estimate: the number; None is shown as one without a value.
        form: how each number is formatted, as for `format`.
        bounds: one of `BELOW`, `BEHIND` and `NONE`.
        scale: what each number is multiplied by: 100 for percent.
        unit: behind the value, not behind the bounds.
    """
    if estimate is None or estimate.value is None:
        return "–"
    text = format(scale * estimate.value, form) + unit
    if bounds and estimate.interval is not None:
        text += bounds.format(*(format(scale * bound, form) for bound in estimate.interval))
    return text


def percent_cell(estimate: Estimate, *, bounds: str = BELOW) -> str:
    """A rate in percent under a head that names the unit: `51.0`, and its bounds below it."""
    return show_estimate(estimate, ".1f", bounds=bounds, scale=100)


def percent(estimate: Estimate, *, bounds: str = BEHIND) -> str:
    """A rate in percent within a sentence: `51.0 % [48.0, 54.0]`."""
    return show_estimate(estimate, ".1f", bounds=bounds, scale=100, unit=" %")


def mean_length(estimate: Estimate) -> str:
    """A mean length, rounded to an integer: `1,234`."""
    return show_estimate(estimate, ",.0f", bounds=NONE)
