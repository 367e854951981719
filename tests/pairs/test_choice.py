"""Every rule of choice equals a naive computation on random scores, and the slope a regression with dummies."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sampo.pairs.choice import (
    CHOICES,
    Candidates,
    ChoiceSettings,
    LengthLimit,
    fit_length_slope,
)
from sampo.pairs.filters import balance


def random_prompts(seed, prompts=30, most=7):
    """Scores without ties that rise with length, a little."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(prompts):
        lengths = rng.integers(1, 300, size=rng.integers(2, most))
        scores = rng.normal(size=len(lengths)) + 0.8 * np.log(lengths) + rng.normal()
        found.append(Candidates(f"p{number}", scores, lengths))
    return found


def ordered(one):
    """(margin, chosen, rejected) of all two answers of a prompt, by hand."""
    for i, j in itertools.permutations(range(len(one.scores)), 2):
        if one.scores[i] > one.scores[j]:
            yield one.scores[i] - one.scores[j], i, j


def widest(one, allowed=lambda i, j: True):
    found = [entry for entry in ordered(one) if allowed(entry[1], entry[2])]
    return [max(found)[1:]] if found else []


def naive(name, prompts, asked):
    if name == "best_worst":
        return [widest(one) for one in prompts]
    if name == "max_margin":
        ranked = sorted(prompts, key=lambda one: max(one.scores) - min(one.scores))
        kept = [one.prompt_id for one in ranked[::-1][: math.ceil(asked.share * len(prompts))]]
        return [widest(one) if one.prompt_id in kept else [] for one in prompts]
    if name == "all_above":
        return [sorted((i, j) for margin, i, j in ordered(one) if margin > asked.margin) for one in prompts]
    if name == "length_matched":

        def close(one):
            return lambda i, j: abs(one.lengths[i] - one.lengths[j]) <= 0.3 * max(one.lengths[i], one.lengths[j])

        return [widest(one, close(one)) for one in prompts]
    if name == "capped":
        return [[(i, j) for i, j in widest(one) if abs(one.lengths[i] - one.lengths[j]) <= 40] for one in prompts]
    slope = dummies(prompts)[0]
    made = []
    for one in prompts:
        rest = [score - slope * math.log(length) for score, length in zip(one.scores, one.lengths, strict=True)]
        made.append([(rest.index(max(rest)), rest.index(min(rest)))])
    return made


def dummies(prompts):
    """Least squares of the scores on log length and one column per prompt: the slope and its sandwich error."""
    scores = np.concatenate([one.scores for one in prompts])
    owner = np.concatenate([[number] * len(one.scores) for number, one in enumerate(prompts)])
    x = np.log(np.concatenate([one.lengths for one in prompts]))
    design = np.column_stack([x, owner[:, None] == np.arange(len(prompts))]).astype(float)
    coefficients = np.linalg.lstsq(design, scores, rcond=None)[0]
    rest = scores - design @ coefficients
    bread = np.linalg.inv(design.T @ design)
    meat = np.zeros_like(bread)
    for number in range(len(prompts)):
        mine = owner == number
        score = design[mine].T @ rest[mine]
        meat += np.outer(score, score)
    n = len(prompts)
    return coefficients[0], math.sqrt((bread @ meat @ bread)[0, 0] * n / (n - 1))


ASKED = {
    "max_margin": ChoiceSettings(share=0.4),
    "all_above": ChoiceSettings(margin=0.7),
    "length_matched": ChoiceSettings(limit=LengthLimit("30%")),
    "capped": ChoiceSettings(limit=LengthLimit("40")),
}


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "best_random"])
@pytest.mark.parametrize("seed", range(5))
def test_a_rule_equals_a_naive_computation(name, seed):
    prompts, asked = random_prompts(seed), ASKED.get(name, ChoiceSettings())
    found = CHOICES[name].choose(prompts, asked)
    assert [sorted(picks) for picks in found] == naive(name, prompts, asked)
    assert any(found)


