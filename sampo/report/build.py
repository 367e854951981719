"""`build_report`: from a folder of outputs to one HTML page."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .audit_section import data_section
from .collect import Found, Problem, collect, plain
from .conclusion import conclusion_section
from .diagnosis_section import diagnosis_section
from .evaluation_sections import answer_section, win_rate_section
from .judge_section import judge_section
from .page import Section, render
from .sections import benchmark_section, other_section
from .training_section import training_section

SectionBuilder = Callable[[Found], Section]
SECTIONS: tuple[SectionBuilder, ...] = (
    *(data_section, training_section, diagnosis_section, win_rate_section, judge_section, answer_section),
)
LAST_SECTIONS: tuple[SectionBuilder, ...] = (benchmark_section, other_section)
SECTION_COMMANDS = {  # section -> its content, and the command that writes it
    "data": ("an audit of the preference data", "sampo audit DATA --out DIR/audit"),
    "training": ("the log of a training run (trainer_state.json)", "sampo train … --output_dir DIR/run"),
    "model": (
        "length pressure and rewards of a model",
        "sampo diagnose --policy MODEL --reference BASE --data HELD_OUT --out DIR/diagnosis",
    ),
    "win-rate": (
        "win rates, the frontier of verbosity, win rates by length",
        "sampo judge --system DIR/A.jsonl --baseline DIR/B.jsonl --judge … --out DIR/judgements.jsonl",
    ),
    "judges": (
        "how far a judge agrees with people",
        "sampo judge --labelled PAIRS --judge … --out DIR/labelled.jsonl",
    ),
    "answers": ("answers to read", "sampo generate MODEL --prompts PROMPTS --out DIR/A.jsonl"),
    "lab": ("the lab", "sampo lab --out DIR/lab"),
}


@dataclass(frozen=True)
class Report:
    """A page and its contents.

    Attributes:
        html: the page.
        shown: titles of its sections.
        problems: omitted files, each with the reason.
        missing: contents for which the folder has no files.
    """

    html: str
    shown: list[str]
    problems: list[Problem]
    missing: list[str]


def build_report(
    folder: str | Path,
    *,
    title: str | None = None,
    lab_section: SectionBuilder | None = None,
    sweep_section: SectionBuilder | None = None,
) -> Report:
    """Everything that sampo's commands wrote below a folder, on one HTML page that loads nothing and runs nothing.

    The same files give the same page. Files that are broken or foreign are named on it. Needs the extra `report`.

    Args:
        folder: with the outputs, at most eight folders deep.
        title: of the page.
        lab_section: `sampo.lab.section.lab_section`, which this package must not import. Without it the records of
            the lab are shown among the other records.
        sweep_section: the same for a sweep, `sampo.sweep.section.sweep_section`.

    Raises:
        NotADirectoryError: `folder` is not a folder.
        ImportError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"A report needs matplotlib and jinja2, got: {error}. Install them: pip install 'sampo-dpo[report]'"
        ) from None
    folder = Path(folder)
    found = collect(folder)
    if lab_section is None:
        found.others += found.labs
    if sweep_section is None:
        found.others += found.sweeps
    builders = [
        *([sweep_section] if sweep_section else []),
        *SECTIONS,
        *([lab_section] if lab_section else []),
        *LAST_SECTIONS,
    ]
    sections = [build(found) for build in builders]
    missing = [
        SECTION_COMMANDS[section.name]
        for section in sections
        if not section.blocks and section.name in SECTION_COMMANDS
    ]
    conclusion = conclusion_section(found, [one for one in missing if one != SECTION_COMMANDS["lab"]])
    name = plain(folder.resolve().name)
    problems = _problems(found, [*sections, conclusion], folder)
    title = title or f"sampo report: {name}"
    return Report(
        html=render([conclusion, *sections], found, title=title, folder=name, missing=missing, problems=problems),
        shown=[section.title for section in sections if section.blocks],
        problems=problems,
        missing=[what for what, _ in missing],
    )


def _problems(found: Found, sections: list[Section], folder: Path) -> list[Problem]:
    """All problems, without the path of the folder: the page may be sent to others."""
    every = [*found.problems, *(problem for section in sections for problem in section.problems)]
    return list(dict.fromkeys(Problem(one.file, one.reason.replace(f"{folder}/", "")) for one in every))
