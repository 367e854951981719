"""The win rate at equal style: features of answers, the fit against other implementations, and the commands."""

import csv
import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from scipy.special import expit

from sampo.cli import main
from sampo.commands.style_options import STYLE_CHOICES
from sampo.evaluation.answers.answers import Answer, read_answers, write_answers
from sampo.evaluation.results import style_control
from sampo.evaluation.results.controlled_fit import RIDGE, FitData
from sampo.evaluation.results.judged import read_judged
from sampo.evaluation.results.length_control import ExtrapolationError, ExtrapolationWarning, length_controlled
from sampo.evaluation.results.style import STYLE_FEATURES, count_markdown, read_style
from sampo.evaluation.results.style_control import choose_ridge, style_controlled, support
from sampo.evaluation.results.verdicts import Comparisons, Verdicts, compare_orders
from sampo.io import records as results

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import style_coverage  # noqa: E402, found by the path above


def styled(rng, n=150, samples=1, soft=False, slopes=(0.8, 0.5, -0.6), strength=0.3, correlation=0.5) -> Comparisons:
    """Three correlated features: a length, a count that is often 0, and a score that may be negative."""
    rows = n * samples
    common = np.sqrt(correlation) * rng.normal(size=(rows, 2))
    z = [common + np.sqrt(1 - correlation) * rng.normal(size=(rows, 2)) for _ in range(3)]
    style = {"length": np.round(np.exp(6 + 0.5 * z[0])), "lists": rng.poisson(np.exp(0.8 * z[1])) * 1.0, "tone": z[2]}
    scales = (400.0, 2.0, 1.4)
    eta = strength + sum(
        b * np.tanh((c[:, 0] - c[:, 1]) / s) for b, c, s in zip(slopes, style.values(), scales, strict=True)
    )
    preference = expit(eta + rng.normal(size=rows)) if soft else (rng.random(rows) < expit(eta)) * 1.0
    return Comparisons(
        prompt=np.repeat(np.arange(n), samples),
        preference=preference,
        system_length=style["length"][:, 0],
        baseline_length=style["length"][:, 1],
        style=style,
    )


def with_style(c: Comparisons, style, preference=None) -> Comparisons:
    return Comparisons(
        prompt=c.prompt,
        preference=c.preference if preference is None else preference,
        system_length=c.system_length,
        baseline_length=c.baseline_length,
        style=style,
    )


# --- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_length_alone_is_the_win_rate_at_equal_length(seed):
    rng = np.random.default_rng(seed)
    c = styled(rng, samples=1 + seed % 2)
    hard = dict(enumerate(rng.normal(size=150).tolist())) if seed > 1 else None
    ours = style_controlled(with_style(c, {"length": c.style["length"]}), difficulty=hard)
    expected = length_controlled(c, difficulty=hard)
    assert ours.rate == expected.rate
    assert ours.features[0].slope == expected.slope
    assert ours.features[0].scale == expected.scale
    assert ours.features[0].overlap == expected.overlap
    assert ours.difficulty_weight == expected.difficulty_weight


def design_of(c: Comparisons) -> tuple[np.ndarray, np.ndarray]:
    """Terms by their formula, where all prompts have equally many rows, and the weight of each row."""
    columns = []
    for column in c.style.values():
        difference = column[:, 0] - column[:, 1]
        away = np.abs(difference - np.median(difference))
        columns.append(np.tanh(difference / (1.4826 * np.median(away[away > 1e-9 * np.abs(difference).max()]))))
    return np.stack(columns, axis=1), np.full(len(c), len(c.scores) / len(c))


