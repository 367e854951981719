"""The LM head on CPU against TRL's function: log-probs, statistics and gradients, whatever the tile and the type."""

import pytest
import torch
import trl.trainer.utils as trl_utils
from streams import collate
from tiny import make_model
from trl.kernels import ChunkedLogProbFunction

from sampo.scoring import cpu_head
from sampo.scoring.cpu_head import TokenLogProbs, fast_head
from sampo.scoring.scorer import ModelScorer, Rows, Scorer

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def made(n, dtype, seed=0, vocabulary=83, width=16):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    targets = torch.randint(vocabulary, (n,), generator=generator)
    return states, weight, targets, torch.randn(n, generator=generator)


def computed(function, states, weight, targets, grad, outputs=OUTPUTS):
    states.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=states.dtype == torch.bfloat16):
        found = function(states, weight, targets, outputs)
    found[0].backward(grad)
    return found, states.grad, weight.grad


def trls(states, weight, targets, outputs):
    return ChunkedLogProbFunction.apply(states, weight, None, targets, 1.0, 32768, None, 1.0, outputs)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("rows_per_tile", [3, 1000])
@pytest.mark.parametrize("rows_per_block", [2, 1000])
def test_it_is_trls_function(monkeypatch, dtype, n, rows_per_tile, rows_per_block):
    monkeypatch.setattr(cpu_head, "_TILE_BYTES", rows_per_tile * 83 * dtype.itemsize)
    monkeypatch.setattr(cpu_head, "_BLOCK_NUMBERS", rows_per_block * 83)
    arguments = made(n, dtype, seed=n)
    (theirs, their_states, their_weight), (ours, our_states, our_weight) = (
        computed(function, *arguments) for function in (trls, TokenLogProbs.apply)
    )
    for name, a, b in zip(OUTPUTS, ours, theirs, strict=True):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # of the same rounded logits
    for a, b in ((our_states, their_states), (our_weight, their_weight)):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= BOUNDS[dtype] * b.norm()


def test_the_log_probs_are_those_of_log_softmax_and_unwanted_statistics_are_left_out():
    states, weight, targets, grad = made(9, torch.float32)
    (logps, *statistics), states_grad, _ = computed(
        TokenLogProbs.apply, states, weight, targets, grad, outputs=("log_probs", "is_top1")
    )
    expected = (states @ weight.T).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(states_grad, torch.autograd.grad(expected, states, grad)[0])
    assert [each is None for each in statistics] == [True, True, True, False]


def test_of_equal_logits_the_first_is_the_top_one():
    states, weight = torch.ones(2, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    top = TokenLogProbs.apply(states, weight, torch.tensor([0, 1]), OUTPUTS)[4]
    assert top.tolist() == [True, False]


def test_a_frozen_head_gets_no_gradient():
    states, weight, targets, grad = made(6, torch.float32)
    TokenLogProbs.apply(states, weight.detach(), targets, OUTPUTS)[0].backward(grad)
    assert states.grad.abs().sum() > 0
    assert weight.grad is None


def test_no_tokens_give_no_numbers_and_no_error():
    states, weight, targets, grad = made(0, torch.float32)
    found, states_grad, weight_grad = computed(TokenLogProbs.apply, states, weight, targets, grad)
    assert all(len(each) == 0 for each in found)
    assert states_grad.shape == (0, 16)
    assert not weight_grad.any()


def test_trls_function_is_back_afterwards_even_after_an_error():
    def fail():
        with fast_head():
            assert trl_utils._ChunkedLogProbFunction is not ChunkedLogProbFunction
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert trl_utils._ChunkedLogProbFunction is ChunkedLogProbFunction


@pytest.mark.parametrize("option", ["bias", "softcap", "scale"])
def test_a_head_that_does_more_is_trls(monkeypatch, option):
    states, weight, targets, _ = made(6, torch.float32)
    bias, softcap, scale = torch.ones(83) if option == "bias" else None, None, 1.0
    softcap, scale = (5.0 if option == "softcap" else None), (0.5 if option == "scale" else 1.0)
    monkeypatch.setattr(TokenLogProbs, "apply", None)
    with fast_head():
        arguments = (states, weight, bias, targets, 1.0, 32768, softcap, scale, OUTPUTS)
        found = trl_utils._ChunkedLogProbFunction.apply(*arguments)
    torch.testing.assert_close(found[0], ChunkedLogProbFunction.apply(*arguments)[0])


@pytest.mark.parametrize(("pair_stream", "used"), [("false", False), ("auto", True), ("true", True)])
def test_it_is_used_unless_the_plain_forward_of_trl_is_asked_for(monkeypatch, pair_stream, used):
    calls, apply = [], TokenLogProbs.apply
    monkeypatch.setattr(TokenLogProbs, "apply", lambda *args: calls.append(1) or apply(*args))
    model, rows = make_model(seed=1), Rows(collate([(3, 4, 7), (1, 9, 2)], seed=3))
    ModelScorer(model, pair_stream="false")
    Scorer([model], pair_stream=pair_stream)(model, rows, rows.mask)
    assert bool(calls) == used
