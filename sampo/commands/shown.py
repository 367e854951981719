"""What commands show: tables and sentences, and the command behind a number as it goes into the records."""

import argparse
import json
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..io.tables import Table

SECRET = ("proxy",)  # its URL may hold a password


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command that was given, without what is a default anyhow and without what may be secret."""
    words = parser.prog.split()
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default or action.dest in SECRET:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += action.option_strings[:1]
        words += [] if action.nargs == 0 else map(str, values)
    return shlex.join(words)


def show(*tables: "Table") -> None:
    """Print tables in the width that there is."""
    from ..io.tables import screen_width

    for table in tables:
        print("\n" + table.text(screen_width()), flush=True)


def say(*sentences: str) -> None:
    """Print sentences, each a line of its own; a terminal wraps it, a file keeps it whole."""
    from ..io.tables import clean_lines

    for sentence in sentences:
        print("\n".join(clean_lines(sentence)), flush=True)
