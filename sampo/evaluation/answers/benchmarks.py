"""Named benchmarks: their files of questions and answers in our form, and their official settings as data.

The settings are in `benchmarks/*.yaml`, each with its version, its source and where we differ. The files are the
user's: nothing is downloaded, and none of their texts comes with the package.

| benchmark | questions | answers of a model |
|---|---|---|
| `alpaca_eval_2` | `instruction`, `dataset` | `instruction`, `output`, `generator` |
| `arena_hard_v2` | `uid`, `category`, `prompt` | `uid`, `model`, `messages` |
| `mt_bench` | `question_id`, `category`, `turns`, `reference` or none | `question_id`, `model_id`, `choices` |
| `wildbench` | `session_id`, `conversation_input`, `checklist` | `session_id`, `output` (a list), `generator` |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...data.json_files import BrokenLine
from ...data.sources import open_source, pick_split
from ...io.schemas import named, read_yaml, typed
from .answers import Answer, Prompt, prompt_id
from .prompts import Question

SETTINGS = Path(__file__).parent / "benchmarks"
SECOND = "\n\n=== answer to the second question ===\n\n"  # between the two parts of an answer to both turns


@dataclass(frozen=True, kw_only=True)
class NamedBenchmark:
    """The official settings of a benchmark.

    Attributes:
        name: Of the benchmark here.
        version: Of this file; higher with every change.
        title: Its own name.
        source: Where the settings are from.
        licence: Of its code and questions.
        questions: Number of questions.
        generation: How answers are generated.
        baseline: Model by category, or `all`.
        judge: Model and settings.
        orders: In which orders answers are shown.
        score: What is made of the verdicts.
        template: Name of our template of its form.
        differs: Sentences: where we differ.
    """

    name: str
    version: int
    title: str
    source: str
    licence: str
    questions: int
    generation: str | dict[str, Any]
    baseline: dict[str, str]
    judge: dict[str, Any]
    orders: str
    score: str
    template: str
    differs: list[str]


def benchmark_names() -> list[str]:
    """All that the package knows."""
    return sorted(path.stem for path in SETTINGS.glob("*.yaml"))


def load_benchmark(name: str) -> NamedBenchmark:
    """The settings of one.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in benchmark_names():
        raise ValueError(f"`benchmark` must be one of {benchmark_names()}, got {name!r}.")
    found: NamedBenchmark = read_yaml(SETTINGS / f"{name}.yaml", NamedBenchmark)
    return found


# --- rows of the official files --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _AlpacaQuestion:
    instruction: str
    dataset: str = ""


@dataclass(frozen=True, kw_only=True)
class _AlpacaAnswer:
    instruction: str
    output: str
    generator: str


@dataclass(frozen=True, kw_only=True)
class _ArenaQuestion:
    uid: str
    category: str
    prompt: str


@dataclass(frozen=True, kw_only=True)
class _ArenaAnswer:
    uid: str
    model: str
    messages: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _TurnsQuestion:
    question_id: int | str
    category: str
    turns: list[str]
    reference: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class _TurnsAnswer:
    question_id: int | str
    model_id: str
    choices: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _WildQuestion:
    session_id: str
    conversation_input: list[dict[str, Any]]
    checklist: list[str]
    primary_tag: str = ""


@dataclass(frozen=True, kw_only=True)
class _WildAnswer:
    session_id: str
    output: list[str] | str
    generator: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question of a benchmark: what it is known by, its category, its turns and what a judge is given beside it."""

    key: str
    category: str
    prompts: list[Prompt]
    reference: str | None = None

    def question(self, prompt: Prompt) -> Question:
        """The prompt with what goes with it."""
        extra = {"id": self.key, "dataset": self.category}
        return Question(prompt, extra if self.reference is None else {**extra, "reference": self.reference})


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A model's answer to each turn of a question."""

    key: str
    model: str
    turns: list[str]


