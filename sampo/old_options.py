"""Options that TRL, transformers and alignment-handbook have dropped or renamed, and their replacements.

Taken from the deprecation messages of TRL 0.28 (`DPOConfig`), the migration guide of transformers 5 (section Trainer),
and the configs of alignment-handbook at 125b292c. Tests compare the names with the options that there are.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Successor:
    """What replaces an option.

    Attributes:
        options: present options that `advice` names.
        advice: what to do, a sentence; `{value}` stands for the value of the old option.
        of_value: makes the sentence for values that it knows, and None for others.
    """

    options: tuple[str, ...]
    advice: str
    of_value: Callable[[Any], str | None] = lambda value: None

    def __call__(self, value: Any = None) -> str:
        """The advice for a value of the old option."""
        return self.of_value(value) or self.advice.replace("{value}", "VALUE" if value is None else str(value))


def _renamed(**names: str) -> dict[str, Successor]:
    return {old: Successor((new,), f"It is now `{new}`.") for old, new in names.items()}


def _removed(advice: str, *names: str, options: tuple[str, ...] = ()) -> dict[str, Successor]:
    return {name: Successor(options, advice) for name in names}


def _of_mixer(value: Any) -> str | None:
    """alignment-handbook's `{name: share of its rows}`."""
    if not isinstance(value, dict) or not value or not all(isinstance(share, int | float) for share in value.values()):
        return None
    if list(value.values()) == [1]:
        return f"Write `dataset_name: {next(iter(value))}`."
    parts = [f"{{path: {n}}}" if s == 1 else f"{{path: {n}, split: 'train[:{100 * s:g}%]'}}" for n, s in value.items()]
    return f"Write `datasets: [{', '.join(parts)}]`."


def _of_splits(value: Any) -> str | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    return f"Write `dataset_train_split: {value[0]}` and `dataset_test_split: {value[1]}`."


