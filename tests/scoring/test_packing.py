"""The pair stream against TRL's padded forward: log-probs, gradients and whole runs; and what it must not touch."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from streams import (
    COMMON,
    GROUPED,
    check_gradients,
    collate,
    gradients,
    losses,
    make,
    make_trainer,
    plain_output,
    streamed_output,
)
from tiny import make_pairs, save_model
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sampo.scoring.packing import install, lay_out, uninstall

EXACT = {
    "llama": LlamaConfig(**COMMON, **GROUPED),
    "qwen2": Qwen2Config(**COMMON, **GROUPED),
    "qwen3": Qwen3Config(**COMMON, **GROUPED, head_dim=8),
    "mistral": MistralConfig(**COMMON, **GROUPED, sliding_window=64),
    "phi3": Phi3Config(**COMMON),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "gemma3": Gemma3TextConfig(**COMMON, **GROUPED, head_dim=8, sliding_window=64),
    "gpt2": GPT2Config(  # a table of positions shorter than the stream
        **COMMON | {"hidden_size": 32, "initializer_range": 0.2},
        n_positions=32,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
    ),
    "opt": OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, init_std=0.2),
}


@pytest.fixture(scope="module")
def models():
    return {name: make(config) for name, config in EXACT.items()}


sizes = st.integers(1, 14)
pairs_of_any_shape = st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=4)


@pytest.mark.parametrize("name", list(EXACT))
@given(shapes=pairs_of_any_shape, seed=st.integers(0, 100))
@settings(max_examples=12, deadline=None)
def test_log_probs_statistics_and_gradients_are_those_of_the_padded_forward(models, name, shapes, seed):
    model, batch = models[name], collate(shapes, seed)
    plain, streamed = plain_output(model, batch), streamed_output(model, batch)
    torch.testing.assert_close(streamed.log_probs, plain.log_probs, atol=1e-4, rtol=0)
    scored = batch["completion_mask"][:, 1:].bool()
    for field in ("entropy", "mean_logits"):  # TRL leaves them at unscored places on some devices
        torch.testing.assert_close(getattr(streamed, field)[scored], getattr(plain, field)[scored], atol=1e-4, rtol=0)
    check_gradients(gradients(model, streamed), gradients(model, plain))


ODD = {
    "duplicate pairs": {"shapes": [(3, 4, 5)] * 3},
    "truncated on the right": {"shapes": [(5, 20, 3), (6, 4, 30)], "max_length": 12},
    "a prompt longer than all else": {"shapes": [(60, 2, 3), (1, 1, 1)]},
    "prompts cut at the start, each to its own length": {
        "shapes": [(9, 4, 8), (5, 3, 7)],
        "max_length": 10,
        "mode": "keep_end",
    },
    "no prompt left": {"shapes": [(2, 12, 14)], "max_length": 8, "mode": "keep_end"},
}


@pytest.mark.parametrize("case", list(ODD))
def test_odd_shapes_are_exact_too(models, case):
    batch = collate(**ODD[case])
    plain, streamed = plain_output(models["llama"], batch), streamed_output(models["llama"], batch)
    torch.testing.assert_close(streamed.log_probs, plain.log_probs, atol=1e-4, rtol=0)


def test_the_layout_is_that_of_the_example_in_the_module():
    batch = DataCollatorForPreference(pad_token_id=0)(
        [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}]
    )
    stream = lay_out(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    assert stream.input_ids.tolist() == [[1, 2, 3, 4, 3]]
    assert stream.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert stream.positions.tolist() == [2, 3, 4]
    assert batch["input_ids"][:, 1:][stream.rows, stream.columns].tolist() == [4, 5, 6]


def test_a_branch_sees_neither_the_other_branch_nor_another_pair(models):
    model = models["llama"]
    batch = collate([(4, 6, 5), (3, 4, 7)])
    before = streamed_output(model, batch).log_probs
    changed = copy.deepcopy(batch)
    changed["input_ids"][2, 4:] = 17  # the first pair's rejected completion
    after = streamed_output(model, changed).log_probs
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.equal(before[2], after[2])


def test_only_the_scored_tokens_go_through_the_head(models):
    model = make(EXACT["llama"])
    batch = collate([(4, 6, 5), (3, 4, 7)])
    scored = batch["completion_mask"][:, 1:].bool()
    scored &= torch.rand(scored.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = []
    forward = model.forward

    def watched(**kwargs):
        seen.append(kwargs["shift_labels"].numel())
        return forward(**kwargs)

    whole = streamed_output(model, batch).log_probs
    model.forward = watched
    part = streamed_output(model, batch, scored).log_probs
    assert seen == [scored.sum().item()]
    torch.testing.assert_close(part, whole * scored, atol=1e-6, rtol=0)


def test_the_model_without_a_stream_is_what_it_was(models):
    model, batch = make(EXACT["gemma3"]), collate([(4, 6, 5)])
    before = plain_output(model, batch).log_probs
    generated = model.generate(batch["input_ids"][:1, :4], max_new_tokens=5, do_sample=False)
    install(model)
    assert torch.equal(plain_output(model, batch).log_probs, before)
    assert torch.equal(model.generate(batch["input_ids"][:1, :4], max_new_tokens=5, do_sample=False), generated)
    uninstall(model)
    assert model.config._attn_implementation == "sdpa"


def draw_needed(batch, seed):
    """Random completion tokens: each row has a share of its own, so that some need all and some nothing."""
    completion = batch["completion_mask"][:, 1:].bool()
    draw = torch.rand((2, *completion.shape), generator=torch.Generator().manual_seed(seed))
    return completion & (draw[0] < draw[1, :, :1] ** 3)


@given(shapes=pairs_of_any_shape, seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_what_comes_after_the_last_needed_token_can_be_left_out(models, shapes, seed):
    model, batch = models["llama"], collate(shapes, seed)
    needed = draw_needed(batch, seed)
    plain, streamed = plain_output(model, batch), streamed_output(model, batch, needed, needed)
    torch.testing.assert_close(streamed.log_probs, plain.log_probs * needed, atol=1e-4, rtol=0)
    check_gradients(gradients(model, streamed), gradients(model, plain, weights=needed))


@given(shapes=pairs_of_any_shape, seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_stream_has_only_the_tokens_that_the_needed_ones_depend_on(shapes, seed):
    batch = collate(shapes, seed)
    needed = draw_needed(batch, seed)
    expected = longest = 0
    for pair, (n_prompt, _, _) in enumerate(shapes):
        branches = []
        for row in (pair, pair + len(shapes)):
            columns = [column for column, wanted in enumerate(needed[row].tolist()) if wanted]
            if columns:
                branches.append(columns[-1] + 1 - (n_prompt - 1))
                longest = max(longest, columns[-1] + 1)
        expected += (n_prompt - 1 if branches else 0) + sum(branches)
    stream = lay_out(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], needed)
    assert stream.input_ids.numel() == max(expected, 1)
    assert stream.segments.longest == max(longest, 1)


def test_scoring_a_token_that_was_left_out_is_our_own_mistake(models):
    batch = collate([(4, 6, 5), (3, 4, 7)])
    needed = batch["completion_mask"][:, 1:].bool()
    needed[0, 7:] = False
    with pytest.raises(AssertionError, match=r"^2 of the tokens to be scored are not in the stream"):
        streamed_output(models["llama"], batch, needed=needed)


# --- whole runs ------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
RUNS = [
    {"token_weighting": "all"},
    {"token_weighting": "sampo"},
    {"token_weighting": "sampo", "peft_config": LORA},
    {"token_weighting": "sampo", "gradient_checkpointing": True},
    {"token_weighting": "sampo", "gradient_accumulation_steps": 2, "length_penalty": "learned"},
    {"token_weighting": "sampo", "mask_samples": 3, "loss_type": ["sigmoid", "sft"]},
    {"token_weighting": "sampo", "mask_sharing": "independent"},
    {"token_weighting": "top_k", "log_length_pressure": True},
    {"token_weighting": "expected", "precompute_ref_log_probs": True},
    {"token_weighting": "mean", "max_length": 14},
]


@pytest.mark.parametrize("options", RUNS, ids=lambda o: ",".join(o)[:60] + str(o["token_weighting"]))
def test_a_run_of_20_steps_has_the_same_losses_and_metrics_with_and_without_the_stream(tmp_path, caplog, options):
    folder = save_model(tmp_path / "m")
    logs = []
    with caplog.at_level(logging.INFO, logger="sampo"):
        for mode in ("false", "auto"):
            trainer = make_trainer(
                folder, tmp_path / mode, pair_stream=mode, max_steps=20, eval_dataset=make_pairs(9, seed=5), **options
            )
            trainer.train()
            logs.append([*trainer.state.log_history[:20], trainer.evaluate()])
    assert "pair_stream: packed rows. This batch has" in caplog.text
    for plain, streamed in zip(*logs, strict=True):
        for name, value in plain.items():
            if "per_second" in name or "runtime" in name or "/slope" in name or "/correlation" in name:
                continue
            # rounding of 1e-6 in float32, which 20 steps of Adam at 1e-3 carry on
            tolerance = {"rel": 2e-3, "abs": 2e-3}
            if "accuracies" not in name and "mean_token_accuracy" not in name:
                assert streamed[name] == pytest.approx(value, **tolerance), name
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], abs=1e-6)


def test_in_bf16_the_stream_stays_within_its_rounding(tmp_path):
    folder = save_model(tmp_path / "m")
    runs = [losses(make_trainer(folder, tmp_path, pair_stream=m, bf16=True, max_steps=5)) for m in ("false", "true")]
    assert runs[0] == pytest.approx(runs[1], abs=5e-3)