def _item_of_turns(row: _TurnsQuestion) -> Item:
    if not 1 <= len(row.turns) <= 2:
        raise ValueError(f"`turns` must be one or two questions, got {len(row.turns)}")
    reference = "\n\n".join(row.reference) if row.reference else None
    return Item(key=str(row.question_id), category=row.category, prompts=list(row.turns), reference=reference)


def _item_of_conversation(row: _WildQuestion) -> Item:
    messages = [{name: message.get(name) for name in ("role", "content")} for message in row.conversation_input]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("`conversation_input` must end with a message of the user")
    prompt: Prompt = messages
    checklist = "\n".join(f"- {line}" for line in row.checklist)
    return Item(key=row.session_id, category=row.primary_tag, prompts=[prompt], reference=checklist)


def _arena_answer(row: _ArenaAnswer) -> Answered:
    content = row.messages[-1].get("content") if row.messages else None
    text = content.get("answer") if isinstance(content, dict) else content
    if not isinstance(text, str):
        raise ValueError("`messages` must end with an answer")
    return Answered(key=row.uid, model=row.model, turns=[text])


def _turns_answer(row: _TurnsAnswer) -> Answered:
    turns = typed(list[str], row.choices[0].get("turns") if row.choices else None, field="choices[0].turns")
    return Answered(key=str(row.question_id), model=row.model_id, turns=turns)


def _wild_answer(row: _WildAnswer) -> Answered:
    outputs = [row.output] if isinstance(row.output, str) else row.output
    if not outputs:
        raise ValueError("`output` must hold an answer, got an empty list")
    return Answered(key=row.session_id, model=row.generator, turns=outputs[:1])


@dataclass(frozen=True)
class _Format:
    question: type
    item: Callable[[Any], Item]
    answer: type
    answered: Callable[[Any], Answered]


FORMATS_OF_BENCHMARKS = {
    "alpaca_eval_2": _Format(
        _AlpacaQuestion,
        lambda row: Item(key=prompt_id(row.instruction), category=row.dataset, prompts=[row.instruction]),
        _AlpacaAnswer,
        lambda row: Answered(key=prompt_id(row.instruction), model=row.generator, turns=[row.output]),
    ),
    "arena_hard_v2": _Format(
        _ArenaQuestion,
        lambda row: Item(key=row.uid, category=row.category, prompts=[row.prompt]),
        _ArenaAnswer,
        _arena_answer,
    ),
    "mt_bench": _Format(_TurnsQuestion, _item_of_turns, _TurnsAnswer, _turns_answer),
    "wildbench": _Format(_WildQuestion, _item_of_conversation, _WildAnswer, _wild_answer),
}


def _read(path: str | Path, kind: type, make: Callable[[Any], Any]) -> list[Any]:
    """The rows of a file; each must have the fields of `kind`, and may have others."""
    label, tables = open_source(str(path), None)
    table = pick_split(tables, None, label)
    names = [field.name for field in fields(kind)]
    found = []
    for number, cells in enumerate(table.cells(names), 1):
        with named(f"{path}, row {number}"):
            if isinstance(cells, BrokenLine):
                raise ValueError(f"it is {cells.kind}: {cells.position}")
            row = {name: cell for name, cell in zip(names, cells, strict=True) if cell is not None}
            found.append(make(typed(kind, row)))
    return found


def read_items(benchmark: str, path: str | Path, categories: Sequence[str] = ()) -> list[Item]:
    """The questions of a benchmark's own file.

    Args:
        benchmark: one of `benchmark_names`.
        path: JSONL, JSON or Parquet.
        categories: those to keep; all without any.

    Raises:
        ValueError: a row is no question of this benchmark, two have one id, or there is no such category.
    """
    form = FORMATS_OF_BENCHMARKS[load_benchmark(benchmark).name]
    items: list[Item] = _read(path, form.question, form.item)
    _check_keys(path, items)
    known = sorted({item.category for item in items})
    if strange := sorted(set(categories) - set(known)):
        raise ValueError(f"`categories` must be some of {known}, got {strange}.")
    return [item for item in items if not categories or item.category in categories]


