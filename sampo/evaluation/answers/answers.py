"""Answers of models: one JSON record each, with all that it depends on; to and from AlpacaEval's format.

A prompt is a string or a list of messages. Its id is a hash of the conversation, in which a string is one message of
the user; so answers of different origins can be matched.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...data.issues import KINDS
from ...data.json_files import json_rows
from ...data.layouts import without_nulls
from ...io.files import write_atomic
from ...io.schemas import named, typed

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]

STOPS = ("eos", "length", "unknown")
# names that other files have for the two required columns
PROMPT_NAMES = ("prompt", "instruction")
ANSWER_NAMES = ("answer", "output", "response", "completion")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer of one model to one prompt.

    Attributes:
        prompt: String or messages.
        answer: The text, without end token.
        prompt_id: Hash of the prompt; filled in.
        sample: Number of the answer, from 0, where a prompt has several.
        tokens: Tokens generated, the end token included; None if not known.
        tokenizer: Whose tokens these are: a name, or a hash of the tokenizer.
        stop: `eos`: the model ended the answer; `length`: it was cut off, so its length does not show how concise the
            model is; `unknown`.
        model: Name or folder.
        weights: Revision or fingerprint of the weights.
        backend: What generated it.
        dtype: Type of the weights.
        sampling: `temperature`, `top_p`, `top_k`, `max_tokens`.
        seed: Of the run; None for greedy decoding.
        template: Hash of the chat template; None where the prompt was given as it is.
        extra: `id`, `dataset` and `reference` of the prompt, as far as it has them, and what else a file holds.
    """

    prompt: Prompt
    answer: str
    prompt_id: str = ""
    sample: int = 0
    tokens: int | None = None
    tokenizer: str | None = None
    stop: str = "unknown"
    model: str = ""
    weights: str | None = None
    backend: str | None = None
    dtype: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    template: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        right = prompt_id(self.prompt)
        if self.prompt_id not in ("", right):
            raise ValueError(
                f"`prompt_id` must be the hash of the prompt, {right}, got {self.prompt_id!r}. Leave it out, and it "
                "is filled in."
            )
        object.__setattr__(self, "prompt_id", right)
        if self.stop not in STOPS:
            raise ValueError(f"`stop` must be one of {list(STOPS)}, got {self.stop!r}.")
        if self.tokens is not None and self.tokens < 0:
            raise ValueError(f"`tokens` must not be negative, got {self.tokens}.")

    @property
    def words(self) -> int:
        """Parts between blanks."""
        return len(self.answer.split())

    @property
    def chars(self) -> int:
        """Characters (code points)."""
        return len(self.answer)

    @property
    def key(self) -> tuple[str, int]:
        """Prompt and sample: unique among the answers of one model."""
        return self.prompt_id, self.sample


_FIELDS = frozenset(each.name for each in fields(Answer))


def prompt_id(prompt: Prompt) -> str:
    """Hash a conversation to sixteen hex digits."""
    if isinstance(prompt, str):
        return _id_of_text(prompt)
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and "role" in m for m in prompt):
        raise ValueError(
            f'`prompt` must be a string or a list of messages {{"role": …, "content": …}}, got {str(prompt)[:80]!r}.'
        )
    return _id_of_messages(prompt)


@lru_cache(maxsize=4096)  # samples of one prompt stand next to each other, and share one id in memory
def _id_of_text(text: str) -> str:
    return _id_of_messages([{"role": "user", "content": text}])


def _id_of_messages(messages: list[dict[str, Any]]) -> str:
    text = json.dumps([without_nulls(message) for message in messages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_text(prompt: Prompt) -> str:
    """The prompt for a reader: itself, or the turns of the conversation, with their speakers if there are several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return _content_text(prompt[0].get("content"))
    return "\n\n".join(f"{m['role'].capitalize()}: {_content_text(m.get('content'))}" for m in prompt)


def _content_text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(block.get("text", "") for block in content if isinstance(block, dict))
    return content or ""


def read_answers(path: str | Path) -> list[Answer]:
    """Answers from our JSONL, from any JSONL with a prompt and an answer, or from AlpacaEval's JSON list.

    `json_files` describes the accepted formats. Unknown fields are kept in `extra`. An unfinished last
    line is omitted, with a warning.

    Raises:
        ValueError: a row is no answer, or two are of the same prompt, sample and model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` must be a file of answers, and is not there. Check the spelling.")
    answers: list[Answer] = []
    seen: dict[tuple[str, int], int] = {}
    for number, row in enumerate(_rows(path), 1):
        with named(f"{path}, row {number}"):
            answer = _answer_of(row)
        if answer.key in seen:
            raise ValueError(
                f"{path} must hold one answer per prompt and `sample`, got rows {seen[answer.key]} and {number} with "
                "the same. Number the samples, or take one out."
            )
        seen[answer.key] = number
        answers.append(answer)
    return answers


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.stat().st_size:  # of a run that has not written any answer yet
        return
    # A server may cut an answer inside a surrogate pair, and `generate` keeps it as it came.
    for row in json_rows(path, lone_surrogates=True):
        if isinstance(row, dict):
            yield row
        elif row.cut_off:
            logger.warning("%s: omitted an unfinished last line: %s", path, row.position)
        else:
            what = KINDS[row.kind][0].format(are="is", have="has")
            raise ValueError(
                f"Each row of {path} must be a JSON object with a prompt and an answer, got one that {what}: "
                f"{row.position}. Restore it, or delete it."
            )


def _answer_of(row: dict[str, Any]) -> Answer:
    row = dict(typed(dict[str, Any], row))
    for ours, names in (("prompt", PROMPT_NAMES), ("answer", ANSWER_NAMES)):
        name = next((name for name in names if name in row), None)
        if name is None:
            raise ValueError(f"an answer must have one of {list(names)}, got {sorted(row)}.")
        row[ours] = row.pop(name)
    if "generator" in row and "model" not in row:
        row["model"] = row.pop("generator")
    extra = typed(dict[str, Any], row.pop("extra", {}), field="extra")
    extra |= {key: row.pop(key) for key in sorted(row.keys() - _FIELDS)}
    return typed(Answer, {**row, "extra": extra})


def as_row(answer: Answer) -> dict[str, Any]:
    """The answer as a row of a file."""
    return asdict(answer)


def write_answers(path: str | Path, answers: Iterable[Answer]) -> None:
    """Write answers as JSONL; the write is atomic."""
    write_atomic(Path(path), "".join(json.dumps(as_row(answer)) + "\n" for answer in answers))


def write_alpaca_eval(path: str | Path, answers: Iterable[Answer]) -> None:
    """Write `model_outputs` for the `alpaca_eval` package: a list of `instruction`, `output`, `generator`, `dataset`.

    AlpacaEval looks difficulty up by row number, so keep the order of its own file.

    Raises:
        ValueError: a prompt is a conversation, which that format cannot hold, or has several answers.
    """
    answers = list(answers)
    turns = [
        a.prompt_id for a in answers if not isinstance(a.prompt, str) and [m["role"] for m in a.prompt] != ["user"]
    ]
    if turns or any(answer.sample for answer in answers):
        raise ValueError(
            "AlpacaEval's format must have one instruction and one output a row, got "
            f"{len(turns)} prompts of several messages and {sum(a.sample > 0 for a in answers)} further samples. "
            "Export answers to single prompts."
        )
    rows = [
        {
            **({"dataset": answer.extra["dataset"]} if "dataset" in answer.extra else {}),
            "instruction": prompt_text(answer.prompt),
            "output": answer.answer,
            "generator": answer.model,
        }
        for answer in answers
    ]
    write_atomic(Path(path), json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
