"""Models and batches that the pair stream is not exact for: each is recognised, and `auto` takes the plain forward."""

import logging
import math
from contextlib import contextmanager

import pytest
import torch
from peft import PromptTuningConfig
from streams import COMMON, GROUPED, collate, losses, make, make_trainer, plain_output, streamed_output
from tiny import make_model, make_pairs, save_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    FalconH1Config,
    GPTJConfig,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from varlen_reference import own_flash

from sampo.scoring.attention import StreamRefused
from sampo.scoring.interface import install, is_installed, marks_for_masks, own_implementation
from sampo.scoring.packing import RowsTooLong, lay_out, too_long, why_not
from sampo.scoring.segments import Reach, Softmax
from sampo.scoring.ways import PACKED, PADDED, Ways

NO_AUX = {"router_aux_loss_coef": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
REFUSED = {
    "bloom": (BloomConfig(vocab_size=69, hidden_size=32, n_layer=2, n_head=4), "the model's ALiBi counts"),
    "mpt": (MptConfig(vocab_size=69, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), "the model's ALiBi counts"),
    "gpt-neo": (
        GPTNeoConfig(
            vocab_size=69, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        ),
        "the model's local layers count positions along the packed row",
    ),
    "mamba": (MambaConfig(vocab_size=69, hidden_size=32, num_hidden_layers=2, state_size=4), "`linear_attention`"),
    "lfm2, short convolutions": (Lfm2Config(**COMMON, **GROUPED, layer_types=["conv", "full_attention"]), "`conv`"),
    "recurrent gemma": (RecurrentGemmaConfig(**COMMON, **GROUPED, lru_width=32), "`linear_attention`"),
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
        "layers of type `linear_attention` carry a state from one response into the next",
    ),
    "falcon-h1, state space beside attention": (
        FalconH1Config(**COMMON, **GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        "layers of type `hybrid` carry a state",
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


ASKED = {
    "`sinks`": {"sinks": torch.zeros(4)},
    "`position_bias`": {"position_bias": torch.zeros(1, 4, 9, 9)},
    "`indices`": {"indices": torch.zeros(1, 9, 2)},
    "`block_indices`": {"block_indices": torch.zeros(1, 9, 2)},
    "tokens after the query": {"is_causal": False},
    "dropout of 0.1": {"dropout": 0.1},
}


@pytest.mark.parametrize("what", list(ASKED))
def test_each_argument_of_a_layer_that_is_not_implemented_is_refused(what):
    """Each is asked of a layer of a model, in its forward."""
    model, asked = make(LlamaConfig(**COMMON, **GROUPED)), {}
    layer = model.model.layers[1].self_attn
    layer.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | asked), with_kwargs=True)
    batch = collate([(4, 4, 3)])
    streamed_output(model, batch)
    asked |= {"softcap": None, "s_aux": None, "indices": None}
    streamed_output(model, batch)
    asked |= ASKED[what]
    if not asked.keys() & {"is_causal", "dropout"}:
        with pytest.raises(StreamRefused, match=what):
            streamed_output(model, batch)
        return
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    install(model)
    registered = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    with marked(model, batch) as mark, pytest.raises(StreamRefused, match=what):
        registered(layer, *[torch.zeros(1, 4, 9, 8)] * 3, mark, **asked)
    heads = torch.randn(3, 1, 4, 9, 8)
    assert torch.equal(registered(layer, *heads, None)[0], own(layer, *heads, None)[0])


def marked(model, batch):
    """A mark as a layer gets it in a packed forward."""
    stream = lay_out(*(batch[name] for name in ("input_ids", "attention_mask", "completion_mask")))

    @contextmanager
    def forward():
        with marks_for_masks(stream.segments):
            states = torch.zeros(*stream.input_ids.shape, 32)
            yield create_causal_mask(model.config, states, torch.ones_like(stream.input_ids), None)

    return forward()


def test_a_mask_that_is_not_transformers_is_refused():
    model = make(LlamaConfig(**COMMON, **GROUPED))
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(StreamRefused, match="computes the mask of its attention in a way of its own"):
        streamed_output(model, collate([(4, 4, 3)]))


def test_a_layer_that_does_not_call_the_attention_is_found():
    model = make(LlamaConfig(**COMMON, **GROUPED))
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(StreamRefused, match="1 of the model's 2 layers called the attention function"):
        streamed_output(model, collate([(4, 4, 3)]))


def test_a_mask_with_a_pattern_of_the_models_own_or_with_later_tokens_is_refused(monkeypatch):
    batch, model = collate([(4, 4, 3)]), make(LlamaConfig(**COMMON, **GROUPED))
    model.config.is_causal = False
    with pytest.raises(StreamRefused, match="tokens after the query"):
        streamed_output(model, batch)
    model.config.is_causal = True
    theirs = modeling_llama.create_causal_mask
    monkeypatch.setattr(
        modeling_llama,
        "create_causal_mask",
        lambda **kwargs: theirs(**kwargs, or_mask_function=lambda b, h, q, k: q == k),
    )
    with pytest.raises(StreamRefused, match="adds a pattern of its own"):
        streamed_output(model, batch)


# --- other implementations of the attention --------------------------------------------------------------------------


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_every_implementation_is_packed_and_restored_and_calls_without_a_stream_use_it(own):
    model, batch = make(LlamaConfig(**COMMON, **GROUPED)), collate([(4, 6, 5), (2, 3, 3)])
    expected = plain_output(model, batch).log_probs
    torch.testing.assert_close(streamed_output(model, batch).log_probs, expected, atol=1e-4, rtol=0)
    model.set_attn_implementation(own)
    ids = batch["input_ids"][:1, :8]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        install(model)
        install(model)  # the second time changes nothing
        assert own_implementation(model.config._attn_implementation) == own
        assert is_installed(model.config)
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert is_installed(model.config)
        streamed = streamed_output(model, batch).log_probs  # takes it away again
    torch.testing.assert_close(streamed, expected, atol=1e-4, rtol=0)
    assert model.config._attn_implementation == own


def test_flash_implementations_get_the_segments_and_the_models_window(monkeypatch):
    """By a function in the place of a flash kernel, which this machine does not have."""
    model = make(MistralConfig(**COMMON, **GROUPED, sliding_window=6))
    batch = collate([(4, 6, 5), (2, 3, 9)])
    expected = plain_output(model, batch).log_probs
    calls = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        assert module.config._attn_implementation == "flash_for_tests"  # transformers finds the kernel by this name
        calls.append(kwargs)
        softmax = Softmax(kwargs["scaling"], Reach(kwargs["sliding_window"]))
        return own_flash(softmax, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_for_tests", flash)
    monkeypatch.setattr(type(model), "_check_and_adjust_attn_implementation", lambda self, name, **_: name)
    model.set_attn_implementation("flash_for_tests")
    assert why_not(model) is None
    streamed = streamed_output(model, batch).log_probs
    torch.testing.assert_close(streamed, expected, atol=1e-4, rtol=0)
    assert len(calls) == 1 + 2  # the first run of the kernel, and the forward of 2 layers
    assert model.config._attn_implementation == "flash_for_tests"


# --- what is found by the first batch --------------------------------------------------------------------------------


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


def test_rotary_frequencies_depend_on_all_tokens_of_a_row_not_on_those_left_in_the_stream():
    batch = collate([(8, 20, 5)])
    tensors = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    needed = batch["completion_mask"][:, 1:].bool()
    needed[0, 16:] = False
    stream = lay_out(*tensors, needed)
    assert "and a row has 28" in too_long(LIMITED["two sets of rotary frequencies"][0], stream)


def test_frequencies_by_layer_type_are_limits_too():
    batch = collate([(8, 20, 5)])
    stream = lay_out(*(batch[name] for name in ("input_ids", "attention_mask", "completion_mask")))
    nested = LlamaConfig(**COMMON)
    nested.rope_parameters = {"full_attention": {**LONGROPE, "original_max_position_embeddings": 9}}
    assert "change beyond 9 tokens" in too_long(nested, stream)


def test_a_dense_mask_has_a_limit():
    stream = lay_out(*(collate([(4, 4, 3)])[name] for name in ("input_ids", "attention_mask", "completion_mask")))
    config = GPTJConfig(vocab_size=69)
    assert too_long(config, stream) is None
    stream.input_ids = torch.zeros(1, 4097, dtype=torch.long)
    assert "takes a dense mask (of at most 4,096 tokens), and a batch has 4,097" in too_long(config, stream)
    assert too_long(installed_config(), stream) is None


def installed_config():
    model = make_model()
    install(model)
    return model.config


def test_batches_with_long_rows_take_the_plain_forward_and_the_others_the_stream(tmp_path, caplog, monkeypatch):
    folder = str(tmp_path / "model")
    torch.manual_seed(0)
    config = Phi3Config(**LONG | {"original_max_position_embeddings": 22}, rope_parameters=LONGROPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
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
        ValueError, match=r"must be exact for every batch, but the model's rotary frequencies change beyond 22 tokens"
    ):
        trainer.train()
