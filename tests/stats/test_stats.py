"""Intervals, tests, the bootstrap and the logistic fit: closed forms, slow loops and simulation."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from sampo.stats import intervals
from sampo.stats.bootstrap import bootstrap
from sampo.stats.logistic import newton

OUTCOMES = {  # name -> (true mean, sampler): what judges produce, from coins to soft probabilities
    "coins 0.5": (0.5, lambda rng, size: (rng.random(size) < 0.5) * 1.0),
    "coins 0.2": (0.2, lambda rng, size: (rng.random(size) < 0.2) * 1.0),
    "many ties": (0.45, lambda rng, size: rng.choice([1.0, 0.5, 0.0], size=size, p=[0.2, 0.5, 0.3])),
    "few wins": (0.17, lambda rng, size: rng.choice([1.0, 0.5, 0.0], size=size, p=[0.07, 0.2, 0.73])),
    "soft": (0.4, lambda rng, size: rng.beta(0.8, 1.2, size)),
}


@given(st.integers(1, 400), st.data())
@settings(deadline=None, max_examples=60)
def test_for_wins_and_losses_the_interval_is_wilsons(n, data):
    wins = data.draw(st.integers(0, n))
    found = intervals.rate_interval(np.r_[np.ones(wins), np.zeros(n - wins)])
    expected = stats.binomtest(wins, n).proportion_ci(method="wilson")
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
@settings(deadline=None, max_examples=100)
def test_the_interval_holds_the_rate_stays_in_bounds_and_mirrors(values):
    scores = np.array(values)
    found, mirror = intervals.rate_interval(scores), intervals.rate_interval(1 - scores)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1
    assert found.high - found.low > 0
    assert mirror.interval == pytest.approx((1 - found.high, 1 - found.low), abs=1e-9)


def test_ties_narrow_the_interval_and_equal_scores_do_not_close_it():
    coins = intervals.rate_interval(np.tile([0.0, 1.0], 50))
    ties = intervals.rate_interval(np.tile([0.0, 0.5, 0.5, 1.0], 25))
    assert ties.high - ties.low == pytest.approx((coins.high - coins.low) / math.sqrt(2), rel=0.02)
    assert np.ptp(intervals.rate_interval(np.full(50, 0.5)).interval) > 0.03


def coverage(mean, sampler, n, repeats, seed):
    """Share of the simulated data sets whose interval holds the true mean."""
    rng = np.random.default_rng(seed)
    found = (intervals.rate_interval(sampler(rng, n)) for _ in range(repeats))
    return np.mean([one.low <= mean <= one.high for one in found])


@pytest.mark.parametrize("name", OUTCOMES)
def test_the_interval_of_a_win_rate_covers_what_it_says(name):
    # 2,000 repeats have a standard error of half a point: 1.1 points of slack around 93 to 97
    assert 0.919 <= coverage(*OUTCOMES[name], n=60, repeats=2000, seed=1) <= 0.981


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTCOMES)
@pytest.mark.parametrize("n", [50, 100, 400, 805])
def test_the_interval_of_a_win_rate_covers_93_to_97_percent(name, n):
    assert 0.93 <= coverage(*OUTCOMES[name], n=n, repeats=20000, seed=n) <= 0.97


@pytest.mark.parametrize("skew", [0.5, 0.8])
def test_the_interval_of_a_mean_length_covers_more_than_students_t(skew):
    rng = np.random.default_rng(2)
    values = np.exp(rng.normal(0, skew, (1500, 80)))
    mean = math.exp(skew**2 / 2)
    found = [intervals.mean_interval(row) for row in values]
    plain = [stats.t.interval(0.95, 79, loc=row.mean(), scale=stats.sem(row)) for row in values]
    ours = np.mean([one.low <= mean <= one.high for one in found])
    students = np.mean([low <= mean <= high for low, high in plain])
    assert ours >= 0.925
    assert ours >= students - 0.006  # one standard error of the simulation


def test_the_interval_of_a_symmetric_mean_is_students():
    values = np.array([1.0, 2, 3, 4, 5, 6, 7])
    expected = stats.t.interval(0.95, 6, loc=4, scale=stats.sem(values))
    assert intervals.mean_interval(values).interval == pytest.approx(expected)


def test_skewness_moves_the_interval_and_changes_its_sign_with_it():
    values = np.exp(np.random.default_rng(0).normal(size=60))
    found, mirror = intervals.mean_interval(values), intervals.mean_interval(-values)
    assert found.high - found.value > found.value - found.low
    assert mirror.interval == pytest.approx((-found.high, -found.low))


@given(st.integers(1, 120), st.sampled_from([0.5, 0.9]), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_the_interval_of_a_quantile_is_the_exact_one_between_two_ranks(n, level, seed):
    values = np.random.default_rng(seed).exponential(size=n)
    found = intervals.quantile_interval(values, np.arange(n), level)
    expected = stats.quantile_test(values, q=0.0, p=level).confidence_interval()
    for ours, exact in ((found.low, expected.low), (found.high, expected.high)):
        assert ours == exact or (ours is None and not np.isfinite(exact))
    assert found.value == np.quantile(values, level, method="inverted_cdf")


def test_samples_of_a_prompt_widen_the_interval_of_a_quantile():
    values = np.random.default_rng(0).exponential(size=100)
    alone = intervals.quantile_interval(np.repeat(values, 4), np.arange(400), 0.5)
    together = intervals.quantile_interval(np.repeat(values, 4), np.repeat(np.arange(100), 4), 0.5)
    assert together.interval == intervals.quantile_interval(values, np.arange(100), 0.5).interval
    assert np.ptp(together.interval) > 1.5 * np.ptp(alone.interval)


def test_quantiles_weigh_prompts_and_not_answers():
    values = np.array([1.0, 2.0, 3.0] + [9.0] * 50)
    codes = np.array([0, 1, 2] + [3] * 50)
    assert intervals.quantile_interval(values, codes, 0.5).value == 2.0


def test_holm_is_the_published_step_down():
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert intervals.holm([]) == []


def test_the_paired_interval_covers_what_it_says():
    rng = np.random.default_rng(6)
    hits = []
    for _ in range(1500):
        better = rng.random(80) < 0.15  # where they differ, the first wins two times in three
        d = np.where(better, np.where(rng.random(80) < 2 / 3, 1.0, -1.0), 0.0)
        found = intervals.difference_interval(d)
        hits.append(found.low <= 0.05 <= found.high)
    assert 0.92 <= np.mean(hits) <= 0.98


@pytest.mark.parametrize(("difference", "sd"), [(0.1, 0.5), (0.05, 0.3)])
def test_as_many_prompts_as_said_show_a_difference_as_often_as_said(difference, sd):
    n = intervals.prompts_needed(difference, sd=sd, power=0.8)
    assert n == math.ceil(((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * sd / difference) ** 2)
    assert intervals.detectable_difference(n, sd=sd) == pytest.approx(difference, rel=0.01)
    rng = np.random.default_rng(0)
    share = sd**2 / 0.25  # a coin with ties has this variance
    scores = np.where(rng.random((4000, n)) < share, rng.random((4000, n)) < 0.5 + difference / share, 0.5)
    low = [intervals.rate_interval(row).low for row in scores]
    assert 0.77 <= np.mean(np.array(low) > 0.5) <= 0.83


def test_three_points_need_about_two_thousand_coins():
    assert intervals.prompts_needed(0.03) == 2181
    assert intervals.prompts_needed(0.03, sd=0.35) == 1069  # paired scores of real systems: about a thousand


def test_newton_minimises_and_weights_are_counts():
    rng = np.random.default_rng(0)
    x, y = np.stack([rng.normal(size=40), np.ones(40)], axis=1), rng.random(40)
    counts = rng.integers(0, 3, 40)
    ridge = np.array([0.3, 0.1])
    found = newton(x[None], y, counts[None].astype(float), ridge)[0]
    rows = np.repeat(np.arange(40), counts)

    def loss(b):
        eta = x[rows] @ b
        return (np.logaddexp(0, eta) - y[rows] * eta).sum() + (ridge * b**2).sum() / 2

    assert found == pytest.approx(optimize.minimize(loss, np.zeros(2), tol=1e-12).x, abs=1e-5)


def test_statistics_load_no_torch_and_nothing_of_the_other_packages():
    code = """
