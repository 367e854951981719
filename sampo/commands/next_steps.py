"""The commands that a command names at its end, with the paths of this run: ready to copy.

A word in capitals stands for what the run cannot know, such as a judge.
"""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .option_checks import is_adapter
from .pair_options import treatment_words

PROMPTS = 100  # to answer, at first

Command = Sequence[object]  # its words


def show_next(*commands: Command, show: Callable[[str], object] = print) -> None:
    """Print commands, each on a line of its own that is never wrapped."""
    for number, command in enumerate(commands):
        show(f"{'      ' if number else 'Next: '}{shlex.join(map(str, command))}")


def after_audit(args: argparse.Namespace) -> list[Command]:
    """Diagnose the model to train on these pairs."""
    model = args.tokenizer or "MODEL"
    return [["sampo", "diagnose", "--policy", model, "--data", args.data[0], *treatment_words(args)]]


def after_diagnose(args: argparse.Namespace) -> list[Command]:
    """Train the model; after a training, see all on one page."""
    if args.reference or is_adapter(args.policy[0]):
        return [_report(args.out)]
    words = ["--model_name_or_path", args.policy[0], "--dataset_name", args.data, *treatment_words(args)]
    return [["sampo", "train", *words, "--output_dir", "FOLDER"]]


def after_training(folder: str, model: str, script_args: Any, *, evaluates: bool) -> list[Command]:
    """Use the model: merge an adapter, generate answers, talk to it beside the one that it started from.

    Args:
        folder: of the model.
        model: what the training started from.
        script_args: how its data was read.
        evaluates: whether there was an evaluation.
    """
    prompts = ["PROMPTS"]
    if script_args.dataset_name and not script_args.dataset_config:  # `generate` reads no configurations
        tested = evaluates and not script_args.eval_fraction
        split = script_args.dataset_test_split if tested else script_args.dataset_train_split
        prompts = [script_args.dataset_name, "--split", f"{split}[:{PROMPTS}]"]
        prompts += ["--columns", *script_args.columns] if script_args.columns else []
        prompts += ["--text_as_messages"] if script_args.text_as_messages else []
    generate = ["sampo", "generate", folder, "--prompts", *prompts, "--out", Path(folder) / "answers.jsonl"]
    merge = [["sampo", "merge", folder, "--out", f"{Path(folder)}-merged"]] if is_adapter(folder) else []
    return [*merge, generate, ["sampo", "chat", folder, model], _report(folder)]


def after_merging(folder: Path) -> list[Command]:
    """Generate answers."""
    return [["sampo", "generate", folder, "--prompts", "PROMPTS", "--out", folder / "answers.jsonl"]]


def after_generating(answers: Path) -> list[Command]:
    """Judge them against the answers of another model."""
    judge = ["--judge", "endpoint", "--url", "URL", "--model", "JUDGE"]
    files = ["--system", answers, "--baseline", "BASELINE.jsonl"]
    return [["sampo", "judge", *files, *judge, "--out", answers.with_name("judgements.jsonl")]]


def after_pairs(pairs: Path) -> list[Command]:
    """Audit the pairs, train on them."""
    return [
        ["sampo", "audit", pairs, "--tokenizer", "MODEL"],
        ["sampo", "train", "--model_name_or_path", "MODEL", "--dataset_name", pairs, "--output_dir", "FOLDER"],
    ]


def after_judging(judgements: Path) -> list[Command]:
    """Compare several systems, or see all on one page."""
    return [["sampo", "compare", "--judgements", judgements, "OTHER.jsonl"], _report(judgements.parent)]


def after_comparing(out: Path) -> list[Command]:
    """See all on one page."""
    return [_report(out.parent)]


def after_sweep(folder: Path) -> list[Command]:
    """Read the answers of two runs side by side, or make the page again."""
    return [["sampo", "chat", folder / "runs" / "RUN"], _report(folder)]


def _report(folder: str | Path) -> Command:
    return ["sampo", "report", folder]
