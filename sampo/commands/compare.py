"""`sampo compare --judgements A.jsonl B.jsonl …`: several systems on one screen; nothing is judged here."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .next_steps import after_comparing, show_next
from .style_options import add_style_options, asked_features, measure_style

LENGTH_UNITS = ("characters", "words", "tokens")


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo compare",
        allow_abbrev=False,
        description="Compare systems that `sampo judge` judged against one baseline: win rates, lengths, and every "
        "two prompt by prompt. Without `--judgements` only the lengths of `--answers`.",
    )
    parser.add_argument("--judgements", nargs="+", type=Path, default=[], metavar="FILE", help="of `sampo judge`")
    parser.add_argument(
        "--answers",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="files of answers; with `--judgements` only those that are no more where they were judged",
    )
    parser.add_argument(
        "--agreement",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="of `sampo judge --labelled`; without it those of the judge beside the first judgements",
    )
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="one of `--answers`, if there are no judgements")
    parser.add_argument("--out", type=Path, help="write OUT.csv, .json, .records.jsonl; without it nothing is written")
    parser.add_argument("--n", type=int, help="compare on so many prompts, drawn by a hash of `--seed`")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--matched_only", action="store_true", help="omit prompts that one system lacks")
    parser.add_argument("--length_unit", default="characters", choices=LENGTH_UNITS, help="for the win rates")
    parser.add_argument(
        "--difficulty",
        action="store_true",
        help="let the control of length know how hard each prompt is to the other systems",
    )
    add_style_options(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Compare, and report the result."""
    try:
        if args.judgements:
            _compare_judged(args)
        elif args.answers:
            _compare_lengths(args)
        else:
            raise ValueError("`judgements` or `answers` must name files to compare, got neither.")
    except (ValueError, OSError) as error:
        raise SystemExit(f"sampo compare: error: {error}") from None


def _display_names(files: Sequence[str]) -> dict[str, str]:
    """File → its name without folder and ending, or the complete path where two are the same."""
    from ..evaluation.server_text import visible

    short = {file: visible(Path(file).stem) for file in files}
    return short if len(set(short.values())) == len(short) else {file: visible(file) for file in files}


