"""`sampo judge --labelled PAIRS`: a judge beside people, on pairs that people have labelled."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.columns import read_columns
from ..evaluation.judging.labelled import GROUP_COLUMN, LabelledPairs, label_meanings, read_labelled
from .shown import say, show

if TYPE_CHECKING:
    from ..evaluation.judging.judges import Judgement

ONLY_HERE = ("columns", "responses", "labels", "label_values", "by")
NOT_HERE = ("system", "baseline", "agreement", "matched_only", "control_n", "annotation_sheet")


def add_labelled_options(parser: argparse.ArgumentParser) -> None:
    """The options of pairs that people have labelled, and of the file that a win rate takes the result from."""
    group = parser.add_argument_group("people")
    group.add_argument(
        "--labelled",
        type=Path,
        metavar="PAIRS",
        help="check the judge on pairs with labels of people, in place of `--system` and `--baseline`",
    )
    group.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="names in PAIRS of prompt, chosen, rejected"
    )
    group.add_argument(
        "--responses", nargs=2, metavar="COLUMN", help="with `--labels`: the columns of the first and second response"
    )
    group.add_argument(
        "--labels",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="A (the first response), B or tie, a column per annotator",
    )
    group.add_argument(
        "--label_values", nargs="+", default=[], metavar="A=VALUE", help="other labels, such as A=1 B=2 tie=0"
    )
    group.add_argument(
        "--by", nargs="+", metavar="COLUMN", help=f"accuracy for each value of a column (`{GROUP_COLUMN}`, if there)"
    )
    group.add_argument(
        "--agreement",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="of `--labelled`, to show beside the win rate; without it those of this judge beside `--out`",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raise for options that do not go together.

    Raises:
        ValueError: and which.
    """
    if args.labelled is None:
        if args.system is None or args.baseline is None:
            raise ValueError("`system` and `baseline` must name files of answers, or `labelled` a file of pairs.")
        if wrong := [name for name in ONLY_HERE if getattr(args, name)]:
            raise ValueError(f"{', '.join(f'`{name}`' for name in wrong)} must go with `labelled`, got none.")
        return
    if wrong := [name for name in NOT_HERE if getattr(args, name)]:
        raise ValueError(f"`labelled` excludes {', '.join(f'`{name}`' for name in wrong)}. Leave them out.")
    if args.length_unit == "tokens":
        raise ValueError("`length_unit` must be characters or words with `labelled`, got tokens.")
    if (summary := args.out.with_suffix(".summary.json")).exists():
        raise ValueError(
            f"`out` must not be the name of another run's judgements, got {args.out}, which has {summary}."
        )


def labelled_of(args: argparse.Namespace) -> LabelledPairs:
    """The pairs to judge, `--n` of their prompts."""
    from dataclasses import replace

    from ..evaluation.judging.judges import draw_pairs

    found = read_labelled(
        args.labelled,
        columns=read_columns(args.columns),
        responses=args.responses,
        labels=args.labels,
        label_values=label_meanings(args.label_values),
        by=args.by,
    )
    drawn = {pair.system.key for pair in draw_pairs([each.pair for each in found.pairs], args.n, args.seed)}
    kept = [each for each in found.pairs if each.pair.system.key in drawn]
    annotators = f", {len(found.annotators)} annotators" if len(found.annotators) > 1 else ""
    say(f"{len(kept)} labelled pairs{annotators}, {len(found.pairs) - len(kept)} not drawn.")
    return replace(found, pairs=kept)


def report(
    args: argparse.Namespace, judge: Any, labelled: LabelledPairs, rows: "Sequence[Judgement]", command: str
) -> dict[str, int]:
    """Compute, show and write the agreement; returns the failed verdicts by kind."""
    from ..evaluation.judging.judges import write_judgements
    from ..evaluation.results.agreement import agreement_tables, measure_agreement
    from ..evaluation.results.judge_checks import ENDING, data_name
    from ..evaluation.results.judged import AnswerFile, Judged, content_hash
    from ..io.files import write_atomic
    from ..io.records import lines

    pairs = AnswerFile(str(args.labelled), content_hash(args.labelled), None)
    about = {"name": judge.name, **judge.about}
    run = Judged(system=pairs, baseline=pairs, judge=about, n=args.n, seed=args.seed, rows=rows)
    found = measure_agreement(labelled, run, length_unit=args.length_unit)
    show(*agreement_tables(found))
    check = found.check(about, data_name(args.labelled))
    say(f"{run.judge_name} {check.phrase}; {found.tied} pairs tied by people, {found.failed} without both verdicts.")
    say(*(f"Note: {note}" for note in found.notes))
    config = {"judged_by": about, "data": check.data, "labelled": pairs.sha256, "n": args.n}
    config |= {"length_unit": args.length_unit, "labels": list(labelled.annotators)}
    written = [args.out, args.out.with_name(args.out.stem + ENDING)]
    write_judgements(args.out, rows)
    write_atomic(written[1], lines(found.records(config, seed=args.seed, command=command)))
    say(f"Written: {', '.join(map(str, written))}. Win rates of this judge beside it show this.")
    return run.failures
