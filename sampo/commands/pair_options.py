"""The options that change pairs before they are used, for the commands that are not `sampo train`."""

import argparse
from typing import Any

from ..data.columns import read_columns
from ..data.treatment import REPEATED_PROMPT

COLUMNS_HELP = (
    "names in the source of prompt, chosen, rejected, system and input, as prompt=question; system= leaves the system "
    "messages out"
)


def add_treatment(parser: argparse.ArgumentParser) -> None:
    """`--columns`, `--repeated_prompt` and `--text_as_messages`."""
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=COLUMNS_HELP)
    parser.add_argument(
        "--repeated_prompt",
        default="error",
        choices=REPEATED_PROMPT,
        help="responses that begin with their prompt: `cut` it there, with the role tags around it",
    )
    parser.add_argument(
        "--text_as_messages",
        action="store_true",
        help="text becomes a message of the user and one of the assistant, for a chat model",
    )


def treatment_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load_preferences` that say the same."""
    return {
        "columns": read_columns(args.columns),
        "repeated_prompt": args.repeated_prompt,
        "text_as_messages": args.text_as_messages,
    }
