r"""Prompts to answer, from files: JSONL, JSON or Parquet (also `.gz`), folders and hub ids, as for preference data.

| columns | prompt |
|---|---|
| `prompt` | itself, a string or messages; a string `\n\nHuman: … \n\nAssistant:` becomes messages |
| `instruction` | AlpacaEval |
| `messages` | all before the last answer |
| `conversations` | all before the last answer, ShareGPT's messages too |
| `chosen`, `rejected` | preference pairs, such as HH-RLHF transcripts: the shared beginning, as in training |

A column `system` or `input` is used as in preference data (`source_columns`): two rows that differ there alone are two
prompts.
`id`, `dataset` and `reference` (the right answer, for judges that need one) go with it.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...data.columns import TableRows, pair_rows
from ...data.issues import ON_BAD_ROWS, check_choice
from ...data.json_files import BrokenLine
from ...data.layouts import EXTRA_COLUMNS, PAIR_COLUMNS, READERS, detect_layout, is_blank_text, without_nulls
from ...data.sources import SourceTable, open_source, pick_split
from .answers import Prompt, prompt_id, prompt_text

logger = logging.getLogger(__name__)

KEPT = ("id", "dataset", "reference")
PROMPT_COLUMNS = ("prompt", "instruction", "messages", "conversations", "chosen")


@dataclass(frozen=True)
class Question:
    """A prompt to answer; `extra` holds its `id`, `dataset` and `reference`, as far as the file has them."""

    prompt: Prompt
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_id(self) -> str:
        """Hash of the prompt."""
        return prompt_id(self.prompt)


class _Bad(ValueError):
    """A row without a prompt."""


def load_prompts(
    source: str | Path,
    *,
    split: str | None = None,
    name: str | None = None,
    on_bad_rows: str = "error",
    columns: Mapping[str, str] | None = None,
    text_as_messages: bool = False,
) -> list[Question]:
    """Load the prompts of a file in its order, each once.

    Args:
        source: File, folder or hub id.
        split: Split, with a slice if wanted: `test[:100]`.
        name: Configuration of a hub data set.
        on_bad_rows: `error`, or `drop` rows without a usable prompt, with their number in the log.
        columns: Names of the columns in the source, as `{"prompt": "question"}`; of `system` and `input` too.
        text_as_messages: Make a user's message of each text, without the blanks at its ends, as for preference data.

    Raises:
        ValueError: no column has prompts, or rows are bad.
    """
    check_choice("on_bad_rows", on_bad_rows, ON_BAD_ROWS)
    label, tables = open_source(source, name)
    table = pick_split(tables, split, label)
    if unused := [column for column in EXTRA_COLUMNS if column in table.columns]:
        logger.warning("%s: the columns %s take no effect in generation, only in training", label, unused)
    questions: dict[str, Question] = {}
    bad: Counter[str] = Counter()
    first_bad: list[int] = []
    total = 0
    for total, found in enumerate(_questions(table, label, dict(columns or {})), 1):
        if isinstance(found, str):
            bad[found] += 1
            first_bad += [total - 1] if len(first_bad) < 10 else []
        else:
            found = _as_message(found) if text_as_messages else found
            questions.setdefault(found.prompt_id, found)
    if bad:
        text = f"{sum(bad.values()):,} of {total:,} rows ({', '.join(f'{n:,} {why}' for why, n in bad.items())})"
        if on_bad_rows == "error":
            raise ValueError(
                f"Each row of {label} must have a prompt, got {text} without, first at rows {first_bad}. Correct "
                "them, or set `on_bad_rows` to `drop`."
            )
        logger.warning("%s: dropped %s", label, text)
    again = total - sum(bad.values()) - len(questions)
    if again:
        logger.info("%s: %s rows repeat a prompt; %s different ones", label, f"{again:,}", f"{len(questions):,}")
    if not questions:
        raise ValueError(f"{label} must have at least one prompt, got none in {total} rows.")
    return list(questions.values())


def _as_message(question: Question) -> Question:
    if not isinstance(question.prompt, str):
        return question
    return replace(question, prompt=[{"role": "user", "content": question.prompt.strip()}])


def check_prompts(
    questions: list[Question], find_issue: Callable[[Prompt], str | None], on_bad_rows: str = "error"
) -> list[Question]:
    """Keep the prompts that a chat template can render; called before a model is loaded.

    Args:
        questions: the prompts.
        find_issue: why one cannot be asked, or None (`Texts.find_issue`).
        on_bad_rows: `error`, or `drop` the others, with their number in the log.

    Raises:
        ValueError: some cannot be asked with `error`, or none can.
    """
    issues = {number: why for number, each in enumerate(questions) if (why := find_issue(each.prompt))}
    if not issues:
        return questions
    first, why = next(iter(issues.items()))
    begin = prompt_text(questions[first].prompt)[:60]
    text = f"{len(issues):,} of {len(questions):,} prompts, the first {begin!r} {why}"
    if on_bad_rows == "error" or len(issues) == len(questions):
        raise ValueError(
            f"The chat template must render all messages completely, got issues in {text}. Take another template "
            "(`chat_template`), correct the prompts, or set `on_bad_rows` to `drop`."
        )
    logger.warning("dropped %s", text)
    return [question for number, question in enumerate(questions) if number not in issues]


def _questions(table: SourceTable, label: str, columns: dict[str, str]) -> Iterator[Question | str]:
    """Each row's prompt, or why it has none."""
    column = next((name for name in PROMPT_COLUMNS if name in table.columns), None)
    if "prompt" not in columns and (column is None or (column == "chosen" and "rejected" not in table.columns)):
        raise ValueError(
            f"Prompts must stand in a column `prompt`, `instruction`, `messages` or `conversations`, or be shared by "
            f"`chosen` and `rejected`; {label} has {table.columns}. Name it with `columns` prompt=NAME."
        )
    if column is not None and column != "chosen":
        columns = {"prompt": column, **columns}
    rows = pair_rows(table, columns, label)
    wanted = ["prompt"]
    read: Callable[..., Prompt] = _before_answer if column in ("messages", "conversations") else _prompt
    if column == "chosen" or _is_in_responses(rows):
        wanted, read = list(PAIR_COLUMNS), _reader_of_pairs(rows)
    for cells in rows.cells([*wanted, *KEPT]):
        if isinstance(cells, BrokenLine):
            yield f"broken: {cells.kind}"
            continue
        try:
            prompt = read(*cells[: len(wanted)])
            prompt_id(prompt)
            if not isinstance(prompt, str):  # Arrow fills the keys that a message lacks with nulls
                prompt = [without_nulls(message) for message in prompt]
        except _Bad as error:
            yield str(error)
            continue
        except ValueError:
            yield "of the wrong type"
            continue
        rest = zip(KEPT, cells[len(wanted) :], strict=True)
        yield Question(prompt, {key: value for key, value in rest if value is not None})


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        if is_blank_text(value):
            raise _Bad("empty")
        return _transcript(value) if value.lstrip().startswith("Human:") and value.startswith("\n") else value
    if not value:
        raise _Bad("empty")
    return value


