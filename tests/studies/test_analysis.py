import itertools
import math
import random
import statistics
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from sampo.io import records as results
from sampo.lab.methods import STUDY_METHODS
from sampo.lab.settings import GROUPS, SFT, STUDY_GROUPS, Settings
from studies.analysis import (
    Spread,
    Study,
    first_reaching,
    frontier,
    interpolate,
    interpolate_grid,
    over_seeds,
    paired,
    prediction,
    tuned,
)
from studies.claims import FAILS, HOLDS, OPEN, Claim, Finding, above, below, claims, collapsed, combine, within
from studies.page import PARTS, write_figures
from studies.plan import study_plan

NAMES = ("tokens", "stops", "quality", "win_rate", "kl", "accuracy", "correlation", "pressure", "push")


def records_of(runs, value):
    """Records as the study writes them; `value(run, name)` makes the numbers."""
    for run in runs:
        names = NAMES[:5] if run.method == SFT else (*NAMES, "penalty_per_token", "train_seconds")
        for name in names:
            yield results.Record(name=name, value=value(run, name), n=1, config=run.config, seed=run.seed)


def by_chance(run, name):
    rng = random.Random(f"{run.config} {name}")
    centre, width = {"tokens": (30, 20), "kl": (4, 3.5), "correlation": (0, 0.9), "pressure": (0, 0.5)}.get(
        name, (0.6, 0.3)
    )
    return centre + width * (2 * rng.random() - 1)


@pytest.fixture(scope="module")
def runs():
    return study_plan(Settings(), seeds=4)


@pytest.fixture(scope="module")
def study(runs):
    return Study(records_of(runs, by_chance))


def test_a_spread_over_seeds_is_students_interval():
    values = [1.0, 4.0, 2.5, 3.0]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert over_seeds(values) == pytest.approx((2.625, low, high, 4))
    assert over_seeds([2.0]) == (2.0, None, None, 1)
    assert over_seeds([]) is None


def test_differences_are_taken_within_a_seed_and_only_where_both_are():
    first, second = {0: 5.0, 1: 7.0, 2: 1.0}, {1: 4.0, 2: 3.0, 3: 100.0}
    assert paired(first, second) == over_seeds([3.0, -2.0])
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_the_headline_numbers_are_those_of_the_records(runs, study):
    for method, group in itertools.product(("dpo", "mean", "sampo_iterative"), STUDY_GROUPS):
        expected = {
            run.seed: by_chance(run, "tokens")
            for run in runs
            if (run.method, run.group, run.settings, run.changes) == (method, group, Settings(), ())
        }
        assert study.headline(method, group, "tokens") == expected
        assert set(expected) == {0, 1, 2, 3}
    assert set(study.start("tokens")) == {0, 1, 2, 3}


def test_a_run_that_is_not_whole_and_a_seed_without_its_start_do_not_count(runs):
    records = list(records_of(runs[:30], by_chance))
    cut = Study(records[:-1])  # `train_seconds` is written last
    whole = Study(records)
    assert len(whole.cells) == len(cut.cells) + 1 == 29
    assert Study([record for record in records if record.config["method"] != SFT]).cells == []


def test_records_of_two_studies_are_refused(runs):
    other = [replace(run, settings=replace(run.settings, steps=7)) for run in runs[1:3]]
    with pytest.raises(ValueError, match="must be of one study, got 2 different settings"):
        Study([*records_of(runs[:3], by_chance), *records_of(other, by_chance)])


def naive_at_equal(points, level):
    points = sorted(points)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= level <= x1:
            share = (math.log(level) - math.log(x0)) / (math.log(x1) - math.log(x0))
            return y0 + share * (y1 - y0)
    return None


@pytest.mark.parametrize("level", [0.4, 1.0, 2.7, 6.0, 9.0])
def test_numbers_at_equal_kl_lie_on_the_line_between_the_neighbours(study, level):
    found = 0
    for method, group in (("dpo", "all"), ("sampo", "short"), ("rdpo_02", "long")):
        values = interpolate_grid(study, method, group, "win_rate", level=level)
        for seed in range(4):
            cells = [
                c
                for c in study.cells
                if (c.method, c.group, c.seed, c.bias, c.changes) == (method, group, seed, 0.5, ())
            ]
            assert len(cells) == 6
            expected = naive_at_equal([(c.numbers["kl"], c.numbers["win_rate"]) for c in cells], level)
            assert values.get(seed) == (None if expected is None else pytest.approx(expected))
            found += expected is not None
    assert found > 0 or level in (0.4, 9.0)
    assert (
        interpolate(study.cells[:1], "win_rate", by="kl", level=study.cells[0].numbers["kl"]) is None
    )  # of one point


