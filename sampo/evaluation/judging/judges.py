"""Judges: (prompt, answer A, answer B) → preference for A in [0, 1], or a failure with its reason.

This module has the protocol, the join of two files of answers, both orders, and the control with an empty answer. The
judges: `endpoint_judge` asks a model behind a URL, `model_judges` asks reward models and policies,
`rule_judges` follow a rule, and `human_judge` reads annotations.

A failure is never a tie: it has no preference, and is counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from ...io.files import replacing
from ...io.journal import each_row
from ...io.progress import Progress
from ...io.schemas import named, typed
from ..answers.answers import Answer, prompt_text

Score = float | str  # of one answer: a finite number, or the reason of a failure in one word
ORDERS = ("ab", "ba")  # ab: the system's answer is A; ba: it is B
ONCE = "shown in one order only"  # `detail` of a preference for an order that was not shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The input of a judge; A is shown first."""

    prompt: Any
    prompt_id: str
    answer_a: str
    answer_b: str
    reference: str | None = None

    @property
    def swapped(self) -> "Comparison":
        """The same in the other order."""
        return replace(self, answer_a=self.answer_b, answer_b=self.answer_a)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A preference for answer A in [0, 1], or None with a one-word reason and details."""

    preference: float | None
    failure: str | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.preference is None) == (self.failure is None):
            raise ValueError("A verdict must have either a `preference` or a `failure`, got both or none.")
        if self.preference is not None and not 0 <= self.preference <= 1:  # NaN too
            raise ValueError(f"`preference` must be from 0 to 1, got {self.preference}.")


class Judge(Protocol):
    """A judge; `about` are the settings that its verdicts depend on."""

    name: str

    @property
    def about(self) -> Mapping[str, Any]:
        """The settings."""
        ...

    def judge(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict for each comparison, in their order."""
        ...


class AnswerScorer(Judge, Protocol):
    """A judge that scores each answer on its own; a preference is made of two scores."""

    def score(self, answers: Sequence[Answer], progress: Progress | None = None) -> list[Score]:
        """A score for each answer, in their order; higher is better."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """The answers of a system and of a baseline to one prompt."""

    system: Answer
    baseline: Answer

    def comparison(self, order: str) -> Comparison:
        """What is shown in that order."""
        reference = reference_of(self.system)
        shown = Comparison(
            prompt=self.system.prompt,
            prompt_id=self.system.prompt_id,
            answer_a=self.system.answer,
            answer_b=self.baseline.answer,
            reference=reference_of(self.baseline) if reference is None else reference,
        )
        return shown if order == "ab" else shown.swapped


def reference_of(answer: Answer) -> str | None:
    """The right answer to the prompt, where the file has one."""
    reference = answer.extra.get("reference")
    return None if reference is None else str(reference)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A verdict on one pair in one order, with the lengths: a row of the file that statistics are made from.

    Attributes:
        prompt_id: Of the prompt; the unit of all statistics.
        sample: Of the system's answer.
        order: `ab` if the system's answer was shown first, else `ba`.
        preference: For the system, in [0, 1]; None if the judge failed.
        failure: Why, in one word; None if it did not.
        detail: Why, for people.
        judge: Name of the judge.
        system_tokens, system_words, system_chars, system_stop: Of the system's answer; tokens as in its file.
        baseline_tokens, baseline_words, baseline_chars, baseline_stop: Of the baseline's.
    """

    prompt_id: str
    sample: int
    order: str
    preference: float | None
    failure: str | None
    detail: str
    judge: str
    system_tokens: int | None
    system_words: int
    system_chars: int
    system_stop: str
    baseline_tokens: int | None
    baseline_words: int
    baseline_chars: int
    baseline_stop: str

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"`order` must be one of {list(ORDERS)}, got {self.order!r}")
        Verdict(self.preference, self.failure)


@dataclass(frozen=True)
class Matching:
    """Pairs with a prompt in common, and how many answers of each file have no partner."""

    pairs: list[AnswerPair]
    system_only: int
    baseline_only: int


def match(system: Sequence[Answer], baseline: Sequence[Answer]) -> Matching:
    """Join by prompt and sample; a baseline with one answer to a prompt is compared with each of the system's."""
    by_key = {answer.key: answer for answer in baseline}
    samples = Counter(answer.prompt_id for answer in baseline)
    only = {answer.prompt_id: answer.key for answer in baseline if samples[answer.prompt_id] == 1}
    pairs, used = [], set()
    for answer in system:
        key = answer.key if answer.key in by_key else only.get(answer.prompt_id, answer.key)
        if key in by_key:
            pairs.append(AnswerPair(answer, by_key[key]))
            used.add(key)
    return Matching(pairs, len(system) - len(pairs), len(baseline) - len(used))


