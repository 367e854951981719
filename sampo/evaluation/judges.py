"""Judges: (prompt, answer A, answer B) → preference for A in [0, 1], or a failure with its reason.

Here are the protocol, the joining of two files of answers, both orders, and the controls. The judges themselves:
`endpoint_judge` asks a model behind a URL, `model_judges` asks reward models and policies, `rule_judges` and
`human_judge` say what they are.

A failure is never a tie: it has no preference, and is counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .answers import Answer
from .journal import read_rows, write_whole

ORDERS = ("ab", "ba")  # ab: the system's answer is A; ba: it is B
Progress = Callable[[int, int], None]  # (done, of)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a judge sees, in this order."""

    prompt: Any
    prompt_id: str
    answer_a: str
    answer_b: str
    reference: str | None = None

    @property
    def swapped(self) -> "Comparison":
        """The same in the other order."""
        return replace(self, answer_a=self.answer_b, answer_b=self.answer_a)


@dataclass(frozen=True)
class Verdict:
    """A preference for answer A in [0, 1], or None and why there is none: one word, and details for people."""

    preference: float | None
    failure: str | None = None
    detail: str = ""

    def __post_init__(self):
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


@dataclass(frozen=True)
class Pair:
    """The answers of a system and of a baseline to one prompt."""

    system: Answer
    baseline: Answer

    def comparison(self, order: str) -> Comparison:
        """What is shown in that order."""
        reference = self.system.extra.get("reference", self.baseline.extra.get("reference"))
        shown = Comparison(
            prompt=self.system.prompt,
            prompt_id=self.system.prompt_id,
            answer_a=self.system.answer,
            answer_b=self.baseline.answer,
            reference=None if reference is None else str(reference),
        )
        return shown if order == "ab" else shown.swapped


@dataclass(frozen=True, kw_only=True)
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
        system_tokens, system_words, system_chars, system_stop: Of the system's answer; tokens as its file says.
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


@dataclass(frozen=True)
class Matching:
    """Pairs with a prompt in common, and how many answers have no partner on the other side."""

    pairs: list[Pair]
    system_only: int
    baseline_only: int


def match(system: Sequence[Answer], baseline: Sequence[Answer]) -> Matching:
    """Join by prompt and sample; a baseline with one answer to a prompt is compared with each of the system's."""
    by_key = {answer.key: answer for answer in baseline}
    samples = Counter(answer.prompt_id for answer in baseline)
    pairs, used = [], set()
    for answer in system:
        key = answer.key
        if key not in by_key and samples[answer.prompt_id] == 1:
            key = next(other for other in by_key if other[0] == answer.prompt_id)
        if key in by_key:
            pairs.append(Pair(answer, by_key[key]))
            used.add(key)
    return Matching(pairs, len(system) - len(pairs), len(baseline) - len(used))


def draw(pairs: Sequence[Pair], n: int | None, seed: int = 0) -> list[Pair]:
    """The pairs of `n` prompts, drawn by a hash: a larger `n` adds some, and kept replies still serve."""
    if n is None:
        return list(pairs)

    def rank(prompt_id: str) -> str:
        return hashlib.sha256(f"{seed} {prompt_id}".encode()).hexdigest()

    kept = set(sorted({pair.system.prompt_id for pair in pairs}, key=rank)[:n])
    return [pair for pair in pairs if pair.system.prompt_id in kept]


def judge_pairs(judge: Judge, pairs: Sequence[Pair], progress: Progress | None = None) -> list[Judgement]:
    """Both orders of each pair, next to each other."""
    shown = [(pair, order) for pair in pairs for order in ORDERS]
    verdicts = judge.judge([pair.comparison(order) for pair, order in shown], progress)
    return [_judgement(judge.name, *what, verdict) for what, verdict in zip(shown, verdicts, strict=True)]


def _judgement(judge: str, pair: Pair, order: str, verdict: Verdict) -> Judgement:
    p = verdict.preference
    lengths = {
        f"{side}_{measure}": getattr(answer, measure)
        for side, answer in (("system", pair.system), ("baseline", pair.baseline))
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
    """One row per prompt, sample and order; the file is whole or absent."""
    write_whole(Path(path), "".join(json.dumps(asdict(row)) + "\n" for row in judgements))


def read_judgements(path: str | Path) -> list[Judgement]:
    """The rows of such a file."""
    return [Judgement(**row) for row in read_rows(path)]


def mean_preferences(judgements: Sequence[Judgement]) -> dict[tuple[str, int], float]:
    """(prompt id, sample) → mean of both orders; without those of which an order failed, which would be biased."""
    found: dict[tuple[str, int], dict[str, float | None]] = {}
    for row in judgements:
        found.setdefault((row.prompt_id, row.sample), {})[row.order] = row.preference
    means = {}
    for key, by_order in found.items():
        values = [by_order.get(order) for order in ORDERS]
        if all(value is not None for value in values):
            means[key] = sum(value for value in values if value is not None) / len(values)
    return means


@dataclass(frozen=True, kw_only=True)
class Controls:
    """What tells a judge that can be believed from one that cannot; each None where nothing was judged.

    Attributes:
        empty_n: Prompts on which an empty answer was judged against the baseline.
        empty_win_rate: Its mean preference, both orders; should be near 0.
        empty_failures: Judgements among these that failed.
        longer_n: Pairs whose answers differ in characters.
        longer_win_rate: The system's win rate if the longer answer won, over all pairs, equal lengths ½.
        longer_agreement: Share of the pairs of different lengths, and with a winner, whose winner is the longer one.
    """

    empty_n: int
    empty_win_rate: float | None
    empty_failures: int
    longer_n: int
    longer_win_rate: float | None
    longer_agreement: float | None


def controls(
    judge: Judge,
    pairs: Sequence[Pair],
    judgements: Sequence[Judgement],
    *,
    n: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Controls:
    """Both controls; the empty answer on `n` prompts (all without it), since a judge may have to be paid."""
    nothing = [Pair(replace(pair.system, answer="", tokens=0), pair.baseline) for pair in draw(pairs, n, seed)]
    empty = judge_pairs(judge, nothing, progress) if nothing else []
    empty_means = list(mean_preferences(empty).values())
    means = mean_preferences(judgements)
    longer, decided = [], []
    for pair in pairs:
        difference = pair.system.chars - pair.baseline.chars
        longer.append(0.5 + 0.5 * ((difference > 0) - (difference < 0)))
        preference = means.get(pair.system.key, 0.5)
        if difference and preference != 0.5:
            decided.append((preference > 0.5) == (difference > 0))
    return Controls(
        empty_n=len(empty_means),
        empty_win_rate=_mean(empty_means),
        empty_failures=sum(row.failure is not None for row in empty),
        longer_n=sum(value != 0.5 for value in longer),
        longer_win_rate=_mean(longer),
        longer_agreement=_mean(decided),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