def _transcript(text: str) -> Prompt:
    """Read a transcript that ends before an answer, with two made-up answers, by the reader of pairs."""
    text = text.rstrip().removesuffix("Assistant:").rstrip()
    responses = [f"{text}\n\nAssistant: {answer}" for answer in ("a", "b")]
    (prompt, *_), issues = READERS["transcripts"](None, *responses)
    if issues:
        raise _Bad("not a complete transcript")
    return prompt


def _before_answer(messages: Any) -> Prompt:
    if not isinstance(messages, list) or not messages:
        raise _Bad("empty")
    prompt_id(messages)
    kept = list(itertools.dropwhile(lambda message: message["role"] == "assistant", reversed(messages)))[::-1]
    if not kept:
        raise _Bad("with answers only")
    return kept


def _layout(rows: TableRows) -> str:
    cells = rows.cells(list(PAIR_COLUMNS))
    head = [row for row in itertools.islice(cells, 1000) if not isinstance(row, BrokenLine)]
    return detect_layout(rows.columns, head)


def _is_in_responses(rows: TableRows) -> bool:
    """Whether a text `prompt` stands beside complete conversations, which may also have a system message."""
    return {"chosen", "rejected"} <= set(rows.columns) and _layout(rows) == "text_beside_messages"


def _reader_of_pairs(rows: TableRows) -> Callable[[Any, Any, Any], Prompt]:
    reader = READERS[_layout(rows)]

    def read(given: Any, chosen: Any, rejected: Any) -> Prompt:
        (prompt, *_), issues = reader(given, chosen, rejected)
        # two equal answers, or an empty one, make a pair bad and not its prompt; but then the reader has stopped early
        if issues or not prompt:
            raise _Bad(f"{issues[0][0]} in `{issues[0][1]}`" if issues else "without a prompt")
        return prompt

    return read
