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
    """Print sentences, each a line of its own; a terminal wraps it, a file does not."""
    from ..io.tables import clean_lines

    for sentence in sentences:
        print("\n".join(clean_lines(sentence)), flush=True)
