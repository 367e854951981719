"""The cards of pairs and of filters: what was asked for, what became of every prompt, and the audit, as Markdown."""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from ..audit.bias import LengthBias
from ..audit.report import MEASURES, format_interval, format_value
from ..io.tables import Table
from ..stats.intervals import Estimate
from .make import STATUSES

SHOWN = ("longer", "equal", "shorter", "chosen_mean", "rejected_mean", "difference", "auc", "slope")


def audit_table(title: str, parts: Mapping[str, LengthBias]) -> Table:
    """The lengths of one or several sets of pairs, side by side; one set has its intervals beside it."""
    table = Table(title, ["", *parts, *(["95 % interval"] if len(parts) == 1 else [])])
    numbers = [bias.numbers() for bias in parts.values()]
    for name in SHOWN:
        text, how = MEASURES[name]
        cells = [format_value(each[name].value, how) for each in numbers]
        cells += [format_interval(numbers[0][name].interval, how)] if len(parts) == 1 else []
        table.add(text.format(unit=next(iter(parts.values())).unit), *cells)
    return table


def account_table(counts: Mapping[str, int]) -> Table:
    """What became of every prompt."""
    table = Table("Prompts", ["", "prompts"])
    for status, text in STATUSES.items():
        table.add(text, f"{counts[status]:,}")
    table.add("all", f"{sum(counts.values()):,}")
    return table


def slope_sentence(slope: Estimate) -> str:
    """What the judge gives for length."""
    if slope.value is None:
        return "The answers to each prompt are equally long, so the judge's slope on length is not defined."
    interval = "" if slope.interval is None else f" (95 % interval {_doubled(slope.low)} to {_doubled(slope.high)})"
    return (
        f"Twice the length changes the judge's score by {_doubled(slope.value)}{interval}, within {slope.n:,} prompts "
        "whose answers differ in length."
    )


def _doubled(value: float | None) -> str:
    return "–" if value is None else f"{value * log(2):+.3g}"


def write_pairs_card(
    title: str, settings: Mapping[str, Any], tables: Sequence[Table], sentences: Sequence[str], command: str
) -> str:
    """A Markdown page.

    Args:
        title: of the page.
        settings: name → value, one line each.
        tables: made by the functions above.
        sentences: one paragraph each.
        command: that makes the same again.
    """
    parts = [f"# {title}", "\n".join(f"- {name}: {value}" for name, value in settings.items()), *sentences]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in tables]
    return "\n\n".join([*parts, f"```bash\n{command}\n```"]) + "\n"
