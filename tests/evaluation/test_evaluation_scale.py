"""From answers to a comparison in linear time and with rows read and written one at a time."""

import dataclasses
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any, Literal

import pytest

from sampo.evaluation.answers.answers import Answer, read_answers, write_answers
from sampo.evaluation.judging.judges import judge_pairs, match, read_judgements, write_judgements
from sampo.evaluation.judging.rule_judges import RuleJudge, longer_judge
from sampo.evaluation.results.style import read_style
from sampo.evaluation.results.summary import summarise
from sampo.evaluation.results.verbosity import System, compare_verbosity
from sampo.evaluation.results.verdicts import Verdicts
from sampo.io.journal import each_row
from sampo.io.schemas import WrongShape, typed


def make_answers(prompts: int, samples: int, seed: int) -> list[Answer]:
    rng = random.Random(seed)
    return [
        Answer(prompt=f"Question {i}?", answer="so " * rng.randrange(5, 40), sample=s, stop="eos")
        for i in range(prompts)
        for s in range(samples)
    ]


def slow_match(system: list[Answer], baseline: list[Answer]) -> tuple[list[tuple[int, int]], int, int]:
    """The rule as a loop over all pairs: the same sample, else the only answer of the baseline to the prompt."""
    pairs = []
    for i, ours in enumerate(system):
        same = [j for j, theirs in enumerate(baseline) if theirs.key == ours.key]
        of_prompt = [j for j, theirs in enumerate(baseline) if theirs.prompt_id == ours.prompt_id]
        found = same or (of_prompt if len(of_prompt) == 1 else [])
        pairs += [(i, found[0])] if found else []
    return pairs, len(system) - len(pairs), len(baseline) - len({j for _, j in pairs})


@pytest.mark.parametrize("seed", range(20))
def test_matching_is_that_of_the_slow_loop(seed):
    rng = random.Random(seed)
    system, baseline = (
        rng.sample(full, rng.randint(0, len(full)))
        for full in (make_answers(6, rng.randint(1, 4), 1), make_answers(6, rng.choice((1, 1, 3)), 2))
    )
    found = match(system, baseline)
    chosen = (system, [pair.system for pair in found.pairs]), (baseline, [pair.baseline for pair in found.pairs])
    at = [[next(i for i, x in enumerate(side) if x is one) for one in own] for side, own in chosen]
    expected, system_only, baseline_only = slow_match(system, baseline)
    assert list(zip(*at, strict=True)) == expected
    assert (found.system_only, found.baseline_only) == (system_only, baseline_only)


def seconds_of_everything(folder: Path, prompts: int, samples: int) -> float:
    """CPU time from two files to all tables."""
    for name, seed in (("a", 1), ("b", 2)):
        write_answers(folder / f"{name}.jsonl", make_answers(prompts, samples, seed))
    began = time.process_time()
    a, b = (read_answers(folder / f"{name}.jsonl") for name in "ab")
    noisy = RuleJudge("noisy", lambda prompt, answer, reference: hash(answer) % 1000)
    write_judgements(folder / "j.jsonl", judge_pairs(noisy, match(a, b).pairs))
    rows = read_judgements(folder / "j.jsonl")
    summarise(Verdicts.of(rows))
    table = read_style(folder / "a.jsonl", folder / "b.jsonl", ["length", "lists"])
    table.of_judgements(rows, Verdicts.of(rows).lengths)
    compare_verbosity([System.of("a", a), System.of("b", b)], "b")
    return time.process_time() - began


@pytest.mark.parametrize("shape", ["many prompts", "many samples of a few prompts"])
def test_time_grows_with_the_number_of_answers_and_not_with_its_square(tmp_path, shape):
    def seconds(answers: int) -> float:
        prompts, samples = (answers // 4, 4) if shape == "many prompts" else (4, answers // 4)
        return min(seconds_of_everything(tmp_path, prompts, samples) for _ in range(2))

    seconds(200)  # imports and caches
    assert seconds(6400) < 2.2 * 8 * seconds(800)  # a square would be 64 times as much


def test_rows_are_written_and_read_one_at_a_time(tmp_path):
    row = judge_pairs(longer_judge(), match(make_answers(1, 1, 1), make_answers(1, 1, 2)).pairs)[0]
    peaks = []
    for count in (2_000, 20_000):
        tracemalloc.start()
        write_judgements(tmp_path / "j.jsonl", (row for _ in range(count)))
        assert sum(1 for _ in each_row(tmp_path / "j.jsonl")) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "j.jsonl").stat().st_size > 5_000_000
    assert peaks[1] < max(1.5 * peaks[0], 1_000_000)


def test_texts_that_repeat_are_in_memory_once(tmp_path):
    pairs = match(make_answers(3, 4, 1), make_answers(3, 4, 2)).pairs
    rows = judge_pairs(longer_judge(), pairs)
    write_judgements(tmp_path / "j.jsonl", rows)
    found = read_judgements(tmp_path / "j.jsonl")
    assert found == rows
    assert len({id(row.prompt_id) for row in found}) == 3
    assert len({id(row.judge) for row in found}) == 1
    write_answers(tmp_path / "a.jsonl", make_answers(3, 4, 1))
    assert len({id(answer.prompt_id) for answer in read_answers(tmp_path / "a.jsonl")}) == 3


KINDS = [str, int, float, bool, Any, str | None, int | None, float | str, bool | None, list[int], dict[str, Any],
         dict[str, int], list[str] | None, Literal["a", 1], tuple[int, str], dict[str, Any] | None]  # fmt: skip
VALUES = ["a", "", 1, 0, -2.5, 1.0, True, False, None, [], [1], ["a"], {}, {"a": 1}, {"a": "b"}, {1: 2}, [1, "a"],
          float("nan"), 10**40]  # fmt: skip


def outcome(kind: Any, value: Any, name: str) -> str:
    try:
        return repr(typed(kind, value, field=name))
    except WrongShape as error:
        return f"error: {error}"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_field_accepts_what_its_type_accepts(kind):
    made = dataclasses.make_dataclass("Made", [("field", kind)])
    for value in VALUES:
        try:
            found = repr(typed(made, {"field": value}).field)
        except WrongShape as error:
            found = f"error: {error}"
        assert found == outcome(kind, value, "field"), value
