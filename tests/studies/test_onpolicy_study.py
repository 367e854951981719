"""The study of on-policy rounds: its runs, made small, and its verdicts on records with known effects."""

import itertools

import pytest

from sampo.io import records as results
from sampo.io.records import Record
from sampo.lab.settings import SFT, Settings
from studies import onpolicy
from studies.claims import FAILS, HOLDS, OPEN
from studies.onpolicy import (
    BIASES,
    LAST,
    METHODS,
    RECORDS,
    RULES,
    OnPolicyRun,
    OnPolicySettings,
    OnPolicyStudy,
    onpolicy_claims,
    onpolicy_plan,
    onpolicy_table,
    run_missing,
)

MICRO = OnPolicySettings(steps=2, questions=24)
LAB = Settings(sft_steps=4, questions=12, judged_pairs=12, max_tokens=24)


def test_the_plan_has_every_rule_with_every_method_and_bias_for_each_seed():
    runs = onpolicy_plan(2)
    assert len(runs) == len(set(runs)) == 2 * (1 + len(BIASES) * len(RULES) * len(METHODS))
    assert [run.method for run in runs].count(SFT) == 2


def made_records(tokens, seeds=3):
    """Records of all runs; `tokens(bias, rule, method)` is added to the start's 20, with a spread over seeds."""
    found = []
    for run in onpolicy_plan(seeds):
        more = 0 if run.method == SFT else tokens(run.bias, run.rule, run.method)
        numbers = {"tokens": 20 + more + 0.1 * run.seed * (run.method != SFT), "win_rate": 0.7, "kl": 1.0, LAST: 1.0}
        config = run.config(MICRO, LAB)
        found += [Record(name=name, value=value, n=9, config=config) for name, value in numbers.items()]
    return found


def test_verdicts_follow_the_effects_that_were_put_in():
    def tokens(bias, rule, method):
        return 0.0 if rule == "length_matched" else 20.0 if method == "dpo" else 30.0 if method == "sampo" else 10.0

    claims = onpolicy_claims(OnPolicyStudy(made_records(tokens)))
    verdicts = [{finding.verdict for finding in claim.findings} for claim in claims]
    longer, matched, capped, regressed, sampo, ours, doors = verdicts
    assert longer == matched == ours == doors == {HOLDS}
    assert sampo == {FAILS}
    assert capped == regressed == {FAILS}  # no change at all is not less
    few = onpolicy_claims(OnPolicyStudy(made_records(tokens, seeds=2)))
    assert {finding.verdict for claim in few for finding in claim.findings} == {OPEN}


def test_runs_are_recorded_once_and_those_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    few = [OnPolicyRun(0), *(OnPolicyRun(0, 1.0, rule, "dpo") for rule in ("best_worst", "length_matched"))]
    monkeypatch.setattr(onpolicy, "onpolicy_plan", lambda seeds: few)
    run_missing(tmp_path, 1, MICRO, LAB)
    first = results.read(tmp_path / RECORDS)
    assert [record.name for record in first].count(LAST) == len(few)
    rounds = {(r.config["rule"], r.name): r.value for r in first if r.name.startswith("pairs/")}
    assert rounds.keys() == {
        (rule, f"pairs/{n}") for rule, n in itertools.product(("best_worst", "length_matched"), (1, 2))
    }
    assert 0 < rounds["length_matched", "pairs/1"] <= rounds["best_worst", "pairs/1"] <= MICRO.questions
    monkeypatch.setattr(onpolicy.OnPolicyBench, "measure", lambda *args: pytest.fail("was run again"))
    run_missing(tmp_path, 1, MICRO, LAB)
    assert results.read(tmp_path / RECORDS) == first
    table = onpolicy_table(OnPolicyStudy(first))
    assert table.count("(1)") == 2
