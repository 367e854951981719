"""`sampo pairs --answers A.jsonl --judge …`: preference pairs from answers, with a choice of pairs by length."""

import argparse
import json
import logging
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.locks import alone_at
from . import judge_options
from .endpoints import INCOMPLETE, STOPPED
from .next_steps import after_pairs, show_next
from .shown import say, show

if TYPE_CHECKING:
    from ..pairs.choice import ChoiceSettings
    from ..pairs.make import MadePairs, PromptAnswers
    from ..pairs.scores import EmptyControl, JudgeScores


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    from ..pairs.choice import CHOICES
    from ..pairs.make import CHOICE_UNITS
    from ..pairs.scores import SCHEDULES

    parser = argparse.ArgumentParser(
        prog="sampo pairs",
        allow_abbrev=False,
        description="Score the answers to each prompt, and choose which of them become pairs. Scores and replies are "
        "kept, so the same command continues, and another choice asks for nothing. Exit code "
        f"{INCOMPLETE}: some scores or judgements failed; {STOPPED}: stopped early, no pairs are written.",
    )
    parser.add_argument("--answers", required=True, nargs="+", type=Path, help="of one or several models, as `judge`")
    parser.add_argument("--out", type=Path, default=Path("pairs.jsonl"), help="pairs, .jsonl or .parquet")
    parser.add_argument("--choice", default="best_worst", choices=list(CHOICES), help="which answers become pairs")
    parser.add_argument("--margin", type=float, help="for `all_above`: scores differ by more than this (0)")
    parser.add_argument("--share", type=float, help="for `max_margin`: of the prompts, those that differ most (0.5)")
    parser.add_argument(
        "--limit",
        metavar="N|X%",
        help="lengths differ by at most this, for `length_matched` (10%%) and `capped` (100)",
    )
    parser.add_argument(
        "--length_unit", default="auto", choices=CHOICE_UNITS, help="`auto`: tokens where they are known, else words"
    )
    parser.add_argument("--use_cut", action="store_true", help="use answers that were cut off, too")
    parser.add_argument("--schedule", default="all", choices=list(SCHEDULES), help="of a judge of two answers")
    parser.add_argument("--n", type=int, help="take so many prompts, drawn by a hash of `--seed`")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--annotation_sheet", type=Path, metavar="CSV", help="write a sheet for people, and stop")
    judge_options.add_judges(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Score, choose and report."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        code = _run(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"sampo pairs: error: {error}") from None
    if code:
        raise SystemExit(code)


def _run(args: argparse.Namespace) -> int:
    from ..evaluation.answers.answers import read_answers
    from ..evaluation.answers.generate import read_missing
    from ..evaluation.judging import human_judge
    from ..evaluation.judging.judges import drawn_prompts
    from ..pairs import make, scores
    from ..pairs.files import beside, check_pairs_path

    check_pairs_path(args.out)
    settings = choice_settings(args)
    systems = [read_answers(path) for path in args.answers]
    missing = Counter(row.prompt_id for path in args.answers for row in read_missing(path))
    if args.n is not None:
        drawn = drawn_prompts((a.prompt_id for answers in systems for a in answers), args.n, args.seed)
        systems = [[a for a in answers if a.prompt_id in drawn] for answers in systems]
        missing = Counter({prompt_id: count for prompt_id, count in missing.items() if prompt_id in drawn})
    unit = make.length_unit_of(systems, args.length_unit)
    prompts = make.sort_answers(systems, use_cut=args.use_cut, seed=args.seed, missing=missing)
    groups = [one.usable for one in prompts if not one.status]
    say(
        f"{sum(map(len, systems)):,} answers to {len(prompts):,} prompts; {sum(map(len, groups)):,} answers to "
        f"{len(groups):,} prompts are judged. Lengths are in {unit}."
    )
    if args.annotation_sheet:
        human_judge.write_sheet(args.annotation_sheet, scores.every_pair(groups), args.seed)
        say(f"{args.annotation_sheet}: fill in `preferred` with A, B or tie.")
        return 0
    judge = judge_options.make_judge(args)
    control = judge_options.control_pairs(args, scores.control_pairs_of(groups))
    with ExitStack() as stack:
        stack.enter_context(alone_at(args.out))
        stack.callback(getattr(judge, "close", lambda: None))
        if args.dry_run:
            shown = judge_options.comparisons_of([*scores.every_pair(groups), *control])
            judge_options.say_estimate(args, judge, shown)
            return 0
        journal = beside(args.out, "scores.jsonl")
        found = _score(args, judge, groups, journal)
        emptied = _control(judge, control, journal)
        cost = judge_options.cost_of(judge)
        judge_options.say_cost(cost)
        code = judge_options.say_failures(judge, found.failures)
        if code == STOPPED:
            say("No pairs were written.")
            return code
        about = {
            "length_unit": unit,
            "judge": judge.name,
            "judge_settings": json.dumps(dict(judge.about), sort_keys=True),
            "choice": args.choice,
            "choice_settings": json.dumps(_choice_words(args.choice, settings), sort_keys=True),
            "seed": args.seed,
        }
        made = make.make_rows(prompts, found.groups, args.choice, settings, unit=unit, about=about)
        _write(args, prompts, made, found, emptied, {**about, "cost": json.dumps(cost)} if cost else about)
    if not code:
        show_next(*after_pairs(args.out))
    return code


def choice_settings(args: argparse.Namespace) -> "ChoiceSettings":
    """The settings of the rule.

    Raises:
        ValueError: one has a wrong value, or has no effect on this rule.
    """
    from ..pairs.choice import CHOICES, ChoiceSettings, LengthLimit

    rule = CHOICES[args.choice]
    given = {name: getattr(args, name) for name in ("margin", "share", "limit") if getattr(args, name) is not None}
    for name in given:
        if name not in rule.settings:
            users = [other for other, one in CHOICES.items() if name in one.settings]
            raise ValueError(f"`{name}` goes with `choice` {' or '.join(users)}, got {args.choice}. Leave it out.")
    if rule.limit:
        given["limit"] = LengthLimit(given.get("limit", rule.limit))
    return ChoiceSettings(**given, seed=args.seed)


def _choice_words(choice: str, settings: "ChoiceSettings") -> dict[str, Any]:
    """The settings that the rule reads, as JSON values."""
    from ..pairs.choice import CHOICES

    return {
        name: settings.limit.text if name == "limit" else getattr(settings, name) for name in CHOICES[choice].settings
    }


def _score(args: argparse.Namespace, judge: Any, groups: list[list[Any]], journal: Path) -> "JudgeScores":
    from ..pairs import scores
    from .progress import progress

    with progress("scores" if scores.scores_alone(judge) else "judgements") as advance:
        if scores.scores_alone(judge):
            return scores.score_once(judge, groups, journal, advance)
        return scores.SCHEDULES[args.schedule](judge, groups, advance)


def _control(judge: Any, pairs: list[Any], journal: Path) -> "EmptyControl | None":
    from ..pairs.scores import ask_control
    from .progress import progress

    if not pairs:
        return None
    with progress("control") as advance:
        return ask_control(judge, pairs, journal, advance)


def _write(
    args: argparse.Namespace,
    prompts: list["PromptAnswers"],
    made: "MadePairs",
    found: "JudgeScores",
    control: "EmptyControl | None",
    about: dict[str, Any],
) -> None:
    """Write pairs, account and card, and show the tables of the card."""
    from datasets import Dataset, disable_progress_bars

    from ..audit.report import bias_sentences
    from ..data.issues import PreferenceDataError
    from ..data.validate import check_preferences
    from ..io.command_line import format_arguments
    from ..io.files import write_atomic
    from ..pairs import card, make
    from ..pairs.files import beside, write_pairs

    disable_progress_bars()
    account, page = beside(args.out, "account.jsonl"), beside(args.out, "md")
    write_atomic(account, "".join(json.dumps(one.row()) + "\n" for one in prompts))
    counts = make.count_statuses(prompts)
    tables = [card.account_table(counts)]
    sentences = [_left_out(prompts), *_judge_sentences(found, control), card.slope_sentence(made.slope)]
    if not made.rows:
        raise ValueError(
            f"The rule must find a pair, got none of {len(prompts):,} prompts. {account} has the reasons."
        )
    pairs = Dataset.from_list(made.rows)
    write_pairs(args.out, pairs)
    tables.append(card.audit_table("Lengths", {f"{len(made.rows):,} pairs": made.bias}))
    sentences += bias_sentences(made.bias, about["length_unit"])
    try:
        check_preferences(pairs)
    except PreferenceDataError as error:
        sentences.append(f"Some pairs cannot be trained on as they are: {error}")
    files = ", ".join(path.name for path in args.answers)
    command = format_arguments(make_parser(), args)
    write_atomic(
        page, card.write_pairs_card("Preference pairs", {"answers": files, **about}, tables, sentences, command)
    )
    show(*tables)
    say("", *sentences, f"Written: {args.out}, {account}, {page}")


def _left_out(prompts: list["PromptAnswers"]) -> str:
    left = {
        "cut off": sum(one.cut for one in prompts),
        "empty": sum(one.empty for one in prompts),
        "a repetition of another one": sum(one.repeated for one in prompts),
        "without a score": sum(one.failed for one in prompts),
    }
    missing = sum(one.missing for one in prompts)
    generated = f" Not generated: {missing:,} further answers." if missing else ""
    return f"Answers left out: {', '.join(f'{count:,} {what}' for what, count in left.items())}.{generated}"


def _judge_sentences(found: "JudgeScores", control: "EmptyControl | None") -> list[str]:
    lines = []
    if found.orders_agree is not None:
        lines.append(f"Both orders name the same winner in {found.orders_agree:.1%} of {found.asked:,} comparisons.")
    if control is not None and control.wins.value is not None:
        failed = f"; {control.failed} failed" if control.failed else ""
        lines.append(
            f"Control, an empty answer: wins {control.wins.value:.1%} of {control.wins.n:,} prompts, should be near "
            f"0{failed}."
        )
    if found.failures:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.failures.items())
        lines.append(f"Failed: {reasons}.")
    return lines
