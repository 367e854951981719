"""What commands show: tables and sentences."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..io.tables import Table


def show(*tables: "Table") -> None:
    """Print tables in the width of the screen."""
    from ..io.tables import screen_width

    for table in tables:
        print("\n" + table.text(screen_width()), flush=True)


def say(*sentences: str) -> None:
    """Print sentences, each on a line of its own, wrapped to the width of the screen; in a file not."""
    from ..io.tables import clean_lines, screen_width, wrapped

    for sentence in sentences:
        lines = [part for line in clean_lines(sentence) for part in wrapped(line, screen_width(), indent="")]
        print("\n".join(lines), flush=True)
