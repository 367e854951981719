"""The options `style` and `style_columns` of `judge` and `compare`."""

import argparse
from pathlib import Path
from typing import Any

# of `sampo.evaluation.results.style`, which numpy makes slow to import: a test compares the two
STYLE_CHOICES = ("length", "headers", "lists", "bold", "code")


def add_style_options(parser: argparse.ArgumentParser) -> None:
    """Add both."""
    parser.add_argument(
        "--style",
        nargs="*",
        choices=STYLE_CHOICES,
        metavar="FEATURE",
        help=f"add the win rate at equal style; of {', '.join(STYLE_CHOICES)}, all without names",
    )
    parser.add_argument(
        "--style_columns",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="further features of style: columns of the answers that hold numbers",
    )


def asked_features(args: argparse.Namespace) -> list[str]:
    """Features and columns that were asked for; none without the options."""
    named = [] if args.style is None else args.style or list(STYLE_CHOICES)
    return [*dict.fromkeys(named), *args.style_columns]


def measure_style(args: argparse.Namespace, system: Path, baseline: Path) -> Any:
    """The features of the answers in both files, or None if none were asked for."""
    from ..evaluation.results.style import read_style

    asked = asked_features(args)
    own = len(args.style_columns)
    return read_style(system, baseline, asked[: len(asked) - own], args.style_columns) if asked else None
