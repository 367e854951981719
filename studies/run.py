"""Every method over seeds, groups of pairs, learning rates and betas, in the lab's small world.

- `python -m studies.run`: hours on a few cores; if it is interrupted, the same command continues it.
- `python -m studies.run --report`: tables, verdicts and figures of the existing records.
- `python -m studies.run --runs 100`: the first hundred runs; each method has the same number of them.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from sampo.io.command_line import format_command
from sampo.io.files import write_atomic
from sampo.io.locks import FolderInUseError, alone_in
from sampo.lab.settings import Run, Settings

from .plan import SEEDS, study_plan


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.run",
        description="Run every method over seeds, groups of pairs, learning rates and betas in a small world with "
        "ground truth. Finished runs are kept in the output folder and not run again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("study-results"), metavar="DIR", help="records and starts")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="number of seeds")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each")
    parser.add_argument("--runs", type=int, metavar="N", help="stop after the first N runs of the plan")
    parser.add_argument("--report", action="store_true", help="run nothing; analyse the existing records")
    for option in fields(Settings):
        if "help" in option.metadata:
            text = option.metadata["help"].replace("%", "%%")
            parser.add_argument(f"--{option.name}", type=option.type, default=option.default, help=text)
    return parser


def main(args: argparse.Namespace) -> None:
    """Run what is missing, then analyse everything."""
    for name in ("seeds", "jobs", "runs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"study: `--{name}` must be at least 1, got {getattr(args, name)}.")
    try:
        settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings) if "help" in f.metadata})
    except ValueError as error:
        raise SystemExit(f"study: {error}") from None
    plan = study_plan(settings, seeds=args.seeds)
    try:
        with alone_in(args.out):
            if not args.report:
                _run(plan[: args.runs], len(plan), settings, args)
            _report(args.out)
    except FolderInUseError as error:
        raise SystemExit(f"study: error: {error}") from None


def _run(runs: Sequence[Run], n_planned: int, settings: Settings, args: argparse.Namespace) -> None:
    from sampo.lab.experiment import no_progress, run_all, unmeasured, work_quietly

    work_quietly()
    print(f"{len(runs)} runs of a plan of {n_planned} into {args.out}; finished ones are kept.", flush=True)
    began, measured = time.perf_counter(), 0
    missing = set(unmeasured(runs, args.out))
    outcomes = run_all(runs, args.out, command=_command(args, settings), progress=no_progress, jobs=args.jobs)
    for done, (run, records) in enumerate(outcomes, 1):
        shown = {record.name: record.value for record in records}
        if run in missing:
            measured += 1
            each = (time.perf_counter() - began) / measured
            print(
                f"{done} of {len(runs)} ({each:.0f} s each): {run.title}: {shown['tokens']:.1f} tokens, "
                f"{shown['stops']:.0%} end, win rate {shown['win_rate']:.2f}, KL {shown['kl']:.1f}",
                flush=True,
            )
    print(f"{len(runs)} runs are recorded, {measured} of them new, {time.perf_counter() - began:.0f} s.")
    sys.stdout.flush()


def _report(folder: Path) -> None:
    """Tables and figures of all records in the folder."""
    from sampo.io import records as results
    from sampo.lab.experiment import RECORDS

    from .analysis import Study
    from .page import PARTS, verdicts, write_figures

    try:
        study = Study(results.read(folder / RECORDS))
    except ValueError as error:
        raise SystemExit(f"study: {error}") from None
    if not study.cells:
        raise SystemExit(f"study: `--out` must hold finished runs to analyse, got none in {folder}.")
    text = "\n\n".join(f"## {name.replace('_', ' ')}\n\n{part(study)}" for name, part in PARTS.items())
    write_atomic(folder / "study.md", text + "\n")
    print(verdicts(study))
    try:
        figures = [path.name for path in write_figures(study, folder)]
    except ImportError:
        figures = ['no figures, which need `pip install "sampo-dpo[report]"`']
    print(f"Written to {folder}: {', '.join(['study.md', *figures])}")


def _command(args: argparse.Namespace, settings: Settings) -> str:
    """The shortest command that measures the same."""
    words = ["python", "-m", "studies.run"]
    words += ["--seeds", str(args.seeds)] if args.seeds != SEEDS else []
    for option in fields(Settings):
        if getattr(settings, option.name) != option.default:
            words += [f"--{option.name}", str(getattr(settings, option.name))]
    return format_command(words)


if __name__ == "__main__":
    main(make_parser().parse_args())
