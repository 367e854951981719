"""`sampo prompts convert BENCHMARK --questions FILE --out FILE`, `sampo prompts show BENCHMARK`: named benchmarks."""

import argparse
import json
from pathlib import Path
from typing import Any

from .shown import say


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo prompts",
        allow_abbrev=False,
        description="Questions and answers of named benchmarks from their own files, and their official settings. "
        "Nothing is downloaded.",
    )
    parser.add_argument("action", choices=("convert", "show"), help="write a file in our form, or print the settings")
    parser.add_argument("benchmark", help="alpaca_eval_2, arena_hard_v2, mt_bench or wildbench")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="the benchmark's own file of questions")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="a model's answers: of the benchmark, or ours")
    parser.add_argument("--first_turn", type=Path, metavar="FILE", help="`mt_bench`: our answers to the first turn")
    parser.add_argument("--turn", type=int, default=1, choices=(1, 2), help="of the benchmark's `--answers` (1)")
    parser.add_argument("--categories", nargs="+", default=[], metavar="NAME", help="only questions of these")
    parser.add_argument("--out", type=Path, metavar="JSONL", help="prompts, or answers if there are `--answers`")
    return parser


def main(args: argparse.Namespace) -> None:
    """Convert, or show the settings."""
    from ..evaluation.answers.benchmarks import load_benchmark

    try:
        benchmark = load_benchmark(args.benchmark)
        if args.action == "convert":
            _convert(args, benchmark)
    except (ValueError, OSError) as error:
        raise SystemExit(f"sampo prompts: error: {error}") from None
    if args.action == "show":
        _show(benchmark)


def _show(benchmark: Any) -> None:
    say(f"{benchmark.title} (settings version {benchmark.version})")
    for name in ("source", "licence", "questions", "generation", "baseline", "judge", "orders", "score"):
        value = getattr(benchmark, name)
        say(f"{name}: {_flat(value) if isinstance(value, dict) else value}")
    say(f"template here: {benchmark.template}", "Where sampo differs:", *(f"- {line}" for line in benchmark.differs))


def _flat(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {f'({_flat(v)})' if isinstance(v, dict) else v}" for name, v in values.items())


def _convert(args: argparse.Namespace, benchmark: Any) -> None:
    from ..evaluation.answers import benchmarks
    from ..evaluation.answers.answers import read_answers, write_answers
    from ..io.files import write_atomic

    for name in ("questions", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"`{name}` must name a file, got nothing.")
    items = benchmarks.read_items(args.benchmark, args.questions, args.categories)
    if args.first_turn is None and args.answers is None:
        questions = benchmarks.first_questions(items)
    elif args.answers is None:
        questions = benchmarks.second_questions(items, read_answers(args.first_turn))
    else:
        if args.first_turn is None:
            official = benchmarks.read_answered(args.benchmark, args.answers)
            answers = benchmarks.official_answers(items, official, turn=args.turn)
        else:
            answers = benchmarks.both_turns(items, read_answers(args.first_turn), read_answers(args.answers))
        write_answers(args.out, answers)
        say(f"{args.out}: {len(answers)} answers of {answers[0].model or 'a model'}")
        return
    rows = [{"prompt": question.prompt, **question.extra} for question in questions]
    write_atomic(args.out, "".join(json.dumps(row) + "\n" for row in rows))
    say(f"{args.out}: {len(rows)} prompts; officially {benchmark.questions} questions")
    say(f"The official settings, and where sampo differs: sampo prompts show {benchmark.name}")
