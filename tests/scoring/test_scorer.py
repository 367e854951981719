"""One pass scores several targets: against log-softmax of the model's own logits, with every head and layout."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from streams import collate
from tiny import make_model

from sampo.scoring.scorer import ModelScorer, Rows, Scorer
from sampo.scoring.ways import GROUPED, PACKED, PADDED

SHAPES = [(3, 4, 7), (1, 9, 2), (6, 1, 1)]
HEADS = [("positions", "true"), ("positions", "false"), ("labels", "false"), ("logits", "false")]


def expected_logps(model, batch, targets):
    """`(2B, N)` by the model's own forward, row by row and without padding."""
    found = torch.zeros(targets.shape)
    for row, (ids, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        n = int(real.sum())
        logps = model(input_ids=ids[None, :n]).logits[0, :-1].log_softmax(dim=1)
        found[row, : n - 1] = logps.gather(1, targets[row, : n - 1, None])[:, 0]
    return found


@pytest.fixture
def batch():
    return collate(SHAPES, seed=3)


@pytest.mark.parametrize(("head", "pair_stream"), HEADS)
@pytest.mark.parametrize("n_targets", [1, 2, 3])
def test_each_target_has_its_log_probs_and_the_first_its_gradient(batch, head, pair_stream, n_targets):
    model, plain = make_model(seed=1), make_model(seed=1)
    ModelScorer(model)  # gives it TRL's head
    scorer = Scorer([model], head=head, pair_stream=pair_stream)
    rows = Rows(batch)
    positions = rows.mask & (torch.rand(rows.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.7)
    others = [torch.randint(4, 60, rows.mask.shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    targets = [batch["input_ids"][:, 1:], *others][:n_targets]
    scores = scorer(model, rows, positions, *targets)
    assert len(scores.log_probs) == n_targets
    for found, target in zip(scores.log_probs, targets, strict=True):
        torch.testing.assert_close(found, expected_logps(plain, batch, target) * positions, atol=1e-5, rtol=0)
    assert [found.requires_grad for found in scores.log_probs] == [True] + [False] * (n_targets - 1)
    scores.log_probs[0].sum().backward()
    (expected_logps(plain, batch, targets[0]) * positions).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-4)


LAYOUTS = {"packed": {"pair_stream": "true"}, "padded": {"pair_stream": "false"}, "grouped": {"refuse": "of a test"}}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_hidden_states_are_those_that_predict_the_tokens(batch, layout):
    model, plain = make_model(seed=1), make_model(seed=1)
    ModelScorer(model)  # gives it TRL's head
    scorer, rows = Scorer([model], **LAYOUTS[layout]), Rows(batch)
    scorer(model, rows, rows.mask)
    scorer.ways.settle(None)
    assert {"grouped": GROUPED, "packed": PACKED, "padded": PADDED}[layout] == scorer.ways.way
    scores = scorer(model, rows, rows.mask, keep_states=True)
    assert not hasattr(scores.output, "states")
    assert scores.states.requires_grad  # `tdpo` needs their gradient; a weighting gets them without
    for row, (ids, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        n = int(real.sum())
        states = plain.model(input_ids=ids[None, :n]).last_hidden_state[0, :-1]  # the state before each token
        mask = rows.mask[row, : n - 1, None]
        torch.testing.assert_close(scores.states[row, : n - 1], states * mask, atol=1e-5, rtol=1e-5)


def test_the_batchs_own_tokens_are_the_target_where_none_is_given(batch):
    model = make_model(seed=1)
    rows = Rows(batch)
    (own,) = ModelScorer(model)(batch)
    torch.testing.assert_close(own, expected_logps(make_model(seed=1), batch, batch["input_ids"][:, 1:]) * rows.mask)


def test_each_model_is_compared_on_its_first_batch(batch):
    models = [make_model(seed=seed) for seed in (1, 2)]
    calls = []
    for number, model in enumerate(models):
        ModelScorer(model)
        model.model.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    scorer = Scorer(models, pair_stream="true")
    rows = Rows(batch)
    for model in (*models, *models):
        scorer(model, rows, rows.mask)
    assert calls == [0, 0, 0, 1, 1, 1, 0, 1]


def test_the_own_head_includes_an_adapter_on_it(batch):
    """TRL's head reads the weight below an adapter; a merge and a judge need what the model really computes."""
    adapted = get_peft_model(make_model(seed=1), LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    rows = Rows(batch)
    (found,) = ModelScorer(adapted, own_head=True)(batch)
    with torch.no_grad():
        expected = expected_logps(adapted, batch, batch["input_ids"][:, 1:]) * rows.mask
        without = expected_logps(make_model(seed=1), batch, batch["input_ids"][:, 1:]) * rows.mask
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - without).abs().max() > 0.01


def test_rows_of_any_kind_are_padded_on_the_right():
    rows = Rows.of([([5, 6], [7]), ([8], [9, 10, 11])])
    assert rows.inputs["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert rows.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert rows.mask.tolist() == [[False, True, False], [True, True, True]]
