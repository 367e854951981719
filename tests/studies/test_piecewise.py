"""The trial of a piecewise linear penalty: its arithmetic, its runs, made small, and verdicts on known effects."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sampo.io import records as results
from sampo.io.records import Record
from sampo.lab.settings import SFT, Run, Settings
from sampo.training.length_penalty import LengthPenalty, Theta
from studies import piecewise
from studies.claims import DATASET, FAILS, HOLDS, OPEN
from studies.piecewise import (
    INTERVALS,
    LAST,
    RECORDS,
    PiecewisePenalty,
    Trial,
    conditions,
    piecewise_claims,
    piecewise_plan,
    piecewise_table,
    run_missing,
    split,
)

MICRO = Settings(steps=3, pairs=64, sft_steps=4, questions=12, judged_pairs=12, max_tokens=24)
ABOUT = {"command": "test", **results.provenance()}


@given(st.lists(st.integers(-300, 300), min_size=1, max_size=20), st.floats(0.5, 200))
def test_parts_add_up_to_the_difference_and_each_lies_in_its_interval(difference, border):
    parts = split(torch.tensor(difference, dtype=torch.float64), border)
    for column, d in zip(parts.T.tolist(), difference, strict=True):
        bounds = (min(d + border, 0), min(max(d, -border), 0), max(min(d, border), 0), max(d - border, 0))
        assert column == pytest.approx(bounds)
    torch.testing.assert_close(parts.sum(0), torch.tensor(difference, dtype=torch.float64))


def make_penalties():
    options = {"learns_length_penalty": True, "has_length_penalty": True, "length_penalty_scale": 7.0, "beta": 0.3}
    args = SimpleNamespace(**options, length_penalty_lr=0.05, length_penalty_start=0.02)
    theta = Theta(args.length_penalty_lr, args.length_penalty_start * 7.0)
    return LengthPenalty(args, None, lambda: theta), PiecewisePenalty(args, None, lambda: theta), theta


def test_equal_slopes_are_the_linear_penalty_and_the_gradients_of_the_slopes_add_up_to_its_gradient():
    linear, ours, theta = make_penalties()
    lengths = torch.tensor([12, 40, 3, 9, 30, 4, 3, 25])
    shifts = [penalty.shift(lengths) for penalty in (linear, ours)]
    torch.testing.assert_close(*shifts)
    for penalty, shift in zip((linear, ours), shifts, strict=True):
        penalty.learn(-torch.nn.functional.logsigmoid(0.3 * shift).sum(), shift, lengths)
    assert sum(one.gradients[0] for one in ours.thetas) == pytest.approx(theta.gradients[0])
    before = [one.value for one in ours.thetas]
    ours.shift(lengths)  # the next batch: a step of Adam, whose first one moves each by the learning rate
    moved = [one.value - old for one, old in zip(ours.thetas, before, strict=True)]
    assert [abs(m) for m in moved] == pytest.approx([0.05] * 4, rel=1e-5)


def test_runs_are_recorded_once_with_their_slopes_and_the_linear_ones_beside_them(tmp_path, monkeypatch):
    runs = [Run(0, "all", DATASET, MICRO)]
    run_missing(tmp_path, runs, ABOUT)
    linear, found = (results.read(tmp_path / name) for name in ("records.jsonl", RECORDS))
    numbers = {record.name: record.value for record in found}
    assert {f"slope/{name}" for name in INTERVALS} < numbers.keys()
    assert LAST in numbers
    assert len({numbers[f"slope/{name}"] for name in INTERVALS}) > 1
    assert [record.name for record in linear].count(LAST) == 1
    monkeypatch.setattr(piecewise, "measure", lambda *args: pytest.fail("was run again"))
    run_missing(tmp_path, runs, ABOUT)
    assert results.read(tmp_path / RECORDS) == found


def made_trial(tokens, wins, seeds=3):
    """Linear runs at 30 tokens from a start of 20; piecewise ones at so many tokens and wins more."""
    linear, ours = [], []
    for run in piecewise_plan(MICRO, seeds):
        config = run.config
        small = 0.01 * run.seed
        for name, value, more in (("tokens", 30.0, tokens + small), ("win_rate", 0.7, wins + small / 100)):
            linear.append(Record(name=name, value=value, n=9, config=config))
            ours.append(Record(name=name, value=value + more, n=9, config={**config, "penalty": "piecewise"}))
        for name in ("kl", LAST):
            linear.append(Record(name=name, value=1.0, n=9, config=config))
            ours.append(Record(name=name, value=1.0, n=9, config={**config, "penalty": "piecewise"}))
    for seed in range(seeds):
        config = Run(seed, "", SFT, MICRO).config
        linear.append(Record(name="tokens", value=20.0, n=9, config=config))
    return Trial(linear, ours)


@pytest.mark.parametrize(
    ("tokens", "wins", "verdicts"),
    [(-5.0, 0.05, (HOLDS, HOLDS)), (5.0, -0.05, (FAILS, FAILS)), (-5.0, -0.05, (FAILS, FAILS))],
)
def test_verdicts_follow_the_effects_that_were_put_in(tokens, wins, verdicts):
    claims = piecewise_claims(made_trial(tokens, wins))
    assert [{f.verdict for f in claim.findings} for claim in claims] == [{one} for one in verdicts]
    few = piecewise_claims(made_trial(tokens, wins, seeds=2))
    assert {f.verdict for claim in few for f in claim.findings} == {OPEN}


def test_the_table_has_both_penalties_under_every_condition():
    table = piecewise_table(made_trial(-5.0, 0.0))
    assert len(table.splitlines()) == 2 + 2 * len(conditions())
    assert "25.0 / 0.700 / 1.0" in table
