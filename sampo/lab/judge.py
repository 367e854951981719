"""The judge that knows the ground truth: the answer of higher true quality in the lab's world is preferred."""

from typing import Any

from ..evaluation.answers.answers import prompt_text
from ..evaluation.judging.rule_judges import RuleJudge
from .world import ATTRIBUTE, ENTITY, FILLER, NIL, SEP, VALUE, WORDS, World, WorldQuestion


def lab_judge(seed: int) -> RuleJudge:
    """The true quality in the lab's world of that seed. An answer with other words has none."""
    world, numbers = World(seed), {word: number for number, word in enumerate(WORDS)}

    def score(prompt: Any, answer: str, reference: str | None) -> float | None:
        asked = [numbers.get(word) for word in prompt_text(prompt).split()]
        stated = [numbers.get(word) for word in answer.split()]
        entities = [word - ENTITY for word in asked if word is not None and ENTITY <= word < VALUE]
        attributes = [word - ATTRIBUTE for word in asked if word is not None and ATTRIBUTE <= word < ENTITY]
        if None in asked or None in stated or len(entities) != 1 or not attributes or SEP not in asked:
            return None
        assert FILLER > VALUE > ENTITY > ATTRIBUTE > NIL
        question = WorldQuestion(entities[0], tuple(attributes))
        return float(world.quality(question, [word for word in stated if word is not None]))

    return RuleJudge("lab", score, "not_of_the_lab", {"world_seed": seed})
