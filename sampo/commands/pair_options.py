"""The options that change pairs before they are used, for the commands that are not `sampo train`."""

import argparse
from typing import Any

from ..data.columns import read_columns
from ..data.treatment import REPEATED_PROMPT

COLUMNS_HELP = (
    "names in the source of prompt, chosen, rejected, system and input, as prompt=question; system= omits the system "
    "messages"
)


def add_treatment(parser: argparse.ArgumentParser) -> None:
    """Add `--columns`, `--repeated_prompt` and `--text_as_messages`."""
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=COLUMNS_HELP)
    parser.add_argument(
        "--repeated_prompt",
        default="error",
        choices=REPEATED_PROMPT,
        help="for responses that begin with their prompt: `cut` removes it, with the role tags around it",
    )
    parser.add_argument(
        "--text_as_messages",
        action="store_true",
        help="make a user and an assistant message of text, for a chat model",
    )


def treatment_words(args: argparse.Namespace) -> list[str]:
    """Return the same options as words of a command, without those that have their default."""
    words = ["--columns", *args.columns] if args.columns else []
    words += ["--repeated_prompt", args.repeated_prompt] if args.repeated_prompt != "error" else []
    return [*words, *(["--text_as_messages"] if args.text_as_messages else [])]


def treatment_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the same options as arguments of `load_preferences`."""
    return {
        "columns": read_columns(args.columns),
        "repeated_prompt": args.repeated_prompt,
        "text_as_messages": args.text_as_messages,
    }