def test_each_seed_is_measured_in_the_cell_that_is_best_in_the_others(runs, study):
    not_its_own_best = 0
    for method, group in (("dpo", "all"), ("sampo", "short"), ("rejected_learned_balanced", "long")):
        wins = {
            (seed, rate, beta): next(
                c.numbers["win_rate"]
                for c in study.cells
                if (c.method, c.group, c.seed, c.bias, c.changes) == (method, group, seed, 0.5, ())
                and (c.learning_rate, c.beta) == (rate, beta)
            )
            for seed in range(4)
            for rate in (2e-4, 5e-4)
            for beta in (0.05, 0.1, 0.3)
        }
        found = tuned(study, method, group)
        assert found.keys() == set(range(4))
        for seed, cell in found.items():
            sums: dict = {}
            for (other, *place), value in wins.items():
                if other != seed:
                    sums[tuple(place)] = sums.get(tuple(place), 0) + value
            assert sums[cell.learning_rate, cell.beta] == max(sums.values())
            assert (cell.seed, cell.method, cell.group) == (seed, method, group)
            own = max(value for (other, *_), value in wins.items() if other == seed)
            not_its_own_best += wins[seed, cell.learning_rate, cell.beta] < own
    assert not_its_own_best > 3


def test_a_seed_whose_grid_is_not_whole_has_no_part_in_tuning(runs):
    def without(missing):
        kept = [run for run in runs if run not in missing]
        return tuned(Study(records_of(kept, by_chance)), "dpo", "all")

    cells = [
        run
        for run in runs
        if (run.method, run.group, run.settings.bias, run.changes) == ("dpo", "all", 0.5, ()) and run.seed > 0
    ]
    assert len(cells) == 18
    assert without([cells[0]]).keys() == {0, 1, 2, 3} - {cells[0].seed}
    assert without(cells) == {}  # one seed alone has no others


def walk(points, win_rate):
    """KL and tokens where a walk along the points in steps of √KL first has a win rate; None if it never has."""
    distances, wins, tokens = zip(*sorted((math.sqrt(kl), wins, tokens) for kl, wins, tokens in points), strict=True)
    steps = np.linspace(0, distances[-1], 200_001)
    (there, *_) = [*np.flatnonzero(np.interp(steps, distances, wins) >= win_rate), None]
    if there is None:
        return None
    return {"kl": steps[there] ** 2, "tokens": np.interp(steps[there], distances, tokens)}


def test_a_win_rate_is_first_reached_where_a_walk_from_the_start_has_it(runs, study):
    start = {name: {**numbers, "win_rate": 0.5} for name, numbers in study.starts.items()}
    found, never, study = 0, 0, Study(records_of(runs, by_chance))
    study.starts = start
    for method, level in (("dpo", 0.6), ("sampo", 0.75), ("rdpo_02", 0.9)):
        reached = first_reaching(study, method, "short", level)
        for seed, cells in study.grid(method, "short").items():
            numbers = [(c.numbers["kl"], c.numbers["win_rate"], c.numbers["tokens"]) for c in cells]
            expected = walk([(0.0, 0.5, start[seed]["tokens"]), *numbers], level)
            assert (seed in reached) == (expected is not None)
            if expected is not None:
                assert reached[seed] == pytest.approx(expected, rel=1e-3)
            found, never = found + (expected is not None), never + (expected is None)
    assert found > 3
    assert never > 1
    assert first_reaching(study, "dpo", "all", 0.4) == {}  # the start has it already
    assert first_reaching(study, "dpo", "equal", 0.6) == {}  # there is no grid


def test_the_frontier_has_the_points_that_no_other_one_beats():
    rng = random.Random(0)
    for _ in range(200):
        points = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randrange(1, 9))]
        best = [
            i
            for i, (t, q) in enumerate(points)
            if not any((u < t and r >= q) or (u <= t and r > q) for u, r in points)
        ]
        assert frontier(points) == best


