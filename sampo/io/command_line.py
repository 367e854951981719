"""The command behind a result, as records and model cards keep it: one line for a shell, without anything private.

Folders of this machine are given by their last part; values of options that may be secret are hidden.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

_HIDDEN = "HIDDEN"
_SECRET = re.compile(r"(^|(?<!end)[-_])token$|key$|secret|password|proxy", re.IGNORECASE)  # a proxy's URL may hold one
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+@")


def format_command(words: Iterable[str]) -> str:
    """Join the words of a command, without folders of this machine and without secrets."""
    kept: list[str] = []
    hide_next = False
    for word in words:
        name, equals, value = word.partition("=")
        is_option = name.startswith("-")
        if hide_next and not is_option:
            kept.append(_HIDDEN)
        elif is_option and equals:
            kept.append(f"{name}={_HIDDEN if is_secret(name) else _make_public(value)}")
        else:
            kept.append(_make_public(word))
        hide_next = is_option and not equals and is_secret(name)
    return shlex.join(kept)


def format_argv(argv: Sequence[str]) -> str:
    """The command line of a process; empty in a notebook, which has none.

    Args:
        argv: as `sys.argv`.
    """
    if not argv or not argv[0] or "ipykernel" in argv[0]:
        return ""
    program = Path(argv[0])
    words = ["python", program.name]
    if program.name == "sampo":
        words = ["sampo"]
    elif program.match("sampo/commands/*.py"):
        words = ["sampo", program.stem]
    return format_command([*words, *argv[1:]])


def format_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command that gives these arguments, without options that have their default or may be secret."""
    words = parser.prog.split()
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default or is_secret(action.dest):
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += action.option_strings[:1]
        words += [] if action.nargs == 0 else map(str, values)
    return format_command(words)


def is_secret(option: str) -> bool:
    """Whether the value of an option of this name may be secret."""
    return _SECRET.search(option.lstrip("-")) is not None


def _make_public(word: str) -> str:
    return Path(word).name if os.path.isabs(word) else _USER_OF_URL.sub(f"{_HIDDEN}@", word)
