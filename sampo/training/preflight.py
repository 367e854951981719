"""Checks before a model is loaded: launches whose processes would not train together, data that cannot be used."""

import importlib.util
import logging
import os
import re
from typing import Any

from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from transformers import AutoProcessor

from ..checkpointing.files import find_output_folder_issue
from ..config import SamPOConfig
from ..data.end_tokens import ResponseEnds, end_token_ids
from ..data.lengths import TokenCounts
from ..data.token_ids import ID_COLUMNS
from ..data.validate import check_preferences
from ..logs import get_logger, show_logs
from ..models.checks import find_token_issues, find_vocabulary_issues
from ..models.load import check_model
from ..old_options import find_old_argument_issues
from .engines import uses_prompt_learning

logger = get_logger(__name__)

# of a model's config: what scales or caps its logits, as TRL's fused head reads it
LOGIT_OPTIONS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def check_before_loading(
    model: Any, args: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any, *, unknown: dict[str, Any]
) -> tuple[SamPOConfig, Any]:
    """Check the arguments of a trainer, before its model is loaded.

    Args:
        model: a path or a model.
        args: of the run, or None for the defaults.
        train_dataset: as given.
        eval_dataset: as given.
        processing_class: as given, or None.
        unknown: further arguments by name, of which TRL may have dropped some.

    Returns:
        The config; and the tokenizer or processor if it had to be loaded to check the data, else `processing_class`.

    Raises:
        TypeError: arguments that TRL has dropped, or `args` that are not a `SamPOConfig`.
        ValueError: missing packages, an unusable output folder, data that cannot be used.
        RuntimeError: several processes were launched, and each sees itself alone.
    """
    if issues := find_old_argument_issues(unknown, SamPOConfig.__dataclass_fields__):
        raise TypeError(" ".join(issues))
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        args = SamPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-SamPO")
    if not isinstance(args, SamPOConfig):
        raise TypeError(
            f"`args` must be a `SamPOConfig`, got `{type(args).__name__}`. It takes all options of `DPOConfig`: "
            "change the class, and set `token_weighting='all'` for plain DPO."
        )
    show_logs(logging.INFO if args.log_level == "passive" else args.get_process_log_level())
    refuse_separate_processes(args)
    if issues := find_package_issues(args):
        raise ValueError(" ".join(issues))
    if issue := find_output_folder_issue(str(args.output_dir)):
        raise ValueError(issue)
    if processing_class is None:
        processing_class = find_processor(model, args, train_dataset, eval_dataset)
    if args.generate_every is not None and eval_dataset is None:
        raise ValueError(
            f"`generate_every: {args.generate_every}` needs evaluation data to take prompts from, got none. Give an "
            "`eval_dataset`, or unset it."
        )
    check_data(args, train_dataset, eval_dataset, processing_class)
    refuse_without_end_token(train_dataset, processing_class, args)
    if isinstance(model, str):  # TRL would train what a folder lacks from random weights
        check_model(model, trust_remote_code=args.trust_remote_code)
    return args, processing_class


def check_tokens(trainer: Any) -> None:
    """Token ids and vocabularies that would end in an index error on the device, or in a run on nothing.

    Raises:
        ValueError: such tokens.
    """
    models = [each for each in (trainer.model, getattr(trainer, "ref_model", None)) if each is not None]
    # DeepSpeed's engine has a config of its own
    configs = [trainer.accelerator.unwrap_model(each).config for each in models]
    sizes = [getattr(config.get_text_config(), "vocab_size", None) for config in configs]
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    columns = getattr(trainer, "id_columns", ID_COLUMNS)
    known = {
        name: dataset
        for name, dataset in {"train": trainer.train_dataset, **sets}.items()
        if isinstance(dataset, Dataset) and columns[0] in dataset.column_names
    }
    issues = find_token_issues(known, vocabulary=sizes[0], tokenizer=trainer._tokenizer, columns=columns)
    issues += find_vocabulary_issues(sizes[0], sizes[-1])
    if issues:
        raise ValueError(" ".join(issues))


