"""How the launch and the form of a model (compiled, adapted, sharded) affect a run."""

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DynamoBackend, is_compiled_module, is_peft_model
from peft import LoraConfig
from torch.distributed.fsdp import MixedPrecisionPolicy


def keep_log_probs_in_float32(accelerator: Any) -> None:
    """Let the log-probs leave the model in float32 under FSDP2.

    accelerate's policy for bf16 casts outputs too, and a sum of −150 nats in bf16 has a resolution of 1.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if isinstance(getattr(plugin, "mixed_precision_policy", None), MixedPrecisionPolicy):  # FSDP1 has another
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=torch.float32)


def adapter_uses_all_parameters(model: Any) -> bool:
    """Whether each pair of text gives each trained parameter of an adapter a gradient: not with experts."""
    if not is_peft_model(model):
        return False
    settings = model.config.get_text_config().to_dict()
    return isinstance(model.active_peft_config, LoraConfig) and not any("expert" in name for name in settings)


def is_compiled(accelerator: Any, models: list[Any]) -> bool:
    """Whether a model is compiled, fully or in part: by option, launcher or caller."""
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        return True
    parts = [part for each in models for part in each.modules()]
    return any(is_compiled_module(part) or part._compiled_call_impl is not None for part in parts)


def uses_prompt_learning(model: Any) -> bool:
    """Whether a model, not wrapped, puts virtual tokens in front of each row."""
    return is_peft_model(model) and model.active_peft_config.is_prompt_learning
