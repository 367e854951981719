"""Checks of the options of `sampo train` before anything is loaded."""

import importlib.util
import os
import re
from typing import Any

from ..data.columns import read_columns

WITHOUT_REFERENCE = ("cpo", "simpo", "orpo")  # values of `trainer`
HELD_OUT = {"test", "eval", "evaluation", "valid", "validation", "val", "dev"}  # words in the name of a split

NO_GPU = "`bf16`, TRL's default, needs a GPU, got none. Set `use_cpu: true` to train on the CPU, or `bf16: false`."


def find_option_issues(options: Any) -> list[str]:
    """Find all issues of the options before anything is loaded.

    Args:
        options: An attribute for each option of all the dataclasses together.
    """
    from ..training.preflight import find_package_issues

    evaluates = str(options.eval_strategy) not in ("no", "False", "IntervalStrategy.NO")
    mixed = [dict(d) if isinstance(d, dict) else vars(d) for d in options.datasets]
    splits = [d.get("split", "train") for d in mixed] or [options.dataset_train_split]
    held_out = [split for split in splits if HELD_OUT & set(re.split(r"[^a-z]+", split.lower()))]
    fraction, generates = options.eval_fraction, getattr(options, "generate_every", None)  # of `trainer: dpo` alone
    table = [
        (not options.model_name_or_path, "`model_name_or_path` must be given."),
        (not options.dataset_name and not mixed, "`dataset_name` or `datasets` must be given."),
        (options.dataset_name and mixed, "`dataset_name` and `datasets` exclude each other, got both. Remove one."),
        (
            held_out,
            f"Training must not see held-out data, got the split {held_out} to train on. Name another split; for "
            "evaluation there is `dataset_test_split`.",
        ),
        (not 0 <= fraction < 1, f"`eval_fraction` must lie in [0, 1), got {fraction}."),
        (
            fraction and not evaluates,
            f"`eval_fraction: {fraction}` holds out pairs that are not evaluated with `eval_strategy: no`. Set "
            "`eval_strategy: steps`, or drop `eval_fraction`.",
        ),
        (
            generates and not evaluates,
            f"`generate_every: {generates}` needs evaluation pairs to take prompts from, got "
            "`eval_strategy: no`. Set `eval_strategy: steps`, with `eval_fraction` or `dataset_test_split`.",
        ),
        (
            fraction and options.test_split_size,
            "`eval_fraction` and `test_split_size` exclude each other, got both. `eval_fraction` keeps all pairs of a "
            "prompt in one split.",
        ),
        (
            options.resume and options.resume_from_checkpoint,
            f"`resume` and `resume_from_checkpoint` exclude each other, got {options.resume} and "
            f"{options.resume_from_checkpoint}. Remove one.",
        ),
    ]
    return [
        *(message for wrong, message in table if wrong),
        *_find_syntax_issues(options),
        *_find_baseline_issues(options),
        *_find_model_issues(options),
        *_find_streaming_issues(options),
        *_find_quantization_issues(options),
        *find_package_issues(options),
    ]


def find_other_checkpoints_issue(options: Any, resume: Any) -> str | None:
    """A new run must not mix its checkpoints with those of another one in the same folder.

    Args:
        options: with `output_dir` and `save_strategy`.
        resume: what asks to go on from a checkpoint, if anything does.
    """
    from transformers.trainer_utils import SaveStrategy  # imports torch, which the help texts do without

    from ..checkpointing.files import numbered_checkpoints  # so does this

    there = [path.name for path in numbered_checkpoints(str(options.output_dir))]
    if not there or resume or SaveStrategy(options.save_strategy) == SaveStrategy.NO:
        return None
    return (
        f"A new run must not mix its checkpoints with those of another one, got `output_dir` {options.output_dir} "
        f"with {', '.join(there)}. Set `resume: auto` to resume from the last one, or choose another folder."
    )


def _find_syntax_issues(options: Any) -> list[str]:
    """Check the options with a syntax of their own."""
    issues = []
    for read in (lambda: read_shard(options.prompt_shard or "1/1"), lambda: read_columns(options.columns or ())):
        try:
            read()
        except ValueError as issue:
            issues.append(str(issue))
    return issues


