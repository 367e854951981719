"""What makes verdicts doubtful, always on screen: position bias, answers cut off, failures by kind."""

from collections.abc import Mapping, Sequence

from ...io.tables import Table
from ...stats.intervals import Estimate
from .cells import NONE, percent_cell
from .summary import Summary


def reliability_table(found: Sequence[Summary], failures: Sequence[Mapping[str, int]]) -> Table:
    """One line per system.

    Args:
        found: of the systems.
        failures: failed verdicts by kind, of each system.
    """
    heads = ("first shown\npreferred, %", "cut off, %", "baseline's\ncut off, %", "verdicts\nfailed", "of which")
    table = Table("Reliability of the verdicts", ["system", *heads])
    for one, kinds in zip(found, failures, strict=True):
        cut: Sequence[Estimate | None] = one.cut or (None, None)
        table.add(
            one.system,
            _share(one.orders.first_shown if one.orders else None),
            *map(_share, cut),
            f"{one.failed_verdicts:,}",
            "\n".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())),
        )
    return table


def _share(estimate: Estimate | None) -> str:
    return "–" if estimate is None else percent_cell(estimate, bounds=NONE)
