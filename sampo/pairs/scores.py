"""A score for each answer to a prompt: by a judge that scores answers, or by one that compares two of them.

A scorer sees each answer once, and its scores are kept in a journal, so an interrupted run continues and another rule
of choice costs nothing. A judge of two answers is asked by a schedule, in both orders of each two; its own cache keeps
the replies.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from ..evaluation.answers.answers import Answer
from ..evaluation.judging.judges import (
    ONCE,
    AnswerPair,
    AnswerScorer,
    Judge,
    Judgement,
    Score,
    judge_pairs,
    reference_of,
)
from ..io.hashing import hash_json
from ..io.journal import Journal
from ..io.progress import Progress
from ..io.schemas import named, typed
from ..stats.intervals import Estimate, rate_interval

AT_ONCE = 512  # answers that are scored before their scores are written
NOT_COMPARED = "not_compared"  # failure of an answer without any comparison that succeeded
AnswerGroups = Sequence[Sequence[Answer]]  # the answers to each prompt, two or more
Two = tuple[int, int, int]  # number of a prompt, positions of two of its answers


@dataclass(frozen=True)
class KeptScore:
    """A row of the journal: the score of one answer, or why there is none; `key` is all that it depends on."""

    key: str
    prompt_id: str
    score: float | None
    failure: str | None


@dataclass
class JudgeScores:
    """What a judge has said.

    Attributes:
        groups: a score, or the reason of a failure, for each answer of each prompt.
        asked: scores or comparisons (both orders of two answers are one) that were needed.
        failures: reason → number of scores or judgements that failed.
        orders_agree: share of the compared answers of which both orders name the same winner; None for a scorer.
    """

    groups: list[list[Score]]
    asked: int
    failures: Counter[str] = field(default_factory=Counter)
    orders_agree: float | None = None


def scores_alone(judge: Judge) -> bool:
    """Whether the judge is an `AnswerScorer`."""
    return hasattr(judge, "score")


def score_once(judge: Judge, groups: AnswerGroups, journal: Path, progress: Progress | None = None) -> JudgeScores:
    """Score each answer once; scores in the journal are taken from there.

    Raises:
        ValueError: the journal has a row that is no score.
        BlockingIOError: another process has it open.
    """
    answers = [answer for group in groups for answer in group]
    found = iter(_kept_scores(cast(AnswerScorer, judge), answers, journal, progress))
    made = [[next(found) for _ in group] for group in groups]
    return JudgeScores(made, len(answers), Counter(s for group in made for s in group if isinstance(s, str)))


def _kept_scores(judge: AnswerScorer, answers: Sequence[Answer], path: Path, progress: Progress | None) -> list[Score]:
    about = [judge.name, dict(judge.about)]
    keys = [hash_json([about, a.prompt_id, a.answer, reference_of(a)]) for a in answers]
    with Journal(path) as journal:
        kept: dict[str, Score] = {}
        for number, row in enumerate(journal.rows, 1):
            with named(path, "Restore it, or delete the line", line=number):
                one = typed(KeptScore, row, complete=True)
            kept[one.key] = one.score if one.failure is None else one.failure
        missing = list({key: a for key, a in zip(keys, answers, strict=True) if key not in kept}.items())
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            scores = judge.score([answer for _, answer in part])
            kept |= {key: score for (key, _), score in zip(part, scores, strict=True)}
            journal.append(*(_as_row(key, a, s) for (key, a), s in zip(part, scores, strict=True)))
            if progress:
                progress(start + len(part), len(missing))
    return [kept[key] for key in keys]


def _as_row(key: str, answer: Answer, score: Score) -> dict[str, object]:
    failed = isinstance(score, str)
    return {
        "key": key,
        "prompt_id": answer.prompt_id,
        "score": None if failed else score,
        "failure": score if failed else None,
    }


# --- judges of two answers -----------------------------------------------------------------------------------------


def compare_all(judge: Judge, groups: AnswerGroups, progress: Progress | None = None) -> JudgeScores:
    """Compare every two answers to a prompt, n (n − 1) / 2; a score is the mean preference over all others."""
    twos = [(number, i, j) for number, group in enumerate(groups) for i, j in _all_twos(len(group))]
    asked = _Comparisons(judge, groups)
    asked.ask(twos, progress)
    return asked.scores(lambda number, i: [other for other in range(len(groups[number])) if other != i])


def compare_best(judge: Judge, groups: AnswerGroups, progress: Progress | None = None) -> JudgeScores:
    """Find the best answer, and compare it with all others: n − 1 to 2 n − 3 comparisons of n answers.

    The answers are taken in their order, and the better of two stays. A score is the preference over the best answer,
    which itself has 0.5; where a judge is not transitive, another answer may have more.
    """
    asked, best = _Comparisons(judge, groups), [0] * len(groups)
    at_most = sum(max(1, 2 * len(group) - 3) for group in groups)
    for challenger in range(1, max(map(len, groups), default=0)):
        twos = [(number, best[number], challenger) for number, group in enumerate(groups) if challenger < len(group)]
        asked.ask(twos)
        for number, champion, _ in twos:
            preference = asked.preference(number, champion, challenger)
            if preference is not None and preference < 0.5:
                best[number] = challenger
        if progress:
            progress(len(asked.preferences), at_most)
    asked.ask([(number, best[number], i) for number, group in enumerate(groups) for i in range(len(group))])
    if progress:
        progress(at_most, at_most)
    return asked.scores(lambda number, i: [best[number]])


SCHEDULES: dict[str, Callable[[Judge, AnswerGroups, Progress | None], JudgeScores]] = {
    "all": compare_all,
    "best": compare_best,
}


def every_pair(groups: AnswerGroups) -> list[AnswerPair]:
    """All that a schedule may ask for."""
    return [AnswerPair(group[i], group[j]) for group in groups for i, j in _all_twos(len(group))]


def _all_twos(n: int) -> Iterable[tuple[int, int]]:
    return itertools.combinations(range(n), 2)


class _Comparisons:
    """Preferences of answers over others of the same prompt, each two asked for once, in both orders."""

    def __init__(self, judge: Judge, groups: AnswerGroups):
        self.judge, self.groups = judge, groups
        self.preferences: dict[Two, float | None] = {}  # of the first answer; None for a failure
        self.failures: Counter[str] = Counter()
        self.agree: list[bool] = []

    def ask(self, twos: Iterable[Two], progress: Progress | None = None) -> None:
        """Ask for those that are not known."""
        new = [two for two in dict.fromkeys(twos) if two[1] != two[2] and not self._known(*two)]
        pairs = [AnswerPair(self.groups[number][i], self.groups[number][j]) for number, i, j in new]
        rows = judge_pairs(self.judge, pairs, progress)
        for two, ab, ba in zip(new, rows[::2], rows[1::2], strict=True):
            self.preferences[two] = mean_of_orders(ab, ba)
            self.failures.update(row.failure for row in (ab, ba) if row.failure is not None)
            if ab.preference is not None and ba.preference is not None and ONCE not in (ab.detail, ba.detail):
                self.agree.append(np.sign(ab.preference - 0.5) == np.sign(ba.preference - 0.5))

    def _known(self, number: int, i: int, j: int) -> bool:
        return (number, i, j) in self.preferences or (number, j, i) in self.preferences

    def preference(self, number: int, i: int, j: int) -> float | None:
        """Of answer i over answer j; None if that is not known."""
        if i == j:
            return 0.5
        if (number, i, j) in self.preferences:
            return self.preferences[number, i, j]
        other = self.preferences.get((number, j, i))
        return None if other is None else 1 - other

    def scores(self, rivals: Callable[[int, int], list[int]]) -> JudgeScores:
        """The mean preference of each answer over its rivals, those without a verdict left out."""
        groups: list[list[Score]] = []
        for number, group in enumerate(self.groups):
            found = [[self.preference(number, i, other) for other in rivals(number, i)] for i in range(len(group))]
            good = [[p for p in row if p is not None] for row in found]
            groups.append([float(np.mean(row)) if row else NOT_COMPARED for row in good])
        agree = float(np.mean(self.agree)) if self.agree else None
        return JudgeScores(groups, len(self.preferences), self.failures, agree)


def mean_of_orders(ab: Judgement, ba: Judgement) -> float | None:
    """Preference for the first answer, the mean of both orders; None if one of them has failed."""
    if ab.preference is None or ba.preference is None:
        return None
    return (ab.preference + ba.preference) / 2


# --- control -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmptyControl:
    """How often an empty answer wins against the first answer to a prompt; it should never."""

    wins: Estimate
    failed: int


def control_pairs_of(groups: AnswerGroups) -> list[AnswerPair]:
    """The first answer to each prompt, beside itself; `empty_answers` empties one of them."""
    return [AnswerPair(group[0], group[0]) for group in groups]


def ask_control(judge: Judge, pairs: Sequence[AnswerPair], journal: Path, progress: Progress | None) -> EmptyControl:
    """Judge empty answers, the `system` of each pair, against answers, its `baseline`."""
    if scores_alone(judge):
        scored = score_once(judge, [[pair.system, pair.baseline] for pair in pairs], journal, progress).groups
        wins = [_win(*two) for two in scored]
    else:
        rows = judge_pairs(judge, pairs, progress)
        wins = [mean_of_orders(ab, ba) for ab, ba in zip(rows[::2], rows[1::2], strict=True)]
    known = np.array([win for win in wins if win is not None])
    return EmptyControl(rate_interval(known), len(wins) - len(known))


def _win(a: Score, b: Score) -> float | None:
    if isinstance(a, str) or isinstance(b, str):
        return None
    return 0.5 + 0.5 * ((a > b) - (a < b))
