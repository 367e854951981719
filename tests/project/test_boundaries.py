"""Values at the border of a rule, which tests over random numbers seldom hit."""

import inspect
from importlib import import_module

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats

from sampo.audit.bias import estimate_mean, estimate_share, preference_slope
from sampo.data.lengths import count_tokens
from sampo.evaluation.results.verdicts import Verdicts, compare_orders
from sampo.evaluation.results.win_rate import length_matched, paired, win_rate, winner_is_longer
from sampo.stats.intervals import wilson
from sampo.training.length_metrics import LengthSums

TWO = np.array([0, 1])  # two prompts of one pair each


def test_two_prompts_are_enough_for_an_interval_and_one_is_not():
    found = estimate_mean(np.array([1.0, 3.0]), TWO)
    low, high = stats.t.interval(0.95, 1, loc=2, scale=1)  # sd √2 over √2
    assert (found.value, found.se, found.n) == (2, pytest.approx(1), 2)
    assert found.interval == pytest.approx((low, high))
    assert estimate_mean(np.array([1.0, 3.0]), np.array([0, 0])).interval is None
    difference = np.array([30, -10])
    slope = preference_slope(difference, TWO)
    assert slope.interval == pytest.approx(stats.t.interval(0.95, 1, loc=slope.value, scale=slope.se))
    assert preference_slope(difference, np.array([0, 0])).interval is None


def test_the_share_of_two_prompts_counts_for_no_more_than_one_coin():
    found = estimate_share(np.array([1.0, 0.0]), TWO)
    assert found.se == pytest.approx(0.5)  # √(p(1 − p)/2) by the correction 2/(2 − 1)
    assert found.interval == pytest.approx(wilson(0.5, 1.0))


@pytest.mark.parametrize("estimate", [estimate_mean, estimate_share])
def test_nothing_has_no_mean_and_no_share(estimate):
    found = estimate(np.array([]), np.array([], dtype=int))
    assert (found.value, found.interval, found.se, found.n) == (None, None, None, 0)


def test_a_response_that_just_fits_is_not_cut():
    rows = Dataset.from_dict(
        {
            "prompt_ids": [[1, 2], [1, 2], [1]],
            "chosen_ids": [[3, 4, 5], [3, 4, 5, 6], [3]],
            "rejected_ids": [[7, 8, 9], [7, 8, 9], [4, 5, 6, 7, 8, 9]],
        }
    )
    found = count_tokens(rows, max_length=5)
    assert (found.cut_chosen, found.cut_rejected) == (1, 1)
    assert (found.chosen_tokens, found.rejected_tokens) == (3 + 3 + 1, 3 + 3 + 4)
    assert found.describe(5).startswith("3 pairs, 2.3 chosen and 3.3 rejected tokens on average; at max_length 5: ")
    assert "1 chosen and 1 rejected responses truncated" in found.describe(5)


def test_a_margin_of_exactly_0_is_not_right():
    sums = LengthSums()
    lengths = {"chosen_tokens": np.array([5.0, 5, 2, 2]), "rejected_tokens": np.array([3.0, 3, 4, 4])}
    margin = np.array([0.0, 1.0, 0.0, -1.0])
    sums.add({**lengths, "selected_tokens": np.full(4, 6.0), "margin": margin, "dpo_margin": margin})
    found = sums.metrics()
    for prefix in ("", "dpo/"):
        assert found[f"{prefix}accuracies/chosen_longer"] == 0.5
        assert found[f"{prefix}accuracies/chosen_shorter"] == 0


MODULES = (
    *("stats.intervals", "stats.bootstrap", "evaluation.results.win_rate", "evaluation.results.length_control"),
    *("evaluation.results.verbosity", "evaluation.results.summary", "evaluation.results.comparing"),
    *("evaluation.results.metrics", "evaluation.results.alpaca_eval", "audit.bias", "audit.audit"),
    *("diagnostics.findings", "diagnostics.pair_scores"),
)


def test_every_interval_is_one_of_95_percent_unless_another_is_asked_for():
    defaults = {}
    for name in MODULES:
        module = import_module(f"sampo.{name}")
        for what, thing in vars(module).items():
            if inspect.isfunction(thing) and thing.__module__ == module.__name__:
                parameter = inspect.signature(thing).parameters.get("confidence")
                if parameter is not None and parameter.default is not inspect.Parameter.empty:
                    defaults[f"{name}.{what}"] = parameter.default
    assert len(defaults) >= 15
    assert set(defaults.values()) == {0.95}, {name: value for name, value in defaults.items() if value != 0.95}
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 70, 80), rng.integers(50, 70, 80)
    verdicts = Verdicts(
        prompt=np.repeat(np.arange(40), 2),
        order=np.tile([0, 1], 40),
        preference=rng.random(80),
        system_length=np.repeat(lengths[0][:40], 2),
        baseline_length=np.repeat(lengths[1][:40], 2),
    )
    both = compare_orders(verdicts)
    for measure in (win_rate, length_matched, winner_is_longer):
        default, wide, narrow = measure(both), measure(both, confidence=0.95), measure(both, confidence=0.5)
        intervals = [getattr(found, "rate", found).interval for found in (default, wide, narrow)]
        assert intervals[0] == intervals[1] != intervals[2]
    assert paired(both, both).difference.interval == paired(both, both, confidence=0.95).difference.interval
