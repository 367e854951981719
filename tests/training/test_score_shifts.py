"""The terms of DPOP and TDPO in the margin: against loops over tokens and over full logits, and against DPO."""

import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from tiny import make_model, make_pairs, make_tokenizer, save_model, training_options, with_weights

from sampo import SamPOConfig, SamPOTrainer
from sampo.scoring.divergence import forward_kl
from sampo.scoring.scorer import Scores
from sampo.training.score_shifts import dpop_shift, tdpo_shift

LAMBDA, BETA = 3.0, 0.1
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("start"))


def make_trainer(model, folder, pairs=None, *, peft_config=None, **options):
    """A run on random pairs, of DPOP unless of TDPO; a model whose reference is another one, or a folder."""
    other = {} if isinstance(model, str) else {"ref_model": make_model(seed=1), "processing_class": make_tokenizer()}
    options = {"dpop_lambda": 0.0 if "tdpo" in options else LAMBDA, **options}
    options = {"token_weighting": "all", "pair_stream": "false", **options}
    pairs = make_pairs(16) if pairs is None else pairs
    return SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(folder, **options)),
        train_dataset=pairs,
        peft_config=peft_config,
        **other,
    )


def loss_and_gradients(trainer, rows):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def log_probs(model, prompt, response):
    """The log-prob of each token of a response, from logits and with a gradient."""
    logps = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    return [logps[t, token] for t, token in enumerate(response)]


def loss_of_loop(policy, reference, rows, coefficient):
    """DPOP's loss from the equation of arXiv 2402.13228, and the number of pairs in which its term is active."""
    total, active = 0.0, 0
    for row in rows:
        ratios = {}
        for side in ("chosen_ids", "rejected_ids"):
            own = log_probs(policy, row["prompt_ids"], row[side])
            with torch.no_grad():
                ref = log_probs(reference, row["prompt_ids"], row[side])
            ratios[side] = sum(a - b for a, b in zip(own, ref, strict=True))
        fallen = -ratios["chosen_ids"] if ratios["chosen_ids"].item() < 0 else 0.0
        active += ratios["chosen_ids"].item() < 0
        logit = BETA * (ratios["chosen_ids"] - ratios["rejected_ids"] - coefficient * fallen)
        total = total + torch.log1p(torch.exp(-logit)) / len(rows)
    return total, active


def test_the_term_is_that_of_a_loop_over_random_scores():
    scores = torch.randn(50, dtype=torch.float64, requires_grad=True)
    shift = dpop_shift(scores, coefficient=LAMBDA)
    expected = [-LAMBDA * max(0.0, -score) for score in scores.tolist()]
    assert shift.tolist() == pytest.approx(expected)
    (slope,) = torch.autograd.grad(shift.sum(), scores)
    assert slope.tolist() == [LAMBDA if score < 0 else 0.0 for score in scores.tolist()]
    at_zero = torch.zeros(2, requires_grad=True)
    assert torch.autograd.grad(dpop_shift(at_zero, coefficient=LAMBDA).sum(), at_zero)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_loss_and_gradients_of_a_step_are_those_of_the_equation(tmp_path, stream):
    policy, reference = make_model(seed=2), make_model(seed=1)
    trainer = make_trainer(policy, tmp_path, pair_stream=stream)
    rows = [trainer.train_dataset[i] for i in range(12)]
    loss, gradients = loss_and_gradients(trainer, rows)

    again = make_model(seed=2)
    expected, active = loss_of_loop(again, reference, rows, LAMBDA)
    expected.backward()
    assert 0 < active < 12  # both branches
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    by_hand = torch.cat([p.grad.flatten() for p in again.parameters()])
    torch.testing.assert_close(gradients, by_hand, atol=2e-5, rtol=1e-4)
    plain, _ = loss_of_loop(again, reference, rows, 0.0)
    assert loss > plain.item() + 0.1