def test_prediction_is_spearmans_correlation_within_each_seed(study):
    correlations = []
    for seed in range(4):
        cells = [c for c in study.cells if c.seed == seed and c.group == "long"]
        ranks = [
            stats.rankdata([c.numbers["pressure"] for c in cells]),
            stats.rankdata([c.numbers["tokens"] / study.starts[seed]["tokens"] for c in cells]),
        ]
        correlations.append(np.corrcoef(*ranks)[0, 1])
    assert prediction(study, "pressure", lambda c: c.group == "long") == pytest.approx(over_seeds(correlations))


def test_a_pressure_that_says_what_comes_predicts_it(runs):
    def value(run, name):
        if name == "tokens" and run.method != SFT:
            return 20 * math.exp(-by_chance(run, "pressure"))
        return by_chance(run, name)

    assert prediction(Study(records_of(runs, value)), "pressure") == pytest.approx((-1, -1, -1, 4))


@pytest.mark.parametrize(
    ("spread", "is_above", "is_below", "is_within"),
    [
        (Spread(2, 1, 3, 5), HOLDS, FAILS, FAILS),
        (Spread(-2, -3, -1, 5), FAILS, HOLDS, FAILS),
        (Spread(0.1, -0.2, 0.4, 5), OPEN, OPEN, HOLDS),
        (Spread(0.4, -0.2, 1, 5), OPEN, OPEN, OPEN),
        (Spread(2, 1, 3, 2), OPEN, OPEN, OPEN),
        (Spread(2, None, None, 1), OPEN, OPEN, OPEN),
        (None, OPEN, OPEN, OPEN),
    ],
)
def test_verdicts_follow_the_interval_and_need_three_seeds(spread, is_above, is_below, is_within):
    assert (above(spread), below(spread), within(spread, 0.5)) == (is_above, is_below, is_within)


def test_a_conjunction_fails_with_one_part_and_is_open_with_an_open_one():
    assert [combine(HOLDS, HOLDS), combine(HOLDS, FAILS), combine(OPEN, FAILS), combine(HOLDS, OPEN)] == [
        HOLDS,
        FAILS,
        FAILS,
        OPEN,
    ]


def test_a_claim_that_holds_in_some_groups_says_in_which():
    def verdict(**found):
        return Claim("", "", "", [Finding(name, result, "") for name, result in found.items()]).verdict

    assert verdict(all=HOLDS, long=HOLDS) == "holds"
    assert verdict(all=FAILS, long=FAILS) == "does not hold"
    assert verdict(all=OPEN, long=OPEN) == "open"
    assert verdict(all=HOLDS, long=FAILS, short=OPEN) == "holds when: all"
    assert verdict(all=HOLDS, long=OPEN) == "holds where decided: all"
    assert verdict(all=FAILS, long=OPEN) == "does not hold where decided: all"


def made(runs, effect):
    """A study in which DPO has fixed numbers, and each other method those and its effect."""

    def value(run, name):
        base = {"tokens": 40, "win_rate": 0.7, "stops": 1, "quality": 1, "kl": 2, "accuracy": 0.7}.get(name, 0.0)
        base = 20 if run.method == SFT and name == "tokens" else base
        noise = 1e-3 * random.Random(f"{run.seed} {run.method} {name} {run.group}").random()
        return base + noise + effect.get((run.method, run.group, name), 0)

    return {claim.text: claim for claim in claims(Study(records_of(runs, value)))}


def test_claims_hold_or_fail_as_the_effects_that_were_put_in(runs):
    effect = {("sampo", "all", "tokens"): -8, ("sampo", "short", "tokens"): -8, ("sampo", "long", "tokens"): 10}
    effect |= {("sampo", "short", "win_rate"): -0.1, ("sampo", "long", "win_rate"): 0.1}
    effect |= {("dpo", "short", "stops"): -0.9, ("sampo", "long", "correlation"): 0.4}
    found = made(runs, effect)
    assert found["DPO makes answers longer."].verdict == HOLDS
    assert found["SamPO's answers are shorter than DPO's, at no loss of quality."].verdict == "holds when: `all`"
    assert found["SamPO improves quality over DPO."].verdict == "holds when: `long`"
    assert found["SamPO takes length out of the implicit reward."].verdict == "holds when: `all`, `short`"
    collapse = found["Trained on pairs whose chosen answer is shorter, DPO collapses and SamPO does not."]
    assert collapse.verdict == HOLDS
    assert "DPO 4 of 4 seeds, SamPO 0 of 4" in collapse.findings[0].evidence
    assert "-8.0" in found["SamPO's answers are shorter than DPO's, at no loss of quality."].findings[0].evidence
    both_collapse = made(runs, effect | {("sampo", "short", "win_rate"): -0.5})
    assert both_collapse[collapse.text].verdict == FAILS


