"""Which answers to a prompt become pairs: each rule is a function of the scores and lengths of all prompts.

Answers to one prompt come in an order that is drawn (`make`), and of equal scores the first counts; so no model and no
sample is preferred. A prompt whose scores are all equal gives no pair: the judge prefers none of its answers.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..stats.intervals import Estimate, undefined

NOISE = 1e-9  # of the spread of the scores; what is left of it is no preference
Pick = tuple[int, int]  # positions of the chosen and of the rejected answer


@dataclass(frozen=True)
class LengthLimit:
    """How far two lengths may differ: `100` units of length, or `20%` of the longer one.

    Raises:
        ValueError: it is neither.
    """

    text: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+(\.\d+)?%?", self.text):
            raise ValueError(
                f"A limit of length must be a number such as 100, or a share such as 20%, got {self.text}."
            )

    def allows(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether each two lengths, `(n,)` and `(n,)`, are within the limit."""
        value = float(self.text.removesuffix("%"))
        gap = np.abs(np.asarray(a, dtype=float) - b)
        return gap <= (value / 100 * np.maximum(a, b) if self.text.endswith("%") else value)


@dataclass(frozen=True)
class Candidates:
    """The answers to one prompt that can be used.

    Attributes:
        prompt_id: of the prompt.
        scores: `(n,)` float, n ≥ 2; higher is better.
        lengths: `(n,)` int, at least 1, in one unit for all prompts.
    """

    prompt_id: str
    scores: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings:
    """What rules depend on besides the answers.

    Attributes:
        margin: for `all_above`: the score of the chosen answer is higher by more than this.
        limit: for `length_matched` and `capped`.
        share: for `max_margin`: of the prompts with a pair, in (0, 1].
        seed: of what is drawn.
    """

    margin: float = 0.0
    limit: LengthLimit = LengthLimit("100")
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.margin >= 0 and math.isfinite(self.margin)):
            raise ValueError(f"`margin` must be a number of at least 0, got {self.margin}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1, got {self.share}.")


def choose_best_worst(prompts: Sequence[Candidates], settings: ChoiceSettings) -> list[list[Pick]]:
    """The best answer and the worst one (SimPO, arXiv 2405.14734, section 3)."""
    return [[_extremes(one.scores)] for one in prompts]


def choose_best_random(prompts: Sequence[Candidates], settings: ChoiceSettings) -> list[list[Pick]]:
    """The best answer, and a random one with a lower score."""
    picks = []
    for one in prompts:
        best = int(one.scores.argmax())
        lower = np.flatnonzero(one.scores < one.scores[best])
        digest = hashlib.sha256(f"{settings.seed} rejected {one.prompt_id}".encode()).digest()
        picks.append([(best, int(lower[int.from_bytes(digest[:8], "big") % len(lower)]))])
    return picks


def choose_max_margin(prompts: Sequence[Candidates], settings: ChoiceSettings) -> list[list[Pick]]:
    """The best answer and the worst one, of the share of prompts in which their scores differ most."""
    spread = [float(np.ptp(one.scores)) for one in prompts]
    first = sorted(range(len(prompts)), key=lambda number: (-spread[number], prompts[number].prompt_id))
    kept = set(first[: math.ceil(settings.share * len(prompts))])
    return [[_extremes(one.scores)] if number in kept else [] for number, one in enumerate(prompts)]


def choose_all_above(prompts: Sequence[Candidates], settings: ChoiceSettings) -> list[list[Pick]]:
    """Every two answers whose scores differ by more than the margin."""
    return [_pairs(one.scores[:, None] - one.scores[None, :] > settings.margin) for one in prompts]


def choose_length_matched(prompts: Sequence[Candidates], settings: ChoiceSettings) -> list[list[Pick]]:
    """Of the answers whose lengths are within the limit, the two whose scores differ most."""
    picks = []
    for one in prompts:
        margin = one.scores[:, None] - one.scores[None, :]  # (n, n)
        margin[~settings.limit.allows(one.lengths[:, None], one.lengths[None, :])] = 0
        chosen, rejected = np.unravel_index(margin.argmax(), margin.shape)
        picks.append([(int(chosen), int(rejected))] if margin.max() > 0 else [])
    return picks


