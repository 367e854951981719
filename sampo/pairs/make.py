"""From answers and their scores to pairs: what can be used of each prompt, the pairs, and an account of every prompt.

An answer is left out if it is cut off (`stop` is `length`; unless asked for: training would teach its end), if it is
empty, or if it repeats another answer to the prompt.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..audit.bias import LengthBias, length_bias
from ..data.layouts import is_blank_text
from ..evaluation.answers.answers import Answer, Prompt
from ..evaluation.judging.judges import Score
from ..stats.intervals import Estimate
from .choice import CHOICES, Candidates, ChoiceSettings, Pick, fit_length_slope

CHOICE_UNITS = ("auto", "tokens", "words", "characters")
# status of a prompt → its description; each prompt has one
STATUSES = {
    "used": "prompts with a pair",
    "unanswered": "prompts without any answer",
    "cut": "prompts with fewer than two answers that ended by themselves",
    "too_few": "prompts with fewer than two different answers",
    "failed": "prompts with fewer than two answers that the judge could score",
    "no_spread": "prompts whose answers all have the same score",
    "no_pair": "prompts in which the rule of choice found no pair",
}


@dataclass
class PromptAnswers:
    """The answers to one prompt that can be used, in an order drawn by the seed, and how many cannot.

    Attributes:
        prompt_id: of the prompt.
        usable: different answers with a text.
        cut: answers left out because they were cut off.
        empty: answers without a visible text.
        repeated: answers with the text of another one.
        missing: answers that were not generated.
        status: one of `STATUSES`; empty as long as it is open.
        failed: usable answers without a score.
        pairs: made of the prompt.
    """

    prompt_id: str
    usable: list[Answer] = field(default_factory=list)
    cut: int = 0
    empty: int = 0
    repeated: int = 0
    missing: int = 0
    status: str = ""
    failed: int = 0
    pairs: int = 0

    def row(self) -> dict[str, Any]:
        """A row of the account."""
        return {**vars(self), "usable": len(self.usable)}


def sort_answers(
    systems: Iterable[Sequence[Answer]], *, use_cut: bool, seed: int, missing: Mapping[str, int] | None = None
) -> list[PromptAnswers]:
    """Collect the answers of several systems by prompt, in the order in which the prompts appear.

    Args:
        systems: the answers of each.
        missing: of each prompt the number of answers that were not generated. Prompts without any come last.
        use_cut: use answers that were cut off, too.
        seed: of the order of the answers to a prompt.
    """
    found: dict[str, list[tuple[str, Answer]]] = {}
    for number, answers in enumerate(systems):
        for answer in answers:
            drawn = hashlib.sha256(f"{seed} {answer.prompt_id} {number} {answer.sample}".encode()).hexdigest()
            found.setdefault(answer.prompt_id, []).append((drawn, answer))
    missing = missing or {}
    for prompt_id in missing:
        found.setdefault(prompt_id, [])
    prompts = [
        _sort_prompt(prompt_id, [answer for _, answer in sorted(rows, key=lambda row: row[0])], use_cut)
        for prompt_id, rows in found.items()
    ]
    for one in prompts:
        one.missing = missing.get(one.prompt_id, 0)
    return prompts


def _sort_prompt(prompt_id: str, answers: Sequence[Answer], use_cut: bool) -> PromptAnswers:
    one, texts = PromptAnswers(prompt_id), set()
    for answer in answers:
        if answer.stop == "length" and not use_cut:
            one.cut += 1
        elif is_blank_text(answer.answer):
            one.empty += 1
        elif answer.answer in texts:
            one.repeated += 1
        else:
            texts.add(answer.answer)
            one.usable.append(answer)
    if not answers:
        one.status = "unanswered"
    elif len(one.usable) < 2:
        one.status = "cut" if len(one.usable) + one.cut >= 2 else "too_few"
    return one


def length_unit_of(systems: Iterable[Sequence[Answer]], unit: str = "auto") -> str:
    """The unit of length: `auto` is `tokens` where all answers have counts of one tokenizer, else `words`.

    Raises:
        ValueError: `tokens` are asked for and not known.
    """
    counted = {answer.tokenizer if answer.tokens is not None else None for answers in systems for answer in answers}
    known = len(counted) == 1 and None not in counted
    if unit == "tokens" and not known:
        raise ValueError(
            "`length_unit: tokens` must have counts of one tokenizer in all answers, got "
            f"{sorted(str(name) for name in counted)}. Use `words` or `characters`."
        )
    return unit if unit != "auto" else "tokens" if known else "words"


def length_of(answer: Answer, unit: str) -> int:
    """Length of an answer, at least 1."""
    length = {"tokens": answer.tokens, "words": answer.words, "characters": answer.chars}[unit]
    return max(1, length or 0)


@dataclass(frozen=True)
class MadePairs:
    """The pairs.

    Attributes:
        rows: with the columns of docs/onpolicy.md.
        bias: how far length explains which answer was chosen.
        slope: of the judge's scores on log length, within prompts, over all scored answers.
    """

    rows: list[dict[str, Any]]
    bias: LengthBias
    slope: Estimate


def make_rows(
    prompts: Sequence[PromptAnswers],
    scores: Sequence[Sequence[Score]],
    rule: str,
    settings: ChoiceSettings,
    *,
    unit: str,
    about: Mapping[str, Any],
) -> MadePairs:
    """Choose the pairs, and write the status of each prompt into `prompts`.

    Args:
        prompts: all of them.
        scores: of the usable answers to each prompt whose status is open, in their order.
        rule: a key of `CHOICES`.
        settings: of the rule.
        unit: of lengths.
        about: columns that are the same in all rows.
    """
    open_prompts = [one for one in prompts if not one.status]
    good: list[tuple[PromptAnswers, list[Answer], Candidates]] = []
    for one, found in zip(open_prompts, scores, strict=True):
        scored = [(answer, s) for answer, s in zip(one.usable, found, strict=True) if not isinstance(s, str)]
        one.failed = len(one.usable) - len(scored)
        if len(scored) < 2:
            one.status = "failed"
            continue
        answers = [answer for answer, _ in scored]
        lengths = np.array([length_of(answer, unit) for answer in answers])
        candidates = Candidates(one.prompt_id, np.array([s for _, s in scored], dtype=float), lengths)
        good.append((one, answers, candidates))
    slope = fit_length_slope([candidates for *_, candidates in good])
    spread = [entry for entry in good if np.ptp(entry[2].scores) > 0]
    chat = any(_is_chat(answer) for one in prompts for answer in one.usable)
    picks = CHOICES[rule].choose([candidates for *_, candidates in spread], settings)
    rows = []
    for (one, answers, candidates), chosen in zip(spread, picks, strict=True):
        one.status, one.pairs = "used" if chosen else "no_pair", len(chosen)
        rows += [{**_pair_row(answers, candidates, pick, chat=chat), **about} for pick in chosen]
    for one, *_ in good:
        one.status = one.status or "no_spread"
    return MadePairs(rows, bias_of(rows, unit), slope)


def bias_of(rows: Sequence[Mapping[str, Any]], unit: str) -> LengthBias:
    """What length alone explains in the pairs; prompts have no length here."""
    lengths = np.array([[row[f"{side}_length"] for side in ("chosen", "rejected")] for row in rows], dtype=int)
    chosen, rejected = lengths.reshape(-1, 2).T
    prompt_ids = np.array([row["prompt_id"] for row in rows])
    return length_bias(np.zeros_like(chosen), chosen, rejected, prompt_ids, unit=unit)


def count_statuses(prompts: Iterable[PromptAnswers]) -> dict[str, int]:
    """Number of prompts by status; all of them are there, and their sum is the number of prompts."""
    counts = Counter(one.status for one in prompts)
    return {status: counts[status] for status in STATUSES}


def _pair_row(answers: Sequence[Answer], found: Candidates, pick: Pick, *, chat: bool) -> dict[str, Any]:
    sides = dict(zip(("chosen", "rejected"), pick, strict=True))
    row: dict[str, Any] = {"prompt": _prompt(answers[pick[0]].prompt, chat)}
    for side, number in sides.items():
        text = answers[number].answer
        row[side] = [{"role": "assistant", "content": text}] if chat else text
    row["prompt_id"] = found.prompt_id
    for side, number in sides.items():
        answer = answers[number]
        row[f"{side}_score"], row[f"{side}_length"] = float(found.scores[number]), int(found.lengths[number])
        row[f"{side}_model"], row[f"{side}_sample"], row[f"{side}_stop"] = answer.model, answer.sample, answer.stop
        drawn = {**answer.sampling, "seed": answer.seed, "weights": answer.weights}
        row[f"{side}_sampling"] = json.dumps(drawn, sort_keys=True)
    row["margin"] = row["chosen_score"] - row["rejected_score"]
    return row


def _is_chat(answer: Answer) -> bool:
    """Whether the prompt was given as messages: by a chat template, or by a server, which applies its own."""
    return not isinstance(answer.prompt, str) or answer.template is not None or "://" in (answer.backend or "")


def _prompt(prompt: Prompt, chat: bool) -> Prompt:
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
