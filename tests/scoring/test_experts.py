"""Mixtures of experts as their families' default configs make them: TRL adds their auxiliary loss unless its
coefficient is 0, whatever `output_router_logits` says."""

import math

import pytest
import torch
from streams import COMMON, GROUPED, collate, losses, make_trainer
from tiny import make_pairs, make_tokenizer, training_options
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from trl import DPOConfig, DPOTrainer

from sampo.scoring.packing import lay_out
from sampo.scoring.scorer import ModelScorer

SMALL = {**COMMON, **GROUPED, "num_experts_per_tok": 2}
CONFIGS = {
    "qwen3-moe": lambda **flags: Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, moe_intermediate_size=16, **flags),
    "qwen2-moe": lambda **flags: Qwen2MoeConfig(
        **SMALL, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, **flags
    ),
    "mixtral": lambda **flags: MixtralConfig(**SMALL, num_local_experts=4, **flags),
    "olmoe": lambda **flags: OlmoeConfig(**SMALL, num_experts=4, **flags),
}
CASES = [(name, {}) for name in CONFIGS] + [
    ("mixtral", {"output_router_logits": True}),
    ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.0}),
    ("qwen3-moe", {"router_aux_loss_coef": 0.0}),
]


@pytest.fixture(params=CASES, ids=str)
def experts(request, tmp_path):
    """Folder of a model, and whether its config asks for the auxiliary loss."""
    name, flags = request.param
    torch.manual_seed(0)
    config = CONFIGS[name](**flags)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), config.router_aux_loss_coef != 0


def trls(folder, tmp_path, **options):
    args = DPOConfig(**training_options(tmp_path / "trl", max_steps=2, **options))
    return losses(DPOTrainer(model=folder, args=args, train_dataset=make_pairs(32)))


@pytest.mark.parametrize("cached", [False, True])
def test_with_all_tokens_the_losses_are_trls_whatever_the_stream(experts, tmp_path, cached):
    folder, _ = experts
    options = {"precompute_ref_log_probs": True} if cached else {}
    theirs = trls(folder, tmp_path, **options)
    options |= {"token_weighting": "all", "max_steps": 2, "ref_cache_dir": str(tmp_path / "cache")}
    for stream in ("false", "true"):
        ours = losses(make_trainer(folder, tmp_path, pair_stream=stream, **options))
        exact = stream == "false" and not cached
        assert ours == (theirs if exact else pytest.approx(theirs, abs=1e-4))


@pytest.mark.parametrize("mode", ["auto", "true"])
def test_a_wrong_auxiliary_loss_is_found_by_the_first_batch(tmp_path, caplog, monkeypatch, mode):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["mixtral"]()).float().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")

    def with_ones(*args, **kwargs):
        stream = lay_out(*args, **kwargs)
        stream.n_rows = torch.ones_like(stream.n_rows)  # as if no prompt were shared
        return stream

    monkeypatch.setattr("sampo.training.batch.lay_out", with_ones)
    trainer = make_trainer(str(tmp_path / "model"), tmp_path, pair_stream=mode, max_steps=1)
    if mode == "true":
        with pytest.raises(ValueError, match="the log-probs of the first batch differ"):
            trainer.train()
        return
    trainer.train()
    assert "auto takes the plain forward over padded rows, because the log-probs of the first" in caplog.text


def test_a_coefficient_of_0_lets_the_stream_in_and_pieces_too(experts, tmp_path, caplog):
    folder, has_loss = experts
    off = {"router_aux_loss_coef": 0.0, "max_steps": 2, "token_weighting": "all"}
    theirs = trls(folder, tmp_path, router_aux_loss_coef=0.0)
    for more in ({}, {"max_tokens_per_forward": 60}):
        ours = losses(make_trainer(folder, tmp_path, pair_stream="true", **off, **more))
        assert ours == pytest.approx(theirs, abs=1e-4)
    if has_loss:
        with pytest.raises(ValueError, match=r"`max_tokens_per_forward` must cut .* mixture of experts"):
            make_trainer(folder, tmp_path, pair_stream="auto", max_tokens_per_forward=60)


def test_subsets_begin_at_ln_2_plus_the_auxiliary_loss(experts, tmp_path):
    folder, has_loss = experts
    trainer = make_trainer(folder, tmp_path, pair_stream="auto", max_steps=1, log_length_pressure=True)
    (first,) = losses(trainer)
    added = trainer.router_aux_loss_coef * trainer.state.log_history[0]["aux_loss"] if has_loss else 0.0
    assert first == pytest.approx(math.log(2) + added, abs=1e-6)


def test_diagnose_scores_tokens_by_the_stream(experts):
    model = AutoModelForCausalLM.from_pretrained(experts[0])
    batch = collate([(3, 2, 3), (6, 9, 4)])
    targets = batch["input_ids"][:, 1:]
    streamed, plain = (ModelScorer(model, pair_stream=mode)(batch, targets)[0] for mode in ("true", "false"))
    torch.testing.assert_close(streamed, plain, atol=1e-5, rtol=0)
