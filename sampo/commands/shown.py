"""What commands show: tables wide enough for a log, and the command behind a number as it goes into the records."""

import argparse
import json
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LOG_WIDTH = 120  # columns of a table that goes to no terminal
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


def console() -> "Console":
    """Where tables go."""
    from rich.console import Console

    # a name such as `a[b]` is no markup
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH, markup=False)


def say(console: "Console", *sentences: str) -> None:
    """Sentences as they are, each a line of its own."""
    for sentence in sentences:
        console.print(sentence, soft_wrap=True, markup=False, highlight=False)
