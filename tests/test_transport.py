"""OTPO's weights against loops in double precision, the transport problem itself, and what must not change them."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from sampo.transport import count_iterations, transport_weights


def batch_of(lengths, *, width=None, size=6, seed=0, scale=1.0):
    """States and mask of pairs whose completions stand behind a prompt of two positions."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(map(max, lengths)) + 4
    order = [w for w, _ in lengths] + [l for _, l in lengths]
    states = scale * torch.randn(len(order), width, size, generator=generator)
    position = torch.arange(width)
    mask = torch.stack([(position >= 2) & (position < 2 + n) for n in order])
    return states, mask


@pytest.mark.parametrize(("reg", "mass_reg"), [(1.0, 0.2), (0.1, 0.05), (0.5, 5.0), (2.0, 100.0)])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
@settings(max_examples=15, deadline=None)
def test_the_weights_are_those_of_loops_in_double_precision(reg, mass_reg, lengths, seed, scale):
    states, mask = batch_of(lengths, seed=seed, scale=scale)
    got = transport_weights(states, mask, reg=reg, mass_reg=mass_reg)
    assert (got[~mask] == 0).all()
    n = len(lengths)
    for pair in range(n):
        rows = [states[row][mask[row]].double().tolist() for row in (pair, n + pair)]
        for row, expected in zip((pair, n + pair), oracles.transport_weights(*rows, reg, mass_reg), strict=True):
            assert got[row][mask[row]].tolist() == pytest.approx(expected, rel=2e-4)
            assert got[row].sum().item() == pytest.approx(min(lengths[pair]), rel=1e-5)


def test_the_plan_is_the_minimum_of_the_transport_problem():
    states, mask = batch_of([(3, 4)], scale=0.3)
    a, b = (states[row][mask[row]].double().numpy() for row in (0, 1))
    cost = np.linalg.norm(a[:, None] - b[None], axis=2) + 1e-6
    cost = cost / max(cost.max(), 1)
    reg, mass_reg = 0.7, 0.4

    def divergence(x):  # from ones
        return (x * np.log(x) - x + 1).sum()

    def objective(logs):
        plan = np.exp(logs).reshape(3, 4)
        masses = divergence(plan.sum(axis=1)) + divergence(plan.sum(axis=0))
        return (cost * plan).sum() + reg * divergence(plan) + mass_reg * masses

    plan = np.exp(minimize(objective, np.zeros(12), method="BFGS", options={"gtol": 1e-9}).x).reshape(3, 4)
    got = transport_weights(states, mask, reg=reg, mass_reg=mass_reg)
    for row, axis in ((0, 1), (1, 0)):
        expected = plan.sum(axis=axis) * 3 / plan.sum()
        assert got[row][mask[row]].numpy() == pytest.approx(expected, rel=1e-4)


def test_a_pair_has_the_same_weights_in_any_batch_and_padding():
    states, mask = batch_of([(5, 8), (3, 2), (9, 1)], width=14, scale=5.0)
    whole = transport_weights(states, mask, reg=1.0, mass_reg=0.2)
    for pair in range(3):
        rows = [pair, 3 + pair]
        alone = transport_weights(states[rows, :12], mask[rows, :12], reg=1.0, mass_reg=0.2)
        torch.testing.assert_close(alone, whole[rows, :12], rtol=1e-6, atol=0)


def test_equal_states_share_equally_and_near_tokens_weigh_more():
    states, mask = torch.ones(2, 8, 3), torch.arange(8).repeat(2, 1) < torch.tensor([[6], [4]])
    same = transport_weights(states, mask, reg=1.0, mass_reg=0.2)
    assert same[0, :6].tolist() == pytest.approx([4 / 6] * 6)
    assert same[1, :4].tolist() == pytest.approx([1.0] * 4)
    states[0, 5] = 4.0
    far = transport_weights(states, mask, reg=1.0, mass_reg=0.2)
    assert far[0, 5] < 0.95 * far[0, 0]
    assert not transport_weights(states.requires_grad_(), mask, reg=1.0, mass_reg=0.2).requires_grad


def test_the_number_of_iterations_reduces_the_error_as_far_as_it_says():
    for reg, mass_reg in ((1.0, 0.2), (1.0, 1.0), (1.0, 100.0)):
        factor = mass_reg / (mass_reg + reg)
        n = count_iterations(reg, mass_reg)
        assert factor ** (2 * n) <= 1e-9 * (1 + 1e-6) < factor ** (2 * (n - 1)) * (1 + math.ulp(1))