def test_claims_at_equal_kl_see_the_difference_along_the_grid(runs):
    """Win rates lie on log KL, a line for each method; all methods move by other amounts."""

    def value(run, name):
        kl = 40 * run.settings.beta * run.settings.learning_rate * 1e3 * (0.7 if run.method == "dpo" else 1.0)
        gain = {"sampo": -0.1, "sampo_rejected_learned": 0.03}.get(run.method, 0.0)
        noise = 1e-4 * random.Random(f"{run.seed} {run.method} {name} {run.group}").random()
        return {"kl": kl, "win_rate": 0.5 + 0.1 * math.log(kl) + gain + noise}.get(name, 1.0 + noise)

    found = {claim.text: claim for claim in claims(Study(records_of(runs, value)))}
    worse = found["At the same KL, SamPO is at least as good as DPO."]
    better = found["At the same KL, SamPO, rejected + learned is at least as good as DPO."]
    assert (worse.verdict, better.verdict) == (FAILS, HOLDS)
    assert [f.condition for f in worse.findings] == [f"`{group}` at KL {kl}" for group in GROUPS for kl in (1, 2, 4)]
    assert "win rate -0.100" in worse.findings[4].evidence
    assert "win rate +0.030" in better.findings[4].evidence


def test_claims_at_equal_win_rate_see_who_changes_length_less(runs):
    """Win rates grow with √KL alike; tokens go up with it, by an amount that is each method's own."""
    lengthening = {"sampo": 2.0, "sampo_rejected_learned": 12.0}

    def value(run, name):
        distance = 0 if run.method == SFT else math.sqrt(4e3 * run.settings.beta * run.settings.learning_rate)
        noise = 1e-3 * random.Random(f"{run.seed} {run.method} {name} {run.group}").random()
        tokens = 20 + lengthening.get(run.method, 6.0) * distance
        return {"kl": distance**2, "win_rate": 0.5 + 0.4 * distance, "tokens": tokens}.get(name, 1.0) + noise

    found = {claim.text: claim for claim in claims(Study(records_of(runs, value)))}
    less = found["At the same win rate, SamPO changes length less than DPO."]
    more = found["At the same win rate, SamPO, rejected + learned changes length less than DPO."]
    assert (less.verdict, more.verdict) == (HOLDS, FAILS)
    assert [f.condition for f in less.findings] == [f"`{group}`" for group in GROUPS]
    at_all, at_short = less.findings[0].evidence, less.findings[1].evidence
    assert "change of length -2.0" in at_all  # 4 tokens for each step of √KL, half a step to a win rate of 0.7
    assert "change of length -1.0" in at_short


def test_with_two_seeds_nothing_is_decided():
    found = made(study_plan(Settings(), seeds=2), {("sampo", "all", "tokens"): -8})
    assert {claim.verdict for claim in found.values()} == {OPEN}


def test_a_policy_has_collapsed_when_it_loses_or_does_not_end():
    assert collapsed({"win_rate": 0.44, "stops": 1.0})
    assert collapsed({"win_rate": 0.6, "stops": 0.4})
    assert not collapsed({"win_rate": 0.46, "stops": 0.6})


def test_the_page_is_made_from_any_part_of_the_study(runs, study, tmp_path):
    for part in (study, Study(records_of(runs[:3], by_chance))):  # and of hardly anything
        texts = {name: make(part) for name, make in PARTS.items()}
        assert all(texts.values())
        assert "nan" not in " ".join(texts.values())
    mean = statistics.mean(study.headline("decay", "long", "win_rate").values())
    row = next(line for line in PARTS["headline"](study).splitlines() if line.startswith("| `long` | D2PO"))
    assert f"| {mean:.3f} ± " in row
    assert f"{len(study.cells)} runs and 4 supervised starts" in PARTS["about"](study)
    few = Study(records_of(runs[:150], by_chance))
    first = [path.read_bytes() for path in write_figures(few, tmp_path)]
    assert [path.read_bytes() for path in write_figures(few, tmp_path)] == first
    assert all(STUDY_METHODS["dpo"].title.encode() in content for content in first)
