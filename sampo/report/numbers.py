"""Numbers of records as texts of cells and captions."""

from collections.abc import Mapping
from typing import Any

from ..audit.report import format_interval, format_value
from ..io.records import Record
from ..stats.intervals import Estimate, kept_estimate

SummaryRow = Mapping[str, Any]  # of `sampo judge` or `sampo compare`


def estimate(record: Record) -> Estimate:
    """The number of a record."""
    return kept_estimate(record.value, record.interval, record.n)


def estimate_in_row(row: SummaryRow, key: str) -> Estimate:
    """A number of a row, with its interval."""
    return Estimate(row.get(key), row.get(f"{key}_low"), row.get(f"{key}_high"), None, row.get("prompts", 0))


def number(one: Estimate | None, how: str | int = 3, *, sign: bool = False) -> str:
    """A value with its interval: `0.123 (0.100 to 0.150)`, `12.3 % (11.0 to 14.0)`, or a dash."""
    if one is None or one.value is None:
        return "–"
    plus = "+" if sign and one.value > 0 else ""
    bounds = format_interval(one.interval, how).replace(" %", "")
    return plus + format_value(one.value, how) + (f" ({bounds})" if bounds else "")


def count_runs(count: int) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} run" if count == 1 else f"{count:,} runs"