def test_the_first_loss_is_ln_2_with_the_gradients_of_dpo(start, tmp_path):
    found = []
    for coefficient in (0.0, 50.0):
        trainer = make_trainer(start, tmp_path, dpop_lambda=coefficient)
        found.append(loss_and_gradients(trainer, [trainer.train_dataset[i] for i in range(8)]))
    assert found[1][0] == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0)


def history(trainer):
    trainer.train()
    return trainer.state.log_history


def losses(trainer):
    return [entry["loss"] for entry in history(trainer) if "loss" in entry]


def test_rewards_are_logged_without_the_term_and_are_those_of_dpo(tmp_path):
    logs = []
    for coefficient in (0.0, LAMBDA):
        trainer = make_trainer(make_model(seed=2), tmp_path, dpop_lambda=coefficient, max_steps=1)
        logs.append(history(trainer)[0])
    for name, value in logs[0].items():
        if name.startswith(("rewards/", "logps/", "length")):
            assert logs[1][name] == pytest.approx(value, abs=1e-6), name
    assert logs[1]["loss"] > logs[0]["loss"] + 0.1


RUNS = [
    {},
    {"token_weighting": "sampo"},
    {"token_weighting": "sampo", "mask_samples": 2, "length_penalty": "learned"},
    {"token_weighting": "expected", "balance_end_token": True, "precompute_ref_log_probs": True},
    {"token_weighting": "column", "pair_weight_column": "pair_weight"},
    {"ld_alpha": 0.4, "loss_type": ["sigmoid", "sft"]},
    {"peft_config": LoraConfig(**LORA), "gradient_checkpointing": True},
]


@pytest.mark.parametrize("options", RUNS, ids=lambda o: ",".join(o) or "plain")
def test_stream_cache_and_micro_batches_have_the_losses_of_the_plain_forward(start, tmp_path, options):
    pairs = with_weights(make_pairs(22))
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 4}
    layouts = [{}, {"pair_stream": "true"}, {"precompute_ref_log_probs": True}]
    layouts.append({"pair_stream": "true", "max_tokens_per_forward": 90})
    logs = []
    for number, layout in enumerate(layouts):
        kept = {"ref_cache_dir": str(tmp_path / f"cache{number}")}
        logs.append(losses(make_trainer(start, tmp_path, pairs, **{**sizes, **kept, **options, **layout})))
    for log in logs[1:]:
        assert log == pytest.approx(logs[0], abs=2e-4)  # rounding decides the sign of a score near 0
    without = losses(make_trainer(start, tmp_path, pairs, **{**sizes, **options, "dpop_lambda": 0.0}))
    assert max(abs(a - b) for a, b in zip(without, logs[0], strict=True)) > 5e-4


def test_the_loss_of_weighted_pairs_is_the_mean_of_their_weighted_losses(tmp_path):
    trainer = make_trainer(make_model(seed=2), tmp_path, with_weights(make_pairs(5)), pair_weight_column="pair_weight")
    rows = [trainer.train_dataset[i] for i in range(5)]
    loss, gradients = loss_and_gradients(trainer, rows)
    alone = [loss_and_gradients(trainer, [row | {"pair_weight": 1.0}]) for row in rows]
    weights = [row["pair_weight"] for row in rows]
    assert loss == pytest.approx(sum(w * each for w, (each, _) in zip(weights, alone, strict=True)) / 5, rel=1e-5)
    expected = sum(w * each for w, (_, each) in zip(weights, alone, strict=True)) / 5
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


