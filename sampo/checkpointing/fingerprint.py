"""What a resumed run must have in common with the run that wrote the checkpoint.

All options count unless they are named here: an option that a later version of transformers adds is compared until
it is classified. Data and model are compared by content, so files may move.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ..data.token_ids import ID_COLUMNS, hash_token_ids
from ..data.weight_columns import hash_weight_columns
from ..io.versions import TRAINING_PACKAGES, find_version
from ..weighting import REGISTERED

# Options that do not change the learned weights, by reason.
UNCOMPARED = {
    "names, paths, reports": "output_dir run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "report_to push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "logging": "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level "
    "log_level_replica disable_tqdm include_num_input_tokens_seen log_length_pressure log_token_statistics debug "
    "skip_memory_metrics",
    "saving and resuming": "save_only_model save_strategy save_steps save_on_each_node save_total_limit "
    "enable_jit_checkpoint resume_from_checkpoint restore_callback_states_from_checkpoint do_train do_eval do_predict",
    "evaluation": "eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start "
    "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
    "generate_every generate_prompts generate_max_tokens max_length_ratio "
    "load_best_model_at_end metric_for_best_model greater_is_better",
    "how data are loaded": "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataset_num_proc precompute_ref_batch_size "
    "ddp_timeout local_rank torch_empty_cache_steps ref_cache_dir ref_cache_check",
    "the length of the run, which has a rule of its own": "max_steps num_train_epochs",
    "compared as model, data or pairs per step": "model_init_kwargs trust_remote_code pad_token use_cache "
    "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size",
}
# Options that change results by rounding alone, if at all.
ROUNDED = {
    "memory": "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
    "gradient_checkpointing_kwargs activation_offloading max_tokens_per_forward ref_cache_dtype bf16_full_eval "
    "fp16_full_eval",
    "kernels": "use_cpu torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config "
    "tf32 full_determinism",
    "layout": "pair_stream pad_to_multiple_of padding_free",
    "several processes": "average_tokens_across_devices ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph deepspeed fsdp fsdp_config parallelism_config",
}
FREE = frozenset(" ".join(UNCOMPARED.values()).split())
ROUNDING_OPTIONS = frozenset(" ".join(ROUNDED.values()).split())
_OF_THE_PLACE = {"_name_or_path", "transformers_version", "base_model_name_or_path", "revision", "inference_mode"}
_SAMPLE = 1024  # numbers of each tensor that go into the hash of the weights


def identity(trainer: Any) -> dict[str, dict[str, Any]]:
    """What identifies a run: `must` not change, and what changes results by `rounding` only.

    Args:
        trainer: A trainer whose model has its first weights still.
    """
    model, args = trainer.model, trainer.args
    values = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(args) if f.init}
    must = {f"`{name}`": value for name, value in values.items() if name not in FREE | ROUNDING_OPTIONS}
    must |= {
        "the training data": describe_data(trainer.train_dataset, getattr(trainer, "id_columns", ID_COLUMNS)),
        "the weights of model and reference": hash_weight_samples([model, getattr(trainer, "ref_model", None)]),
        # a cache may have been filled by a reference that is not loaded now
        "the precomputed reference": _values_of(getattr(trainer, "ref_identity", None)),
        "the end tokens": getattr(trainer, "end_token_ids", None),
        "the pairs per step": trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
    if columns := getattr(args, "weight_columns", []):
        must["the weights in the training data"] = describe_weights(trainer.train_dataset, columns)
    if code := REGISTERED.get(getattr(args, "token_weighting", "")):
        must["the file of the plugin's weighting"] = code
    must |= _described("model", model.config)
    must |= _described("adapter", getattr(model, "peft_config", {}).get("default"))
    rounding = {f"`{name}`": values[name] for name in sorted(ROUNDING_OPTIONS & values.keys())}
    rounding |= {f"the version of {name}": find_version(name) for name in TRAINING_PACKAGES}
    rounding |= {
        "`attn_implementation`": getattr(model.config, "_attn_implementation", None),
        "the kind of device": args.device.type,
        "the number of processes": args.world_size,
        "`per_device_train_batch_size`": args.per_device_train_batch_size,
        "`gradient_accumulation_steps`": args.gradient_accumulation_steps,
    }
    return {"must": _as_json(must), "rounding": _as_json(rounding)}


def _values_of(reference: dict[str, str] | None) -> dict[str, str] | None:
    """The fields of the cache's key that identify the reference, without those of rounding."""
    return None if reference is None else {name: reference[name] for name in ("weights", "config")}


def _described(what: str, config: Any) -> dict[str, Any]:
    options = {} if config is None else config.to_dict()
    return {f"`{name}` of the {what}": value for name, value in options.items() if name not in _OF_THE_PLACE}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe each difference, by name."""
    names = sorted(before.keys() | now.keys())
    return [_change(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def _change(name: str, before: Any, now: Any) -> str:
    return f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def describe_data(dataset: Any, columns: Sequence[str] = ID_COLUMNS) -> dict[str, Any]:
    """Number and hash of the tokenised pairs in their order; for streams and images, whose rows are not read, less."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return {"streamed": True}
    if not set(columns) <= set(dataset.column_names):
        return {"pairs": len(dataset), "columns": sorted(dataset.column_names)}
    return {"pairs": len(dataset), "sha256": hash_token_ids(dataset, columns)[:16]}


def describe_weights(dataset: Any, columns: list[str]) -> str:
    """Hash of the weights that a run reads from its data; of streams, whose rows are not read, their columns."""
    from datasets import Dataset

    return hash_weight_columns(dataset, columns)[:16] if isinstance(dataset, Dataset) else ", ".join(columns)


def hash_weight_samples(models: list[Any]) -> str:
    """Hash of names, shapes and up to 1,024 evenly spaced numbers of each tensor: enough to distinguish models.

    The trained adapter is omitted: it starts at random, and comes from the checkpoint. So are weights that this
    process does not hold (sharded or not yet loaded).
    """
    import torch

    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.named_parameters() if model is not None else ():
            if ".default" in name:
                continue
            digest.update(f"{name} {list(getattr(tensor, 'ds_shape', tensor.shape))}".encode())
            if tensor.device.type != "meta" and not hasattr(tensor, "full_tensor") and tensor.numel():
                flat = tensor.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
                digest.update(sample.to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """As the values will be read back: enums by their value, sets sorted, what JSON does not know by its text."""

    def plain(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value, key=str)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        return getattr(value, "value", None) or str(value)

    return json.loads(json.dumps(values, default=plain, sort_keys=True))
