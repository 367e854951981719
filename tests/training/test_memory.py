"""The estimate of memory against the tensors of real models, and against what autograd really keeps."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import make_model, make_pairs, make_tokenizer, training_options
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from sampo import SamPOConfig, SamPOTrainer
from sampo.cli import main
from sampo.training.memory import (
    ENGINES,
    MEMORY_METHODS,
    QLORA_ENGINES,
    SHAPES,
    Shape,
    activation_bytes,
    gpu_bytes,
    machine_bytes,
    read_shape,
)

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
TINY = Shape("tiny", 2, 32, 48, 2, 2, 69, qkv_bias=False)  # tests/support/tiny.py's model


@pytest.mark.parametrize("size", SHAPES)
def test_the_parameters_of_a_shape_are_those_of_the_model_in_transformers(size):
    shape = SHAPES[size]
    kind = Qwen2Config if shape.qkv_bias else LlamaConfig
    settings = {name: getattr(shape, name) for name in FIELDS}
    config = kind(vocab_size=shape.vocab_size, tie_word_embeddings=shape.tied, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    assert shape.linear_parameters == sum(m.weight.numel() for m in linear)
    assert shape.adapter_parameters(8) == sum(8 * (m.in_features + m.out_features) for m in linear)
    assert shape.parameters / 1e9 == pytest.approx(float(size.removesuffix("B")), rel=0.09)  # as its name says


def in_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_one_process_holds_the_weights_gradients_moments_and_reference_that_are_computed(tmp_path, method):
    make_model().save_pretrained(tmp_path / "model")
    dtype = "float32" if method == "full" else "bfloat16"
    trainer = SamPOTrainer(
        model=str(tmp_path / "model"),
        args=SamPOConfig(**training_options(tmp_path, max_steps=1, model_init_kwargs={"dtype": dtype}, bf16=True)),
        train_dataset=make_pairs(4),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if method == "lora" else None,
    )
    kept = {}
    step = trainer.training_step  # gradients are gone after the step

    def watched(*args, **kwargs):
        loss = step(*args, **kwargs)
        kept["gradients"] = in_bytes(p.grad for p in trainer.model.parameters() if p.grad is not None)
        return loss

    trainer.training_step = watched
    trainer.train()
    moments = [v for state in trainer.optimizer.state.values() for name, v in state.items() if name != "step"]
    kept["adam"] = in_bytes(moments)
    kept["weights"] = in_bytes(p for p in trainer.model.parameters() if p.requires_grad)
    kept["frozen"] = in_bytes(p for p in trainer.model.parameters() if not p.requires_grad)
    kept["reference"] = 0 if trainer.ref_model is None else in_bytes(trainer.ref_model.parameters())
    computed = gpu_bytes(TINY, "single", method, lora_r=4)
    computed["reference"] *= 4 / 6  # without the copies of autocast
    assert kept == {name: computed[name] for name in kept}


@pytest.mark.parametrize("settings", [{}, {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}])
def test_a_shape_is_read_from_a_folder_and_from_a_configuration_file(tmp_path, settings):
    model = make_model(**settings)
    model.config.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json"):
        shape = read_shape(str(place))
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        assert [shape.kv_size, shape.q_size] == [
            model.model.layers[0].self_attn.k_proj.out_features,
            model.model.layers[0].self_attn.q_proj.out_features,
        ]
    assert read_shape("8B") is SHAPES["8B"]


def test_a_model_of_other_layers_and_a_place_without_a_configuration_are_refused(tmp_path):
    MixtralConfig(**{name: getattr(TINY, name) for name in FIELDS}, vocab_size=69).save_pretrained(tmp_path / "moe")
    GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "moe": "of type mixtral with [0-9,]+ parameters, where the formula has [0-9,]+",
        "gpt2": "must be a decoder with intermediate_size in its configuration",
        "empty": "or a folder, a file or a hub id with the configuration of a decoder, got",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_shape(str(tmp_path / name))


def test_the_command_shows_a_row_for_each_engine_with_the_numbers_of_the_formula(tmp_path, capsys):
    make_model().config.save_pretrained(tmp_path)
    words = ["memory", str(tmp_path), "--gpus", "4", "--batch_size", "3", "--max_length", "100"]
    assert main([*words, "--engine", "zero3", "zero3_offload"]) == 0
    said = capsys.readouterr().out
    assert "GB per GPU, computed and not measured" in said
    assert "4 GPUs (1 with `single`), 3 pairs on each, with two responses of 100 tokens: 600 tokens" in said
    assert "GB of main memory, over all machines together" in said
    assert main(["memory", "7B", "--method", "qlora"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:3] in ("sin", "zer"))
    assert set(rows) == {"single", "zero1", "zero2"}
    for engine, row in rows.items():
        total = sum(gpu_bytes(SHAPES["7B"], engine, "qlora").values())
        assert row.split()[-1] == f"{total / 1e9:.1f}"
    for option in ("--gpus", "--batch_size", "--max_length", "--lora_r"):
        with pytest.raises(SystemExit, match=f"`{option[2:]}` must be at least 1, got 0"):
            main(["memory", "7B", option, "0"])
    with pytest.raises(SystemExit, match="sampo memory: error: `engine` must be one of"):
        main(["memory", "7B", "--method", "qlora", "--engine", "zero3"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_those_that_autograd_keeps_of_one_layer_and_the_input_of_each(dtype):
    shape = Shape("wide", 3, 256, 704, 8, 2, 64, qkv_bias=False)
    settings = {name: getattr(shape, name) for name in FIELDS}
    config = LlamaConfig(vocab_size=shape.vocab_size, attn_implementation="sdpa", **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    tokens, storages = 512, {}
    ignored = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    hidden = torch.randn(1, tokens, shape.hidden_size, dtype=dtype, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    ignored |= {t.untyped_storage().data_ptr() for t in (*positions, hidden)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        out = model.model.layers[0](hidden, position_embeddings=positions)
    del out
    bf16_weights = {p.numel() for p in model.model.layers[0].parameters()}  # autocast's copies are counted apart
    kept = [t for at, t in storages.items() if at not in ignored]
    kept = [t for t in kept if not (t.dtype == torch.bfloat16 and t.numel() in bf16_weights and t.dim() == 2)]
    measured = in_bytes(kept) / tokens
    inputs = shape.num_hidden_layers * shape.hidden_size * dtype.itemsize
    assert activation_bytes(shape, float32=dtype == torch.float32) - inputs == pytest.approx(measured, rel=0.01)


def test_what_is_spread_shrinks_with_the_gpus_and_what_is_not_does_not():
    shape = SHAPES["7B"]
    for engine, kind in ENGINES.items():
        two, eight = (gpu_bytes(shape, engine, gpus=n) for n in (2, 8))
        for part in ("weights", "gradients", "master", "adam", "reference"):
            spread = part in kind.spread and not kind.on_cpu
            assert two[part] == pytest.approx(eight[part] * (4 if spread else 1)), (engine, part)


def test_a_cached_reference_saves_the_reference_and_an_adapter_needs_none():
    for engine in ENGINES:
        live, cached = (sum(gpu_bytes(SHAPES["7B"], engine, reference=r).values()) for r in ("live", "cached"))
        assert (live > cached) == (engine != "zero3_offload"), engine
        assert gpu_bytes(SHAPES["7B"], engine, "lora")["reference"] == 0


def test_offload_moves_to_the_machine_what_all_gpus_together_hold_otherwise():
    shape = SHAPES["7B"]
    spread = gpu_bytes(shape, "zero3")
    together = 8 * sum(spread[name] for name in ("weights", "gradients", "master", "adam", "reference"))
    # the gradients wait in float32 there
    assert machine_bytes(shape) == pytest.approx(together + 2 * shape.parameters)
    assert gpu_bytes(shape, "zero3_offload")["adam"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"engine": "zero4"}, "`engine` must be one of"),
        ({"engine": "single", "method": "qlora4"}, "`method` must be one of"),
        ({"engine": "single", "reference": "none"}, "`reference` must be one of"),
        ({"engine": "zero3", "method": "qlora"}, "for `method: qlora`, got 'zero3'"),
    ],
)
def test_names_that_are_not_known_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        gpu_bytes(SHAPES["7B"], **words)


def test_every_engine_has_a_launch_configuration_of_its_name():
    names = {path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}
    assert set(ENGINES) - {"single"} <= names
    assert "single_gpu" in names
    assert set(QLORA_ENGINES) < set(ENGINES)
    assert MEMORY_METHODS == ("full", "lora", "qlora")