def _compare_judged(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from ..evaluation.results import comparing, judged
    from ..evaluation.results.judge_checks import checks_of

    if args.baseline:
        raise ValueError("`baseline` goes with `answers` alone: judgements name their baseline.")
    read = [judged.read_judged(path) for path in args.judgements]
    names = _display_names([*(run.system.file for run in read), read[0].baseline.file])
    if len(names) != len(read) + 1:
        raise ValueError(
            f"`judgements` must be of different systems, got {[run.system.file for run in read]} against "
            f"{read[0].baseline.file}. Name each once."
        )
    runs = comparing.shared_runs({names[run.system.file]: run for run in read}, matched_only=args.matched_only)
    checks = checks_of(read[0].judge, args.agreement, args.judgements[0].parent)
    runs = {name: replace(run.drawn(args.n, args.seed), checks=checks) for name, run in runs.items()}
    prompts = {row.prompt_id for row in next(iter(runs.values())).rows}
    baseline = names[read[0].baseline.file]
    moved = {judged.content_hash(path): path for path in args.answers}
    files = {**{name: run.system for name, run in runs.items()}, baseline: read[0].baseline}
    paths = {name: _find_answers(file, moved) for name, file in files.items()}
    runs = {name: replace(run, style=measure_style(args, paths[name], paths[baseline])) for name, run in runs.items()}
    summaries, duels = comparing.compare(runs, length_unit=args.length_unit, difficulty=args.difficulty)
    drawn = {"n": args.n, "difficulty": args.difficulty}
    configs = {name: {**run.config, **drawn} for name, run in runs.items()}
    configs[baseline] = {"baseline_answers": read[0].baseline.sha256, **drawn}
    _show_and_write(args, summaries, _measure_lengths(paths, baseline, prompts), duels, configs, runs)


def _find_answers(file: Any, moved: Mapping[str, Path]) -> Path:
    """Where the answers are that were judged."""
    from ..evaluation.results.judged import content_hash

    path = moved.get(file.sha256, Path(file.file))
    if not path.is_file() or content_hash(path) != file.sha256:
        what = "it holds other answers" if path.is_file() else "it does not exist"
        raise ValueError(f"{path} must hold the answers that were judged, but {what}. Name theirs with `answers`.")
    return path


def _compare_lengths(args: argparse.Namespace) -> None:
    from ..evaluation.answers.answers import read_answers
    from ..evaluation.judging.judges import drawn_prompts
    from ..evaluation.results.comparing import shared_prompts
    from ..evaluation.results.judged import content_hash

    if wrong := [name for name in ("difficulty", "agreement") if getattr(args, name)]:
        raise ValueError(f"`{wrong[0]}` goes with `judgements`, got none.")
    if asked_features(args):
        raise ValueError("`style` and `style_columns` go with `judgements`, got none.")
    names = _display_names([str(path) for path in args.answers])
    if args.baseline and str(args.baseline) not in names:
        raise ValueError(f"`baseline` must be one of `answers`, got {args.baseline}.")
    paths = {name: Path(file) for file, name in names.items()}
    prompts = shared_prompts(
        {name: (answer.prompt_id for answer in read_answers(path)) for name, path in paths.items()},
        args.matched_only,
    )
    if args.n is not None:
        prompts = drawn_prompts(prompts, args.n, args.seed)
    configs = {name: {"answers": content_hash(path), "n": args.n} for name, path in paths.items()}
    baseline = names[str(args.baseline)] if args.baseline else None
    _show_and_write(args, [], _measure_lengths(paths, baseline, prompts), [], configs, {})


def _measure_lengths(paths: Mapping[str, Path], baseline: str | None, prompts: set[str]) -> list[Any]:
    """Measures of length of each file, on some prompts; the answers of two files at most are in memory."""
    from ..evaluation.answers.answers import read_answers
    from ..evaluation.results.verbosity import System, verbosity

    def read(name: str) -> System:
        return System.of(name, (answer for answer in read_answers(paths[name]) if answer.prompt_id in prompts))

    against = None if baseline is None else read(baseline)
    found = []
    for name in paths:
        if against is not None and name == baseline:
            found.append(verbosity(against))
        else:
            found.append(verbosity(read(name), against))
    return found


def _show_and_write(
    args: argparse.Namespace,
    summaries: Sequence[Any],
    lengths: Sequence[Any],
    duels: Sequence[Any],
    configs: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Any],
) -> None:
    """Show and write."""
    from ..evaluation.results import comparing
    from ..evaluation.results.judged import csv_text
    from ..evaluation.results.reliability import reliability_table
    from ..evaluation.results.style_control import style_table
    from ..evaluation.results.summary import summary_table
    from ..evaluation.results.verbosity import verbosity_table
    from ..io.command_line import format_arguments
    from ..io.files import write_atomic
    from ..io.locks import alone_at
    from ..io.records import lines
    from .shown import say, show

    if summaries:
        failures = [runs[one.system].failures for one in summaries]
        show(summary_table(summaries), reliability_table(summaries, failures))
        if styled := {one.system: one.styled for one in summaries if one.styled}:
            show(style_table(styled))
    show(verbosity_table(lengths))
    if duels:
        show(comparing.duel_table(duels))
    notes = [f"Note: {one.system}: {note}" for one in [*summaries, *lengths] for note in one.notes]
    say(*dict.fromkeys(one.judge_check for one in summaries if one.judge_check))
    say(*dict.fromkeys(notes))
    several = "; one by one, only the last p-values know that there are several" if duels else ""
    say(f"Intervals are 95 %, over prompts{several}.")
    if args.out is None:
        return
    command = format_arguments(make_parser(), args)
    rows = comparing.rows_of(summaries, lengths)
    content = {"command": command, "systems": rows, "duels": [duel.row() for duel in duels], "configs": configs}
    made = comparing.all_records(summaries, lengths, duels, configs=configs, seed=args.seed, command=command)
    paths = [args.out.with_name(f"{args.out.name}.{ending}") for ending in ("csv", "json", "records.jsonl")]
    with alone_at(args.out):
        for path, text in zip(paths, (csv_text(rows), json.dumps(content, indent=2) + "\n", lines(made)), strict=True):
            write_atomic(path, text)
    say(f"Written: {', '.join(map(str, paths))}")
    show_next(*after_comparing(args.out))