def check_weight_columns(trainer: Any) -> None:
    """Data whose rows have no tokens that weights could be aligned with.

    Raises:
        ValueError: weights from the data, which are images.
    """
    if trainer.args.weight_columns and trainer._is_vision_dataset:
        raise ValueError(
            f"Weights from the data {trainer.args.weight_columns} need data of text, got vision data, which are laid "
            "out by their processor. Use another `token_weighting`, and unset `pair_weight_column`."
        )


def check_micro_batches(trainer: Any) -> None:
    """Models, data and launches for which pairs cannot be computed in micro-batches.

    Raises:
        ValueError: `max_tokens_per_forward` with one of them.
    """
    if trainer.args.max_tokens_per_forward is None:
        return
    reasons = {
        "a mixture of experts with an auxiliary loss, which is defined for the full batch (`router_aux_loss_coef: 0` "
        "switches it off)": trainer.aux_loss_enabled,
        "vision data, which are laid out by their processor": trainer._is_vision_dataset,
        "a prompt-learning adapter, whose rows are longer than those of the batch": uses_prompt_learning(
            trainer.accelerator.unwrap_model(trainer.model)
        ),
        "tensor, context or sequence parallelism, where processes share their pairs already": _shares_rows(trainer),
    }
    for text, holds in reasons.items():
        if holds:
            raise ValueError(f"`max_tokens_per_forward` must cut batches at pair borders, got {text}. Unset it.")
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if trainer.args.finds_tokens_per_forward and sharded and trainer.args.device.type == "cuda":
        raise ValueError(
            "`max_tokens_per_forward: auto` must try out sizes on each GPU by itself, got FSDP or DeepSpeed, where "
            "all GPUs wait for one that runs out of memory. Set a number, such as 8192, and half of it if memory is "
            "exhausted."
        )


def check_generation(trainer: Any) -> None:
    """Data and launches for which `generate_every` cannot generate.

    Raises:
        ValueError: one of them.
    """
    reasons = {
        "vision data, whose prompts are laid out by their processor": trainer._is_vision_dataset,
        "tensor, context or sequence parallelism, where processes share their rows": _shares_rows(trainer),
        "FSDP1, which gathers weights for its own forward pass only (`fsdp_version: 2` can)": trainer.is_fsdp_enabled
        and not trainer.accelerator.is_fsdp2,
    }
    for text, holds in reasons.items():
        if holds:
            raise ValueError(f"`generate_every` must answer whole prompts on each process, got {text}. Unset it.")


def _shares_rows(trainer: Any) -> bool:
    return trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1


def check_divergence(trainer: Any) -> None:
    """Models and launches for which the divergence of `tdpo` cannot be computed.

    Raises:
        ValueError: `tdpo` with one of them.
    """
    if not trainer.args.has_tdpo:
        return
    models = [each for each in (trainer.model, trainer.ref_model) if each is not None]
    configs = [trainer.accelerator.unwrap_model(each).config.get_text_config() for each in models]
    changed = [name for name in LOGIT_OPTIONS if any(getattr(each, name, None) not in (None, 1) for each in configs)]
    reasons = {
        "FSDP or DeepSpeed, which may divide the LM head over processes": trainer.is_deepspeed_enabled
        or trainer.is_fsdp_enabled,
        f"a model whose config changes them by {changed}": bool(changed),
    }
    for text, holds in reasons.items():
        if holds:
            raise ValueError(
                f"`tdpo: {trainer.args.tdpo}` must have the logits of policy and reference as the LM head gives them, "
                f"got {text}. Use another method."
            )