def read_answered(benchmark: str, path: str | Path) -> list[Answered]:
    """A model's answers in a benchmark's own file.

    Raises:
        ValueError: a row is no answer, or two are to one question.
    """
    form = FORMATS_OF_BENCHMARKS[load_benchmark(benchmark).name]
    answers: list[Answered] = _read(path, form.answer, form.answered)
    _check_keys(path, answers)
    return answers


def _check_keys(path: str | Path, rows: Sequence[Any]) -> None:
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row.key in seen:
            raise ValueError(
                f"{path} must have each question once, got the same in rows {seen[row.key]} and {number}."
            )
        seen[row.key] = number


# --- turns -----------------------------------------------------------------------------------------------------------


def first_questions(items: Sequence[Item]) -> list[Question]:
    """The first turn of each question."""
    return [item.question(item.prompts[0]) for item in items]


def second_questions(items: Sequence[Item], first: Sequence[Answer]) -> list[Question]:
    """The second turn of each question that has one, after a model's own answer to the first.

    Raises:
        ValueError: an answer is missing.
    """
    by_prompt = {answer.prompt_id: answer.answer for answer in first}
    found = []
    for item in _two_turns(items):
        answer = _needed(by_prompt, prompt_id(item.prompts[0]), item, "first_turn")
        turns = (("user", item.prompts[0]), ("assistant", answer), ("user", item.prompts[1]))
        found.append(item.question([{"role": role, "content": content} for role, content in turns]))
    return found


def both_turns(items: Sequence[Item], first: Sequence[Answer], second: Sequence[Answer]) -> list[Answer]:
    """A model's answers to both turns as one answer to both questions, to be judged against another model's.

    Its tokens are those of both parts, and it was cut off if the second part was.

    Raises:
        ValueError: an answer is missing.
    """
    by_first = {answer.prompt_id: answer for answer in first}
    by_second = {answer.prompt_id: answer for answer in second}
    made = []
    for item, question in zip(_two_turns(items), second_questions(items, first), strict=True):
        one = by_first[prompt_id(item.prompts[0])]
        two = _needed(by_second, question.prompt_id, item, "answers")
        tokens = None if one.tokens is None or two.tokens is None else one.tokens + two.tokens
        more = {"model": two.model, "stop": two.stop, "tokens": tokens, "tokenizer": two.tokenizer}
        made.append(_answer_to_both(item, [one.answer, two.answer], **more))
    return made


def official_answers(items: Sequence[Item], answers: Sequence[Answered], *, turn: int = 1) -> list[Answer]:
    """A model's answers from a benchmark's own file.

    Args:
        items: the questions.
        answers: to all of them.
        turn: 1, or 2 for both turns as one answer.

    Raises:
        ValueError: an answer is missing.
    """
    by_key = {answer.key: answer for answer in answers}
    made = []
    for item in _two_turns(items) if turn == 2 else items:
        answer = _needed(by_key, item.key, item, "answers")
        if len(answer.turns) < turn:
            raise ValueError(f"`answers` must have {turn} turns of question {item.key}, got {len(answer.turns)}.")
        if turn == 2:
            made.append(_answer_to_both(item, answer.turns[:2], model=answer.model))
        else:
            question = item.question(item.prompts[0])
            extra = question.extra
            made.append(Answer(prompt=question.prompt, answer=answer.turns[0], model=answer.model, extra=extra))
    return made


def _answer_to_both(item: Item, parts: Sequence[str], **more: Any) -> Answer:
    asked: Prompt = [{"role": "user", "content": prompt} for prompt in item.prompts]
    return Answer(prompt=asked, answer=SECOND.join(parts), extra=item.question(asked).extra, **more)


def _two_turns(items: Sequence[Item]) -> list[Item]:
    found = [item for item in items if len(item.prompts) == 2]
    if not found:
        raise ValueError("The questions must have two turns for this, got one each. Only those of `mt_bench` do.")
    return found


def _needed(answers: Mapping[str, Any], key: str, item: Item, option: str) -> Any:
    if key not in answers:
        raise ValueError(f"`{option}` must answer every question, got no answer to question {item.key}.")
    return answers[key]
