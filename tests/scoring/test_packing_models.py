"""Models and batches that the pair stream is not exact for: each is recognised, and `auto` takes the plain forward."""

import logging
import math

import pytest
import torch
from peft import PromptTuningConfig
from streams import COMMON, GROUPED, collate, losses, make, make_trainer, plain_output, streamed_output
from tiny import make_model, make_pairs, save_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    DogeConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sampo.scoring.attention import StreamRefused
from sampo.scoring.packing import NAME, RowsTooLong, lay_out, score_packed, too_long, why_not
from sampo.scoring.ways import PACKED, PADDED, Ways

GEMMA2 = Gemma2Config(**COMMON, **GROUPED, head_dim=8)
NO_AUX = {"router_aux_loss_coef": 0.0}
GPT_OSS = GptOssConfig(**COMMON, **GROUPED, **NO_AUX, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
EAGER = "attention implementation is `eager`, not `sdpa`"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
REFUSED = {
    "bloom": (BloomConfig(vocab_size=69, hidden_size=32, n_layer=2, n_head=4), EAGER),
    "mpt, positions by ALiBi": (MptConfig(vocab_size=69, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), EAGER),
    "mamba": (MambaConfig(vocab_size=69, hidden_size=32, num_hidden_layers=2, state_size=4), EAGER),
    "gemma2, soft-capping": (GEMMA2, EAGER),
    "gpt-oss, attention sinks": (GPT_OSS, EAGER),
    "mixture of experts": (MixtralConfig(**COMMON, **GROUPED), "mixture of experts"),
    "falcon": (FalconConfig(vocab_size=69, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), "0 of the mo"),
    "lfm2, short convolutions": (
        Lfm2Config(**COMMON, **GROUPED, layer_types=["conv", "full_attention"]),
        "1 of the model's 2 layers called",
    ),
    "recurrent gemma": (RecurrentGemmaConfig(**COMMON, **GROUPED, lru_width=32), "0 of the model's 2 layers called"),
    "qwen3-next, linear attention": (
        Qwen3NextConfig(
            **COMMON,
            **GROUPED,
            **EXPERTS,
            **NO_AUX,
            head_dim=8,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        "1 of the model's 2 layers called",
    ),
    "falcon-h1, state space beside attention": (
        FalconH1Config(**COMMON, **GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        "the log-probs of the first batch differ from those of the plain forward",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_the_stream_cannot_do_is_recognised(tmp_path, caplog, name):
    config, reason = REFUSED[name]
    torch.manual_seed(0)
    folder = str(tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    auto = make_trainer(folder, tmp_path / "auto", pair_stream="auto", max_steps=2)
    auto_losses = losses(auto)
    assert "auto takes rows grouped by length, because" in caplog.text
    assert reason in caplog.text
    plain = losses(make_trainer(folder, tmp_path / "plain", pair_stream="false", max_steps=2))
    assert auto_losses == pytest.approx(plain, abs=1e-5)
    with pytest.raises(ValueError, match=r"`pair_stream: true` must be exact for this model"):
        losses(make_trainer(folder, tmp_path / "true", pair_stream="true"))


def test_vision_language_models_are_recognised():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**COMMON, **GROUPED), image_token_index=68)
    assert "more than text" in why_not(LlavaForConditionalGeneration(config))


def test_prompt_learning_is_recognised(tmp_path, caplog):
    folder = save_model(tmp_path / "m")
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    make_trainer(folder, tmp_path, pair_stream="auto", peft_config=peft)
    assert "prompt learning puts virtual tokens" in caplog.text


def test_why_not_names_nothing_for_a_plain_model():
    assert why_not(make_model()) is None


@pytest.mark.parametrize(("config", "what"), [(GEMMA2, "softcap"), (GPT_OSS, "s_aux")], ids=["gemma2", "gpt-oss"])
def test_what_the_model_asks_of_its_attention_is_refused_where_it_is_not_done(config, what):
    """Should the model be let in one day: it says so at each call."""
    model, batch = make(config), collate([(4, 6, 5)])
    model.set_attn_implementation(NAME)
    stream = lay_out(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    with pytest.raises(StreamRefused, match=f"the model's attention uses `{what}`"):
        score_packed(
            model, model.base_model, stream, batch["completion_mask"][:, 1:].bool(), [batch["input_ids"][:, 1:]]
        )


ASKED = {
    "`softcap`": {"softcap": 30.0},
    "`s_aux`": {"s_aux": torch.zeros(4)},
    "`sinks`": {"sinks": torch.zeros(4)},
    "`position_bias`": {"position_bias": torch.zeros(1, 4, 9, 9)},
    "`indices`": {"indices": torch.zeros(1, 9, 2)},
    "`block_indices`": {"block_indices": torch.zeros(1, 9, 2)},
    "tokens after the query": {"is_causal": False},
    "dropout of 0.1": {"dropout": 0.1},
    "a sliding window of 6 tokens, and a row has 7": {"sliding_window": 6},
}


@pytest.mark.parametrize("what", list(ASKED))
def test_each_wish_of_a_layer_that_is_not_fulfilled_is_refused(what):
    batch = collate([(4, 4, 3)])
    stream = lay_out(*(batch[name] for name in ("input_ids", "attention_mask", "completion_mask")))
    heads = [torch.zeros(1, 4, stream.input_ids.numel(), 8) for _ in range(3)]
    attention = ALL_ATTENTION_FUNCTIONS[NAME]
    harmless = {"scaling": 0.5, "is_causal": True, "dropout": 0.0, "sliding_window": 7, "softcap": None, "s_aux": None}
    attention(None, *heads, None, pair_stream=stream, **harmless)
    with pytest.raises(StreamRefused, match=what):
        attention(None, *heads, None, pair_stream=stream, **harmless | ASKED[what])


def test_attention_dropout_is_refused():
    model = make(LlamaConfig(**COMMON, **GROUPED, attention_dropout=0.1))
    model.train()
    with pytest.raises(StreamRefused, match=r"dropout of 0\.1"):
        streamed_output(model, collate([(4, 6, 5)]))


@pytest.mark.parametrize("mode", ["auto", "true"])
@pytest.mark.parametrize("which", ["both", "reference"])
def test_a_model_that_mixes_neighbours_outside_of_attention_is_found_out_by_the_first_batch(
    tmp_path, caplog, mode, which
):
    """As short convolutions and token shifts do: every layer calls the attention function, and the stream is wrong."""
    trainer = make_trainer(save_model(tmp_path / "m"), tmp_path, pair_stream=mode)

    def token_shift(module, args, embedded):
        return embedded + 0.5 * torch.nn.functional.pad(embedded, (0, 0, 1, -1))

    for model in (trainer.model, trainer.ref_model) if which == "both" else (trainer.ref_model,):
        model.model.embed_tokens.register_forward_hook(token_shift)
    if mode == "true":
        with pytest.raises(ValueError, match="the log-probs of the first batch differ from"):
            trainer.train()
        return
    first = losses(trainer)[0]
    assert "auto takes rows grouped by length, because the log-probs of the first batch differ from" in caplog.text
    if which == "both":
        assert first == pytest.approx(math.log(2), abs=1e-7)
    for model in (trainer.model, trainer.ref_model):
        assert model.config._attn_implementation == "sdpa"


# --- rows that are too long ------------------------------------------------------------------------------------------

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = COMMON | GROUPED | {"max_position_embeddings": 64, "original_max_position_embeddings": 17}
LIMITED = {  # config, what it says, and the tokens of the longest row for which the stream is exact
    "a sliding window": (MistralConfig(**COMMON, **GROUPED, sliding_window=16), "`sliding_window` is 16", 17),
    "a window that is in the mask only": (
        Qwen2MoeConfig(
            **COMMON,
            **GROUPED,
            **EXPERTS,
            shared_expert_intermediate_size=16,
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=0,
        ),
        "`sliding_window` is 16",
        17,
    ),
    "sparse beyond a limit": (DogeConfig(**COMMON, **GROUPED, keep_window_size=16), "`keep_window_size` is 16", 17),
    "two sets of rotary frequencies": (Phi3Config(**LONG, rope_parameters=LONGROPE), "change beyond 17 tokens", 17),
    "rotary frequencies that grow": (
        LlamaConfig(**COMMON, **GROUPED, max_position_embeddings=17, rope_parameters=DYNAMIC),
        "change beyond 17 tokens",
        17,
    ),
}


@pytest.mark.parametrize("name", list(LIMITED))
def test_a_row_up_to_the_models_limit_is_exact_and_a_longer_one_refused(name):
    config, what, n_tokens = LIMITED[name]
    model = make(config)
    fits, too_much = (collate([(8, n, 5), (3, 2, 2)]) for n in (n_tokens - 8, n_tokens - 7))
    streamed, plain = streamed_output(model, fits).log_probs, plain_output(model, fits).log_probs
    torch.testing.assert_close(streamed, plain, atol=1e-4, rtol=0)
    with pytest.raises(RowsTooLong, match=what):
        streamed_output(model, too_much)


def test_a_row_is_as_long_as_the_tokens_left_in_the_stream_but_rotary_frequencies_depend_on_all():
    batch = collate([(8, 20, 5)])
    tensors = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    needed = batch["completion_mask"][:, 1:].bool()
    needed[0, 16:] = False
    stream = lay_out(*tensors, needed)
    assert too_long(LIMITED["a sliding window"][0], lay_out(*tensors))
    assert too_long(LIMITED["a sliding window"][0], stream) is None
    assert "and a row has 28" in too_long(LIMITED["two sets of rotary frequencies"][0], stream)


def test_chunked_attention_and_frequencies_by_layer_type_are_limits_too_and_some_numbers_mean_none():
    batch = collate([(8, 20, 5)])
    stream = lay_out(*(batch[name] for name in ("input_ids", "attention_mask", "completion_mask")))
    assert "`attention_chunk_size` is 16" in too_long(Llama4TextConfig(**COMMON, attention_chunk_size=16), stream)
    nested = LlamaConfig(**COMMON)
    nested.rope_parameters = {"full_attention": {**LONGROPE, "original_max_position_embeddings": 9}}
    assert "change beyond 9 tokens" in too_long(nested, stream)
    for none in (None, 0, -1):
        config = LlamaConfig(**COMMON)
        config.sliding_window = none
        assert too_long(config, stream) is None


def test_batches_with_long_rows_take_the_plain_forward_and_the_others_the_stream(tmp_path, caplog, monkeypatch):
    folder = str(tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MistralConfig(**COMMON, **GROUPED, sliding_window=22)).save_pretrained(folder)
    data = make_pairs(48, max_len=14)
    runs, taken = [], []
    of = Ways.of

    def watched(ways, model, stream):
        taken.append(of(ways, model, stream))
        return taken[-1]

    with caplog.at_level(logging.INFO, logger="sampo"):
        for mode in ("auto", "false"):
            trainer = make_trainer(folder, tmp_path, pair_stream=mode, data=data, max_steps=12)
            if mode == "auto":
                monkeypatch.setattr(Ways, "of", watched)
            runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)
    assert set(taken) == {PACKED, PADDED}
    assert "pair_stream: packed rows." in caplog.text
    trainer = make_trainer(folder, tmp_path, pair_stream="true", data=data, max_steps=12)
    with pytest.raises(
        ValueError, match=r"must be exact for every batch, but the model's `sliding_window` is 22 tokens"
    ):
        trainer.train()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_log_probs_of_a_model():
    model, batch = make(LlamaConfig(**COMMON, **GROUPED)), collate([(4, 90, 5), (70, 8, 60)])
    stream = lay_out(*(batch[name] for name in ("input_ids", "attention_mask", "completion_mask")))
    stream.segments.way = "flex"
    model.set_attn_implementation(NAME)
    places = batch["completion_mask"][:, 1:].bool()
    with torch.no_grad():  # FlexAttention has no backward pass on CPU
        ours = score_packed(model, model.base_model, stream, places, [batch["input_ids"][:, 1:]])[0].log_probs
        torch.testing.assert_close(ours, plain_output(model, batch).log_probs, atol=1e-4, rtol=0)