def choose_length_regressed(prompts: Sequence[Candidates], settings: ChoiceSettings) -> list[list[Pick]]:
    """The best answer and the worst one after the judge's own slope on log length is subtracted from all scores.

    The slope is that of `fit_length_slope`; it is 0 where all answers to each prompt are equally long.
    """
    slope = fit_length_slope(prompts).value or 0.0
    rest = [one.scores - slope * np.log(one.lengths) for one in prompts]
    spread = [np.ptp(scores) > NOISE * np.ptp(one.scores) for scores, one in zip(rest, prompts, strict=True)]
    return [[_extremes(scores)] if differ else [] for scores, differ in zip(rest, spread, strict=True)]


def choose_capped(prompts: Sequence[Candidates], settings: ChoiceSettings) -> list[list[Pick]]:
    """The best answer and the worst one, if their lengths are within the limit (Olmo 3, arXiv 2512.13961, 5.3.1)."""
    picks = [_extremes(one.scores) for one in prompts]
    lengths = [one.lengths[list(pick)] for one, pick in zip(prompts, picks, strict=True)]
    return [[pick] if settings.limit.allows(*two) else [] for pick, two in zip(picks, lengths, strict=True)]


@dataclass(frozen=True)
class ChoiceRule:
    """A rule.

    Attributes:
        choose: makes the picks of each prompt; every prompt has two different scores.
        settings: names of the settings that it reads, besides the seed.
        limit: its limit of length where none is given.
    """

    choose: Callable[[Sequence[Candidates], ChoiceSettings], list[list[Pick]]]
    settings: tuple[str, ...] = ()
    limit: str = ""


CHOICES = {
    "best_worst": ChoiceRule(choose_best_worst),
    "best_random": ChoiceRule(choose_best_random),
    "max_margin": ChoiceRule(choose_max_margin, ("share",)),
    "all_above": ChoiceRule(choose_all_above, ("margin",)),
    "length_matched": ChoiceRule(choose_length_matched, ("limit",), "10%"),
    "length_regressed": ChoiceRule(choose_length_regressed),
    "capped": ChoiceRule(choose_capped, ("limit",), "100"),
}


def fit_length_slope(prompts: Sequence[Candidates], confidence: float = 0.95) -> Estimate:
    """Slope of the scores on log length within prompts: how much the judge gives for length.

    Least squares with an intercept for each prompt, so that easy prompts, whose answers are short and good, do not
    count. The standard error is the sandwich's with the prompt as its unit, the interval that of t.

    Returns:
        Score per unit of log length; times log 2, score per doubling. Without a value where the answers to each prompt
        are equally long.
    """
    lengths = [np.log(one.lengths) for one in prompts]
    within = [(x - x.mean(), one.scores - one.scores.mean()) for x, one in zip(lengths, prompts, strict=True)]
    within = [(x, y) for x, y in within if np.ptp(x) > 0]
    if not within:
        return undefined(0)
    squares, n = sum(float(x @ x) for x, _ in within), len(within)
    slope = sum(float(x @ y) for x, y in within) / squares
    if n == 1:
        return Estimate(slope, None, None, None, 1)
    score = np.array([float(x @ (y - slope * x)) for x, y in within])  # (P,)
    se = float(np.sqrt((score**2).sum() * n / (n - 1))) / squares
    half_width = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * se
    return Estimate(slope, slope - half_width, slope + half_width, se, n)


def _extremes(scores: np.ndarray) -> Pick:
    return int(scores.argmax()), int(scores.argmin())


def _pairs(which: np.ndarray) -> list[Pick]:
    """The positions where an `(n, n)` array is true."""
    return [(int(chosen), int(rejected)) for chosen, rejected in np.argwhere(which)]
