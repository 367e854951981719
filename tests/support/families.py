"""A tiny model of every family of causal language models that transformers has, packed and padded.

The models are made from the config of their family, with small sizes and a window or chunk that is shorter than the
rows. Every parameter is random, so that sinks, biases and gates take effect. As a program, it writes a record for each
number: `PYTHONPATH=. python tests/support/families.py --out measurements/families.jsonl`.
"""

import argparse
import inspect
import shlex
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import torch
from streams import collate
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES
from trl.trainer.utils import add_fused_lm_head

from sampo.io import records
from sampo.scoring.attention import StreamRefused, describe_error
from sampo.scoring.interface import install, uninstall
from sampo.scoring.packing import lay_out, score_packed, why_not

_ENCODER = "an encoder, or the decoder of an encoder-decoder, that can be run as a language model"
_INPUTS = "takes images, sound or bytes beside or instead of the tokens of a text; its text family is listed by itself"
_NO_HEAD = "TRL 1.16 does not find the backbone of its head, so it cannot be trained by DPO at all"
_ASSISTANT = "an assistant for speculative decoding, which needs the states of another model"
SKIPPED = {
    **dict.fromkeys(
        [
            "bart",
            "bert",
            "bert-generation",
            "big_bird",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "marian",
            "mbart",
            "megatron-bert",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "reformer",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "trocr",
            "whisper",
            "xlm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xlnet",
            "xmod",
        ],
        _ENCODER,
    ),
    **dict.fromkeys(
        [
            "aria_text",
            "blt",
            "dots3_note",
            "emu3",
            "fuyu",
            "gemma3",
            "gemma3n",
            "gemma4",
            "gemma4_unified",
            "git",
            "got_ocr2",
            "llama4",
            "mllama",
            "moshi",
            "moss_transcribe_diarize",
            "musicgen",
            "musicgen_melody",
            "phi4_multimodal",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen4_exp",
        ],
        _INPUTS,
    ),
    "llama4_text": _NO_HEAD,
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], _ASSISTANT),
}

