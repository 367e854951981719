"""Pairs that people have labelled, to judge a judge with: `chosen` and `rejected`, or two responses and their labels.

The pair that a judge gets has the response that people prefer as its *system*, so a preference of 1 agrees with them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...data.layouts import visible_text
from ..answers.answers import Answer, prompt_id
from .judges import AnswerPair

LABEL_SIDES = {"a": 1.0, "tie": 0.5, "b": 0.0}  # what a label says of the first response
GROUP_COLUMN = "subset"  # groups the pairs unless another column is named
MAX_GROUP_VALUES = 100  # of one column


@dataclass(frozen=True)
class LabelledPair:
    """A pair with what people say.

    Attributes:
        pair: its `system` is the response with more votes; where there are as many for both, the first.
        labels: of each annotator for the `system`: 1, ½ for a tie, 0; None where there is none.
        groups: column -> the pair's value.
    """

    pair: AnswerPair
    labels: tuple[float | None, ...] = (1.0,)
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether people prefer neither."""
        given = [label for label in self.labels if label is not None]
        return sum(given) * 2 == len(given)


@dataclass(frozen=True, kw_only=True)
class LabelledPairs:
    """The pairs of a file.

    Attributes:
        pairs: those with a label.
        unlabelled: rows without one, which are omitted.
        annotators: columns of the labels; none for `chosen` and `rejected`.
    """

    pairs: list[LabelledPair]
    unlabelled: int = 0
    annotators: tuple[str, ...] = ()


def label_meanings(arguments: Sequence[str]) -> dict[str, float]:
    """Parse `["A=1", "B=2", "tie=0"]`: what a value says of the first response; several values per side may be given.

    Raises:
        ValueError: an argument has another form.
    """
    found = {}
    for argument in arguments:
        side, equals, value = argument.partition("=")
        if side.strip().lower() not in LABEL_SIDES or not equals or not value.strip():
            raise ValueError(f"`label_values` must be given as A=VALUE, B=VALUE or tie=VALUE, got {argument!r}.")
        found[value.strip()] = LABEL_SIDES[side.strip().lower()]
    return found


def read_labelled(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    responses: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    label_values: Mapping[str, float] | None = None,
    by: Sequence[str] | None = None,
) -> LabelledPairs:
    """Read pairs in any form that training data may have (JSON, JSONL, Parquet, `.gz`; texts or messages).

    Args:
        path: the file.
        columns: names of the columns in the file, as in `load_preferences`.
        responses: the columns of the first and of the second response, for data with `labels`.
        labels: columns of labels, one per annotator: A (the first response), B, or tie; empty for none. Without it
            people prefer `chosen`.
        label_values: of other labels, from `label_meanings`.
        by: columns that group the pairs; by default `subset`, if there is one.

    Raises:
        ValueError: rows are not such pairs, or a label has no meaning.
    """
    from ...data.load import load_preferences

    columns = dict(columns or {})
    if bool(responses) != bool(labels):
        given, other = ("responses", "labels") if responses else ("labels", "responses")
        raise ValueError(f"`responses` and `labels` must be given together, got {given} without {other}.")
    if responses:
        columns |= {"chosen": responses[0], "rejected": responses[1]}
    data = load_preferences(path, columns=columns)
    missing = [name for name in (*labels, *(by or ())) if name not in data.column_names]
    if missing:
        raise ValueError(f"{path} must have the columns {missing} of `labels` and `by`, got {data.column_names}.")
    by = [GROUP_COLUMN] * (GROUP_COLUMN in data.column_names) if by is None else by
    known = _labels(data, labels, label_values or {}, path)
    found = LabelledPairs(
        pairs=list(_pairs(data, known, by)),
        unlabelled=sum(all(label is None for label in row) for row in known),
        annotators=tuple(labels),
    )
    if not found.pairs:
        raise ValueError(f"{path} must have a label in at least one row, got none in {len(known)}.")
    for name in by:
        if (values := len({pair.groups[name] for pair in found.pairs})) > MAX_GROUP_VALUES:
            raise ValueError(
                f"`by` must name columns with at most {MAX_GROUP_VALUES} values, got {values} in `{name}`."
            )
    return found


def _labels(
    data: Any, names: Sequence[str], meanings: Mapping[str, float], path: str | Path
) -> list[tuple[float | None, ...]]:
    """The labels of each row, for the first response."""
    if not names:
        return [(1.0,)] * len(data)
    unknown: Counter[str] = Counter()
    first: dict[str, tuple[str, int]] = {}
    read: list[list[float | None]] = []
    for name in names:
        read.append([])
        for number, value in enumerate(data[name], 1):
            text = _label_text(value)
            side = meanings.get(text, LABEL_SIDES.get(text.lower()))
            if side is None and text:
                unknown[text] += 1
                first.setdefault(text, (name, number))
            read[-1].append(side)
    if unknown:
        shown = [text for text, _ in unknown.most_common(5)]
        name, number = min(first.values(), key=lambda where: where[1])
        raise ValueError(
            f"{path}: a label must be A, B or tie, got {shown} in {unknown.total():,} cells, first in row {number} of "
            f"`{name}`. Say what they mean with `label_values`, such as A=1 B=2 tie=0."
        )
    return list(zip(*read, strict=True))


def _label_text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _pairs(data: Any, labels: Sequence[tuple[float | None, ...]], by: Sequence[str]) -> Iterator[LabelledPair]:
    seen: Counter[str] = Counter()
    for number, (row, given) in enumerate(zip(data, labels, strict=True), 1):
        known = [label for label in given if label is not None]
        if not known:
            continue
        first, second = (_response_text(row[name], name, number) for name in ("chosen", "rejected"))
        sample = seen[prompt_id(row["prompt"])]
        seen[prompt_id(row["prompt"])] += 1
        answers = [Answer(prompt=row["prompt"], answer=text, sample=sample) for text in (first, second)]
        if 2 * sum(known) < len(known):
            answers.reverse()
            given = tuple(None if label is None else 1 - label for label in given)
        reference = row.get("reference")
        if reference is not None:
            answers = [replace(answer, extra={"reference": reference}) for answer in answers]
        yield LabelledPair(AnswerPair(*answers), given, {name: str(row[name]) for name in by})


def _response_text(response: Any, column: str, number: int) -> str:
    if isinstance(response, list) and len(response) != 1:
        raise ValueError(
            f"`{column}` must be one message, since a judge compares two texts, got {len(response)} in row {number}."
        )
    return visible_text(response)
