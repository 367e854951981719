"""`sampo report DIR`: everything that the other commands wrote there, on one HTML page."""

import argparse
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo report",
        allow_abbrev=False,
        description="One HTML page from what the other commands wrote into a folder: audit, training curves, "
        "diagnostics, win rate and verbosity, answers side by side, the lab. It loads nothing and runs nothing; files "
        "that are broken or foreign are named on it and omitted.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="searched, at most eight folders deep")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (DIR/report.html)")
    parser.add_argument("--title", help="of the page")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the page, and report what is on it."""
    from ..io.files import write_atomic
    from ..lab.section import lab_section
    from ..report.build import build_report
    from ..sweep.section import sweep_section

    out = args.out or args.folder / "report.html"
    try:
        if out.is_dir():
            raise ValueError(f"`out` must name a file, got the folder {out}.")
        report = build_report(args.folder, title=args.title, lab_section=lab_section, sweep_section=sweep_section)
        write_atomic(out, report.html)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"sampo report: error: {error}") from None
    print(f"{out}: {', '.join(report.shown) or 'nothing was found to show'}")
    for problem in report.problems:
        print(f"omitted: {problem.file}: {problem.reason}")
    if report.missing:
        print(f"not there: {'; '.join(report.missing)}. The page names the commands.")
