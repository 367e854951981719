"""`sampo panel A.jsonl B.jsonl C.jsonl --out panel.jsonl`: several judges on the same pairs in one result."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .endpoints import INCOMPLETE
from .next_steps import after_judging, show_next
from .shown import say, show


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo panel",
        allow_abbrev=False,
        description="Combine what several judges said of the same pairs: the panel's win rate, how far its judges "
        "agree, and the panel without each of them. Nothing is judged here. A judge without a verdict is absent, not "
        f"a tie. Exit code {INCOMPLETE}: the panel lacks a verdict on some pairs.",
    )
    parser.add_argument("judgements", nargs="+", type=Path, help="of `sampo judge`, one file per judge")
    parser.add_argument(
        "--rule", default="mean", choices=("mean", "majority"), help="how verdicts are combined (mean)"
    )
    parser.add_argument("--quorum", type=int, help="judges that must have a verdict on a pair (all)")
    parser.add_argument("--out", type=Path, default=Path("panel.jsonl"), help="as of `sampo judge`, to be compared")
    parser.add_argument("--matched_only", action="store_true", help="omit prompts that one judge lacks")
    parser.add_argument(
        "--length_unit", default="characters", choices=("characters", "words", "tokens"), help="of all lengths"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Combine, and report the result."""
    try:
        code = _combine(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"sampo panel: error: {error}") from None
    if code:
        raise SystemExit(code)


def _combine(args: argparse.Namespace) -> int:
    from ..evaluation.results import judged, panel
    from ..evaluation.results.summary import summary_table
    from ..io.command_line import format_arguments
    from ..io.locks import alone_at

    read = [judged.read_judged(path) for path in args.judgements]
    names = _judge_names(args.judgements, [run.judge_name for run in read])
    runs = panel.check_members(dict(zip(names, read, strict=True)), matched_only=args.matched_only)
    combined = panel.combine(runs, args.rule, quorum=args.quorum)
    members, agreed = panel.leave_one_out(runs, args.rule, quorum=args.quorum), panel.agreement(runs)
    found = combined.summary(length_unit=args.length_unit)
    show(summary_table([found]), panel.member_table(members), panel.agreement_table(names, agreed))
    say(found.sentence(), *(f"Note: {note}" for note in found.notes))
    more = {"stopped": None, "panel": panel.panel_rows(members, agreed)}
    with alone_at(args.out):
        written = judged.write(args.out, combined, found, more=more, command=format_arguments(make_parser(), args))
    say(f"Written: {', '.join(map(str, written))}")
    if combined.failures:
        return INCOMPLETE
    show_next(*after_judging(args.out))
    return 0


def _judge_names(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The judges for a reader, each with its file where two have the same name."""
    counts: Counter[Any] = Counter(names)
    full = [name if counts[name] == 1 else f"{name} ({path.stem})" for name, path in zip(names, paths, strict=True)]
    return full if len(set(full)) == len(full) else [f"{n} ({p})" for n, p in zip(names, paths, strict=True)]