SIZES = {
    "vocab_size": 69,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "attn_logit_softcapping": 1.5,
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "initializer_range": 0.2,
    **dict.fromkeys(
        ["attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "hidden_dropout"], 0.0
    ),
}
_ONE_KEY_HEAD_EACH = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}
_TWO_KINDS = ["sliding_attention", "full_attention"]
OVERRIDES = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
        ],
        _ONE_KEY_HEAD_EACH,
    ),
    **dict.fromkeys(["bamba", "granitemoehybrid"], _MAMBA),
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": _TWO_KINDS,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _TWO_KINDS},
    },
    "dots1": {"n_shared_experts": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _TWO_KINDS * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 69,
        "laurel_rank": 4,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 69},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "num_key_value_heads": 4},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "longcat_flash": {
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 1,
        "num_key_value_heads": 4,
        "moe_topk": 2,
    },
    "laguna": {"layer_types": _TWO_KINDS},
    "mellum": {"layer_types": _TWO_KINDS},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "zamba": {"layer_types": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def parameters_of(config_class):
    if is_dataclass(config_class):
        return {each.name for each in fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def small_config(model_type, **more):
    """A config of the family with small sizes; with a layer of full attention if its first layers have a window."""
    config_class = CONFIG_MAPPING[model_type]
    known = parameters_of(config_class)
    options = {name: value for name, value in SIZES.items() if name in known}
    options |= OVERRIDES.get(model_type, {}) | more
    config = config_class(**options)
    types = getattr(config, "layer_types", None) or []
    local = {"sliding_attention", "chunked_attention"} & set(types)
    if local and len(set(types)) == 1 and "layer_types" in known and "layer_types" not in options:
        config = config_class(**options, layer_types=[*local, "full_attention"])
    return config


def make_model(model_type, **more):
    """A model in float32 with TRL's head, every parameter of which is random."""
    config = small_config(model_type, **more)
    with torch.device("meta"):  # a size that is not made small would take all of the memory
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 3e6, f"{model_type} has {size:,} parameters"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(model_type, **more)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    add_fused_lm_head(model)
    return model


@dataclass
class Outcome:
    """A family, packed and padded.

    Attributes:
        way: `packed`, or the reason why it is not.
        logps: largest difference of a log-prob, in nats.
        gradients: norm of the difference of all gradients over their norm.
    """

    way: str
    logps: float | None = None
    gradients: float | None = None

    @property
    def kind(self):
        """What mixes the tokens of the family."""
        if "carry a state" in self.way or "recurrent" in self.way:
            return "recurrent layers"
        return "sparse attention" if "select or compress" in self.way else "softmax attention"


def compare(model, shapes=((9, 14, 20), (3, 5, 2), (20, 1, 6))):
    """Score two targets by both forwards, and compare the log-probs of both and the gradients of the first."""
    reason = why_not(model)
    if reason:
        return Outcome(reason)
    batch = collate(shapes)
    positions = batch["completion_mask"][:, 1:].bool()
    own = batch["input_ids"][:, 1:]
    targets = [own, (own + 7) % 60]
    expected = [padded_output(model, batch, target).log_probs for target in targets]
    theirs = _gradients(model, expected[0])
    try:
        output, (second,) = packed_output(model, batch, targets)
        ours = _gradients(model, output.log_probs)
    except StreamRefused as refused:
        return Outcome(refused.reason)
    except Exception as error:  # as a run decides
        return Outcome(f"it failed with {describe_error(error)}")
    logps = max((a - b).abs().max().item() for a, b in zip((output.log_probs, second), expected, strict=True))
    gradients = ((ours - theirs).norm() / theirs.norm()).item()
    exact = logps <= 1e-4 and gradients <= 1e-4
    assert positions.any()
    return Outcome("packed" if exact else "the results differ", logps, gradients)


def padded_output(model, batch, target, **options):
    """TRL's output for one target at the completion tokens."""
    positions = batch["completion_mask"][:, 1:].bool()
    labels = torch.nn.functional.pad(target.masked_fill(~positions, -100), (1, 0), value=-100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, **options, labels=labels, use_cache=False, fused_lm_head=True)


def packed_output(model, batch, targets, **options):
    """The same by the packed row, with every token in it where an auxiliary loss needs them."""
    masks = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    stream = lay_out(*masks, every_token=bool(options))
    install(model)
    try:
        positions = batch["completion_mask"][:, 1:].bool()
        return score_packed(model, model.base_model, stream, positions, targets, **options)
    finally:
        uninstall(model)


def _gradients(model, scored):
    model.zero_grad()
    scored.pow(2).sum().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([each.flatten() for each in found])


def compare_aux_loss(model, shapes=((9, 14, 20), (3, 5, 2), (20, 1, 6))):
    """The auxiliary loss of a mixture of experts and its gradients, by both forwards."""
    batch = collate(shapes)
    target = batch["input_ids"][:, 1:]
    expected = padded_output(model, batch, target, output_router_logits=True).aux_loss
    theirs = _gradients(model, expected)
    found = packed_output(model, batch, [target], output_router_logits=True)[0].aux_loss
    return found.item(), expected.item(), ((_gradients(model, found) - theirs).norm() / theirs.norm()).item()


def main(argv=None):
    """Two records for each family: the differences of log-probs and of gradients, or none and the reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file of records, which are appended")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "tests/support/families.py", *(sys.argv[1:] if argv is None else argv)])
    for family in FAMILIES:
        skipped = SKIPPED.get(family)
        outcome = Outcome(skipped) if skipped else compare(make_model(family))
        kind = "skipped" if skipped else outcome.kind
        config = {"family": family, "way": outcome.way, "kind": kind, "dtype": "float32", "device": "cpu"}
        about = {"n": 1, "config": config, "seed": 0, "command": command, **records.provenance()}
        numbers = {"logps_difference_max": outcome.logps, "gradients_difference": outcome.gradients}
        records.append(args.out, [records.Record(name=name, value=value, **about) for name, value in numbers.items()])
        print(family, outcome, flush=True)


if __name__ == "__main__":
    main()
