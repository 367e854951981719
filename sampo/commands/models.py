"""The models of a run: tokenizer, policy and reference."""

import logging
import os
from dataclasses import fields
from typing import Any

from .option_checks import WITHOUT_REFERENCE, is_adapter, same_place, second_adapter

logger = logging.getLogger(__name__)


class RefusedRun(ValueError):
    """The options cannot be run; the text lists all issues."""


def load_processor(script_args: Any, training_args: Any, model_args: Any) -> Any:
    """The model's tokenizer (or processor), as TRL loads it, with the chat template that was asked for.

    Raises:
        RefusedRun: it does not load, has no end token, or a chat template that cannot be used.
    """
    from transformers import AutoProcessor

    from ..models.checks import find_tokenizer_issues
    from ..models.load import base_of

    path, revision = model_args.model_name_or_path, model_args.model_revision
    if is_adapter(path) and not os.path.isfile(os.path.join(path, "tokenizer_config.json")):
        path, revision = base_of(path)  # an adapter may come without a tokenizer
    try:
        processor = AutoProcessor.from_pretrained(
            path, revision=revision or "main", trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RefusedRun(f"The tokenizer of `model_name_or_path` {path!r} must load, got: {error}") from error
    template = script_args.chat_template
    if template is not None:
        if os.path.isfile(template):
            with open(template, encoding="utf-8") as file:
                template = file.read()
        processor.chat_template = template
    if issues := find_tokenizer_issues(getattr(processor, "tokenizer", processor)):
        raise RefusedRun(" ".join(issues))
    return processor


def check_adapter(model_args: Any) -> None:
    """Check an adapter as the policy: it needs a base, and no second adapter.

    Raises:
        RefusedRun: it does not.
    """
    from ..models.load import base_of

    if _holds_adapter(model_args):
        try:
            base_of(model_args.model_name_or_path, model_args.model_revision)
        except ValueError as issue:
            raise RefusedRun(str(issue)) from None


def check_vocabulary(script_args: Any, training_args: Any, model_args: Any, processor: Any) -> None:
    """Check that policy and reference have the same token ids.

    Raises:
        RefusedRun: they do not.
    """
    from transformers import AutoConfig, AutoTokenizer

    reference = script_args.ref_model_name_or_path
    if reference is None or same_place(reference, model_args.model_name_or_path):
        return
    options = {
        "revision": script_args.ref_model_revision or "main",
        "trust_remote_code": training_args.trust_remote_code,
    }
    ours = getattr(processor, "tokenizer", processor).get_vocab()
    theirs = AutoTokenizer.from_pretrained(reference, **options).get_vocab()
    rows = AutoConfig.from_pretrained(reference, **options).get_text_config().vocab_size
    begin = f"`ref_model_name_or_path` must have the vocabulary of `model_name_or_path`, got {reference} "
    if ours != theirs:
        differ = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        first = f"{differ[0]!r} is {theirs.get(differ[0], 'none')} there and {ours.get(differ[0], 'none')} here"
        raise RefusedRun(
            f"{begin}with {len(theirs):,} tokens against {len(ours):,}; {len(differ):,} differ, the first: {first}."
        )
    if max(ours.values()) >= rows:
        raise RefusedRun(f"{begin}with {rows:,} rows of embeddings for token numbers up to {max(ours.values()):,}.")


def load_models(script_args: Any, training_args: Any, model_args: Any) -> dict:
    """The trainer's arguments for policy and reference."""
    from trl import get_peft_config, get_quantization_config

    from ..models.load import create_model, load_trainable

    policy, reference = model_args.model_name_or_path, script_args.ref_model_name_or_path
    quantization = get_quantization_config(model_args)
    loading = dict(training_args.model_init_kwargs)
    if quantization is not None:
        loading["quantization_config"] = quantization
    if training_args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        loading["device_map"] = None  # as in TRL; "auto" fails there
    models: dict[str, Any] = {}
    if _holds_adapter(model_args):
        zero3 = training_args.deepspeed_plugin is not None and training_args.deepspeed_plugin.zero_stage == 3
        models["model"] = load_trainable(
            policy,
            **{**loading, "revision": model_args.model_revision},
            autocast=quantization is not None or not zero3,  # ZeRO-3 needs one dtype, as in TRL
        )
        training_args.model_init_kwargs = None
        logger.info("training continues with the adapter in %s", policy)
        _warn_of_adapter_options(model_args)
    elif script_args.trainer in WITHOUT_REFERENCE:  # TRL's trainers of these load no quantised model
        models |= {"model": create_model(policy, **loading), "peft_config": get_peft_config(model_args)}
        training_args.model_init_kwargs = None
    else:
        models |= {
            "model": policy,
            "quantization_config": quantization,
            "peft_config": get_peft_config(model_args),
        }
    if reference is not None and not same_place(reference, policy):
        logger.info("the reference model is %s (`ref_model_name_or_path`)", reference)
        revisions = {script_args.ref_model_revision, model_args.model_revision} - {None, "main"}
        as_the_policy = models["model"] == policy and quantization is None and not revisions
        if training_args.precompute_ref_log_probs and as_the_policy:
            models["ref_model"] = reference  # the trainer loads it if its log-probs are not in the cache
        else:
            models["ref_model"] = create_model(
                reference,
                option="ref_model_name_or_path",
                **{**loading, "revision": script_args.ref_model_revision or "main"},
            )
    return models


def _warn_of_adapter_options(model_args: Any) -> None:
    """Warn of `lora_*` options, which do not change an existing adapter."""
    names = [f for f in fields(model_args) if f.name.startswith("lora_") or f.name in ("use_dora", "use_rslora")]
    default = type(model_args)()
    without_effect = [f.name for f in names if getattr(model_args, f.name) != getattr(default, f.name)]
    if without_effect:
        logger.warning("%s have no effect on an adapter that exists already.", without_effect)


def _holds_adapter(model_args: Any) -> bool:
    """Whether `model_name_or_path` is an adapter, on the hub too; a second one beside it is refused."""
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(model_args.model_name_or_path, revision=model_args.model_revision) is None:
        return False
    if model_args.use_peft:
        raise RefusedRun(second_adapter(model_args.model_name_or_path))
    return True
