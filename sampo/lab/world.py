"""A small world in which the true quality of an answer is known, so that length and quality can be measured apart.

A question asks for one to four attributes of an entity. An answer states facts and wraps them in filler. How many of
the facts a writer knows and how much filler they write are independent; annotators prefer the better answer and, to a
small degree, the longer one. Any further change of length comes from the method.

    prompt      <bos> e3 a1 a5 <nil> <nil> ?      always 7 tokens, so that nothing needs left padding
    answer      a1 v7 . f2 f9 f4 . a5 v0 . <eos>
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from zlib import crc32

import numpy as np

ATTRIBUTES, ENTITIES, VALUES, FILLERS = 8, 16, 16, 16
WORDS = (
    *("<pad>", "<bos>", "<eos>", "?", ".", "<nil>"),
    *(f"a{i}" for i in range(ATTRIBUTES)),
    *(f"e{i}" for i in range(ENTITIES)),
    *(f"v{i}" for i in range(VALUES)),
    *(f"f{i}" for i in range(FILLERS)),
)
PAD, BOS, EOS, SEP, DOT, NIL = range(6)
ATTRIBUTE, ENTITY, VALUE, FILLER = (WORDS.index(word) for word in ("a0", "e0", "v0", "f0"))  # first id of each kind

MAX_ASKED = 4
PROMPT_TOKENS = MAX_ASKED + 3
MAX_ANSWER_TOKENS = 88  # longer answers are redrawn
QUALITY_SLOPE = 1.5  # annotators' log-odds per unit of true quality
EXTRA_RATE = 0.08  # of a repeated and of an unasked fact, per sentence of filler and once more


@dataclass(frozen=True)
class WorldQuestion:
    """An entity and the attributes asked for, in the order of asking."""

    entity: int
    attributes: tuple[int, ...]

    @property
    def held_out(self) -> bool:
        """Whether the question is kept for evaluation: a fifth of all, by a hash that ignores the order of asking."""
        return self.key % 5 == 0

    @property
    def key(self) -> int:
        """The same number for every order of asking."""
        return crc32(bytes([self.entity, *sorted(self.attributes)]))

    @property
    def prompt(self) -> list[int]:
        """Token ids, always `PROMPT_TOKENS` of them."""
        asked = [ATTRIBUTE + a for a in self.attributes]
        return [BOS, ENTITY + self.entity, *asked, *[NIL] * (MAX_ASKED - len(asked)), SEP]


@dataclass(frozen=True)
class WorldPair:
    """Two answers (token ids, end token included) to one question, the preferred one first."""

    question: WorldQuestion
    chosen: list[int]
    rejected: list[int]

    @property
    def length_difference(self) -> int:
        """Tokens by which the chosen answer is longer, T_w - T_l."""
        return len(self.chosen) - len(self.rejected)


def preference_probability(quality_difference: float, length_difference: float, *, bias: float) -> float:
    """P(a is chosen over b), from Q_a - Q_b and T_a - T_b; `bias` is the log-odds of ten tokens more."""
    return float(1 / (1 + np.exp(-(QUALITY_SLOPE * quality_difference + bias * length_difference / 10))))


def text(ids: Sequence[int]) -> str:
    """Token ids as the words that the tokenizer reads."""
    return " ".join(WORDS[i] for i in ids)


def _pick(rng: np.random.Generator, options: Sequence[int]) -> int:
    return options[int(rng.random() * len(options))]  # several times faster than rng.choice


@dataclass(frozen=True)
class World:
    """The facts and the filler language, both drawn from `seed`, and all questions and answers that use them."""

    seed: int
    facts: np.ndarray = field(init=False)  # (entities, attributes), the value of each
    successors: np.ndarray = field(init=False)  # (fillers, 4), likeliest first
    openers: list[int] = field(init=False)  # filler words that may open a sentence

    def __post_init__(self) -> None:
        rng = self.rng("world")
        object.__setattr__(self, "facts", rng.integers(VALUES, size=(ENTITIES, ATTRIBUTES)))
        successors = np.stack([rng.permutation(FILLERS)[:4] for _ in range(FILLERS)])
        object.__setattr__(self, "successors", successors)
        object.__setattr__(self, "openers", rng.permutation(FILLERS)[:6].tolist())

    def rng(self, purpose: str) -> np.random.Generator:
        """A separate generator for each purpose, so that more draws of one kind do not change those of another."""
        return np.random.default_rng([self.seed, crc32(purpose.encode())])

    def question(self, rng: np.random.Generator, *, held_out: bool) -> WorldQuestion:
        """A random question for evaluation (`held_out`) or for training."""
        while True:
            asked = rng.permutation(ATTRIBUTES)[: 1 + int(rng.random() * MAX_ASKED)]
            question = WorldQuestion(int(rng.random() * ENTITIES), tuple(asked.tolist()))
            if question.held_out == held_out:
                return question

    def answer(self, rng: np.random.Generator, question: WorldQuestion) -> list[int]:
        """An answer by a new writer, whose coverage, accuracy and verbosity are drawn independently."""
        while True:
            coverage, accuracy, verbosity = rng.uniform((0.3, 0.55, 0.5), (1, 1, 5))
            facts = [
                self._fact(rng, question.entity, attribute, right=rng.random() < accuracy)
                for attribute in question.attributes
                if rng.random() < coverage
            ]
            padding = self._padding(rng, question, facts, sentences=int(rng.poisson(verbosity)))
            slots = np.sort(rng.permutation(len(facts) + len(padding))[: len(facts)]).tolist()
            rest = iter(padding)
            stated = dict(zip(slots, facts, strict=True))  # facts keep the order of asking
            sentences = [stated.get(slot) or next(rest) for slot in range(len(facts) + len(padding))]
            ids = [token for sentence in sentences for token in sentence]
            if ids and len(ids) < MAX_ANSWER_TOKENS:
                return [*ids, EOS]

    def _fact(self, rng: np.random.Generator, entity: int, attribute: int, *, right: bool) -> list[int]:
        value = int(self.facts[entity, attribute])
        if not right:
            value = (value + 1 + int(rng.random() * (VALUES - 1))) % VALUES
        return [ATTRIBUTE + attribute, VALUE + value, DOT]

    def _padding(
        self, rng: np.random.Generator, question: WorldQuestion, facts: list[list[int]], *, sentences: int
    ) -> list[list[int]]:
        """Sentences without value: filler, repeats of its facts, true facts that were not asked for."""
        padding = [self._filler(rng) for _ in range(sentences)]
        unasked = [a for a in range(ATTRIBUTES) if a not in question.attributes]
        for _ in range(sentences + 1):
            if rng.random() < EXTRA_RATE and facts:
                padding.append(facts[_pick(rng, range(len(facts)))])
            if rng.random() < EXTRA_RATE:
                padding.append(self._fact(rng, question.entity, _pick(rng, unasked), right=True))
        return padding

    def _filler(self, rng: np.random.Generator) -> list[int]:
        word = _pick(rng, self.openers)
        words = [word]
        for _ in range(1 + int(rng.random() * 4)):
            rank = min(int(rng.geometric(0.5)), 4) - 1
            word = int(self.successors[word, rank])
            words.append(word)
        return [*(FILLER + word for word in words), DOT]

    def quality(self, question: WorldQuestion, answer: Sequence[int]) -> int:
        """The true quality: distinct requested facts stated rightly, minus distinct facts stated wrongly.

        A statement is an attribute directly followed by a value. Filler, repeats, true facts that were not asked
        for and a missing end token do not count, so length alone is neither good nor bad.
        """
        statements = {
            (first - ATTRIBUTE, second - VALUE)
            for first, second in pairwise(answer)
            if ATTRIBUTE <= first < ENTITY and VALUE <= second < FILLER
        }
        truth = self.facts[question.entity]
        right = sum(bool(truth[a] == v) and a in question.attributes for a, v in statements)
        return right - sum(bool(truth[a] != v) for a, v in statements)

    def demonstrations(self, count: int) -> list[tuple[WorldQuestion, list[int]]]:
        """Questions and answers for the supervised start."""
        rng = self.rng("demonstrations")
        questions = (self.question(rng, held_out=False) for _ in range(count))
        return [(question, self.answer(rng, question)) for question in questions]

    def annotated_pairs(self, count: int, *, bias: float, group: str = "all") -> list[WorldPair]:
        """Training pairs, as annotators with a length `bias` choose.

        All pairs, or only those whose chosen answer is shorter (`short`), longer (`long`) or as long (`equal`).
        """
        pairs = []
        for pair in self.annotated_stream(bias):
            difference = pair.length_difference
            wanted = {"all": True, "short": difference < 0, "long": difference > 0, "equal": difference == 0}
            if wanted[group]:
                pairs.append(pair)
            if len(pairs) == count:
                break
        return pairs

    def annotated_stream(self, bias: float) -> Iterator[WorldPair]:
        """Endless pairs as annotators of this length bias label them."""
        rng = self.rng("annotated pairs")
        while True:
            question = self.question(rng, held_out=False)
            a, b = self.answer(rng, question), self.answer(rng, question)
            if a == b:
                continue
            quality_difference = self.quality(question, a) - self.quality(question, b)
            p = preference_probability(quality_difference, len(a) - len(b), bias=bias)
            yield WorldPair(question, a, b) if rng.random() < p else WorldPair(question, b, a)

    def judged_pairs(self, count: int) -> list[WorldPair]:
        """Held-out pairs that differ in true quality, the truly better answer as `chosen`."""
        rng = self.rng("judged pairs")
        pairs: list[WorldPair] = []
        while len(pairs) < count:
            question = self.question(rng, held_out=True)
            a, b = self.answer(rng, question), self.answer(rng, question)
            difference = self.quality(question, a) - self.quality(question, b)
            if difference:
                pairs.append(WorldPair(question, a, b) if difference > 0 else WorldPair(question, b, a))
        return pairs

    def evaluation_questions(self, count: int) -> list[WorldQuestion]:
        """Held-out questions to generate answers for. There are about 500, so most occur more than once."""
        rng = self.rng("evaluation questions")
        return [self.question(rng, held_out=True) for _ in range(count)]
