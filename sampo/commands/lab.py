"""`sampo lab`: DPO against SamPO in a small world where the true quality of every answer is known.

- `sampo lab --fast`: one seed, a few minutes on two cores, no download.
- `sampo lab`: three seeds; what `--fast` has measured is not run again.
- `sampo lab --groups long --bias 1`: something else. A number is filed under all its settings.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .. import plugins
from ..io.command_line import format_command
from ..io.files import write_atomic
from ..io.locks import FolderInUseError, alone_in
from ..io.records import Record
from ..lab.methods import METHODS, STUDY_METHODS
from ..lab.settings import GROUPS, Run, Settings, plan

if TYPE_CHECKING:
    from ..io.progress import OpenProgress

Outcomes = list[tuple[Run, list[Record]]]

DEFAULT_SEEDS = 3


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo lab",
        description="Train a tiny model with each method in a small world with ground truth, and measure the "
        "lengths and the quality of its answers. Finished runs are kept in the output folder and not run again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--fast", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"number of seeds, {DEFAULT_SEEDS} without `--fast`")
    parser.add_argument("--out", type=Path, default=Path("lab-results"), metavar="DIR", help="records, table, figure")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="pairs to train on")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(STUDY_METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"methods to run, of {', '.join(STUDY_METHODS)}",
    )
    for option in fields(Settings):
        if "help" in option.metadata:
            text = option.metadata["help"].replace("%", "%%")
            parser.add_argument(f"--{option.name}", type=option.type, default=option.default, help=text)
    plugins.add_option(parser)
    return parser


def run(argv: list[str]) -> int:
    """`sampo lab …`."""
    if argv[:1] == ["study"]:
        raise SystemExit(
            "sampo lab: the study is no longer part of the package, run `python -m studies.run` in a checkout of the "
            "repository: it takes the same options."
        )
    main(make_parser().parse_args(argv))
    return 0


def main(args: argparse.Namespace) -> None:
    """Run what is missing, then show everything."""
    from .shown import say

    seeds = args.seeds if args.seeds is not None else 1 if args.fast else DEFAULT_SEEDS
    if seeds < 1:
        raise SystemExit(f"sampo lab: `--seeds` must be at least 1, got {seeds}.")
    try:
        settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings) if "help" in f.metadata})
    except ValueError as error:
        raise SystemExit(f"sampo lab: {error}") from None

    groups, methods = _choices(args)
    runs = plan(settings, seeds=seeds, groups=groups, methods=methods)
    command = _command(args, settings)
    say(f"{len(runs)} runs into {args.out}; finished ones are kept.")
    began = time.perf_counter()
    try:
        with alone_in(args.out):
            outcomes = _run(runs, args.out, command)
            _show(outcomes, args.out, command)
    except FolderInUseError as error:
        raise SystemExit(f"sampo lab: error: {error}") from None
    say(f"{time.perf_counter() - began:.0f} seconds.")


def _choices(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The groups and methods asked for, in our order."""
    return [name for name in GROUPS if name in args.groups], [name for name in STUDY_METHODS if name in args.methods]


def _command(args: argparse.Namespace, settings: Settings) -> str:
    """The shortest command that measures the same."""
    words = ["sampo", "lab"]
    if args.seeds is not None:
        words += ["--seeds", str(args.seeds)]
    elif args.fast:
        words += ["--fast"]
    groups, methods = _choices(args)
    words += ["--groups", *groups] if len(groups) < len(GROUPS) else []
    words += ["--methods", *methods] if methods != list(METHODS) else []
    for option in fields(Settings):
        if getattr(settings, option.name) != option.default:
            words += [f"--{option.name}", str(getattr(settings, option.name))]
    return format_command(words)


def _run(runs: Sequence[Run], folder: Path, command: str) -> Outcomes:
    """Every run with its records; a line for each as it ends."""
    import datasets
    import torch
    import transformers

    from ..lab.experiment import run_all
    from .shown import say

    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))  # batches this small gain nothing from more
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    outcomes = []
    try:
        for run, records in run_all(runs, folder, command=command, progress=_progress()):  # known ones first
            outcomes.append((run, records))
            shown = {r.name: r.value for r in records}
            say(
                f"{run.title}: {shown['tokens']:.1f} tokens, {shown['stops']:.0%} end, true quality "
                f"{shown['quality']:.2f}, win rate {shown['win_rate']:.2f}"
            )
    finally:
        torch.set_num_threads(threads)
        transformers.utils.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()
    return sorted(outcomes, key=lambda outcome: runs.index(outcome[0]))


def _progress() -> "OpenProgress":
    """A bar for people; for logs the line that each run prints at its end is enough."""
    from .shown import say

    @contextmanager
    def bar(title: str, steps: int) -> Iterator[Callable[[int], None]]:
        from rich.progress import Progress

        with Progress(transient=True) as progress:
            task = progress.add_task(title, total=steps)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def line(title: str, steps: int) -> Iterator[Callable[[int], None]]:
        began = time.perf_counter()
        yield lambda done: None
        say(f"{title}: {steps} steps in {time.perf_counter() - began:.0f} s")

    return bar if sys.stdout.isatty() else line


def _show(outcomes: Outcomes, folder: Path, command: str) -> None:
    from ..lab import report
    from .shown import say, show

    lines = report.collect_lines(outcomes)
    show(report.table(lines))
    about = report.describe_runs(outcomes, command)
    write_atomic(folder / "table.md", report.markdown(lines, about=about))
    say(about, "")
    for sentence in report.summarise_findings(lines):
        say(f"- {sentence}")
    if warning := report.weak_start(lines):
        say("", f"Warning: {warning}")
    try:
        report.draw_figure(lines, folder / "lab.svg")
        written = "records.jsonl, table.md, lab.svg"
    except ImportError:
        written = 'records.jsonl, table.md; no lab.svg, which needs `pip install "sampo-dpo[report]"`'
    say("", f"Written to {folder}: {written}")
