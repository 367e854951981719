"""Judges that follow a rule: length, a right answer. `sampo.lab.judge` has one that knows the ground truth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...io.progress import Progress
from ..answers.answers import Answer
from .judges import Comparison, Score, Verdict, reference_of


@dataclass(frozen=True)
class RuleJudge:
    """Compares a score of the two answers: the higher one is preferred, equal ones tie, None is a failure.

    `rule(prompt, answer, reference)` returns a number or None; `failure` names what None means.
    """

    name: str
    rule: Callable[[Any, str, str | None], float | None]
    failure: str = "no_score"
    about: Mapping[str, Any] = field(default_factory=dict)

    def judge(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict for each comparison."""
        verdicts = []
        for done, shown in enumerate(comparisons, 1):
            a, b = (self.rule(shown.prompt, text, shown.reference) for text in (shown.answer_a, shown.answer_b))
            if a is None or b is None:
                verdicts.append(Verdict(None, self.failure, f"prompt {shown.prompt_id}"))
            else:
                verdicts.append(Verdict(0.5 + 0.5 * ((a > b) - (a < b))))
            if progress:
                progress(done, len(comparisons))
        return verdicts

    def score(self, answers: Sequence[Answer], progress: Progress | None = None) -> list[Score]:
        """The score of each answer."""
        scores = (self.rule(a.prompt, a.answer, reference_of(a)) for a in answers)
        return [self.failure if score is None else float(score) for score in scores]


def longer_judge() -> RuleJudge:
    """The answer with more characters."""
    return RuleJudge("longer", lambda prompt, answer, reference: len(answer), about={"unit": "characters"})


def exact_judge() -> RuleJudge:
    """The answer that equals the reference, apart from blanks around both and case."""

    def score(prompt: Any, answer: str, reference: str | None) -> float | None:
        return None if reference is None else float(answer.strip().casefold() == reference.strip().casefold())

    return RuleJudge("exact", score, "no_reference")


def contains_judge() -> RuleJudge:
    """The answer that contains the reference as complete words, in any case."""

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
