"""`sampo panel`: each number against a loop over the rows, and what no panel may be made of."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from sampo.cli import main
from sampo.evaluation.answers.answers import Answer, write_answers
from sampo.evaluation.judging.judges import ONCE, AnswerPair, Comparison, Verdict, empty_answers, judge_pairs
from sampo.evaluation.results import judged as judged_files
from sampo.evaluation.results.judged import AnswerFile, Judged, read_judged
from sampo.evaluation.results.panel import agreement, check_members, combine, leave_one_out

N, SAMPLES = 40, 2
FILES = AnswerFile("a.jsonl", "a" * 16, None), AnswerFile("b.jsonl", "b" * 16, None)


class RandomJudge:
    """Prefers at random, ties now and then, and fails in one order or both."""

    about: dict = {}

    def __init__(self, name: str, fails: float):
        self.name, self._random, self._fails = name, random.Random(name), fails

    def judge(self, comparisons: list[Comparison], progress=None) -> list[Verdict]:
        return [self._verdict() for _ in comparisons]

    def _verdict(self) -> Verdict:
        if self._random.random() < self._fails:
            return Verdict(None, "unparseable", "what?")
        return Verdict(self._random.choice([0.0, 0.0, 0.5, 1.0, 1.0, 1.0]))


def pairs() -> list[AnswerPair]:
    rng = random.Random(0)
    return [
        AnswerPair(
            Answer(prompt=f"q{i}", answer="so " * rng.randint(1, 30), sample=sample),
            Answer(prompt=f"q{i}", answer="no " * rng.randint(1, 30)),
        )
        for i in range(N)
        for sample in range(SAMPLES)
    ]


def run_of(name: str, fails: float, control: int | None = 10) -> Judged:
    judge, these = RandomJudge(name, fails), pairs()
    empty = judge_pairs(judge, empty_answers(these, control))
    rows = judge_pairs(judge, these)
    return Judged(system=FILES[0], baseline=FILES[1], judge={"name": name}, n=None, seed=0, rows=rows, empty=empty)


def three(fails: float = 0.1) -> dict[str, Judged]:
    return {name: run_of(name, fails) for name in ("ann", "bob", "cid")}


def by_hand(runs: dict[str, Judged], rule: str, quorum: int) -> dict:
    """(prompt, sample, order) → preference of the panel or None, by the words of the documentation."""
    table = {name: {(r.prompt_id, r.sample, r.order): r.preference for r in run.rows} for name, run in runs.items()}
    found = {}
    for prompt, sample, order in next(iter(table.values())):
        votes = []
        for rows in table.values():
            both = [rows[prompt, sample, "ab"], rows[prompt, sample, "ba"]]
            if None not in both:
                votes.append(rows[prompt, sample, order])
        if len(votes) < quorum:
            found[prompt, sample, order] = None
        elif rule == "mean":
            found[prompt, sample, order] = math.fsum(votes) / len(votes)
        else:
            wins, losses = sum(v > 0.5 for v in votes), sum(v < 0.5 for v in votes)
            half = len(votes) / 2
            found[prompt, sample, order] = 1.0 if wins > half else 0.0 if losses > half else 0.5
    return found


@pytest.mark.parametrize("quorum", [1, 2, 3])
@pytest.mark.parametrize("rule", ["mean", "majority"])
def test_the_panel_says_what_a_loop_over_its_members_says(rule, quorum):
    runs = three(fails=0.25)
    found = combine(runs, rule, quorum=quorum)
    expected = by_hand(runs, rule, quorum)
    assert {(r.prompt_id, r.sample, r.order): r.preference for r in found.rows} == pytest.approx(expected)
    assert [(r.prompt_id, r.sample, r.order) for r in found.rows] == list(expected)
    assert found.failures == Counter("no_quorum" for value in expected.values() if value is None)
    failed = next(row for row in found.rows if row.failure)
    assert any(f"{name}" in failed.detail for name in runs)


def test_a_missing_judge_is_absent_and_no_tie():
    runs = {name: run_of(name, 0.0) for name in ("ann", "bob", "cid")}
    lost = [replace(row, preference=None, failure="timeout") for row in runs["cid"].rows]
    won = {name: replace(run, rows=[replace(r, preference=1.0) for r in run.rows]) for name, run in runs.items()}
    won["cid"] = replace(won["cid"], rows=lost)
    for rule in ("mean", "majority"):
        assert {row.preference for row in combine(won, rule, quorum=2).rows} == {1.0}
        assert {row.failure for row in combine(won, rule).rows} == {"no_quorum"}


def test_without_failures_the_mean_of_the_panel_is_the_mean_of_the_win_rates():
    runs = three(fails=0.0)
    rates = [run.summary().raw.rate.value for run in runs.values()]
    found = combine(runs).summary()
    assert found.raw.rate.value == pytest.approx(sum(rates) / 3)
    assert found.judge == "mean of 3 judges"
    assert found.orders is not None


def test_the_control_is_combined_on_the_prompts_that_all_have():
    runs = {"ann": run_of("ann", 0.0, None), "bob": run_of("bob", 0.0, 10), "cid": run_of("cid", 0.0, 5)}
    found = combine(runs)
    assert {row.prompt_id for row in found.empty} == {row.prompt_id for row in runs["cid"].empty}
    key = (found.empty[0].prompt_id, found.empty[0].sample, found.empty[0].order)
    theirs = [
        next(r.preference for r in run.empty if (r.prompt_id, r.sample, r.order) == key) for run in runs.values()
    ]
    assert found.empty[0].preference == pytest.approx(sum(theirs) / 3)


def outcomes(run: Judged) -> dict:
    table = {}
    for row in run.rows:
        table.setdefault((row.prompt_id, row.sample), []).append(row.preference)
    return {pair: np.sign(sum(both) - 1) for pair, both in table.items() if None not in both}


def kappa(a: list, b: list) -> float:
    """From the table of both outcomes, as Cohen (1960) writes it."""
    table = np.zeros((3, 3))
    for x, y in zip(a, b, strict=True):
        table[int(x) + 1, int(y) + 1] += 1
    table /= table.sum()
    chance = sum(table[i].sum() * table[:, i].sum() for i in range(3))
    return (np.trace(table) - chance) / (1 - chance)


def test_agreement_is_that_of_the_table_of_outcomes():
    runs = three(fails=0.2)
    found = agreement(runs)
    assert [(one.first, one.second) for one in found] == list(combinations(runs, 2))
    for one in found:
        ours, theirs = outcomes(runs[one.first]), outcomes(runs[one.second])
        both = [pair for pair in ours if pair in theirs]
        assert one.pairs == len(both) < N * SAMPLES
        assert one.kappa == pytest.approx(kappa([ours[p] for p in both], [theirs[p] for p in both]))
        per_prompt = {}
        for pair in both:
            per_prompt.setdefault(pair[0], []).append(ours[pair] == theirs[pair])
        assert one.same.value == pytest.approx(np.mean([np.mean(same) for same in per_prompt.values()]))
        assert one.same.n == len(per_prompt)


def test_leave_one_out_is_the_panel_of_the_others():
    runs = three(fails=0.1)
    full = combine(runs, "majority").summary().raw.rate.value
    for member in leave_one_out(runs, "majority"):
        rest = {name: run for name, run in runs.items() if name != member.name}
        without = combine(rest, "majority")
        assert member.without.value == pytest.approx(without.summary().raw.rate.value)
        assert member.rate.value == pytest.approx(runs[member.name].summary().raw.rate.value)
        assert member.others.pairs == len(outcomes(runs[member.name]).keys() & outcomes(without).keys())
        assert member.shift is not None
        assert abs(member.shift.difference.value - (full - member.without.value)) < 0.1  # on shared prompts alone


def test_a_panel_that_sees_no_order_has_no_consistency_of_orders():
    runs = {name: replace(run_of(name, 0.0), judge={"name": name}) for name in ("longer", "reward")}
    assert combine(runs).verdicts().order is None
    assert combine({**runs, "ann": run_of("ann", 0.0)}).verdicts().order is not None
    shown_once = run_of("human", 0.0)
    shown_once = replace(shown_once, rows=[replace(row, detail=ONCE) for row in shown_once.rows])
    assert combine({"longer": runs["longer"], "human": shown_once}).verdicts().order is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"system": AnswerFile("c.jsonl", "c" * 16, None)}, "must have judged the same answers, got a.jsonl as `sys"),
        ({"judge": {"name": "ann"}}, "The judges of a panel must differ, got ann and bob"),
    ],
)
def test_what_does_not_belong_together_is_no_panel(changed, words):
    runs = {"ann": run_of("ann", 0.0), "bob": replace(run_of("bob", 0.0), **changed)}
    with pytest.raises(ValueError, match=words):
        check_members(runs)


def test_pairs_that_one_judge_lacks_are_an_error_or_omitted():
    runs = {"ann": run_of("ann", 0.0), "bob": run_of("bob", 0.0)}
    fewer = {**runs, "bob": replace(runs["bob"], rows=runs["bob"].rows[: 10 * SAMPLES * 2], n=10)}
    with pytest.raises(ValueError, match="must have the same prompts, got 10 that all have, and 30 further ones in a"):
        check_members(fewer)
    kept = check_members(fewer, matched_only=True)
    assert {len(run.rows) for run in kept.values()} == {10 * SAMPLES * 2}
    assert {run.n for run in kept.values()} == {10}
    one_sample = {**runs, "bob": replace(runs["bob"], rows=[r for r in runs["bob"].rows if r.sample == 0])}
    with pytest.raises(ValueError, match="same samples of each prompt, got 80 pairs of ann and 40 of bob, 40 of"):
        check_members(one_sample)
    with pytest.raises(ValueError, match="at least two judges, got 1"):
        check_members({"ann": runs["ann"]})


@pytest.mark.parametrize(
    ("options", "words"), [(("median", None), "`rule` must be"), (("mean", 4), "`quorum` must be")]
)
def test_wrong_settings_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        combine(three(), options[0], quorum=options[1])


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place, rng = tmp_path_factory.mktemp("panel"), random.Random(1)
    for name in ("sft", "sampo", "dpo"):
        rows = [
            Answer(
                prompt=f"where is {i}?",
                answer=" ".join([rng.choice([f"town{i}", "nowhere"]), *["so"] * rng.randint(0, 4)]),
                extra={"reference": f"town{i}"},
            )
            for i in range(30)
        ]
        write_answers(place / f"{name}.jsonl", rows)
    for system in ("sampo", "dpo"):
        for judge in ("contains", "exact", "longer"):
            files = ["--system", str(place / f"{system}.jsonl"), "--baseline", str(place / "sft.jsonl")]
            assert main(["judge", *files, "--judge", judge, "--out", str(place / f"{system}-{judge}.jsonl")]) == 0
    return place


def panel(folder: Path, system: str, *words: str) -> dict:
    files = [str(folder / f"{system}-{judge}.jsonl") for judge in ("contains", "exact", "longer")]
    assert main(["panel", *files, "--out", str(folder / f"{system}-panel.jsonl"), *words]) == 0
    return json.loads((folder / f"{system}-panel.summary.json").read_text())


def test_the_command_writes_judgements_that_compare_reads(folder, capsys):
    found = panel(folder, "sampo", "--rule", "majority")
    panel(folder, "dpo", "--rule", "majority")
    out = capsys.readouterr().out
    assert "by majority of 3 judges on 30 prompts" in out
    assert "Judges of the panel" in out
    assert [row["judge"] for row in found["panel"]["members"]] == ["contains", "exact", "longer"]
    assert len(found["panel"]["agreement"]) == 3
    files = [str(folder / f"{system}-panel.jsonl") for system in ("sampo", "dpo")]
    assert main(["compare", "--judgements", *files]) == 0
    assert "by majority of 3 judges" in capsys.readouterr().out
    read = read_judged(folder / "sampo-panel.jsonl")
    assert read.summary().raw.rate.value == found["result"]["win_rate"]
    assert read.verdicts().order is None


def test_costs_of_the_members_are_added_and_shown(folder, tmp_path, capsys):
    paths = []
    for number, name in enumerate(("contains", "longer"), 1):
        run = read_judged(folder / f"sampo-{name}.jsonl")
        cost = {"tokens_in": 100 * number, "tokens_out": 7, "price": 0.25}
        run = replace(run, judge={**run.judge, "model": f"m{number}"}, cost={"requests": 0, "all_runs": cost})
        paths.append(tmp_path / f"{name}.jsonl")
        judged_files.write(paths[-1], run, run.summary(), more={}, command="")
    assert main(["panel", *map(str, paths), "--out", str(tmp_path / "panel.jsonl")]) == 0
    written = json.loads((tmp_path / "panel.summary.json").read_text())
    assert written["cost"] == {"tokens_in": 300, "tokens_out": 14, "price": 0.5}
    assert [row["cost"]["tokens_in"] for row in written["panel"]["members"]] == [100, 200]
    assert "0.2500" in capsys.readouterr().out


def test_a_panel_without_a_quorum_somewhere_says_so(tmp_path, capsys):
    paths = []
    for name, fails in (("ann", 0.3), ("bob", 0.0)):
        paths.append(tmp_path / f"{name}.jsonl")
        run = run_of(name, fails)
        judged_files.write(paths[-1], run, run.summary(), more={}, command="")
    with pytest.raises(SystemExit) as stopped:
        main(["panel", *map(str, paths), "--out", str(tmp_path / "panel.jsonl")])
    assert stopped.value.code == 3
    assert "pairs left out" in capsys.readouterr().out
    assert main(["panel", *map(str, paths), "--quorum", "1", "--out", str(tmp_path / "panel.jsonl")]) == 0
