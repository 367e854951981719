"""The tables of a sweep: for a terminal, in Markdown and in LaTeX."""

import re
from collections.abc import Sequence

from ..io.tables import Table, markdown_of
from .lines import SWEEP_COLUMNS, SWEEP_LEGEND, Lines, ResultLine

_LATEX = {"\\": r"\textbackslash{}", "–": "--", "−": "$-$", "≥": r"$\geq$"} | {each: f"\\{each}" for each in "&%$#_{}"}
RUN_COLUMNS = ("tokens_mean", "tokens_ratio", "ended", "accuracy", "win_rate", "kl")


def method_rows(lines: Lines) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: the start, then each method over its seeds."""
    names = lines.shown
    heads = ["method", *lines.varied, "seeds", *(SWEEP_COLUMNS[name][0] for name in names)]
    start = ["start", *[""] * len(lines.varied), "", *(lines.start.cell(name) for name in names)]
    rows = [
        [
            f"{line.config['title']} ({line.config['method']})",
            *(f"{line.config[option]:g}" for option in lines.varied),
            str(line.seeds),
            *(line.cell(name) for name in names),
        ]
        for line in lines.methods
    ]
    return heads, [start, *rows]


def run_rows(lines: Lines) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: each run; a failed one has its error."""
    names = [name for name in RUN_COLUMNS if any(name in line.numbers for line in lines.runs)]
    heads = ["run", "steps", *(SWEEP_COLUMNS[name][0] for name in names)]
    rows = []
    for line in lines.runs:
        if "failed" in line.numbers:
            rows.append([line.config["run"], "failed", *[""] * len(names)])
        else:
            rows.append(
                [line.config["run"], f"{line.get('steps').value:,.0f}", *(_plain(line, name) for name in names)]
            )
    return heads, rows


def _plain(line: ResultLine, name: str) -> str:
    """A number without its interval."""
    return re.sub(r" \(.*\)", "", line.cell(name))


def duel_rows(lines: Lines) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: each two methods at the same grid value."""
    heads = ["quality", "first", "second", "difference", "p, Holm", "seeds that agree"]
    rows = []
    for line in lines.duels:
        one, p = line.get("difference"), line.get("p_holm").value
        bounds = "" if one.interval is None else f" ({100 * one.interval[0]:+.1f} to {100 * one.interval[1]:+.1f})"
        difference = "–" if one.value is None else f"{100 * one.value:+.1f}{bounds} points"
        config = line.config
        rows.append(
            [
                config["quality"],
                *lines.duel_names(line),
                difference,
                "–" if p is None else f"{p:.2g}",
                str(config["seeds_agree"]),
            ]
        )
    return heads, rows


def screen_table(lines: Lines) -> Table:
    """The methods for a terminal."""
    heads, rows = method_rows(lines)
    table = Table("", [head.replace(" ", "\n") for head in heads], keys=1)
    for row in rows:
        table.add(*(cell.replace(" (", "\n(") for cell in row))
    return table


def markdown_page(lines: Lines, sentences: Sequence[str], command: str) -> str:
    """`table.md`: conclusion, methods, comparisons, runs."""
    parts = ["# Sweep", "\n".join(f"- {sentence}" for sentence in sentences)]
    for title, (heads, rows) in (
        ("Methods", method_rows(lines)),
        ("Prompt by prompt", duel_rows(lines)),
        ("Runs", run_rows(lines)),
    ):
        if rows:
            parts += [f"## {title}", markdown_of(heads, rows)]
    return "\n\n".join([*parts, SWEEP_LEGEND, f"Measured by `{command}`."]) + "\n"


def latex(lines: Lines) -> str:
    r"""`table.tex`: the methods as a `tabular` with `\toprule` of booktabs."""
    heads, rows = method_rows(lines)

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

    body = [line(heads), r"\midrule", *(line(row) for row in rows)]
    return "\n".join(
        [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}", ""]
    )