def refuse_separate_processes(args: SamPOConfig) -> None:
    """Raise if several launched processes do not train together.

    Raises:
        RuntimeError: several were launched, and each sees itself alone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and args.world_size == 1:
        raise RuntimeError(
            f"All {world} launched processes must train one model together, got a process that sees itself alone: "
            "each would train on the same rows and overwrite the other's output. On CPU set `use_cpu: true` and "
            "launch with `torchrun` or an accelerate config of type MULTI_GPU; on GPUs check that each process sees "
            "its device."
        )


def refuse_another_engine(accelerator: Any) -> None:
    """Raise where accelerate has silently replaced FSDP or DeepSpeed, as it does on the CPU.

    Raises:
        RuntimeError: the launch asked for FSDP or DeepSpeed, and accelerate uses another engine.
    """
    for engine, kind in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        asked = os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"
        if asked and accelerator.distributed_type != kind:
            raise RuntimeError(
                f"The processes must train with {kind.value}, as the launch asks for, got "
                f"{accelerator.distributed_type.value} on {accelerator.device.type}. FSDP needs a GPU for each "
                "process; on the CPU launch with `cpu_zero3`, which shards as well, or with `cpu_ddp`."
            )


LOGGERS = {  # name in `report_to`: how transformers looks for it, what to install
    "azure_ml": ("azureml", "azureml-sdk"),
    "comet_ml": ("comet", "comet-ml"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "clearml": ("clearml", "clearml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "flyte": ("flytekit", "flytekit"),
    "dvclive": ("dvclive", "dvclive"),
    "swanlab": ("swanlab", "swanlab"),
    "kubeflow": ("kubeflow", ""),  # needs no package, but a pod of Kubeflow Trainer
}
_OPTIMISERS = {  # part of the name in `optim`: the import, what to install
    "8bit|paged|lion|ademamix|rmsprop_bnb": ("bitsandbytes", "bitsandbytes"),
    "adamw_torch_[48]bit": ("torchao", "torchao"),
    "galore": ("galore_torch", "git+https://github.com/jiaweizzhao/GaLore"),
    "apollo": ("apollo_torch", "git+https://github.com/zhuhanqing/APOLLO"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "anyprecision": ("torchdistx", "torchdistx"),
}


def find_package_issues(options: Any) -> list[str]:
    """Find options that need a missing package: transformers would raise only after the model is loaded.

    Args:
        options: With the attributes `report_to`, `optim` and `use_liger_kernel` of transformers' arguments.
    """
    optim = str(getattr(options.optim, "value", options.optim))
    needs = [(f"optim: {optim}", *each) for part, each in _OPTIMISERS.items() if re.search(part, optim)]
    if optim.startswith("adamw_torch_"):  # their `8bit` is torchao's, not that of bitsandbytes
        needs = [each for each in needs if each[1] != "bitsandbytes"]
    if options.use_liger_kernel:
        needs.append(("use_liger_kernel: true", "liger_kernel", "liger-kernel"))
    missing = [(option, package) for option, module, package in needs if importlib.util.find_spec(module) is None]
    return [
        *find_logger_issues(options.report_to),
        *(
            f"`{option}` needs a package that is not installed. `pip install {package}`, or choose another value."
            for option, package in missing
        ),
    ]


def find_logger_issues(report_to: str | list[str] | None) -> list[str]:
    """Find loggers in `report_to` that cannot be used: transformers would raise only after the model is loaded.

    Args:
        report_to: As in transformers.
    """
    from transformers.integrations import integration_utils

    asked = [report_to] if isinstance(report_to, str) else list(report_to or [])
    issues = []
    for name in asked:
        if name in ("all", "none"):
            continue
        if name not in LOGGERS:
            issues.append(f"`report_to` must be among {sorted([*LOGGERS, 'all', 'none'])}, got {name!r}.")
            continue
        look_for, package = LOGGERS[name]
        if getattr(integration_utils, f"is_{look_for}_available")():
            continue
        if package:
            needs = f"a package that is not installed. `pip install {package}`, or set"
        else:
            needs = "a job of Kubeflow Trainer, got none (KUBEFLOW_TRAINER_SERVER_URL is not set). Set"
        issues.append(f"`report_to: {name}` needs {needs} `report_to: none`.")
    return issues


def _each_dataset(train_dataset: Any, eval_dataset: Any) -> list:
    return [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]


def check_data(args: SamPOConfig, train_dataset: Any, eval_dataset: Any, processing_class: Any = None) -> None:
    """All issues of the rows, before a model is loaded; of messages also what the chat template makes of them.

    Raises:
        PreferenceDataError: missing columns or bad rows.
        ValueError: rows are to be grouped by a length that they do not have.
    """
    grouped = args.train_sampling_strategy == "group_by_length" and isinstance(train_dataset, Dataset)
    if grouped and args.length_column_name not in train_dataset.column_names:
        raise ValueError(
            "`train_sampling_strategy: group_by_length` needs the length of each pair in the column "
            f"`{args.length_column_name}` (`length_column_name`), got {train_dataset.column_names}. Add it, or use "
            "`random`; `pair_stream: auto` does without padding in any order."
        )
    for dataset in _each_dataset(train_dataset, eval_dataset):
        if isinstance(dataset, Dataset | IterableDataset):  # TRL checks other types
            check_preferences(dataset, chat_template_of=processing_class)


def find_processor(model: Any, args: SamPOConfig, train_dataset: Any, eval_dataset: Any) -> Any:
    """The tokenizer or processor that TRL would load, where messages are to be looked at before the model is loaded.

    None where TRL has to load it, and then raises the error.
    """
    if not isinstance(model, str) or not any(map(_holds_messages, _each_dataset(train_dataset, eval_dataset))):
        return None
    options: Any = args.model_init_kwargs or {}
    try:
        return AutoProcessor.from_pretrained(
            model, revision=options.get("revision") or "main", trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError):
        return None


def _holds_messages(dataset: Any) -> bool:
    if not isinstance(dataset, Dataset) or "chosen" not in dataset.column_names or not len(dataset):
        return False
    return isinstance(dataset.with_format(None)[0]["chosen"], list)


def refuse_without_end_token(train_dataset: Any, processing_class: Any, args: SamPOConfig) -> None:
    """`keep_end_token` and `balance_end_token` with a chat template that ends no turn.

    Raises:
        ValueError: such a template.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    asked = args.keep_end_token or args.balance_end_token
    if not asked or not getattr(tokenizer, "chat_template", None) or not _holds_messages(train_dataset):
        return
    ends = ResponseEnds(tokenizer, end_token_ids(tokenizer))
    if not ends.template_ends_turns and not ends.template_fails:
        raise ValueError(
            f"{_end_options(args)} needs responses with an end token, got a chat template that puts none behind an "
            "answer. Unset it, or take a template that ends each turn of the assistant (`chat_template`)."
        )


def refuse_endless_responses(counts: TokenCounts, args: SamPOConfig, name: str) -> None:
    """Warn where no response ends, or stop where an option is about its end.

    Args:
        counts: of the tokenised data.
        args: of the run.
        name: of the data, `train` or that of an evaluation set.

    Raises:
        ValueError: `keep_end_token` or `balance_end_token`, and no training response has an end token.
    """
    if counts.has_ends:
        return
    what = f"0 of {2 * counts.pairs:,} responses of the {name} data have an end token after truncation"
    if name == "train" and (args.keep_end_token or args.balance_end_token):
        raise ValueError(
            f"{_end_options(args)} needs responses with an end token, got none: {what}. Unset it, raise `max_length`, "
            "or take a chat template that ends each turn of the assistant."
        )
    logger.warning(
        f"{what}: training does not teach where a response ends. Raise `max_length` if it cuts all of them, or take a "
        "chat template that ends each turn of the assistant."
    )


def _end_options(args: SamPOConfig) -> str:
    asked = [name for name in ("keep_end_token", "balance_end_token") if getattr(args, name)]
    return " and ".join(f"`{name}`" for name in asked)