def test_the_rejected_answer_of_best_random_is_any_lower_one_by_the_seed():
    prompts = random_prompts(0, prompts=2000, most=5)
    first, second = (CHOICES["best_random"].choose(prompts, ChoiceSettings(seed=seed)) for seed in (0, 1))
    assert first != second
    assert first == CHOICES["best_random"].choose(prompts[::-1], ChoiceSettings(seed=0))[::-1]  # prompt by prompt
    ranks = []
    for one, [(chosen, rejected)] in zip(prompts, first, strict=True):
        assert one.scores[chosen] == max(one.scores)
        assert one.scores[rejected] < one.scores[chosen]
        if len(one.scores) == 4:
            ranks.append(int((one.scores < one.scores[rejected]).sum()))
    counts = np.bincount(ranks, minlength=3)
    assert stats.chisquare(counts).pvalue > 1e-3  # each of the three others is as likely
    digest = hashlib.sha256(b"0 rejected p0").digest()
    lower = [i for i, score in enumerate(prompts[0].scores) if score < max(prompts[0].scores)]
    assert first[0][0][1] == lower[int.from_bytes(digest[:8], "big") % len(lower)]


def test_the_first_of_equal_scores_counts():
    one = Candidates("p", np.array([2.0, 1.0, 2.0, 1.0]), np.array([5, 5, 5, 5]))
    for name in ("best_worst", "length_matched", "length_regressed", "capped", "max_margin"):
        assert CHOICES[name].choose([one], ChoiceSettings()) == [[(0, 1)]]
    assert CHOICES["all_above"].choose([one], ChoiceSettings()) == [[(0, 1), (0, 3), (2, 1), (2, 3)]]


@pytest.mark.parametrize("seed", range(3))
def test_the_slope_and_its_interval_are_those_of_a_regression_with_an_intercept_for_each_prompt(seed):
    prompts = random_prompts(seed)
    slope, se = dummies(prompts)
    found = fit_length_slope(prompts)
    assert (found.value, found.se, found.n) == (pytest.approx(slope), pytest.approx(se), len(prompts))
    assert found.interval == pytest.approx(stats.t.interval(0.95, len(prompts) - 1, loc=slope, scale=se))
    flat = [Candidates(one.prompt_id, one.scores, np.full(len(one.lengths), 7)) for one in prompts]
    assert fit_length_slope(flat).value is None
    assert fit_length_slope([*prompts, *flat]).value == pytest.approx(slope)  # no variation, no evidence


def test_a_judge_of_length_alone_gives_no_pair_once_its_slope_is_subtracted():
    prompts = [Candidates(str(i), 3 * np.log(i + np.arange(1, 4)), i + np.arange(1, 4)) for i in range(9)]
    assert CHOICES["length_regressed"].choose(prompts, ChoiceSettings()) == [[]] * 9
    assert CHOICES["best_worst"].choose(prompts, ChoiceSettings()) == [[(2, 0)]] * 9


@pytest.mark.parametrize("text", ["", "-1", "10 %", "x", "1e3", "%"])
def test_a_limit_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"must be a number such as 100, or a share such as 20%, got"):
        LengthLimit(text)


def test_a_limit_holds_at_its_border():
    a, b = np.array([100, 100, 80, 0]), np.array([80, 79, 100, 0])
    assert LengthLimit("20").allows(a, b).tolist() == [True, False, True, True]
    assert LengthLimit("20%").allows(a, b).tolist() == [True, False, True, True]


@pytest.mark.parametrize(("name", "value"), [("margin", -0.1), ("margin", math.nan), ("share", 0), ("share", 1.1)])
def test_a_setting_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        ChoiceSettings(**{name: value})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=80), st.integers(0, 3))
def test_a_balanced_set_has_as_many_pairs_of_each_side_in_every_bin_and_no_fewer_than_needed(pairs, seed):
    chosen, rejected = np.array(pairs, dtype=int).reshape(-1, 2).T
    kept = balance(chosen, rejected, seed)
    borders = [(2**k, 2 ** (k + 1) - 1) for k in range(7)]
    expected = sum(c == r for c, r in pairs)
    for low, high in borders:
        longer = [i for i, (c, r) in enumerate(pairs) if low <= c - r <= high]
        shorter = [i for i, (c, r) in enumerate(pairs) if low <= r - c <= high]
        assert kept[longer].sum() == kept[shorter].sum() == min(len(longer), len(shorter))
        expected += 2 * min(len(longer), len(shorter))
    assert kept.sum() == expected
    assert (kept == balance(chosen, rejected, seed)).all()