OLD_OPTIONS: dict[str, Successor] = {
    # TRL's DPOConfig, ModelConfig and script arguments
    **_renamed(torch_dtype="dtype", max_seq_length="max_length"),
    **_removed(
        "Write `loss_type: [sigmoid, sft]` with `loss_weights: [1.0, {value}]` (with your loss in the place of "
        "`sigmoid`).",
        "rpo_alpha",
        options=("loss_type", "loss_weights"),
    ),
    **_removed(
        "Remove it: `max_length` limits prompt and response together, and rows with longer prompts can be filtered "
        "out of the data. `sampo audit --max_length N` lists what would be cut.",
        "max_prompt_length",
        options=("max_length",),
    ),
    **_removed(
        "Remove it: `max_length` limits prompt and response together.",
        *("max_completion_length", "max_target_length"),
        options=("max_length",),
    ),
    **_removed("Remove it: labels are masked with -100, which cannot be changed.", "label_pad_token_id"),
    **_removed("Remove it: the tokenizer's `pad_token` is used.", "padding_value"),
    **_removed("Remove it: encoder-decoder models are not supported.", "is_encoder_decoder"),
    **_removed("Remove it, and run `sampo generate` on the checkpoints.", "generate_during_eval"),
    **_removed(
        "Remove it: a reference model that is given is used (`ref_model_name_or_path`; in Python `ref_model`).",
        "force_use_ref_model",
        options=("ref_model_name_or_path",),
    ),
    **_removed(
        "Remove it: the reference is loaded like the policy (`model_init_kwargs`). In Python, load it and pass it as "
        "`ref_model`.",
        "ref_model_init_kwargs",
        options=("model_init_kwargs",),
    ),
    **_removed(
        "Remove it: the adapter in `model_name_or_path` is trained, and a frozen copy of it is the reference.",
        *("model_adapter_name", "ref_adapter_name"),
        options=("model_name_or_path",),
    ),
    **_removed(
        "A loss without a reference is not available: use TRL's `CPOTrainer` (`trl.experimental.cpo`).",
        "reference_free",
    ),
    **_removed("Remove it, and put the tools into a column `tools` of the data.", "tools"),
    **_removed(
        "Remove it: the trainer does not use it.",
        *("use_logits_to_keep", "use_num_logits_to_keep"),
    ),
    **_removed("Remove it: the decoder is found without it.", "base_model_attribute_name"),
    **_removed(
        "Remove it. `use_liger_kernel` switches Liger's layer kernels on.",
        *("use_liger", "use_liger_loss"),
        options=("use_liger_kernel",),
    ),
    **_removed(
        "Write `activation_checkpointing_kwargs: {use_reentrant: {value}}`.",
        "gradient_checkpointing_use_reentrant",
        options=("activation_checkpointing_kwargs",),
    ),
    **_removed("Remove it, and set `max_steps` for a short run.", "sanity_check", options=("max_steps",)),
    # alignment-handbook
    "dataset_mixer": Successor(
        ("dataset_name", "datasets"),
        "Write `dataset_name: ID` for one data set, or `datasets: [{path: ID}, {path: ID}]` for several, with "
        "`split: train[:50%]` for a part of one.",
        _of_mixer,
    ),
    **_removed(
        "Write its list as `datasets`, with `path` for `id`, `name` for `config` and `fraction` for `weight`; "
        "`test_split_size` stands beside it.",
        "dataset_mixture",
        options=("datasets", "test_split_size"),
    ),
    "dataset_splits": Successor(
        ("dataset_train_split", "dataset_test_split", "datasets"),
        "Write `dataset_train_split` and `dataset_test_split`, or `split` for each of `datasets`.",
        _of_splits,
    ),
    **_removed(
        "Write `dataset_config`, or `name` for each of `datasets`.",
        "dataset_configs",
        options=("dataset_config", "datasets"),
    ),
    **_renamed(
        preprocessing_num_workers="dataset_num_proc",
        base_model_revision="model_revision",
        hub_model_revision="hub_revision",
    ),
    **_removed(
        "Write `attn_implementation: flash_attention_2`.", "use_flash_attention_2", options=("attn_implementation",)
    ),
    **_removed(
        "Remove it: `model_revision` is the revision of weights, tokenizer and code.",
        "model_code_revision",
        options=("model_revision",),
    ),
    **_removed(
        "Remove it: the tokenizer is that of `model_name_or_path`. Save another one into the model's folder.",
        "tokenizer_name_or_path",
        options=("model_name_or_path",),
    ),
    **_removed(
        "Remove it: `truncation_mode` sets which end of a row is kept.",
        "truncation_side",
        options=("truncation_mode",),
    ),
    **_removed(
        "Remove it: no system message is added. Put it into the data, or into `chat_template`.",
        "auto_insert_empty_system_msg",
        options=("chat_template",),
    ),
    **_removed("Remove it: it is for supervised training.", *("text_column", "dataset_kwargs", "dataset_text_field")),
    # transformers' TrainingArguments
    **_renamed(
        evaluation_strategy="eval_strategy",
        per_gpu_train_batch_size="per_device_train_batch_size",
        per_gpu_eval_batch_size="per_device_eval_batch_size",
        no_cuda="use_cpu",
        push_to_hub_token="hub_token",
        push_to_hub_model_id="hub_model_id",
        include_tokens_per_second="include_num_input_tokens_seen",
        xpu_backend="ddp_backend",
        torchdynamo="torch_compile_backend",
    ),
    **_removed(
        "Write `eval_strategy: steps`.",
        "evaluate_during_training",
        options=("eval_strategy",),
    ),
    **_removed(
        "Write `warmup_steps: {value}`: below 1 it is a share of all steps.",
        "warmup_ratio",
        options=("warmup_steps",),
    ),
    **_removed(
        "Remove it: `resume: auto` resumes from the last checkpoint in `output_dir`, and a new run needs an empty "
        "folder.",
        "overwrite_output_dir",
        options=("resume", "output_dir"),
    ),
    **_removed(
        "Set the environment variable TENSORBOARD_LOGGING_DIR (in the YAML file under `env`).",
        "logging_dir",
    ),
    **_removed(
        "Write `train_sampling_strategy: group_by_length`.", "group_by_length", options=("train_sampling_strategy",)
    ),
    **_removed("Remove it: weights are always saved as safetensors.", "save_safetensors"),
    **_removed("Write `hub_model_id: ORGANIZATION/NAME`.", "push_to_hub_organization", options=("hub_model_id",)),
    **_removed(
        "Write `include_for_metrics: [inputs]`.", "include_inputs_for_metrics", options=("include_for_metrics",)
    ),
    **{
        name: Successor(("accelerator_config",), f"Write `accelerator_config: {{{name}: {{value}}}}`.")
        for name in ("dispatch_batches", "split_batches")
    },
    **_removed("Write `debug: tpu_metrics_debug`.", "tpu_metrics_debug", options=("debug",)),
    **_removed("Set the environment variable TPU_NUM_CORES.", "tpu_num_cores"),
    **_removed("Set the environment variable RAY_SCOPE.", "ray_scope"),
    **_removed(
        "Write it into `fsdp_config`.",
        *("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"),
        options=("fsdp_config",),
    ),
    **_removed("Write `fsdp` and `fsdp_config`.", "sharded_ddp", options=("fsdp", "fsdp_config")),
    **_removed("Write `parallelism_config`.", "tp_size", options=("parallelism_config",)),
    **_removed("Write `optim: adafactor`.", "adafactor", options=("optim",)),
    **_removed("Write `torch_compile: true`.", "jit_mode_eval", options=("torch_compile",)),
    **_removed("Remove it: the device is found without it.", *("use_mps_device", "use_ipex")),
    **_removed(
        "Remove it: mixed precision is that of PyTorch (`bf16`, `fp16`).",
        *("fp16_backend", "half_precision_backend", "fp16_opt_level"),
        options=("bf16", "fp16"),
    ),
    **_removed("Remove it.", *("use_legacy_prediction_loop", "past_index", "mp_parameters")),
}

# values of `loss_type` that TRL has had
OLD_LOSSES = {
    "aot_pair": "It is now `aot_unpaired`.",
    "kto_pair": "For KTO use TRL's `KTOTrainer`.",
}


def find_old_option_issues(given: Mapping[str, Any]) -> list[str]:
    """A sentence for each option that TRL or transformers no longer has."""
    return [
        f"`{name}` is no longer an option. {OLD_OPTIONS[name](value)}"
        for name, value in given.items()
        if name in OLD_OPTIONS
    ]


def find_old_argument_issues(given: Mapping[str, Any], options: Container[str]) -> list[str]:
    """A sentence for each argument that TRL's `DPOTrainer` no longer takes; most are options of the config now.

    Args:
        given: arguments of the trainer.
        options: names of the config's options.
    """
    issues = find_old_option_issues(given)
    if "tokenizer" in given:
        issues.append("`tokenizer` is no longer an argument of the trainer. It is now `processing_class`.")
    moved = [name for name in given if name in options]
    return issues + [f"`{name}` is an option of `SamPOConfig`, not an argument of the trainer." for name in moved]
