"""`sampo alpaca_eval ANNOTATIONS.json …`: AlpacaEval 2's own two numbers, from its annotations and its files."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo alpaca_eval",
        allow_abbrev=False,
        description="AlpacaEval 2's win rate of each model, and with its file `df_gamed.csv` its length-controlled "
        "win rate. Nothing is judged here. For your own prompts and judges use `sampo judge` and `sampo compare`.",
    )
    parser.add_argument("annotations", nargs="+", type=Path, help="annotations.json, one per model")
    parser.add_argument("--gamed", type=Path, metavar="CSV", help="df_gamed.csv of the data set tatsu-lab/alpaca_eval")
    parser.add_argument(
        "--difficulty", type=Path, metavar="CSV", help="instruction_difficulty.csv, to check the other"
    )
    parser.add_argument(
        "--instructions",
        type=Path,
        metavar="JSON",
        help="AlpacaEval's instructions in their order, such as alpaca_eval.json; for `--align prompt`",
    )
    parser.add_argument(
        "--align", default="prompt", choices=("prompt", "row"), help="difficulty by prompt (default), or as AlpacaEval"
    )
    parser.add_argument(
        "--leaderboard", type=Path, metavar="CSV", help="a published leaderboard to compare with, by `generator_2`"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="write all numbers, with their intervals")
    return parser


def main(args: argparse.Namespace) -> None:
    """Compute, show and write."""
    from ..evaluation.results.alpaca_eval import alpaca_eval, read_instructions
    from ..evaluation.results.alpaca_leaderboard import beside_leaderboard, read_leaderboard
    from ..evaluation.results.cells import BEHIND, show_estimate
    from ..io.command_line import format_arguments
    from ..io.files import write_atomic
    from .shown import say

    try:
        leaderboard = None if args.leaderboard is None else read_leaderboard(args.leaderboard)
        instructions = None if args.instructions is None else read_instructions(args.instructions)
        options: dict[str, Any] = {"gamed": args.gamed, "difficulty": args.difficulty, "align": args.align}
        found = {str(path): alpaca_eval(path, instructions=instructions, **options) for path in args.annotations}
        if args.out:
            about = {"command": format_arguments(make_parser(), args), "align": args.align}
            models = [{"annotations": path, **asdict(one)} for path, one in found.items()]
            if leaderboard is not None:
                published = {name: asdict(row) for name, row in leaderboard.items()}
                models = [{**model, "published": published.get(str(model["model"]))} for model in models]
            write_atomic(args.out, json.dumps({**about, "models": models}, indent=2) + "\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"sampo alpaca_eval: error: {error}") from None
    for path, one in found.items():
        rate = (
            f"win rate {show_estimate(one.win_rate, '.2f', bounds=BEHIND)}, standard error {one.win_rate.se or 0:.2f}"
        )
        if one.length_controlled:
            rate += f"; length-controlled {show_estimate(one.length_controlled, '.2f', bounds=BEHIND)}"
        say(f"{one.model or Path(path).stem}: {rate}; {one.mean_length:.0f} characters, {one.rows} annotations")
        if one.baseline or one.annotator:
            say(f"against {one.baseline or 'a nameless baseline'}, annotated by {one.annotator or 'nobody named'}")
        if leaderboard is not None:
            say(beside_leaderboard(one, leaderboard))
        say(*(f"Note: {note}" for note in one.notes))
    if not args.gamed:
        say("The length-controlled win rate needs AlpacaEval's df_gamed.csv: name it with `gamed`.")
    if args.out:
        print(f"Written: {args.out}")