def sklearn_fit(x, y, weight, ridge):
    """Soft labels as two rows each; scikit-learn's C is one over the ridge, and its intercept is not penalised."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=10_000)
    labels, weights = np.r_[np.ones(len(y)), np.zeros(len(y))], np.r_[weight * y, weight * (1 - y)]
    return model.fit(np.r_[x, x], labels, sample_weight=weights)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ridge", [RIDGE, 3.0])
def test_the_fit_is_that_of_scikit_learn(monkeypatch, seed, ridge):
    c = styled(np.random.default_rng(seed), samples=1 + seed % 2, soft=seed > 1)
    if ridge != RIDGE:
        monkeypatch.setattr(style_control, "UNSURE", 0.0)
        monkeypatch.setattr(style_control, "RIDGES", np.array([ridge]))
    found = style_controlled(c)
    x, weight = design_of(c)
    model = sklearn_fit(x, c.preference, weight, ridge)
    assert found.ridge == ridge
    assert [f.slope.value for f in found.features] == pytest.approx(model.coef_[0].tolist(), abs=1e-4)
    assert found.rate.value == pytest.approx(float(expit(model.intercept_[0])), abs=1e-5)


def test_the_fit_with_a_difficulty_is_that_of_a_general_optimiser():
    rng = np.random.default_rng(0)
    c, hard = styled(rng), rng.normal(size=150)
    x = np.column_stack([design_of(c)[0], np.ones(150), hard])

    def loss(b):
        eta = x @ b
        return (np.logaddexp(0, eta) - c.preference * eta).sum() + RIDGE / 2 * (b[[0, 1, 2, 4]] ** 2).sum()

    b = optimize.minimize(loss, np.zeros(5), tol=1e-10).x
    found = style_controlled(c, difficulty=dict(enumerate(hard.tolist())))
    assert found.rate.value == pytest.approx(float(expit(b[3] + b[4] * hard).mean()), abs=1e-5)
    assert found.difficulty_weight == pytest.approx(b[4], abs=1e-4)


@pytest.mark.parametrize("samples", [1, 3])
def test_intervals_agree_with_the_bootstrap_over_prompts(samples):
    c = styled(np.random.default_rng(3), n=250, samples=samples)
    formula, drawn = style_controlled(c).rate, style_controlled(c, interval="bootstrap", resamples=600, seed=1).rate
    assert formula.value == drawn.value
    assert formula.se == pytest.approx(drawn.se, rel=0.12)
    assert formula.interval == pytest.approx(drawn.interval, abs=0.02)


@pytest.mark.parametrize("samples", [1, 3])
def test_standard_errors_are_those_of_the_infinitesimal_jackknife(monkeypatch, samples):
    """How rate and slopes move when one prompt weighs a little more, by differences of refits at the same scales."""
    n, step = 60, 1e-3
    c = styled(np.random.default_rng(7), n=n, samples=samples, slopes=(1.5, 1.0, -1.0), strength=0.8)
    c = with_style(c, {name: column + np.array([0.4 * column.std(), 0]) for name, column in c.style.items()})
    found = style_controlled(c)
    fixed = np.array([f.scale for f in found.features])
    monkeypatch.setattr(FitData, "scale", lambda self, counts: np.tile(fixed, (len(counts), 1)))
    data = FitData.of(c, np.stack([v[:, 0] - v[:, 1] for v in c.style.values()], axis=1))
    more, less = (data.fit(np.ones((n, n)) + sign * step * np.eye(n)) for sign in (1, -1))

    def error(high, low):
        return np.sqrt(n / (n - 4) * (((high - low) / (2 * step)) ** 2).sum())

    assert found.rate.se == pytest.approx(error(more.rate, less.rate), rel=1e-3)
    for j, feature in enumerate(found.features):
        assert feature.slope.se == pytest.approx(error(more.beta[:, j], less.beta[:, j]), rel=1e-3)


def test_the_slopes_have_the_standard_errors_of_refits():
    c = styled(np.random.default_rng(5), n=400)
    found = style_controlled(c)
    data = FitData.of(c, np.stack([v[:, 0] - v[:, 1] for v in c.style.values()], axis=1))
    draws = np.random.default_rng(0).multinomial(400, np.full(400, 1 / 400), size=400).astype(float)
    refits = data.fit(draws).beta[:, :3].std(axis=0)
    assert [f.slope.se for f in found.features] == pytest.approx(refits.tolist(), rel=0.15)


@pytest.mark.parametrize("seed", range(3))
def test_swapping_the_sides_and_the_units_and_order_of_features_change_nothing(seed):
    c = styled(np.random.default_rng(seed))
    found = style_controlled(c)
    other = with_style(c, {k: v[:, ::-1] for k, v in c.style.items() if k != "length"}, 1 - c.preference)
    plain = style_controlled(with_style(c, {k: v for k, v in c.style.items() if k != "length"}))
    back = style_controlled(other)
    assert back.rate.value + plain.rate.value == pytest.approx(1, abs=1e-9)
    assert back.rate.interval == pytest.approx((1 - plain.rate.high, 1 - plain.rate.low), abs=1e-9)
    turned = style_controlled(with_style(c, {k: 7.0 * v for k, v in reversed(c.style.items())}))
    assert turned.rate.interval == pytest.approx(found.rate.interval, abs=1e-9)
    assert [f.slope.value for f in turned.features] == pytest.approx(
        [f.slope.value for f in reversed(found.features)], abs=1e-8
    )
    assert turned.support == pytest.approx(found.support)


def test_control_removes_what_style_brought_where_control_of_length_does_not():
    rng = np.random.default_rng(0)
    truth, c = style_coverage.world(0.0, 0.6, 0.0)(rng, 6000)
    assert c.preference.mean() > truth + 0.06
    assert length_controlled(c).rate.value > truth + 0.03
    assert style_controlled(c).rate.value == pytest.approx(truth, abs=0.02)


@pytest.mark.filterwarnings("ignore::sampo.evaluation.results.length_control.ExtrapolationWarning")
@pytest.mark.parametrize(("n", "repeats"), [(50, 150), (200, 150)])
def test_the_interval_covers_with_correlated_features(n, repeats):
    found = style_coverage.simulate(style_coverage.WORLDS["correlated features (.5), system has more"], n, repeats, 5)
    bias, _, coverage = found["style"]
    assert abs(bias) < 0.03
    assert 0.9 <= coverage <= 0.995
    assert found["raw"][0] > 0.03


def test_the_recorded_coverage_is_what_is_promised():
    records = results.read(ROOT / "measurements" / "style_coverage.jsonl")
    found = {(r.config["world"], r.config["prompts"]): r for r in records if r.config["rate"] == "style"}
    assert set(found) == {(w, n) for w in style_coverage.WORLDS for n in style_coverage.SIZES}
    for record in records:
        if record.config["rate"] != "style":
            continue
        slack = 3 * np.sqrt(0.95 * 0.05 / record.n)
        if record.name == "style/coverage":
            assert 0.93 - slack <= record.value <= 0.975 + slack, record.config
        if record.name == "style/bias":
            assert abs(record.value) < (0.01 if record.config["prompts"] > 50 else 0.02), record.config


# --- where the data say little ---------------------------------------------------------------------------------------


def test_a_feature_twice_changes_nothing_but_gets_a_ridge():
    c = styled(np.random.default_rng(1), n=400, slopes=(0.8, 2.0, -0.6))
    once = style_controlled(with_style(c, {"lists": c.style["lists"]}))
    twice = style_controlled(with_style(c, {"lists": c.style["lists"], "again": c.style["lists"].copy()}))
    assert twice.rate.value == pytest.approx(once.rate.value, abs=0.01)
    assert np.isfinite([twice.rate.low, twice.rate.high]).all()
    slopes = [f.slope.value for f in twice.features]
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-6)
    assert sum(slopes) == pytest.approx(once.features[0].slope.value, abs=0.1)


def test_a_judge_that_counts_one_feature_says_nothing_at_equal_style():
    c = styled(np.random.default_rng(2))
    tone = c.style["tone"]
    found = style_controlled(with_style(c, c.style, (tone[:, 0] > tone[:, 1]) * 1.0))
    assert found.rate.interval == (0.0, 1.0)
    assert "Style (tone" in " ".join(found.notes)
    assert np.isfinite([f.slope.value for f in found.features]).all()


def test_few_prompts_get_a_ridge_and_a_note():
    found = style_controlled(styled(np.random.default_rng(0), n=15), allow_extrapolation=True)
    text = " ".join(found.notes)
    assert "15 prompts: below" in text
    assert found.ridge > RIDGE
    assert "chosen by cross-validation" in text


@pytest.mark.parametrize("seed", range(2))
def test_the_ridge_is_the_one_that_predicts_left_out_prompts_best(seed):
    c = styled(np.random.default_rng(seed), n=40, samples=2)
    data = FitData.of(c, np.stack([v[:, 0] - v[:, 1] for v in c.style.values()], axis=1))
    fold = np.random.default_rng(9).permutation(40) % 5
    losses = {}
    for ridge in style_control.RIDGES:
        total = 0.0
        for k in range(5):
            inside = np.flatnonzero(fold[c.codes] != k)
            part = c.where(fold[c.codes] != k)
            x = np.empty((len(c), 3))
            scales = FitData.of(part, data.differences[inside]).scale(np.ones((1, len(part.scores))))[0]
            x = np.tanh(data.differences / scales)
            model = sklearn_fit(x[inside], c.preference[inside], np.full(len(inside), 0.5), ridge)
            outside = fold[c.codes] == k
            eta = x[outside] @ model.coef_[0] + model.intercept_[0]
            total += float((np.logaddexp(0, eta) - c.preference[outside] * eta).sum()) / 2
        losses[float(ridge)] = total
    assert choose_ridge(data, seed=9) == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_a_side_that_wins_everything_has_its_raw_rate(won):
    c = styled(np.random.default_rng(0))
    found = style_controlled(with_style(c, c.style, np.full(150, won)))
    assert (found.rate.value, found.features) == (won, ())
    assert "One side won every comparison" in found.notes[0]


def test_features_that_never_differ_are_left_out_and_named():
    c = styled(np.random.default_rng(0))
    same = np.ones((150, 2))
    found = style_controlled(with_style(c, {**c.style, "code": same}))
    assert found.rate == style_controlled(c).rate
    assert "never differs between the two answers: code" in found.notes[0]
    nothing = style_controlled(with_style(c, {"code": same}))
    assert nothing.rate.value == nothing.raw
    assert "nothing was controlled" in nothing.notes[-1]


def test_styles_that_do_not_overlap_are_refused_or_warned_of():
    c = styled(np.random.default_rng(0))
    lists = np.column_stack([1.0 + c.style["lists"].sum(axis=1), np.zeros(150)])
    with pytest.raises(ExtrapolationError, match=r"lists: more in 100.0%, less in 0.0%, similar in 0.0%"):
        style_controlled(with_style(c, {**c.style, "lists": lists}))
    lists[:20] = lists[:20, ::-1]
    with pytest.warns(ExtrapolationWarning, match=r"rests on few comparisons \(lists"):
        style_controlled(with_style(c, {**c.style, "lists": lists}))
    with pytest.raises(ExtrapolationError, match="the same everywhere for tone"):
        style_controlled(with_style(c, {**c.style, "tone": np.tile([3.0, 1.0], (150, 1))}))


def test_margins_that_overlap_are_refused_where_together_they_do_not():
    rng = np.random.default_rng(0)
    c, a = styled(rng), rng.uniform(-1, 1, 150)
    b = -a + 0.1 * rng.normal(size=150)  # the sum of both is about 0.8 in every row, and 0 nowhere
    style = {name: np.column_stack([x + 0.4, np.zeros(150)]) for name, x in (("a", a), ("b", b))}
    for name in style:
        assert style_controlled(with_style(c, {name: style[name]})).support > 0.2
    with pytest.warns(ExtrapolationWarning, match="all together: 2.0%"):
        found = style_controlled(with_style(c, style), allow_extrapolation=True)
    assert min(f.overlap.share for f in found.features) > 0.2 > 0.05 > found.support
    with pytest.raises(ExtrapolationError, match="all together"):
        style_controlled(with_style(c, style))


@pytest.mark.parametrize("seed", range(3))
def test_support_is_the_share_of_rows_beyond_zero(seed):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(0.4, 1, (60, 3)) @ rng.normal(size=(3, 3)), rng.random(60) + 0.1
    mean, cov = np.average(x, axis=0, weights=w), np.cov(x.T, aweights=w, ddof=0)
    distance = [(row - mean) @ np.linalg.solve(cov, row - mean) for row in [*x, np.zeros(3)]]
    expected = sum(wi for wi, d in zip(w, distance, strict=False) if d >= distance[-1]) / w.sum()
    assert support(x, w) == pytest.approx(expected)
    flat = np.column_stack([x[:, 0], x[:, 0]])
    assert support(flat, w) == pytest.approx(support(x[:, :1], w))
    assert support(flat + np.array([0.0, 1.0]), w) == 0.0  # 0 lies beside the line on which all rows are


# --- features of answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plain text, 2 * 3 - 1.", [0, 0, 0, 0]),
        ("# A\n## B\n####### no\n#no\ntext # no", [2, 0, 0, 0]),
        ("- a\n  * b\n+ c\n10. d\n-no\n1.no", [0, 4, 0, 0]),
        ("**a** and __b__ and **not\nthis** ** **", [0, 0, 3, 0]),
        ("```python\n# no\n- no\n**no**\n```\n# yes", [1, 0, 0, 1]),
        ("~~~\n```\n# no\n~~~\n```js\n- no", [0, 0, 0, 2]),
        ("`` ```a``` `` is inline", [0, 0, 0, 0]),
        ("", [0, 0, 0, 0]),
    ],
)
def test_markdown_is_counted_outside_of_code(text, expected):
    names = STYLE_FEATURES[1:]
    assert count_markdown(text, names) == expected
    assert [count_markdown(text, [name])[0] for name in names] == expected


@pytest.mark.parametrize("hostile", ["\n" * 40_000, "**" * 20_000, "```\n" * 10_001, "_" * 40_000, " " * 40_000 + "-"])
def test_hostile_texts_are_counted_in_no_time(hostile):
    began = time.process_time()
    count_markdown(hostile, STYLE_FEATURES[1:])
    assert time.process_time() - began < 1.0


def make_files(folder: Path, samples: int = 1, baseline_samples: int = 1, prompts: int = 60) -> None:
    rng = random.Random(0)
    for name, count in (("ours", samples), ("theirs", baseline_samples)):
        made = []
        for i in range(prompts):
            for sample in range(count):
                right = f"town{i}" if rng.random() < 0.6 else "nowhere"
                text = "# Answer\n" * rng.randint(0, 1) + f"**{right}**" + "\n- so it is" * rng.randint(0, 4)
                extra = {"reference": f"town{i}", "tone": rng.gauss(0, 1), "note": None if i == 7 else 1}
                made.append(Answer(prompt=f"where is {i}?", answer=text, sample=sample, stop="eos", extra=extra))
        rng.shuffle(made)
        write_answers(folder / f"{name}.jsonl", made)


@pytest.mark.parametrize(("samples", "baseline_samples"), [(1, 1), (3, 1), (3, 3)])
def test_each_judgement_gets_the_style_of_its_two_answers(tmp_path, samples, baseline_samples):
    make_files(tmp_path, samples, baseline_samples)
    words = ["--system", str(tmp_path / "ours.jsonl"), "--baseline", str(tmp_path / "theirs.jsonl")]
    assert main(["judge", *words, "--judge", "contains", "--out", str(tmp_path / "j.jsonl")]) == 0
    table = read_style(tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl", ["lists", "length"], ["tone"])
    rows = read_judged(tmp_path / "j.jsonl").rows
    found = table.of_judgements(rows, Verdicts.of(rows).lengths)
    assert list(found) == ["lists", "length", "tone"]
    ours, theirs = (read_answers(tmp_path / f"{name}.jsonl") for name in ("ours", "theirs"))
    for i, row in enumerate(rows):
        [a] = [x for x in ours if (x.prompt_id, x.sample) == (row.prompt_id, row.sample)]
        sample = row.sample if baseline_samples > 1 else 0
        [b] = [x for x in theirs if (x.prompt_id, x.sample) == (row.prompt_id, sample)]
        assert found["lists"][i].tolist() == [a.answer.count("\n- "), b.answer.count("\n- ")]
        assert found["length"][i].tolist() == [len(a.answer), len(b.answer)]
        assert found["tone"][i].tolist() == [a.extra["tone"], b.extra["tone"]]
    kept = compare_orders(Verdicts(prompt=[r.prompt_id for r in rows], sample=[r.sample for r in rows],
                                   order=[r.order == "ba" for r in rows],
                                   preference=[np.nan if i % 7 == 0 else 1.0 for i in range(len(rows))],
                                   style=found))  # fmt: skip
    alive = [i for i in range(0, len(rows), 2) if i % 7 and (i + 1) % 7]
    assert kept.style["tone"].tolist() == found["tone"][alive].tolist()
    assert kept.where(np.arange(len(kept)) == 2).style["tone"].tolist() == [found["tone"][alive[2]].tolist()]


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("style")
    make_files(folder, prompts=120)
    return folder


def words_of(folder: Path, out: str = "j.jsonl") -> list[str]:
    sides = ["--system", str(folder / "ours.jsonl"), "--baseline", str(folder / "theirs.jsonl")]
    return ["judge", *sides, "--judge", "contains", "--out", str(folder / out)]


def test_judge_and_compare_show_and_write_the_rate_at_equal_style(judged, capsys):
    assert main([*words_of(judged), "--style", "--style_columns", "tone"]) == 0
    shown = capsys.readouterr().out
    assert "style, %" in shown
    assert "; at equal style " in shown
    assert "Left out, as it never differs between the two answers: bold, code." in shown
    with (judged / "j.csv").open() as file:
        [row] = csv.DictReader(file)
    by_name = {r.name: r for r in results.read(judged / "j.records.jsonl")}
    assert float(row["win_rate/equal_style"]) == by_name["win_rate/equal_style"].value
    assert by_name["win_rate/equal_style"].config["style"] == [*STYLE_FEATURES, "tone"]
    assert "style/slope_tone" in by_name
    assert main(["compare", "--judgements", str(judged / "j.jsonl"), "--style", "--style_columns", "tone",
                 "--out", str(judged / "c")]) == 0  # fmt: skip
    again = json.loads((judged / "c.json").read_text())["systems"][0]
    for name, value in row.items():
        if "style" in name:
            assert again[name] == float(value)
    assert "style, %" in capsys.readouterr().out
    assert main(["compare", "--judgements", str(judged / "j.jsonl")]) == 0
    assert "style" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--style_columns", "note"], r"got none in `note` of 1 of 120 rows of .*ours.jsonl, first null in row \d+"),
        (["--style_columns", "mood"], r"got none in `mood` of 120 of 120 rows of .*ours.jsonl, first null in row 1"),
        (["--style_columns", "reference"], r"got none in `reference` of 120 of 120 .*first \"town|first 'town"),
        (["--style", "--style_columns", "length"], "other names than each other and than the features"),
        (["--style_columns", "tone", "tone"], "other names than each other"),
    ],
)
def test_columns_that_are_no_numbers_are_refused_before_anything_is_judged(judged, options, message):
    with pytest.raises(SystemExit) as stopped:
        main([*words_of(judged, "never.jsonl"), *options])
    assert re.search(message, str(stopped.value))
    assert not (judged / "never.jsonl").exists()


def test_style_goes_with_judgements(judged):
    with pytest.raises(SystemExit, match="`style` and `style_columns` go with `judgements`"):
        main(["compare", "--answers", str(judged / "ours.jsonl"), "--style"])


def test_the_choices_of_the_command_are_the_features():
    assert STYLE_CHOICES == STYLE_FEATURES
