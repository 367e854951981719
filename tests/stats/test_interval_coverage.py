"""The simulations behind docs/evaluation.md: what they found, that they run, and (slow) that it holds elsewhere."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sampo.evaluation.results.verdicts import Comparisons
from sampo.evaluation.results.win_rate import win_rate
from sampo.io import records as results

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import interval_coverage  # noqa: E402, found by the path above

PROMISED = (0.93, 0.97)  # coverage of 95 % from 50 prompts on
pytestmark = pytest.mark.filterwarnings("ignore::sampo.evaluation.results.length_control.ExtrapolationWarning")


def covered(records) -> dict[tuple[str, int], results.Record]:
    return {(r.config["world"], r.config["prompts"]): r for r in records if r.name == "coverage"}


def test_the_recorded_coverage_is_what_is_promised_from_fifty_prompts_on():
    found = covered(results.read(ROOT / "measurements" / "interval_coverage.jsonl"))
    assert len(found) == len(interval_coverage.WORLDS) * len(interval_coverage.SIZES)
    for (world, n), record in found.items():
        slack = 3 * np.sqrt(0.95 * 0.05 / record.n)  # of the simulation itself
        if n >= 50:
            assert PROMISED[0] - slack <= record.value <= PROMISED[1] + slack, (world, n)


def test_a_simulation_counts_the_intervals_that_hold_the_truth():
    def third(rng, n):
        return 0.0, ((-1.0, 1.0) if rng.random() < 1 / 3 else (1.0, 2.0)), (0.0, 0.0)

    ours, other = interval_coverage.cover(third, 10, 3000, 0)
    assert ours == pytest.approx(1 / 3, abs=0.03)
    assert other == 1.0


def test_a_short_simulation_gives_a_record_per_cell_and_the_same_for_the_same_seed():
    runs = [list(interval_coverage.measure(30, seed, "test", only="half ties")) for seed in (1, 1, 2)]
    assert [r.config["prompts"] for r in runs[0] if r.name == "coverage"] == list(interval_coverage.SIZES)
    values = [[record.value for record in run] for run in runs]
    assert values[0] == values[1] != values[2]
    assert all(0.7 <= value <= 1 for value in values[0])


@pytest.mark.slow
@pytest.mark.parametrize("world", interval_coverage.WORLDS)
@pytest.mark.parametrize("n", [50, 200])
def test_every_interval_covers_93_to_97_percent_with_other_seeds_too(world, n):
    draw, _ = interval_coverage.WORLDS[world]
    repeats = 3000
    found, _ = interval_coverage.cover(draw, n, repeats, seed=77 + n)
    slack = 3 * np.sqrt(0.95 * 0.05 / repeats)
    assert PROMISED[0] - slack <= found <= PROMISED[1] + slack


@pytest.mark.slow
def test_the_bootstrap_of_clustered_samples_covers_too():
    rng, hits = np.random.default_rng(5), []
    for _ in range(600):
        p = np.repeat(rng.beta(0.7, 0.7, 100), 4)
        c = Comparisons(prompt=np.repeat(np.arange(100), 4), preference=(rng.random(400) < p) * 1.0)
        found = win_rate(c, interval="bootstrap", resamples=400, seed=1).rate
        hits.append(found.low <= 0.5 <= found.high)
    assert 0.92 <= np.mean(hits) <= 0.975
