"""Options of one command inside an option of another one, as `--judge "reward --model M"` of `sampo sweep`."""

import argparse
import shlex
from collections.abc import Mapping

_DOES_SOMETHING_ELSE = ("labelled", "annotation_sheet", "dry_run")  # in place of the command's work


def split_words(option: str, text: str) -> list[str]:
    """The words of a text, as a shell splits them.

    Raises:
        ValueError: a quotation has no end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"`{option}` must be options as for a shell, got {text!r}: {error}.") from None


def parse_nested(
    option: str, parser: argparse.ArgumentParser, ours: Mapping[str, str], words: list[str]
) -> argparse.Namespace:
    """Parse the words that an option holds for another command, without running it.

    Args:
        option: that holds the words.
        parser: of the other command.
        ours: options of that command that are set for it; an empty name is its positional argument.
        words: that were given.

    Raises:
        ValueError: the command does not have these options, or they change what is set for it.
    """
    fixed = [word for name, value in ours.items() for word in ([f"--{name}"] if name else []) + [value]]
    parser.exit_on_error = False
    try:
        args, unknown = parser.parse_known_args([*fixed, *words])
    except argparse.ArgumentError as error:
        raise ValueError(f"`{option}` must hold options of `{parser.prog}`: {error}.") from None
    if unknown:
        raise ValueError(f"`{option}` must hold options of `{parser.prog}`, got {unknown}.")
    changed = [name for name, value in ours.items() if name and _as_given(getattr(args, name)) != value]
    changed += [name for name in _DOES_SOMETHING_ELSE if getattr(args, name, None)]
    if changed:
        raise ValueError(f"`{option}` must go without {', '.join(f'`--{name}`' for name in changed)}.")
    return args


def _as_given(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