# --- TDPO ------------------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_full_logits_in_chunks_of_any_size():
    torch.manual_seed(0)
    positions = torch.rand(4, 7) > 0.4
    states, ref_states = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    weight, ref_weight = torch.randn(2, 11, 6, dtype=torch.float64)
    bias, ref_bias = torch.randn(2, 11, dtype=torch.float64)
    logps, ref_logps = (
        (h @ w.T + b).log_softmax(dim=-1) for h, w, b in ((states, weight, bias), (ref_states, ref_weight, ref_bias))
    )
    expected = (ref_logps.exp() * (ref_logps - logps)).sum(dim=-1) * positions
    policy, reference = Scores(None, [], states, (weight, bias)), Scores(None, [], ref_states, (ref_weight, ref_bias))
    for numbers in (1, 35, 10_000):
        found = forward_kl(reference, policy, positions, chunk_numbers=numbers)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)  # of float32 logits
    assert expected.max() > 1
    nowhere = torch.zeros_like(positions)
    assert forward_kl(reference, policy, nowhere).tolist() == torch.zeros(4, 7).tolist()


def test_the_two_variants_are_those_of_the_equations():
    divergences = torch.rand(6, requires_grad=True)
    d = divergences.tolist()
    for variant, sign_w, scale in (("tdpo1", 1.0, 1.0), ("tdpo2", 0.0, 0.7)):
        shift = tdpo_shift(divergences, variant=variant, alpha=0.7)
        assert shift.tolist() == pytest.approx([-scale * (d[i + 3] - d[i]) for i in range(3)])
        (slope,) = torch.autograd.grad(shift.sum(), divergences)
        assert slope.tolist() == pytest.approx([sign_w] * 3 + [-scale] * 3)


def tdpo_loss_of_loop(policy, reference, rows, weights, variant, alpha):
    """From full logits, token by token; `weights` has those of the tokens of each row, chosen rows first."""
    total, shifts = 0.0, []
    for i, row in enumerate(rows):
        scores, divergences = [], []
        for side, w in (("chosen_ids", weights[i]), ("rejected_ids", weights[len(rows) + i])):
            ids, n_prompt = torch.tensor([row["prompt_ids"] + row[side]]), len(row["prompt_ids"])
            own = policy(ids).logits[0, n_prompt - 1 : -1].log_softmax(dim=-1)
            with torch.no_grad():
                ref = reference(ids).logits[0, n_prompt - 1 : -1].log_softmax(dim=-1)
            score = divergence = 0.0
            for t, token in enumerate(row[side]):
                score = score + w[t] * (own[t, token] - ref[t, token])
                divergence = divergence + w[t] * (ref[t].exp() * (ref[t] - own[t])).sum()
            scores.append(score)
            divergences.append(divergence)
        chosen, rejected = divergences
        shift = chosen - rejected if variant == "tdpo1" else -alpha * (rejected - chosen.detach())
        shifts.append(shift.item())
        total = total - torch.nn.functional.logsigmoid(BETA * (scores[0] - scores[1] + shift)) / len(rows)
    return total, shifts


TDPO_CASES = [
    {"tdpo": "tdpo1"},
    {"tdpo": "tdpo2"},
    {"tdpo": "tdpo2", "tdpo_alpha": 0.7, "token_weighting": "sampo", "pair_stream": "true"},
    {"tdpo": "tdpo1", "token_weighting": "expected", "balance_end_token": True, "pair_stream": "true"},
    {"tdpo": "tdpo2", "token_weighting": "top_k"},
]


@pytest.mark.parametrize("options", TDPO_CASES, ids=str)
def test_loss_and_gradients_of_tdpo_are_those_of_full_logits(tmp_path, options):
    trainer = make_trainer(make_model(seed=2), tmp_path, make_pairs(4), **options)
    rows = [trainer.train_dataset[i] for i in range(4)]
    loss, gradients = loss_and_gradients(trainer, rows)

    batch = trainer.prepare_batch(trainer.data_collator(rows))
    trainer.passes.score(trainer.model, batch)
    chosen = batch.weights[0][0]
    weights = [w[m].tolist() for w, m in zip(chosen, batch.mask, strict=True)]
    again = make_model(seed=2)
    args = trainer.args
    expected, shifts = tdpo_loss_of_loop(again, make_model(seed=1), rows, weights, args.tdpo, args.tdpo_alpha)
    expected.backward()
    assert max(map(abs, shifts)) > 0.5
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    by_hand = torch.cat([p.grad.flatten() for p in again.parameters()])
    torch.testing.assert_close(gradients, by_hand, atol=5e-5, rtol=1e-3)  # of sums over 69 tokens in float32


