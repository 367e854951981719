"""What the figures show: their data, their labels, and that they open no window."""

from pathlib import Path

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


def _rendered(figure):
    """The figure with a canvas, laid out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


def _assert_readable(figure):
    """Legends lie inside the figure and cross no axes; labels of ticks do not overlap."""
    _rendered(figure)
    whole = figure.bbox.padded(1)
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    for legend in legends:
        box = legend.get_window_extent()
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
        assert not any(ax.bbox.overlaps(box) for ax in figure.axes)
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [t for t in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if low <= t.get_loc() <= high]
            boxes = [t.label1.get_window_extent() for t in ticks if t.label1.get_text()]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), ax.get_title()
    return legends


def test_figures_of_the_study_have_their_whole_legend_and_no_overlapping_ticks(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from sampo.io import records as results
    from studies.analysis import Study
    from studies.page import write_figures

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), kept.append(self)))
    records = Path(__file__).parents[2] / "measurements" / "study.jsonl.gz"
    names = [path.stem for path in write_figures(Study(results.read(records)), tmp_path)]
    assert names == ["frontier", "prediction", "biases"]
    for figure in kept:
        assert len(_assert_readable(figure)) == 1


def test_a_legend_crosses_no_lines_however_many_runs_there_are():
    from sampo.report import training_figures

    rng = np.random.default_rng(0)
    for n in range(2, 7):
        names = [f"a-long-name-of-a-run-{i}" for i in range(n)]
        runs = {
            name: [{"step": s, "loss": rng.random(), "eval_loss": rng.random()} for s in range(9)] for name in names
        }
        assert len(_assert_readable(training_figures.training_curve(runs, "loss").figure)) == 1
    for ax in (
        figures.length_histogram(rng.integers(1, 300, 500), rng.integers(1, 250, 500)),
        figures.preference_by_difference(rng.integers(1, 300, 500), rng.integers(1, 250, 500)),
    ):
        assert len(_assert_readable(ax.figure)) == 1
