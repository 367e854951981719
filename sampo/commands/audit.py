"""`sampo audit DATA`: issues of preference data, lengths of its responses, and what length alone explains."""

import argparse
import logging
from pathlib import Path

from ..io.command_line import format_command
from .next_steps import after_audit, show_next
from .pair_options import add_treatment, treatment_of, treatment_words

HAS_ISSUES = 3  # exit code: bad rows, or a file that is cut off; the audit is complete without them


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo audit",
        allow_abbrev=False,
        description="Check every row of preference data: issues with row numbers, lengths, how well length alone "
        "predicts the preference, what SamPO would select, what `max_length` would cut, duplicates within and across "
        f"splits. Exit code 0: no issues; {HAS_ISSUES}: issues, all listed, the rest audited; 1: no audit possible.",
    )
    parser.add_argument("data", nargs="+", help="files, folders or hub ids; all their splits are read")
    parser.add_argument("--tokenizer", metavar="T", help="of the model to train: lengths in its tokens, else in words")
    parser.add_argument("--by", metavar="COLUMN", help="repeat the numbers for each value of this column")
    parser.add_argument(
        "--max_length", type=int, nargs="+", default=[], metavar="N", help="show what each of these would cut"
    )
    parser.add_argument("--truncation_mode", default="keep_start", choices=("keep_start", "keep_end"))
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="read these only")
    parser.add_argument("--name", help="configuration of a hub data set, or sub-folder")
    add_treatment(parser)
    parser.add_argument("--label", help="name of the data in tables and records")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write audit.json, records.jsonl and pairs.parquet")
    return parser


def main(args: argparse.Namespace) -> None:
    """Audit, and print the result."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        code = _run_audit(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"sampo audit: error: {error}") from None
    if code:
        raise SystemExit(code)


def _run_audit(args: argparse.Namespace) -> int:
    from ..audit import files, report
    from ..audit.audit import audit_preferences
    from ..io.locks import alone_in
    from .progress import progress
    from .shown import say, show

    if args.tokenizer:
        import transformers

        transformers.utils.logging.disable_progress_bar()
    with progress("pairs") as advance:
        audit = audit_preferences(
            *args.data,
            tokenizer=args.tokenizer,
            by=args.by,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            splits=args.splits,
            name=args.name,
            label=args.label,
            progress=advance,
            **treatment_of(args),
        )
    say("", report.clean(report.write_verdict(audit)))
    show(*report.make_tables(audit))
    say("", *report.issue_lines(audit), "", report.clean(report.write_conclusion(audit)))
    if args.out:
        with alone_in(args.out):
            written = files.write_audit(audit, args.out, command=_reproducing_command(args))
        say(f"Written: {', '.join(map(str, written))}")
    if not audit.has_issues:
        show_next(*after_audit(args))
    return HAS_ISSUES if audit.has_issues else 0


def _reproducing_command(args: argparse.Namespace) -> str:
    """Return the command that gives the same numbers again."""
    arguments = ["sampo", "audit", *args.data]
    for name in ("tokenizer", "by", "name", "label"):
        if getattr(args, name):
            arguments += [f"--{name}", getattr(args, name)]
    for name in ("max_length", "splits"):
        if getattr(args, name):
            arguments += [f"--{name}", *map(str, getattr(args, name))]
    arguments += treatment_words(args)
    if args.truncation_mode != "keep_start":
        arguments += ["--truncation_mode", args.truncation_mode]
    return format_command(arguments)
