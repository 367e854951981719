"""`sampo filter DATA --cap 100 | --match 20% | --balance`: pairs whose lengths differ less, or differ evenly."""

import argparse
import logging
from pathlib import Path
from typing import Any

from ..data.issues import ON_BAD_ROWS
from ..io.locks import alone_at
from .next_steps import after_pairs, show_next
from .pair_options import add_treatment, treatment_of
from .shown import say, show


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo filter",
        allow_abbrev=False,
        description="Keep preference pairs by the lengths of their two responses, and show the audit before and "
        "after. Several filters are applied in the order in which they stand here.",
    )
    parser.add_argument("data", help="file, folder or hub id")
    parser.add_argument("--cap", metavar="N", help="lengths differ by at most N")
    parser.add_argument("--match", metavar="X%", help="lengths differ by at most this share of the longer one")
    parser.add_argument(
        "--balance",
        action="store_true",
        help="as many pairs with a longer chosen response as with a longer rejected one, for differences alike",
    )
    parser.add_argument("--out", type=Path, default=Path("filtered.jsonl"), help="the pairs, .jsonl or .parquet")
    parser.add_argument("--tokenizer", metavar="T", help="of the model to train: lengths in its tokens, else in words")
    parser.add_argument("--split", help="such as `train` or `train[:1000]`")
    parser.add_argument("--name", help="configuration of a hub data set, or sub-folder")
    parser.add_argument("--on_bad_rows", default="error", choices=ON_BAD_ROWS, help="rows that cannot be trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of `balance`")
    add_treatment(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Filter, and report what was lost."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        with alone_at(args.out):
            _run(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"sampo filter: error: {error}") from None
    show_next(*after_pairs(args.out))


def _run(args: argparse.Namespace) -> None:
    import datasets

    from ..audit.bias import length_bias
    from ..data.load import load_preferences
    from ..io.command_line import format_arguments
    from ..io.files import write_atomic
    from ..pairs import card
    from ..pairs.files import beside, check_pairs_path, write_pairs

    check_pairs_path(args.out)
    steps = _steps(args)
    datasets.disable_progress_bars()
    pairs = load_preferences(
        args.data, split=args.split, name=args.name, on_bad_rows=args.on_bad_rows, **treatment_of(args)
    )
    numbers, before, unit = _audit(args, pairs)
    kept, lost = numbers, {}
    for name, step in steps.items():
        which = step(kept.chosen, kept.rejected)
        lost[name], kept = kept.select(~which), kept.select(which)
    if not len(kept):
        raise ValueError(f"The filters must leave a pair, got none of {len(pairs):,}. Allow larger differences.")
    filtered = pairs.select(kept.row)
    after = length_bias(kept.prompt, kept.chosen, kept.rejected, kept.prompt_hash, unit=unit)
    write_pairs(args.out, filtered)
    tables = [
        _lost_table(lost, len(numbers), len(kept)),
        card.audit_table("Lengths", {"before": before, "after": after}),
    ]
    prompts = len(set(numbers.prompt_hash.tolist())) - len(set(kept.prompt_hash.tolist()))
    sentences = [f"{prompts:,} of {before.prompts:,} prompts have no pair left. Lengths are in {unit}."]
    settings = {"data": Path(args.data).name, "filters": ", ".join(steps), "seed": args.seed}
    page = beside(args.out, "md")
    command = format_arguments(make_parser(), args)
    write_atomic(page, card.write_pairs_card("Filtered pairs", settings, tables, sentences, command))
    show(*tables)
    say("", *sentences, f"Written: {args.out}, {page}")


def _steps(args: argparse.Namespace) -> dict[str, Any]:
    """Name → function of the lengths of chosen and rejected responses that returns which pairs stay.

    Raises:
        ValueError: no filter is given, or one has a wrong value.
    """
    from ..pairs.choice import LengthLimit
    from ..pairs.filters import balance

    steps: dict[str, Any] = {}
    for name, share in (("cap", False), ("match", True)):
        value = getattr(args, name)
        if value is not None:
            if value.endswith("%") != share:
                raise ValueError(f"`{name}` must be {'a share such as 20%' if share else 'a number'}, got {value}.")
            steps[f"{name} {value}"] = LengthLimit(value).allows
    if args.balance:
        steps["balance"] = lambda chosen, rejected: balance(chosen, rejected, args.seed)
    if not steps:
        raise ValueError("A filter must be given: `cap`, `match` or `balance`, got none.")
    return steps


def _audit(args: argparse.Namespace, pairs: Any) -> tuple[Any, Any, str]:
    """The numbers of all pairs, their length bias, and the unit of length.

    Raises:
        ValueError: pairs have no token.
    """
    from ..audit.audit import audit_preferences
    from .progress import progress

    with progress("pairs") as advance:
        audit = audit_preferences(pairs, tokenizer=args.tokenizer, progress=advance)
    if audit.has_issues and args.on_bad_rows == "error":
        described = " ".join(issue.describe(scan.rows) for scan in audit.scans for issue in scan.issues)
        raise ValueError(f"All pairs must have lengths in tokens. {described}")
    return audit.scans[0].pairs, audit.overall, audit.unit


def _lost_table(lost: dict[str, Any], before: int, after: int) -> Any:
    from ..io.tables import Table

    table = Table("Pairs", ["", "pairs", "chosen longer", "chosen shorter", "equal"])
    table.add("before", f"{before:,}")
    for name, pairs in lost.items():
        gap = pairs.chosen - pairs.rejected
        sides = (len(gap), (gap > 0).sum(), (gap < 0).sum(), (gap == 0).sum())
        table.add(f"lost by {name}", *(f"{int(count):,}" for count in sides))
    table.add("after", f"{after:,}")
    return table
