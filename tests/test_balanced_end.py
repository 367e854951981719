"""The trial of an end token whose weight leaves no length pressure: it leaves none, and the trainer uses it."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from sampo import results
from sampo.lab.settings import Settings
from sampo.weighting import length_pressure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import balanced_end


@pytest.mark.parametrize("seed", range(3))
def test_no_pressure_is_left_and_only_the_end_tokens_weight_changes(seed):
    rng = torch.Generator().manual_seed(seed)
    rows, n = 8, 12
    lengths = torch.randint(1, n, (rows, 1), generator=rng)
    position = torch.arange(n).expand(rows, n)
    mask, end = position < lengths, position == lengths - 1
    end[0] = False  # an answer that was cut has none
    end_probs = 0.9 * torch.rand(rows, n, generator=rng)
    weights = mask * torch.rand(rows, n, generator=rng)
    new = balanced_end.balanced(weights, end, end_probs)
    torch.testing.assert_close(new[~end], weights[~end])
    left = torch.stack([length_pressure(new[[i, j]], end[[i, j]], end_probs[[i, j]])[0] for i, j in ((1, 2), (5, 7))])
    torch.testing.assert_close(left, torch.zeros(2), atol=1e-5, rtol=0)
    assert (new >= 0).all()


def test_the_trainer_trains_with_it_and_what_is_known_is_not_run_again(tmp_path, capsys, monkeypatch):
    few = {"sft_steps": 2, "pairs": 64, "questions": 12, "demonstrations": 64, "judged_pairs": 20, "max_tokens": 8}
    monkeypatch.setattr(balanced_end, "Settings", lambda **more: Settings(**few, **{"steps": 2, **more}))
    monkeypatch.setattr(balanced_end, "METHODS", {"sampo_end": ()})
    seen = []

    def spy(weights, end, end_probs):
        new = original(weights, end, end_probs)
        seen.append((weights, new, end))
        return new

    original = balanced_end.balanced
    monkeypatch.setattr(balanced_end, "balanced", spy)
    words = ["--out", str(tmp_path), "--seeds", "1", "--steps", "2"]
    balanced_end.main(words)
    assert seen
    assert all((old[end] == 1).all() and (new[end] != 1).any() for old, new, end in seen)
    records = results.read(tmp_path / "records.jsonl")
    divergence = {
        flag: [r.value for r in records if r.config["balanced"] is flag and r.name == "kl"] for flag in (True, False)
    }
    assert divergence[True] != divergence[False]
    assert "| `short` | SamPO | 1 |" in capsys.readouterr().out
    with mock.patch.object(balanced_end, "measure", side_effect=AssertionError):
        balanced_end.main(words)
    assert len(results.read(tmp_path / "records.jsonl")) == len(records)