def nearly_matched(system: Sequence[Answer], baseline: Sequence[Answer]) -> int:
    """How many prompts have no partner, but would have one if blanks around prompts did not count."""
    ids = [{answer.prompt_id for answer in answers} for answers in (system, baseline)]
    texts = [
        {prompt_text(a.prompt).strip(): a.prompt_id for a in answers if a.prompt_id not in others}
        for answers, others in ((system, ids[1]), (baseline, ids[0]))
    ]
    return len(set(texts[0]) & set(texts[1]))


def draw_pairs(pairs: Sequence[AnswerPair], n: int | None, seed: int = 0) -> list[AnswerPair]:
    """The pairs of `n` prompts, drawn by a hash: a larger `n` adds prompts, and kept replies remain usable."""
    if n is None:
        return list(pairs)
    kept = drawn_prompts((pair.system.prompt_id for pair in pairs), n, seed)
    return [pair for pair in pairs if pair.system.prompt_id in kept]


def drawn_prompts(prompt_ids: Iterable[str], n: int, seed: int) -> set[str]:
    """The `n` prompts that come first by a hash of the seed and their id.

    Raises:
        ValueError: there are fewer, or none is asked for.
    """
    prompts = set(prompt_ids)
    if not 1 <= n <= len(prompts):
        raise ValueError(f"`n` must be at least 1 and at most the number of prompts, got {n} for {len(prompts)}.")
    return set(sorted(prompts, key=lambda prompt_id: hashlib.sha256(f"{seed} {prompt_id}".encode()).hexdigest())[:n])


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch without rows.

    Raises:
        ValueError: it is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")


def judge_pairs(judge: Judge, pairs: Sequence[AnswerPair], progress: Progress | None = None) -> list[Judgement]:
    """Both orders of each pair, next to each other."""
    shown = [(pair, order) for pair in pairs for order in ORDERS]
    verdicts = judge.judge([pair.comparison(order) for pair, order in shown], progress)
    return [_judgement(judge.name, *what, verdict) for what, verdict in zip(shown, verdicts, strict=True)]


def _judgement(judge: str, pair: AnswerPair, order: str, verdict: Verdict) -> Judgement:
    p = verdict.preference
    lengths = {
        f"{whose}_{measure}": getattr(answer, measure)
        for whose, answer in (("system", pair.system), ("baseline", pair.baseline))
        for measure in ("tokens", "words", "chars", "stop")
    }
    return Judgement(
        prompt_id=pair.system.prompt_id,
        sample=pair.system.sample,
        order=order,
        preference=p if p is None or order == "ab" else 1 - p,
        failure=verdict.failure,
        detail=verdict.detail,
        judge=judge,
        **lengths,
    )


def write_judgements(path: str | Path, judgements: Iterable[Judgement]) -> None:
    """Write one row per prompt, sample and order; the write is atomic."""
    names = [each.name for each in fields(Judgement)]
    with replacing(Path(path)) as file:
        for row in judgements:
            file.write(f"{json.dumps({name: getattr(row, name) for name in names})}\n".encode())


def read_judgements(path: str | Path) -> list[Judgement]:
    """The rows of such a file.

    Raises:
        WrongFile: a row is no judgement.
    """
    rows = []
    texts: dict[str, str] = {}  # each different text once in memory: ids, judge and stop reasons repeat
    for number, row in enumerate(each_row(path), 1):
        with named(path, line=number):
            shared = {name: texts.setdefault(x, x) if type(x) is str else x for name, x in row.items()}
            rows.append(typed(Judgement, shared, complete=True))
    return rows


def empty_answers(pairs: Sequence[AnswerPair], n: int | None = None, seed: int = 0) -> list[AnswerPair]:
    """The control of every judge: an empty answer instead of the system's, on `n` prompts (on all without it).

    It should win against no answer but another empty one. The control detects a judge that prefers an empty answer,
    and a parser that reads a verdict from nothing.
    """
    if n == 0 or not pairs:
        return []
    if n is not None:
        n = min(n, len({pair.system.prompt_id for pair in pairs}))
    return [
        AnswerPair(replace(pair.system, answer="", tokens=0), pair.baseline) for pair in draw_pairs(pairs, n, seed)
    ]
