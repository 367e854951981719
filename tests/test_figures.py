"""What the figures show: their data, their labels, and that they open no window."""

import numpy as np
import pytest
from scipy.special import expit

from sampo.audit.bias import preference_slope
from sampo.report import figures


@pytest.fixture(scope="module")
def pairs():
    """Lengths of 3,000 pairs of which the longer response is chosen with log-odds of 1.5 per 100 words."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 200, 3000), rng.integers(1, 200, 3000)
    first = rng.random(3000) < expit(1.5 * (a - b) / 100)
    return np.where(first, a, b), np.where(first, b, a)


def test_the_length_histogram_holds_every_response_once(pairs):
    ax = figures.length_histogram(*pairs, unit="words")
    counted = [patch.get_path().vertices for patch in ax.patches]
    assert len(counted) == 2
    for side, path in zip(pairs, ax.patches, strict=True):
        vertices = path.get_path().vertices
        heights, edges = vertices[1:-1:2, 1], vertices[::2, 0]
        expected = np.histogram(np.minimum(side, edges.max()), np.unique(edges))[0]
        assert expected.sum() == len(side)
        assert heights.tolist() == expected.tolist()
    assert "words" in ax.get_xlabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        f"chosen, mean {pairs[0].mean():.1f}",
        f"rejected, mean {pairs[1].mean():.1f}",
    ]


def test_the_difference_histogram_holds_every_pair_and_says_both_shares(pairs):
    ax = figures.difference_histogram(*pairs)
    assert sum(bar.get_height() for bar in ax.patches) == 3000
    right = sum(bar.get_height() for bar in ax.patches if bar.get_x() >= -1e-9)
    longer, shorter = (pairs[0] > pairs[1]).mean(), (pairs[0] < pairs[1]).mean()
    assert right == (pairs[0] >= pairs[1]).sum()
    assert ax.get_title() == f"chosen shorter {100 * shorter:.1f} %, longer {100 * longer:.1f} %"
    assert "tokens" in ax.get_xlabel()


def test_the_preference_curve_runs_through_the_shares_of_its_bins(pairs):
    ax = figures.preference_by_difference(*pairs, bins=8)
    points = ax.containers[0].lines[0]
    size, rate = (np.asarray(values, dtype=float) for values in points.get_data())
    difference = pairs[0] - pairs[1]
    assert len(size) == 8
    curve = next(line for line in ax.lines if line.get_label().startswith("logistic"))
    slope = preference_slope(difference, np.arange(3000)).value
    assert curve.get_ydata() == pytest.approx(expit(slope * np.asarray(curve.get_xdata()) / 100))
    assert np.abs(rate - expit(slope * size / 100)).max() < 0.1
    unequal = difference[difference != 0]
    edges = np.quantile(np.abs(unequal), np.linspace(0, 1, 9))
    inside = (np.abs(unequal) >= edges[3]) & (np.abs(unequal) < edges[4])
    assert rate[3] == pytest.approx((unequal[inside] > 0).mean())
    assert f"{slope:+.2f}" in curve.get_label()


def test_pairs_that_define_no_curve_are_drawn_without_one():
    for chosen, rejected in (([3, 4, 5], [1, 2, 3]), ([2, 2], [2, 2]), ([7], [9])):
        ax = figures.preference_by_difference(np.array(chosen), np.array(rejected))
        assert not any(line.get_label().startswith("logistic") for line in ax.lines)
    with pytest.raises(ValueError, match="at least one pair"):
        figures.length_histogram(np.array([]), np.array([]))


def test_figures_are_drawn_where_they_are_asked_for_and_leave_nothing_open(pairs):
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    one, two, three = Figure().subplots(1, 3)
    assert figures.length_histogram(*pairs, ax=one) is one
    assert figures.difference_histogram(*pairs, ax=two) is two
    assert figures.preference_by_difference(*pairs, ax=three) is three
    figures.length_histogram(*pairs)
    assert plt.get_fignums() == []