def _find_baseline_issues(options: Any) -> list[str]:
    """Check what TRL's trainers of other methods cannot do."""
    from ..config_checks import find_trainer_issues  # imports torch

    trainer = getattr(options, "trainer", "dpo")
    if trainer == "dpo":
        return []
    table = [
        (
            trainer in WITHOUT_REFERENCE and options.ref_model_name_or_path,
            f"`trainer: {trainer}` has no reference, got `ref_model_name_or_path`. Remove it.",
        ),
        (
            options.dataset_streaming or options.streaming,
            f"`trainer: {trainer}` needs all rows, got a stream. Load the data without streaming.",
        ),
        (options.max_length is None, f"`max_length` must be a number for `trainer: {trainer}`, got none."),
        (
            getattr(options, "generate_during_eval", False),
            "`generate_during_eval` must be off: `sampo generate` answers prompts with the trained model.",
        ),
    ]
    return [*find_trainer_issues(options), *(message for wrong, message in table if wrong)]


def _find_model_issues(options: Any) -> list[str]:
    """Check local model folders without reading weights."""
    policy, reference = options.model_name_or_path or "", options.ref_model_name_or_path
    table = [
        (
            is_adapter(policy) and options.use_peft,
            second_adapter(policy),
        ),
        (
            is_adapter(policy) and _has_weights(policy),
            f"`model_name_or_path` must hold a model or an adapter, got {policy} with both. Move the adapter "
            "(`adapter_*`) or the model (`config.json`, weights) to a folder of its own.",
        ),
        (
            reference and is_adapter(reference) and not same_place(reference, policy),
            f"`ref_model_name_or_path` must be a complete model, got the adapter in {reference}. `sampo merge` it "
            "first.",
        ),
        (
            options.ref_model_revision and not reference,
            "`ref_model_revision` needs `ref_model_name_or_path`, got none.",
        ),
    ]
    return [message for wrong, message in table if wrong]


def second_adapter(policy: str) -> str:
    """The error for `use_peft` on an adapter."""
    return (
        f"`use_peft` would put a second adapter beside the one in {policy}, and with both switched off the reference "
        "would be the base model without either. Without `use_peft` the adapter is trained on, and a frozen copy of "
        "it is the reference; for a new adapter, `sampo merge` the first one and start from that."
    )


def is_adapter(path: str) -> bool:
    """Whether a local folder holds a PEFT adapter."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def same_place(one: str, other: str) -> bool:
    """Whether two names mean one model."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))


def _has_weights(folder: str) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def _find_streaming_issues(options: Any) -> list[str]:
    if not (options.dataset_streaming or options.streaming):
        return []
    table = {
        "eval_fraction": options.eval_fraction != 0,
        "length_split": options.length_split is not None,
        "prompt_shard": options.prompt_shard is not None,
        "on_bad_rows: drop": options.on_bad_rows == "drop",
        "repeated_prompt: cut": options.repeated_prompt == "cut",
        "text_as_messages": options.text_as_messages,
    }
    return [
        f"`{option}` needs all rows, got a stream. Load the data without streaming."
        for option, asked in table.items()
        if asked
    ]


def _find_quantization_issues(options: Any) -> list[str]:
    import torch

    if not (options.load_in_4bit or options.load_in_8bit):
        return []
    option = "load_in_4bit" if options.load_in_4bit else "load_in_8bit"
    table = [
        (
            not options.use_peft and not is_adapter(options.model_name_or_path or ""),
            "`use_peft`: quantised weights cannot be trained, only an adapter on them",
        ),
        (importlib.util.find_spec("bitsandbytes") is None, "bitsandbytes: `pip install 'sampo-dpo[quantization]'`"),
        (options.use_cpu or not torch.cuda.is_available(), "a CUDA device, and the run has none"),
    ]
    missing = [need for lacks, need in table if lacks]
    return [f"`{option}` needs {'; and '.join(missing)}."] if missing else []


def read_shard(text: str) -> tuple[int, int]:
    """`2/3` as numbers.

    Raises:
        ValueError: the text has another form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    shard, shards = map(int, found.groups()) if found else (0, 0)
    if not 1 <= shard <= shards:
        raise ValueError(f"`prompt_shard` must be a shard and their number, as `2/3`, got {text!r}.")
    return shard, shards