import sys
import sampo.stats.bootstrap, sampo.stats.intervals, sampo.stats.logistic
parts = {name.split('.')[1] for name in sys.modules if name.startswith('sampo.')}
print(sorted(parts), [name for name in ('torch', 'transformers', 'pyarrow') if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "['stats'] []", done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# the bootstrap


def test_the_bootstrap_is_the_slow_loop_over_the_drawn_prompts():
    values = np.random.default_rng(0).normal(size=30)
    [mean, share] = bootstrap(
        [lambda counts: counts @ values / 30, lambda counts: counts @ (values > 0) / 30], 30, resamples=400, seed=7
    )
    rng = np.random.default_rng(7)  # the same draws, one by one
    drawn = [np.repeat(values, rng.multinomial(30, np.full(30, 1 / 30))) for _ in range(400)]
    for found, samples in ((mean, [d.mean() for d in drawn]), (share, [(d > 0).mean() for d in drawn])):
        assert found.interval == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))
        assert found.se == pytest.approx(np.std(samples, ddof=1))
        assert found.n == 30
    assert mean.value == pytest.approx(values.mean())


def test_the_bootstrap_has_no_interval_where_a_resample_has_no_value():
    values = np.array([0.0, 1.0])

    def spread(counts):  # NaN where only one of the two prompts is drawn
        share = counts @ values / 2
        return np.where((share > 0) & (share < 1), share, np.nan)

    [found, nothing] = bootstrap([spread, lambda counts: np.full(len(counts), np.nan)], 2, resamples=100, seed=0)
    assert (found.value, found.interval, found.se) == (0.5, None, None)
    assert nothing == intervals.undefined(2)


def test_too_few_resamples_are_refused():
    with pytest.raises(ValueError, match="`resamples` must be at least 100 for an interval, got 99"):
        bootstrap([lambda counts: counts[:, 0]], 3, resamples=99, seed=0)
