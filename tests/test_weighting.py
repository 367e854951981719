"""The arithmetic of the methods against slow loops, closed forms and the statistics of uniform subsets."""

import math
from functools import partial

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sampo.budget import dataset_budget
from sampo.weighting import (
    WEIGHTINGS,
    balance_end,
    draw_keys,
    draw_row_keys,
    fingerprints,
    last_end_tokens,
    length_pressure,
    sequence_logps,
    splitmix64,
    token_weights,
)

SUBSETS = [name for name, method in WEIGHTINGS.items() if method.subset]
EQUAL_TO_DPO_AT_EQUAL_LENGTHS = ["sampo", "expected", "prefix", "mean_rescaled", "top_k"]
END = 7


def make_batch(lengths, *, prompts=None, pad_left=0, seed=0, n_tokens=50):
    """Rows of a prompt and a completion of the given length, padded to the right (and left).

    Returns ids, attention mask `(2B, L)` and the completion mask over predicted tokens `(2B, L-1)`.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = prompts or [3] * len(lengths)
    width = max(p + t for p, t in zip(prompts, lengths, strict=True)) + 2
    ids = torch.zeros(len(lengths), width + pad_left, dtype=torch.long)
    real, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (p, t) in enumerate(zip(prompts, lengths, strict=True)):
        ids[row, pad_left : pad_left + p + t] = torch.randint(10, n_tokens, (p + t,), generator=generator)
        real[row, pad_left : pad_left + p + t] = 1
        completion[row, pad_left + p : pad_left + p + t] = 1
    return ids, real, completion[:, 1:].bool()


def states_of(ids):
    """`(2B, N, 2)` hidden states that depend on the predicted token alone."""
    return torch.stack((ids[:, 1:].sin(), ids[:, 1:].cos()), dim=2)


def weigh(name, ids, real, mask, *, seed=1, epoch=0, stream=0, log_ratios=None, **options):
    keys = draw_keys(ids, real, seed=seed, epoch=epoch, stream=stream)
    row_keys = draw_row_keys(ids, real, seed=seed, epoch=epoch, stream=stream)
    options.setdefault("given", ids[:, 1:] / 10)  # weights from the data
    options.setdefault("states", states_of(ids))
    if log_ratios is None:
        log_ratios = torch.zeros(mask.shape)
    return token_weights(name, mask, keys=keys, row_keys=row_keys, log_ratios=log_ratios, **options)


lengths_of_pairs = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4)


ALLOWED = [
    (name, sides, keep_end)
    for name, method in WEIGHTINGS.items()
    for sides in ("both", *["rejected"] * method.downsamples)
    for keep_end in (False, *[True] * method.can_keep_end)
]


totals_of_data = st.none() | st.tuples(st.integers(1, 10**9), st.integers(1, 10**9))


@pytest.mark.parametrize(("name", "sides", "keep_end"), ALLOWED)
@given(pairs=lengths_of_pairs, seed=st.integers(0, 10**6), cut=st.booleans(), totals=totals_of_data)
@settings(max_examples=25, deadline=None)
def test_weights_equal_a_loop_over_tokens_written_from_the_equations(name, sides, keep_end, pairs, seed, cut, totals):
    totals = totals if WEIGHTINGS[name].downsamples else None
    lengths = [w for w, _ in pairs] + [l for _, l in pairs]
    ids, real, mask = make_batch(lengths, seed=seed)
    end_at = [None if cut and row % 2 else max(t - 1 - row % 2, 0) for row, t in enumerate(lengths)]
    end = torch.zeros_like(mask)
    for row, at in enumerate(end_at):
        if at is not None:
            end[row, mask[row].nonzero()[at]] = True
    log_ratios = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    options = {
        "end": end,
        "sampled_sides": sides,
        "keep_end_token": keep_end,
        "gamma": 0.9,
        "tail_weight": 0.3,
        "token_totals": totals,
    }
    got = weigh(name, ids, real, mask, seed=seed, epoch=2, log_ratios=log_ratios, **options)
    n = len(pairs)
    states = [found[kept].tolist() for found, kept in zip(states_of(ids), mask, strict=True)]
    both_sides = [oracles.transport_weights(states[i], states[n + i]) for i in range(n)]
    plans = [chosen for chosen, _ in both_sides] + [rejected for _, rejected in both_sides]
    for row, own in enumerate(lengths):
        tokens, budget = ids[row][real[row].bool()].tolist(), None
        if totals is not None:
            both = totals if row < n else totals[::-1]
            budget = oracles.dataset_budget(name, own, *both, oracles.row_key(tokens, seed=seed, epoch=2))
        expected = oracles.weights(
            name,
            own,
            lengths[(row + n) % (2 * n)],
            keys=oracles.row_keys(tokens, seed=seed, epoch=2)[-own:],
            log_ratios=log_ratios[row][mask[row]].tolist(),
            end=end_at[row] if keep_end else None,
            whole=sides == "rejected" and row < n,
            gamma=0.9,
            tail=0.3,
            budget=budget,
            given=[token / 10 for token in tokens[-own:]] if name != "otpo" else plans[row],
        )
        assert got[row][mask[row]].tolist() == pytest.approx(expected, rel=1e-5 if name == "otpo" else 1e-6)
        assert got[row][~mask[row]].sum() == 0


@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=2), seed=st.integers(0, 10**6), sure=st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_balanced_end_token_leaves_no_length_pressure_in_any_response(lengths, seed, sure):
    rng = torch.Generator().manual_seed(seed)
    position, counts = torch.arange(12).expand(4, 12), torch.tensor([*lengths, *reversed(lengths)])[:, None]
    mask, end = position < counts, position == counts - 1
    end[3] = False  # cut: no end token
    end_probs = torch.rand(4, 12, generator=rng) * 0.98
    if sure:
        end_probs[1, counts[1] - 1] = 0.9999
    weights = mask * torch.rand(4, 12, generator=rng)
    got = balance_end(weights, end, end_probs)
    assert (got[~end] == weights[~end]).all()
    for row in range(3):
        at, w, p = int(counts[row]) - 1, weights[row].tolist(), end_probs[row].tolist()
        expected = sum(w[t] * p[t] for t in range(at)) / max(1 - p[at], 0.01)
        assert got[row, at].item() == pytest.approx(expected, rel=1e-5)
    if not sure:
        pair = [0, 2]
        assert length_pressure(got[pair], end[pair], end_probs[pair]).item() == pytest.approx(0, abs=1e-5)


def test_the_hash_is_the_published_splitmix64_and_equals_big_integers_bit_for_bit():
    assert splitmix64(torch.tensor(0)).item() % 2**64 == 0xE220A8397B1DCDAF
    numbers = torch.randint(-(2**63), 2**63 - 1, (5000,), generator=torch.Generator().manual_seed(0))
    assert [x % 2**64 for x in splitmix64(numbers).tolist()] == [
        oracles.splitmix64(x % 2**64) for x in numbers.tolist()
    ]


@given(st.integers(-1, 5), st.integers(0, 2**40), st.integers(0, 9), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_keys_equal_the_big_integer_oracle_whatever_the_padding(epoch, seed, stream, length):
    for pad_left in (0, 3):
        ids, real, mask = make_batch([length, length + 4], pad_left=pad_left, seed=length)
        keys = draw_keys(ids, real, seed=seed, epoch=epoch, stream=stream)
        for row in range(2):
            tokens = ids[row][real[row].bool()].tolist()
            expected = oracles.row_keys(tokens, seed, epoch, stream)
            assert keys[row][mask[row]].tolist() == expected[3:]


@given(pairs=lengths_of_pairs)
@settings(max_examples=40, deadline=None)
def test_a_subset_has_exactly_the_shorter_length_and_holds_the_shorter_side_whole(pairs):
    lengths = [w for w, _ in pairs] + [l for _, l in pairs]
    ids, real, mask = make_batch(lengths)
    for name in ("sampo", "prefix", "top_k"):
        kept = weigh(name, ids, real, mask, log_ratios=torch.randn(mask.shape)) > 0
        shorter = torch.tensor([min(p) for p in pairs] * 2)
        assert kept.sum(dim=1).tolist() == shorter.tolist()
        whole = mask.sum(dim=1) == shorter
        assert torch.equal(kept[whole], mask[whole])


def test_with_sampled_sides_rejected_the_chosen_side_is_never_thinned():
    ids, real, mask = make_batch([9, 4, 4, 9])
    kept = weigh("sampo", ids, real, mask, sampled_sides="rejected") > 0
    assert kept.sum(dim=1).tolist() == [9, 4, 4, 4]


def test_a_budget_of_the_data_set_equalises_the_totals_and_not_the_pairs():
    rng = np.random.default_rng(0)
    n = 2000
    lengths = torch.from_numpy(np.concatenate([rng.integers(1, 40, n), rng.integers(1, 90, n)]))
    totals = tuple(each.sum().item() for each in lengths.chunk(2))
    ids, real, _ = make_batch([20] * 2 * n, seed=1)
    chosen, rejected = dataset_budget(lengths, totals, draw_row_keys(ids, real, seed=0, epoch=0)).chunk(2)
    assert torch.equal(chosen, lengths[:n])
    share = totals[0] / totals[1]
    assert 0.3 < share < 0.6
    assert ((rejected - share * lengths[n:]).abs() < 1).logical_or(rejected == 1).all()
    # the rounding of a response has a standard deviation of at most half a token; one of 1 or 2 tokens keeps more
    more = (1 - share * lengths[n:]).clamp(min=0).sum().item()
    assert abs(rejected.sum().item() - more - totals[0]) < 4 * 0.5 * math.sqrt(n)
    assert more < 0.01 * totals[0]


def test_the_rounding_of_a_budget_has_the_share_as_its_mean_and_no_part_in_the_choice_of_tokens():
    draws, length = 6000, 7
    ids, real, mask = make_batch([length] * 2 * draws, seed=8)
    options = {"token_totals": (45, 100)}  # 3.15 of 7 tokens
    kept = weigh("sampo", ids, real, mask, **options)[draws:] > 0
    counts = kept.sum(dim=1)
    assert set(counts.tolist()) == {3, 4}
    error = math.sqrt(0.15 * 0.85 / draws)
    assert abs(counts.double().mean().item() - 3.15) < 4 * error
    for of_four in (False, True):
        rows = (counts == 4) == of_four
        share = (3 + of_four) / length
        first = kept[rows][:, mask[0].nonzero()[0, 0]].double().mean().item()
        assert abs(first - share) < 4 * math.sqrt(share * (1 - share) / rows.sum().item())


@pytest.mark.parametrize("name", ["sampo", "expected", "top_k"])
def test_the_end_token_of_both_sides_always_counts_when_it_is_kept(name):
    for seed in range(50):
        ids, real, mask = make_batch([10, 3, 4, 11], seed=seed)
        for row, at in enumerate((-2, -1, -1, -3)):  # not always the last token: templates put a newline behind it
            ids[row, mask[row].nonzero()[at] + 1] = END
        end = last_end_tokens(ids, mask, torch.tensor([END]))
        assert end.sum(dim=1).tolist() == [1, 1, 1, 1]
        # the end tokens have the smallest log-ratios, so that top_k would leave them out
        options = {"log_ratios": -9.0 * end, "end": end, "keep_end_token": True}
        weights = weigh(name, ids, real, mask, seed=seed, **options)
        assert (weights[end] == 1).all()
        assert weights.sum(dim=1).tolist() == pytest.approx([4, 3, 4, 3])


def test_the_end_token_is_the_last_end_token_of_the_completion_and_a_cut_one_has_none():
    ids, _, mask = make_batch([6, 5, 4, 4])
    ids[0, 1] = END  # in the prompt: does not count
    ids[0, 4], ids[0, 7] = END, END + 1  # two turns; then a newline
    ids[1, 7] = END
    end = last_end_tokens(ids, mask, torch.tensor([END, END + 1]))
    assert [row.nonzero().flatten().tolist() for row in end] == [[6], [6], [], []]


def test_every_position_is_kept_equally_often():
    draws, length, shorter = 6000, 20, 7
    ids, real, mask = make_batch([length] * draws + [shorter] * draws, seed=3)
    kept = (weigh("sampo", ids, real, mask)[:draws] > 0).float()
    counts = torch.stack([row[m] for row, m in zip(kept, mask[:draws], strict=True)]).sum(dim=0)
    # without replacement the counts are less spread than a multinomial's: scale by (1 - share) to a chi-square
    share = shorter / length
    chi_square = ((counts - draws * share) ** 2 / (draws * share * (1 - share))).sum().item() * (length - 1) / length
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], df=length - 1)
    assert low < chi_square < high
    assert abs(counts[0] / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)
    assert abs(counts[-1] / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)


def overlaps(kept_a, kept_b):
    return (kept_a & kept_b).sum(dim=1).double()


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 2}, {"stream": 1}], ids=str)
def test_draws_of_other_epochs_seeds_and_streams_are_independent(other):
    draws, length, shorter = 3000, 20, 8
    ids, real, mask = make_batch([length] * draws + [shorter] * draws, seed=4)
    a = weigh("sampo", ids, real, mask)[:draws] > 0
    b = weigh("sampo", ids, real, mask, **other)[:draws] > 0
    expected = stats.hypergeom(length, shorter, shorter)  # overlap of two independent subsets
    z = (overlaps(a, b).mean().item() - expected.mean()) / (expected.std() / math.sqrt(draws))
    assert abs(z) < 4


def test_the_draws_of_the_two_sides_of_a_pair_are_independent():
    draws, length = 3000, 20
    # a side is thinned only if it is longer: compare a row as chosen with another row of the same prompt as rejected
    ids, real, mask = make_batch([length] * 2 * draws, seed=5)
    keys = draw_keys(ids, real, seed=1, epoch=0)
    ranks = torch.stack([k[m].argsort().argsort() for k, m in zip(keys, mask, strict=True)])
    a, b = ranks[:draws] < 8, ranks[draws:] < 8
    expected = stats.hypergeom(length, 8, 8)
    assert abs((overlaps(a, b).mean().item() - expected.mean()) / (expected.std() / math.sqrt(draws))) < 4


@given(seed=st.integers(0, 1000), size=st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_a_pair_has_the_same_subset_in_any_batch_order_and_padding(seed, size):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 15, 16).tolist()
    ids, real, mask = make_batch(lengths, seed=seed)
    whole = weigh("sampo", ids, real, mask)
    order = rng.permutation(8)
    for part in np.split(order, 8 // size):
        rows = torch.tensor([*part, *(part + 8)])
        extra = torch.zeros(len(rows), 3, dtype=torch.long)
        few_ids, few_real = torch.cat((ids[rows], extra), 1), torch.cat((real[rows], extra), 1)
        few = weigh("sampo", few_ids, few_real, torch.cat((mask[rows], extra.bool()), 1))
        assert torch.equal(few[:, :-3], whole[rows])


def test_left_padding_changes_no_fingerprint_and_no_subset():
    plain, moved = make_batch([5, 9, 12, 4], seed=2), make_batch([5, 9, 12, 4], seed=2, pad_left=4)
    assert torch.equal(fingerprints(*plain[:2]), fingerprints(*moved[:2]))
    assert torch.equal(weigh("sampo", *plain), weigh("sampo", *moved)[:, 4:])


def test_fingerprints_tell_order_length_and_single_tokens_apart():
    rows = torch.tensor([[5, 6, 7, 0], [6, 5, 7, 0], [5, 6, 0, 0], [5, 6, 7, 7], [5, 6, 8, 0]])
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    assert len(set(fingerprints(rows, real).tolist())) == 5


def test_the_mean_over_many_subsets_is_the_expected_weight():
    ids, real, mask = make_batch([12, 5, 7, 9], seed=6)
    end = torch.zeros_like(mask)
    for row in range(4):
        end[row, mask[row].nonzero()[-1]] = True
    cases = ({}, {"keep_end_token": True, "end": end}, {"sampled_sides": "rejected"}, {"token_totals": (30, 41)})
    for options in (*cases, {"token_totals": (100, 41), "keep_end_token": True, "end": end}):
        mean = sum(weigh("sampo", ids, real, mask, epoch=k, **options) for k in range(4000)) / 4000
        expected = weigh("expected", ids, real, mask, **options)
        # binomial error of a share from 4,000 draws is at most .008
        torch.testing.assert_close(mean, expected, atol=0.035, rtol=0)


@pytest.mark.parametrize("name", EQUAL_TO_DPO_AT_EQUAL_LENGTHS)
def test_at_equal_lengths_the_matching_methods_are_dpo(name):
    ids, real, mask = make_batch([6, 9, 6, 9])
    assert torch.equal(weigh(name, ids, real, mask), mask.float())


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_swapping_chosen_and_rejected_flips_the_sign_of_the_margin(name):
    ids, real, mask = make_batch([6, 9, 11, 2])
    logps, ref = torch.randn(2, 4, mask.size(1), dtype=torch.float64)

    def margin(rows):
        w = weigh(name, ids[rows], real[rows], mask[rows], log_ratios=(logps - ref)[rows], gamma=0.9).double()
        chosen, rejected = (sequence_logps(logps[rows], w) - sequence_logps(ref[rows], w)).chunk(2)
        return chosen - rejected

    straight, swapped = margin(torch.tensor([0, 1, 2, 3])), margin(torch.tensor([2, 3, 0, 1]))
    torch.testing.assert_close(straight, -swapped, atol=1e-5, rtol=0)  # weights are float32
    assert straight.abs().min() > 1e-3


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_the_gradient_of_the_loss_is_that_of_finite_differences(name):
    ids, real, mask = make_batch([6, 3, 4, 8])
    # log-ratios far apart, so that a small step does not change the choice of top_k
    ref = torch.randn(mask.shape, dtype=torch.float64)
    start = ref + torch.randperm(mask.numel()).view(mask.shape).double() / 50

    def loss(logps):
        w = weigh(name, ids, real, mask, log_ratios=logps - ref, gamma=0.9).double()
        chosen, rejected = (sequence_logps(logps, w) - sequence_logps(ref, w)).chunk(2)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    assert torch.autograd.gradcheck(loss, (start.requires_grad_(),), eps=1e-6, atol=1e-7)


def test_the_log_ratios_pass_no_gradient_to_the_choice_of_top_k():
    ids, real, mask = make_batch([6, 3])
    ratios = torch.randn(mask.shape, requires_grad=True)
    assert not weigh("top_k", ids, real, mask, log_ratios=ratios).requires_grad


def test_length_pressure_is_the_derivative_of_the_margin_with_respect_to_the_end_tokens_logit():
    ids, real, mask = make_batch([6, 9, 11, 2], n_tokens=40)
    for row in range(4):
        ids[row, mask[row].nonzero()[-1] + 1] = END
    logits = torch.randn(*ids.shape, 50, dtype=torch.float64)
    targets = ids[:, 1:]
    end = mask & (targets == END)

    def margin(shift, w):
        moved = logits[:, :-1].clone()
        moved[..., END] += shift
        logps = moved.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        chosen, rejected = sequence_logps(logps, w).chunk(2)
        return chosen - rejected

    end_probs = logits[:, :-1].softmax(-1)[..., END]
    for name in WEIGHTINGS:
        w = weigh(name, ids, real, mask, gamma=0.9).double()
        numerical = (margin(1e-5, w) - margin(-1e-5, w)) / 2e-5
        torch.testing.assert_close(length_pressure(w, end, end_probs), numerical, atol=1e-8, rtol=1e-6)


def test_length_pressure_has_the_closed_form_of_a_geometric_length_model():
    """With a constant p, DPO gives -p(T_w - T_l), and SamPO in expectation -(1 - T_l/T_w) for a longer chosen side."""
    _, _, mask = make_batch([10, 4])
    end = torch.zeros_like(mask)
    for row in range(2):
        end[row, mask[row].nonzero()[-1]] = True
    p = torch.full(mask.shape, 0.1)
    assert length_pressure(token_weights("all", mask), end, p).item() == pytest.approx(-0.1 * 6)
    assert length_pressure(token_weights("expected", mask), end, p).item() == pytest.approx(-(1 - 4 / 10))


def test_weights_have_the_flags_that_the_registry_claims():
    ids, real, mask = make_batch([9, 4, 3, 8])
    ratios = torch.randn(mask.shape)
    for name, method in WEIGHTINGS.items():
        again = partial(weigh, name, ids, real, mask, gamma=0.9, tail_weight=0.3)
        w = again(log_ratios=ratios)
        assert bool(((w == 0) | (w == 1)).all()) == method.subset, name
        other = again(log_ratios=ratios, seed=99)
        assert (not torch.equal(w, other)) == method.random, name
        others = again(log_ratios=-ratios)
        assert (not torch.equal(w, others)) == method.needs_log_ratios, name
        from_data = again(log_ratios=ratios, given=mask * 3.5)
        assert (not torch.equal(w, from_data)) == method.from_data, name
        from_states = again(log_ratios=ratios, states=states_of(ids.flip(1)))
        assert (not torch.equal(w, from_states)) == method.needs_states, name