def test_tdpo_begins_at_ln_2_with_the_gradients_of_dpo(start, tmp_path):
    rows = [0, 1, 2, 3, 4, 5]
    found = []
    for options in ({"dpop_lambda": 0.0}, {"tdpo": "tdpo1"}, {"tdpo": "tdpo2"}):
        trainer = make_trainer(start, tmp_path, **options)
        found.append(loss_and_gradients(trainer, [trainer.train_dataset[i] for i in rows]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(math.log(2), abs=1e-6)
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-4, atol=1e-7)  # that of a KL of 0 is rounding


TDPO_RUNS = [
    {},
    {"token_weighting": "sampo", "mask_samples": 2, "length_penalty": "learned", "loss_type": ["sigmoid", "sft"]},
    {"token_weighting": "otpo", "log_length_pressure": True},
    {"pair_weight_column": "pair_weight"},
    {"peft_config": LoraConfig(**LORA), "gradient_checkpointing": True, "learning_rate": 5e-2},
]


@pytest.mark.parametrize("options", TDPO_RUNS, ids=lambda o: ",".join(o) or "plain")
def test_stream_and_micro_batches_have_the_losses_of_tdpos_plain_forward(start, tmp_path, options):
    pairs = with_weights(make_pairs(22))
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 4}
    layouts = [{}, {"pair_stream": "true"}, {"pair_stream": "true", "max_tokens_per_forward": 90}]
    layouts.append({"dpop_lambda": 0.0})
    logs = []
    for layout in layouts:
        tdpo = {} if "dpop_lambda" in layout else {"tdpo": "tdpo2"}
        trainer = make_trainer(start, tmp_path, pairs, **{**sizes, "learning_rate": 5e-3, **options, **layout, **tdpo})
        logs.append(losses(trainer))
    assert logs[1] == pytest.approx(logs[0], abs=1e-4)
    assert logs[2] == pytest.approx(logs[0], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(logs[3], logs[0], strict=True)) > 1e-3


def test_the_reference_of_a_run_with_a_head_of_its_own_is_the_base_models_head(start, tmp_path):
    """`modules_to_save` trains a copy of the head; KL and log-ratios must compare with the first one."""
    peft = LoraConfig(**LORA, modules_to_save=["lm_head"])
    trainer = make_trainer(start, tmp_path, tdpo="tdpo1", peft_config=peft)
    rows = [trainer.train_dataset[i] for i in range(4)]
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(1.5)
    batch = trainer.prepare_batch(trainer.data_collator(rows))
    kl = trainer.passes.score(trainer.model, batch).kl.sum(dim=1)
    first = type(trainer.model.get_base_model()).from_pretrained(start)
    for row, found in zip(rows, kl.tolist(), strict=False):
        ids, n_prompt = torch.tensor([row["prompt_ids"] + row["chosen_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            logits = first(ids).logits[0, n_prompt - 1 : -1]
            ref, own = logits.log_softmax(dim=-1), (1.5 * logits).log_softmax(dim=-1)
        assert found == pytest.approx((ref.exp() * (ref - own)).sum().item(), rel=1e-4)
        assert found > 0.1


def test_tdpo_is_refused_where_the_logits_cannot_be_had(start, tmp_path):
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="`tdpo: tdpo1` needs the hidden states of the policy"):
        make_trainer(start, tmp_path, tdpo="tdpo1", peft_config=peft)
    capped = make_model(seed=2)
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"`tdpo: tdpo2` must have the logits .* by \['final_logit_softcapping'\]"):
        make_trainer(capped, tmp_path, tdpo="tdpo2")
