"""A tiny model of every family of causal language models that transformers has, made from the family's config."""

import inspect
from dataclasses import fields, is_dataclass

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.2,
}
NO_DROPOUT = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "hidden_dropout")


def parameters_of(config_class):
    if is_dataclass(config_class):
        return {each.name for each in fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def small_config(model_type, **more):
    config_class = CONFIG_MAPPING[model_type]
    known = parameters_of(config_class)
    options = {name: value for name, value in SIZES.items() if name in known}
    options |= {name: 0.0 for name in NO_DROPOUT if name in known}
    return config_class(**options | more)
