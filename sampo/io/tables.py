"""Tables for a terminal or a file. A number is never cut and a column never dropped.

A table that is too wide is split: several tables below each other, each with the columns that name a row. Where these
names leave too little room, each row becomes a list of `head: cell` lines. Without a width, as in a pipe, there is one
table.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from rich.cells import cell_len

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

Cell = list[str]  # its lines
GAP = 2  # spaces between two columns
DEFAULT_WIDTH = 80  # of a terminal that does not report its width
LEAST_WIDTH = 20


@dataclass
class Table:
    """Cells of text; a head and a cell may have several lines.

    Attributes:
        title: above the table.
        heads: one per column.
        keys: the number of columns at the left that name a row. They are left-justified, and repeated in each part of
            a table that is split; the other columns are right-justified.
        rows: the lines of each cell; None is a blank line between two sections.
    """

    title: str
    heads: Sequence[str]
    keys: int = 1
    rows: list[list[Cell] | None] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row. Cells that are missing at its end are empty."""
        if len(cells) > len(self.heads):
            raise ValueError(f"a row must have at most {len(self.heads)} cells, got {len(cells)}.")
        self.rows.append([clean_lines(cell) for cell in (*cells, *[""] * (len(self.heads) - len(cells)))])

    def end_section(self) -> None:
        """Put a blank line below the existing rows."""
        self.rows.append(None)

    def text(self, width: int | None = None) -> str:
        """The table in lines of at most `width` characters; without a width unsplit.

        Only a word that is itself wider than `width` makes a longer line.
        """
        heads = [clean_lines(head) for head in self.heads]
        columns = list(zip(heads, *(row for row in self.rows if row), strict=True))
        sizes = [max(cell_len(line) for cell in column for line in cell) for column in columns]
        parts = self._parts(sizes, width)
        lines = [*wrapped(clean(self.title), width), ""] if self.title else []
        for part in parts or []:
            lines += [*self._part(heads, sizes, part), ""]
        if parts is None:
            lines += self._stacked([" ".join(head) for head in heads], width)
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        rows = [[" ".join(cell) for cell in row] for row in self.rows if row]
        return markdown_of([" ".join(clean_lines(head)) for head in self.heads], rows)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator[object]:
        """Let `rich` print it, as notebooks do."""
        from rich.text import Text

        yield Text(self.text(options.max_width), no_wrap=True, overflow="ignore")

    def _parts(self, sizes: Sequence[int], width: int | None) -> list[list[int]] | None:
        """The columns of each part after splitting; None where the rows must be stacked."""
        if width is None or sum(sizes) + GAP * (len(sizes) - 1) <= width:
            return [list(range(len(sizes)))]
        keys = list(range(self.keys))
        names = sum(sizes[key] + GAP for key in keys)
        if names > width // 2 or names + max(sizes[self.keys :], default=0) > width:
            return None
        parts: list[list[int]] = []
        free = -1
        for column in range(self.keys, len(sizes)):
            if free < sizes[column]:
                parts.append([*keys])
                free = width - names
            parts[-1].append(column)
            free -= sizes[column] + GAP
        return parts

    def _part(self, heads: Sequence[Cell], sizes: Sequence[int], part: Sequence[int]) -> list[str]:
        """Some columns as a table: heads, a rule, rows."""

        def line(cells: Sequence[str]) -> str:
            aligned = []
            for column, cell in zip(part, cells, strict=True):
                gap = " " * (sizes[column] - cell_len(cell))
                aligned.append(cell + gap if column < self.keys else gap + cell)
            return (" " * GAP).join(aligned).rstrip()

        def lines(row: Sequence[Cell], *, at_bottom: bool = False) -> list[str]:
            cells = [row[column] for column in part]
            height = max(map(len, cells))
            missing = [[""] * (height - len(cell)) for cell in cells]
            filled = [[*gap, *cell] if at_bottom else [*cell, *gap] for gap, cell in zip(missing, cells, strict=True)]
            return [line(each) for each in zip(*filled, strict=True)]

        made = [*lines(heads, at_bottom=True), "─" * (sum(sizes[column] + GAP for column in part) - GAP)]
        for row in self.rows[: -1 if self.rows and self.rows[-1] is None else None]:
            made += [""] if row is None else lines(row)
        return made

    def _stacked(self, heads: Sequence[str], width: int | None) -> list[str]:
        """Each row as its name and a line for each other cell that is not empty."""
        made = []
        for row in filter(None, self.rows):
            cells = [f"{head}: {' '.join(cell)}" for head, cell in zip(heads, row, strict=True) if any(cell)]
            named = sum(any(cell) for cell in row[: self.keys])
            made += wrapped(", ".join(cells[:named]).removeprefix(": "), width)
            made += [line for cell in cells[named:] for line in wrapped(f"  {cell}", width)]
            made += [""]
        return made


def markdown_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a bar inside a cell becomes a slash."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def screen_width(stream: TextIO | None = None) -> int | None:
    """Columns to print in: `COLUMNS`, else those of the terminal; None where the output goes elsewhere."""
    stream = stream or sys.stdout
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return max(int(given), LEAST_WIDTH)
    if not stream.isatty():
        return None
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return max(columns or DEFAULT_WIDTH, LEAST_WIDTH)


def clean(text: str) -> str:
    """A text from the data without what would command a terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def clean_lines(text: str) -> Cell:
    """The lines of a text, each cleaned; at least one."""
    return [clean(line) for line in text.split("\n")]


def wrapped(text: str, width: int | None, *, indent: str = "    ") -> list[str]:
    """Lines of whole words; `indent` begins those after the first. Counts what a terminal shows, so no `textwrap`."""
    if width is None or cell_len(text) <= width:
        return [text]
    lines = [text[: len(text) - len(text.lstrip())]]
    for word in text.split():
        gap = " " if lines[-1].strip() else ""
        if gap and cell_len(lines[-1] + gap + word) > width:
            lines.append(indent + word)
        else:
            lines[-1] += gap + word
    return lines
