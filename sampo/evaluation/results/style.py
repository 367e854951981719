"""Features of style of the answers that were judged: length, Markdown, and columns of the user's files.

The Markdown features and their patterns are those of LMArena's style control (headings, items of lists, bold parts,
counted outside of fenced code), with two differences: blanks before an item do not reach over line ends, which costs
quadratic time, and the number of fenced blocks of code is a feature of its own.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...io.schemas import shown
from ..answers.answers import Answer, read_answers
from ..judging.judges import Judgement, match

LENGTH = "length"
_FENCED = re.compile(r"^[ \t]*(```|~~~)[^`\n]*\n.*?(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6}\s", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:\d+\.|[-*+])\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
# feature -> number of it in (the text without fenced code, the number of fenced blocks)
MARKDOWN: dict[str, Callable[[str, int], int]] = {
    "headers": lambda text, blocks: len(_HEADING.findall(text)),
    "lists": lambda text, blocks: len(_ITEM.findall(text)),
    "bold": lambda text, blocks: len(_BOLD.findall(text)),
    "code": lambda text, blocks: blocks,
}
STYLE_FEATURES = (LENGTH, *MARKDOWN)


def count_markdown(text: str, names: Iterable[str]) -> list[int]:
    """How much of each feature of `MARKDOWN` an answer has."""
    rest, blocks = _FENCED.subn("", text)
    return [MARKDOWN[name](rest, blocks) for name in names]


@dataclass(frozen=True)
class StyleTable:
    """Features of the answers of a system and a baseline.

    Attributes:
        names: the features in the order in which they were asked for; `length` is that of the judgements.
        columns: by name but `length`, `(pairs, 2)` of the system's answer and of the baseline's.
        numbers: row of `columns` by prompt and sample of the system's answer.
    """

    names: tuple[str, ...]
    columns: Mapping[str, np.ndarray]
    numbers: Mapping[tuple[str, int], int]

    def of_judgements(
        self, rows: Sequence[Judgement], lengths: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Features of the answers of each judgement, `(n, 2)` by name; `lengths` are those of its two answers."""
        number = np.array([self.numbers[row.prompt_id, row.sample] for row in rows], dtype=int)
        return {
            name: np.stack(lengths, axis=1) if name == LENGTH else self.columns[name][number] for name in self.names
        }


def read_style(system: Path, baseline: Path, features: Sequence[str], own: Sequence[str] = ()) -> StyleTable:
    """Measure the answers of two files.

    Args:
        system: file of answers.
        baseline: file of answers.
        features: of `STYLE_FEATURES`.
        own: further features: columns of both files that hold a number in every row.

    Raises:
        ValueError: a column is not there or holds something else, or has the name of a feature.
    """
    twice = sorted(set(own) & set(STYLE_FEATURES)) + [name for name in dict.fromkeys(own) if own.count(name) > 1]
    if twice:
        raise ValueError(
            f"`style_columns` must have other names than each other and than the features "
            f"{list(STYLE_FEATURES)}, got {twice}. Rename them."
        )
    counted = [name for name in dict.fromkeys(features) if name != LENGTH]
    ours, theirs = read_answers(system), read_answers(baseline)
    measured = [_measure(path, answers, counted, own) for path, answers in ((system, ours), (baseline, theirs))]
    number = [{answer.key: i for i, answer in enumerate(answers)} for answers in (ours, theirs)]
    pairs = match(ours, theirs).pairs
    at = [[number[0][pair.system.key] for pair in pairs], [number[1][pair.baseline.key] for pair in pairs]]
    both = np.stack([table[rows] for table, rows in zip(measured, at, strict=True)], axis=1)  # (pairs, 2, features)
    return StyleTable(
        names=(*dict.fromkeys(features), *own),
        columns={name: both[:, :, i] for i, name in enumerate([*counted, *own])},
        numbers={pair.system.key: i for i, pair in enumerate(pairs)},
    )


def _measure(path: Path, answers: Sequence[Answer], counted: Sequence[str], own: Sequence[str]) -> np.ndarray:
    """`(n, counted + own)` features of each answer."""
    table = np.empty((len(answers), len(counted) + len(own)))
    for i, answer in enumerate(answers):
        table[i, : len(counted)] = count_markdown(answer.answer, counted)
    for j, name in enumerate(own, len(counted)):
        values = [answer.extra.get(name) for answer in answers]
        wrong = [i for i, value in enumerate(values) if not _is_number(value)]
        if wrong:
            raise ValueError(
                f"`style_columns` must name columns with a finite number in every row, got none in `{name}` of "
                f"{len(wrong)} of {len(values)} rows of {path}, first {shown(values[wrong[0]])} in row "
                f"{wrong[0] + 1}. Fill it in, or leave the column out."
            )
        table[:, j] = values
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
