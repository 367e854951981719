"""Judges: (prompt, answer A, answer B) → preference for A in [0, 1], or a failure with its reason.

Here are the protocol, the joining of two files of answers, both orders, the controls, and the judges that follow a
rule. `endpoint_judge` asks a model behind a URL, `model_judges` asks reward models and policies.

A failure is never a tie: it has no preference, and is counted.
"""

import csv
import hashlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from .answers import Answer, prompt_text
from .journal import read_rows, write_whole

logger = logging.getLogger(__name__)

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
        shown = Comparison(
            prompt=self.system.prompt,
            prompt_id=self.system.prompt_id,
            answer_a=self.system.answer,
            answer_b=self.baseline.answer,
            reference=self.system.extra.get("reference", self.baseline.extra.get("reference")),
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
    """The pairs of `n` prompts, drawn by a hash: a larger `n` adds prompts, so replies kept for the smaller one serve."""
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
    import json

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


# --- judges that follow a rule -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RuleJudge:
    """Compares a score of the two answers: the higher one is preferred, equal ones tie, None is a failure.

    `score(prompt, answer, reference)` returns a number or None; `failure` names what None means.
    """

    name: str
    score: Callable[[Any, str, str | None], float | None]
    failure: str = "no_score"
    about: Mapping[str, Any] = field(default_factory=dict)

    def judge(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict for each comparison."""
        verdicts = []
        for done, shown in enumerate(comparisons, 1):
            a, b = (self.score(shown.prompt, text, shown.reference) for text in (shown.answer_a, shown.answer_b))
            if a is None or b is None:
                verdicts.append(Verdict(None, self.failure, f"prompt {shown.prompt_id}"))
            else:
                verdicts.append(Verdict(0.5 + 0.5 * ((a > b) - (a < b))))
            if progress:
                progress(done, len(comparisons))
        return verdicts


def longer_judge() -> RuleJudge:
    """The answer with more characters."""
    return RuleJudge("longer", lambda prompt, answer, reference: len(answer), about={"unit": "characters"})


def exact_judge() -> RuleJudge:
    """The answer that equals the reference, apart from blanks around both and case."""

    def score(prompt: Any, answer: str, reference: str | None) -> float | None:
        return None if reference is None else float(answer.strip().casefold() == reference.strip().casefold())

    return RuleJudge("exact", score, "no_reference")


def contains_judge() -> RuleJudge:
    """The answer that holds the reference as whole words, in any case."""

    def score(prompt: Any, answer: str, reference: str | None) -> float | None:
        if reference is None or not reference.strip():
            return None
        return float(_has_words(answer.casefold(), reference.strip().casefold()))

    return RuleJudge("contains", score, "no_reference")


def _has_words(text: str, words: str) -> bool:
    """`4` is not in `42`."""
    start = text.find(words)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(words) : start + len(words) + 1]
        inside = (before.isalnum() and words[0].isalnum()) or (after.isalnum() and words[-1].isalnum())
        if not inside:
            return True
        start = text.find(words, start + 1)
    return False


def lab_judge(seed: int) -> RuleJudge:
    """The true quality in the lab's world of that seed; what is not written in its words has none."""
    from ..lab.world import ATTRIBUTE, ENTITY, FILLER, NIL, SEP, VALUE, WORDS, Question, World

    world, numbers = World(seed), {word: number for number, word in enumerate(WORDS)}

    def score(prompt: Any, answer: str, reference: str | None) -> float | None:
        asked = [numbers.get(word) for word in prompt_text(prompt).split()]
        said = [numbers.get(word) for word in answer.split()]
        entities = [word - ENTITY for word in asked if word is not None and ENTITY <= word < VALUE]
        attributes = [word - ATTRIBUTE for word in asked if word is not None and ATTRIBUTE <= word < ENTITY]
        if None in asked or None in said or len(entities) != 1 or not attributes or SEP not in asked:
            return None
        assert FILLER > VALUE > ENTITY > ATTRIBUTE > NIL
        question = Question(entities[0], tuple(attributes))
        return float(world.quality(question, [word for word in said if word is not None]))

    return RuleJudge("lab", score, "not_of_the_lab", {"world_seed": seed})


# --- people --------------------------------------------------------------------------------------------------------

SHEET = ("prompt_id", "prompt", "answer_a", "answer_b", "preferred")
PREFERRED = {"a": 1.0, "b": 0.0, "tie": 0.5}


class HumanJudge:
    """Annotations from a CSV with `answer_a`, `answer_b`, `preferred` and `prompt` or `prompt_id`.

    They belong to the texts and not to a row number: changed answers have no annotation. Several annotations of one pair
    are averaged. Where only one order was shown to people, it serves for both.

    Raises:
        ValueError: columns are missing, or a `preferred` is neither A, B, tie, empty nor a number from 0 to 1.
    """

    name = "human"

    def __init__(self, path: str | Path):
        self.about = {"annotations": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}
        self._given: dict[tuple[str, str, str], list[float]] = {}
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = {"answer_a", "answer_b", "preferred"} - set(rows.fieldnames or ())
            if missing or not {"prompt", "prompt_id"} & set(rows.fieldnames or ()):
                raise ValueError(
                    f"{path} must have the columns `answer_a`, `answer_b`, `preferred` and `prompt` or `prompt_id`, "
                    f"got {rows.fieldnames}."
                )
            for row in rows:
                self._add(row, f"{path}, line {rows.line_num}")

    def _add(self, row: Mapping[str, str], place: str) -> None:
        from .answers import prompt_id

        said = (row["preferred"] or "").strip().lower()
        if not said:
            return
        try:
            value = PREFERRED[said] if said in PREFERRED else float(said)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ValueError(
                f"{place}: `preferred` must be A, B, tie, empty or from 0 to 1, got {row['preferred']!r}."
            )
        key = row.get("prompt_id") or prompt_id(row["prompt"])
        self._given.setdefault((key, _lines(row["answer_a"]), _lines(row["answer_b"])), []).append(value)

    def judge(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict for each comparison."""
        return [self._verdict(shown) for shown in comparisons]

    def _verdict(self, shown: Comparison) -> Verdict:
        texts = _lines(shown.answer_a), _lines(shown.answer_b)
        for key, forward in ((texts, True), (texts[::-1], False)):
            if given := self._given.get((shown.prompt_id, *key)):
                mean = sum(given) / len(given)
                return Verdict(mean if forward else 1 - mean)
        return Verdict(None, "not_annotated", f"prompt {shown.prompt_id}")


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").strip()  # table programs change the ends of lines


def write_sheet(path: str | Path, pairs: Sequence[Pair], seed: int = 0) -> None:
    """A CSV for people to fill in `preferred` (A, B or tie); which side the system is on is drawn for each pair."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(SHEET)
    for pair in pairs:
        first = hashlib.sha256(f"{seed} sheet {pair.system.key}".encode()).digest()[0] % 2
        shown = pair.comparison(ORDERS[first])
        table.writerow([shown.prompt_id, prompt_text(shown.prompt), shown.answer_a, shown.answer_b, ""])
    write_whole(Path(path), text.getvalue())
