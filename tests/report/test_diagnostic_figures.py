"""The figures of `sampo diagnose`: what is drawn is what was found."""

import io

import numpy as np
import pytest
from made_up_scores import made_up

from sampo.diagnostics.findings import Finding, findings
from sampo.report import diagnostic_figures as figures
from sampo.stats.intervals import Estimate

BETA = 0.5


@pytest.fixture(scope="module")
def scores():
    return made_up(90, seed=1)[0]


@pytest.fixture(scope="module")
def found(scores):
    return findings(scores, beta=BETA, by={"source": np.array(["x", "y", "<b>"] * 30)}, resamples=100)


def drawn(axes):
    """(label, places, values, half-intervals) of each series with error bars, by the numbers that matplotlib holds."""
    series = {}
    for container in axes.containers:
        line, _, (bars,) = container
        segments = np.array(bars.get_segments())  # (n, 2, 2)
        series[container.get_label()] = (line.get_xdata(), line.get_ydata(), segments)
    return series


def some(found, quantity, **labels):
    return [f for f in found if f.quantity == quantity and labels.items() <= f.labels.items()]


def check(values, rows, segments, axis):
    assert list(values) == pytest.approx([f.estimate.value for f in rows])
    for segment, row in zip(segments, rows, strict=True):
        assert sorted(segment[:, axis]) == pytest.approx(sorted(row.estimate.interval))


def saved(axes) -> bytes:
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def test_rewards_are_points_and_their_means_a_curve(found, scores):
    axes = figures.reward_against_length(found, scores, beta=BETA)
    places, values, segments = drawn(axes)["mean"]
    curve = some(found, "reward")
    check(values, curve, segments, axis=1)
    assert list(places) == [f.labels["tokens"] for f in curve]
    for points, tokens, ratio in zip(axes.collections[:2], scores.tokens, scores.log_ratio, strict=True):
        assert np.allclose(points.get_offsets(), np.stack([tokens, BETA * ratio], axis=1))
    assert b"</svg>" in saved(axes)


def test_a_scatter_of_many_responses_shows_some_of_them():
    many = made_up(3000)[0]
    axes = figures.reward_against_length(findings(many, beta=1.0, resamples=100), many, beta=1.0)
    assert sum(len(points.get_offsets()) for points in axes.collections[:2]) == figures.POINTS


def test_accuracies_of_several_checkpoints_stand_side_by_side(found):
    other = [Finding(f.quantity, f.labels, Estimate(0.25, 0.2, 0.3, None, 9)) for f in found]
    axes = figures.accuracy_by_length({"one": found, "two": other})
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert names == ["all", "chosen longer", "chosen shorter", "matched length"]
    places, values, segments = drawn(axes)["one"]
    check(values, some(found, "accuracy", method="all"), segments, axis=1)
    assert [round(place) for place in places] == [0, 1, 2, 3]
    assert list(drawn(axes)["two"][1]) == [0.25] * 4
    assert axes.get_ylim() == (0, 1)


def test_log_ratios_are_drawn_by_place_and_by_class(found):
    axes = figures.log_ratio_by_position(found)
    for side in ("chosen", "rejected"):
        rows = some(found, "log_ratio_at", side=side)
        places, values, segments = drawn(axes)[side]
        check(values, rows, segments, axis=1)
        for place, row in zip(places, rows, strict=True):
            assert row.labels["from"] + 1 <= place <= row.labels["to"] + 1
    axes = figures.log_ratio_by_class(found)
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    for side in ("chosen", "rejected"):
        rows = some(found, "log_ratio_of", side=side)
        places, values, segments = drawn(axes)[side]
        check(values, rows, segments, axis=1)
        assert [names[round(place)] for place in places] == [row.labels["class"] for row in rows]


def test_pressure_is_drawn_for_the_groups_asked_for(found):
    axes = figures.draw_length_pressure(found, groups=("chosen shorter", "all", "nobody"))
    assert list(drawn(axes)) == ["chosen shorter", "all"]
    values, _, segments = drawn(axes)["all"]
    check(values, some(found, "pressure", group="all"), segments, axis=0)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["all"]
    with pytest.raises(ValueError, match="must name findings, got"):
        figures.draw_length_pressure(found, methods=["sampoo"])


def test_axes_that_are_given_are_drawn_into(found):
    from matplotlib.figure import Figure

    given = Figure().subplots()
    assert figures.draw_length_pressure(found, axes=given) is given


def test_without_a_reference_there_is_no_reward_to_draw(found, scores):
    pressure = some(found, "pressure")
    with pytest.raises(ValueError, match="must have `reward`"):
        figures.reward_against_length(pressure, scores, beta=1.0)
    with pytest.raises(ValueError, match="must have `accuracy`"):
        figures.accuracy_by_length({"one": pressure})


def test_names_from_data_are_text_in_the_picture(found):
    svg = saved(figures.draw_length_pressure(found, groups=("source: <b>",)))
    assert b"<b>" not in svg
