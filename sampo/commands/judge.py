"""`sampo judge --system A.jsonl --baseline B.jsonl --judge …`: which answers are better, in both orders.

With `--labelled PAIRS` in place of the two files, how far the judge agrees with people.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..evaluation.judging import human_judge, judges
from ..io.locks import alone_at
from . import judge_labelled, judge_options
from .endpoints import INCOMPLETE, STOPPED
from .next_steps import after_judging, show_next
from .shown import say, show
from .style_options import add_style_options, measure_style


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo judge",
        allow_abbrev=False,
        description="Judge the answers of a system against those of a baseline, both orders of each pair; or, with "
        "`--labelled`, pairs that people have labelled, to know how far the judge agrees with them. Exit code "
        f"{INCOMPLETE}: some judgements failed; {STOPPED}: stopped early, the output says how to continue. No "
        "request is sent twice.",
    )
    parser.add_argument("--system", type=Path, help="answers: ours, JSONL, or AlpacaEval's JSON")
    parser.add_argument("--baseline", type=Path, help="answers to compare with")
    parser.add_argument(
        "--out",
        type=Path,
        help="one row per pair and order (judgements.jsonl; with `--labelled`, labelled.jsonl)",
    )
    parser.add_argument("--n", type=int, help="judge so many prompts, drawn by a hash of `--seed`")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument(
        "--length_unit", default="characters", choices=("characters", "words", "tokens"), help="of all lengths"
    )
    parser.add_argument("--matched_only", action="store_true", help="omit prompts that one file lacks")
    add_style_options(parser)
    parser.add_argument("--annotation_sheet", type=Path, metavar="CSV", help="write a sheet for people, and stop")
    judge_labelled.add_labelled_options(parser)
    judge_options.add_judges(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Judge, and report the result."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sampo").setLevel(logging.INFO)
    args.out = args.out or Path("judgements.jsonl" if args.labelled is None else "labelled.jsonl")
    try:
        judge_labelled.check_options(args)
        labelled = judge_labelled.labelled_of(args) if args.labelled else None
        pairs, files = ([each.pair for each in labelled.pairs], None) if labelled else _pairs(args)
        style = None if labelled else measure_style(args, args.system, args.baseline)
        if args.annotation_sheet:
            human_judge.write_sheet(args.annotation_sheet, pairs, args.seed)
            long = sum(max(p.system.chars, p.baseline.chars) > human_judge.LONGEST for p in pairs)
            if long:
                say(f"{long} pairs have an answer above {human_judge.LONGEST:,} characters: Excel cuts such a cell.")
            say(f"{args.annotation_sheet}: {len(pairs)} pairs; fill in `preferred` with A, B or tie.")
            return
        judge = judge_options.make_judge(args)
        with ExitStack() as stack:
            stack.enter_context(alone_at(args.out))
            stack.callback(getattr(judge, "close", lambda: None))
            if args.dry_run:
                code = _dry_run(args, judge, pairs)
            elif labelled:
                code = _judge_labelled(args, judge, labelled)
            else:
                code = _judge(args, judge, pairs, files, style)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"sampo judge: error: {error}") from None
    if code:
        raise SystemExit(code)


def _pairs(args: argparse.Namespace) -> tuple[list[judges.AnswerPair], tuple[Any, Any]]:
    """The pairs to judge, and the two files that they are from."""
    from ..evaluation.answers.answers import read_answers
    from ..evaluation.results.judged import AnswerFile

    system, baseline = read_answers(args.system), read_answers(args.baseline)
    matching = judges.match(system, baseline)
    lacking = (
        f"{matching.system_only} answers only in {args.system} and {matching.baseline_only} only in {args.baseline}"
    )
    if near := judges.nearly_matched(system, baseline):
        lacking += f". {near} of them differ by blanks around the prompt alone: make the prompts the same"
    if not matching.pairs:
        raise ValueError(f"The two files must have prompts in common, got {lacking}.")
    if matching.system_only or matching.baseline_only:
        if not args.matched_only:
            raise ValueError(
                f"The two files must answer the same prompts, got {lacking}. To omit the others, set `matched_only`."
            )
        say(f"Left out: {lacking}.")
    pairs = judges.draw_pairs(matching.pairs, args.n, args.seed)
    prompts = len({pair.system.prompt_id for pair in pairs})
    say(f"{len(pairs)} pairs of answers to {prompts} prompts, {len(matching.pairs) - len(pairs)} not drawn.")
    return pairs, (AnswerFile.of(args.system, system), AnswerFile.of(args.baseline, baseline))


# --- judge and report ----------------------------------------------------------------------------------------------


def _judge(args: argparse.Namespace, judge: Any, pairs: list[judges.AnswerPair], files: Any, style: Any) -> int:
    from ..evaluation.results import judged
    from ..evaluation.results.judge_checks import checks_of
    from ..io.command_line import format_arguments
    from .progress import progress

    nothing = judge_options.control_pairs(args, pairs)
    about = {"name": judge.name, **judge.about}
    checks = checks_of(about, args.agreement, args.out.parent)
    shown = judge_options.comparisons_of([*pairs, *nothing])
    with progress("judgements") as advance:
        if args.batch:  # all in one batch, which can take hours; what follows finds the replies
            judge.judge(shown, advance)
        rows = judges.judge_pairs(judge, pairs, advance)
    empty: list[judges.Judgement] = []
    if nothing:
        with progress("control") as advance:
            empty = judges.judge_pairs(judge, nothing, advance)
    where = {"system": files[0], "baseline": files[1], "n": args.n, "seed": args.seed}
    cost = judge_options.cost_of(judge, shown)
    run = judged.Judged(**where, judge=about, rows=rows, empty=empty, cost=cost, checks=checks, style=style)
    found = run.summary(length_unit=args.length_unit)
    endpoint = getattr(judge, "endpoint", None)
    stopped = endpoint.why_stopped if endpoint is not None else None
    command = format_arguments(make_parser(), args)
    written = judged.write(args.out, run, found, more={"stopped": stopped}, command=command)
    _show_summary(found, run)
    say(f"Written: {', '.join(map(str, written))}")
    if code := judge_options.say_failures(judge, run.failures):
        return code
    if found.empty_failed:
        return INCOMPLETE
    show_next(*after_judging(args.out))
    return 0


def _judge_labelled(args: argparse.Namespace, judge: Any, labelled: Any) -> int:
    from ..io.command_line import format_arguments
    from .progress import progress

    pairs = [each.pair for each in labelled.pairs]
    shown = judge_options.comparisons_of(pairs)
    with progress("judgements") as advance:
        if args.batch:
            judge.judge(shown, advance)
        rows = judges.judge_pairs(judge, pairs, advance)
    failures = judge_labelled.report(args, judge, labelled, rows, format_arguments(make_parser(), args))
    _show_failures(rows, failures)
    judge_options.say_cost(judge_options.cost_of(judge, shown))
    return judge_options.say_failures(judge, failures)


def _show_summary(found: Any, run: Any) -> None:
    from ..evaluation.results.reliability import reliability_table
    from ..evaluation.results.style_control import style_table
    from ..evaluation.results.summary import summary_table

    show(summary_table([found]), reliability_table([found], [run.failures]))
    if found.styled:
        show(style_table({found.system: found.styled}))
    say(found.sentence(), *(f"Note: {note}" for note in found.notes))
    _show_failures(run.rows, run.failures)
    if found.empty:
        say(
            f"control, an empty answer: wins {_percent(found.empty.rate.value)} of {found.empty.rate.n} prompts, "
            f"should be near 0; {found.empty_failed} pairs failed"
        )
    if found.longer_wins:
        say(
            f"control, the longer one wins: {_percent(found.longer_wins.rate.value)}; the judge's winner is the "
            f"longer one in {_percent(found.winner_is_longer.value)} of {found.winner_is_longer.n} prompts with a "
            "winner and different lengths"
        )
    judge_options.say_cost(run.cost)


def _show_failures(rows: Sequence[judges.Judgement], failures: Mapping[str, int]) -> None:
    for reason, count in failures.items():
        detail = next((row.detail for row in rows if row.failure == reason and row.detail), "no details")
        say(f"failed: {count} judgements, {reason} (the first: {' '.join(detail.split())[:200]})")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _dry_run(args: argparse.Namespace, judge: Any, pairs: list[judges.AnswerPair]) -> int:
    nothing = [] if args.labelled else judge_options.control_pairs(args, pairs)
    judge_options.say_estimate(args, judge, judge_options.comparisons_of([*pairs, *nothing]))
    return 0
