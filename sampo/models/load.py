"""The one way to open a model: checked before it is loaded, with every weight from its files.

1. A folder is checked first (`checks.py`). A name that looks like a path is never looked up on the hub.
2. Code of a model runs only with `trust_remote_code`, without a prompt on the terminal. Files that would run code when
   they are unpickled are an error.
3. A weight that is missing or has another shape is an error with its name: transformers would train on random numbers.
4. Call `refuse_weights_not_finite` before a model is used: NaN weights give empty answers.
"""

import contextlib
import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import find_model_folder_issues, find_path_issues

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"}
NAMED = 5  # names of tensors in a message


class ModelError(ValueError):
    """A model, its tokenizer or its adapter cannot be used; the text gives the reason and what to do."""


def base_of(adapter: str, revision: str | None = None) -> tuple[str, str | None]:
    """Name and revision of an adapter's base model, from its configuration.

    Raises:
        ModelError: it names no base model.
    """
    from peft import PeftConfig

    with opening(adapter, "adapter"):
        config = PeftConfig.from_pretrained(adapter, revision=revision)
    if not config.base_model_name_or_path:
        raise ModelError(
            f"The adapter in {adapter} must name its base model, got no `base_model_name_or_path` in its "
            "adapter_config.json. Write it in."
        )
    return config.base_model_name_or_path, config.revision


def has_adapter(name: str, revision: str | None = None) -> bool:
    """Whether a folder or hub id is an adapter."""
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(name, revision=revision) is not None


def check_model(
    name: str,
    *,
    option: str = "model",
    trust_remote_code: bool = False,
    tokenizer: bool = False,
    reward: bool = False,
    base: str | None = None,
) -> None:
    """Check a local model or adapter before its weights are read.

    Args:
        name: folder or hub id; of a hub id nothing is known here.
        option: by which the user gave it.
        trust_remote_code: whether the folder may bring code of its own.
        tokenizer: whether one must be there.
        reward: a sequence classifier is wanted, in place of a causal language model.
        base: of an adapter, if another one than it names.

    Raises:
        ModelError: with all issues.
    """
    issues = find_model_folder_issues(name, trust_remote_code=trust_remote_code, option=option, tokenizer=tokenizer)
    if issues:
        raise ModelError(" ".join(issues))
    if not os.path.isdir(name):
        return
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        check_model(
            base or base_of(name)[0],
            option=f"base model of {name}",
            trust_remote_code=trust_remote_code,
            reward=reward,
        )
        return
    if not any(Path(name).glob("*.gguf")):
        _check_weights(name, option, trust_remote_code, reward)


def create_model(name: str, *, option: str = "model", **options: Any) -> "PreTrainedModel":
    """A model as TRL's trainer loads it, after `check_model`.

    Args:
        name: folder or hub id of a model.
        option: by which the user gave it.
        **options: for TRL's `create_model_from_path`.

    Raises:
        ModelError: it cannot be used.
    """
    from trl.trainer.utils import create_model_from_path

    check_model(name, option=option, trust_remote_code=bool(options.get("trust_remote_code")))
    with opening(name, option):
        return create_model_from_path(name, **options)


def load_tokenizer(
    name: str, *, adapter: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that lies with the adapter, else with the model, else with the adapter's base.

    Args:
        name: folder or hub id of a model or adapter.
        adapter: folder of an adapter on that model.
        revision: of the model.
        trust_remote_code: whether a folder may bring code of its own.

    Raises:
        ModelError: it cannot be used.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if adapter is not None and os.path.isfile(os.path.join(adapter, "tokenizer_config.json")):
        with opening(adapter, "tokenizer"):
            return AutoTokenizer.from_pretrained(adapter, **options)
    if issues := find_path_issues(name, option="model"):
        raise ModelError(" ".join(issues))
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "tokenizer_config.json")) and has_adapter(name):
        name, revision = base_of(name, revision)
    with opening(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", **options)


def add_adapter(model: "PreTrainedModel", name: str, **options: Any) -> "PeftModel":
    """The model with an adapter on it, all of whose weights are in its files.

    Args:
        model: the base.
        name: folder or hub id of the adapter.
        **options: for `PeftModel.from_pretrained`.

    Raises:
        ModelError: the adapter is not made for this model, or lacks weights.
    """
    import warnings

    from peft import PeftModel

    with opening(name, "adapter"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        # PEFT 0.21 reads the name that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            adapted = PeftModel.from_pretrained(model, name, **options)
        except UserWarning as error:
            names = str(error).partition(": ")[2].split(". ")[0]
            raise ModelError(
                f"The files of the adapter {name} must hold all of its weights, got none for {names[:300]}. Fetch or "
                "save it again, or take the base that it was made for."
            ) from None
        _refuse_weights_without_place(adapted, name, options.get("revision"))
    return adapted


def _refuse_weights_without_place(model: "PeftModel", name: str, revision: str | None) -> None:
    """Peft leaves them aside without a word: the adapter would be another one than was trained."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    where: dict[str, Any] = {} if revision is None else {"revision": revision}
    stored = load_peft_weights(name, device="cpu", **where)
    known = get_peft_model_state_dict(model, save_embedding_layers=False)
    # full embeddings are stored with the adapter when tokens were added
    further = [key for key in stored.keys() - known.keys() if not _EMBEDDINGS & set(key.split("."))]
    if further:
        raise ModelError(
            f"The files of the adapter {name} must fit its adapter_config.json and its base, got "
            f"{_some(sorted(further))} without a counterpart in the model. Fetch or save it again, or take the base "
            "that it was made for."
        )


def load_trainable(
    adapter: str, *, revision: str | None = None, autocast: bool = True, **init_kwargs: Any
) -> "PeftModel":
    """Load the base model with its adapter, to train the adapter further.

    Args:
        adapter: Folder or hub id.
        revision: Of the adapter.
        autocast: Keep the adapter in float32 on a base of lower precision.
        init_kwargs: For `from_pretrained` of the base, as TRL's `create_model_from_path` takes them.
    """
    base, base_revision = base_of(adapter, revision)
    option = f"base model of {adapter}"
    model = create_model(base, option=option, **{**init_kwargs, "revision": base_revision or "main"})
    return add_adapter(model, adapter, is_trainable=True, revision=revision, autocast_adapter_dtype=autocast)


@contextlib.contextmanager
def opening(name: str, option: str) -> Iterator[None]:
    """Turn the errors of libraries that open a model into one sentence with the model's name.

    Raises:
        ModelError: in the place of errors of files and values.
    """
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise code_refused(f"one in {name}") from error
    except PermissionError as error:
        raise ModelError(
            f"{error.filename} must be open to the user of this process, got: {error.strerror}. Change who may use it."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"`{option}` {name} must load, got: {_reason(error)}") from error


def code_refused(what: str) -> ModelError:
    """The error for a file that torch did not unpickle, whose own advice is to let its code run."""
    return ModelError(
        f"The files of a model must hold tensors and nothing else, got {what} that would run code when it is loaded. "
        "Nothing was run. Get the model as safetensors, from a source you trust."
    )


def refuse_weights_not_finite(weights: "Iterable[tuple[str, Tensor]]", name: str) -> None:
    """Raise if a weight is NaN or infinite.

    Args:
        weights: names and tensors, as of `named_parameters`; of sharded ones the part that is here.
        name: of the model.

    Raises:
        ModelError: with the names of such tensors.
    """
    if bad := not_finite(weights):
        raise ModelError(
            f"All weights of {name} must be finite, got NaN or infinity in {_some(bad)}. The training that made it "
            "has diverged: take an earlier checkpoint."
        )


def not_finite(weights: "Iterable[tuple[str, Tensor]]") -> list[str]:
    """Names of the tensors with a value that is NaN or infinite."""
    import torch

    bad = []
    for name, weight in weights:
        here: Any = getattr(weight, "ds_tensor", weight)  # ZeRO-3 keeps a part of it
        here = here.to_local() if hasattr(here, "to_local") else here  # so does FSDP2
        # the largest absolute value is NaN or infinite if one of them is
        if here.is_floating_point() and here.numel() and not torch.isfinite(here.detach().abs().amax().float()):
            bad.append(name)
    return bad


def _check_weights(name: str, option: str, trust_remote_code: bool, reward: bool) -> None:
    """Compare names and shapes of the files with those of the model, which is made without memory for its weights."""
    with _in_silence(), opening(name, option):
        kind = _kind_of(name, trust_remote_code, reward)
        if kind is None:
            return
        _, found = kind.from_pretrained(
            name,
            device_map="meta",
            dtype="auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    missing, misshapen = sorted(found["missing_keys"]), sorted(found["mismatched_keys"], key=lambda key: key[0])
    begin = f"`{option}` must be a folder with all weights of its model, got {name!r}"
    end = "Fetch or save it again, or correct config.json."
    if missing:
        raise ModelError(f"{begin} without {_some(missing)}. {end}")
    if misshapen:
        first = [f"{key} of shape {tuple(ours)} in place of {tuple(theirs)}" for key, ours, theirs in misshapen]
        raise ModelError(f"{begin} with {_some(first)}. {end}")
    if found["unexpected_keys"] and not reward:
        logger.warning(
            "%s holds weights that its model does not have, and that are not used: %s. Check that config.json belongs "
            "to these weights.",
            *(name, _some(sorted(found["unexpected_keys"]))),
        )


def _kind_of(name: str, trust_remote_code: bool, reward: bool) -> Any:
    """The class to load a folder with; None where the weights cannot be compared (quantised ones)."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        return None
    if reward:
        return transformers.AutoModelForSequenceClassification
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or not config.architectures:
        return transformers.AutoModelForCausalLM
    return getattr(transformers, config.architectures[0], transformers.AutoModelForCausalLM)


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Without the bar and the report of a load that is none, and outside of ZeRO-3, which knows no `meta` device."""
    from transformers.integrations import deepspeed
    from transformers.utils import logging as their_logging

    verbosity, bars = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        their_logging.set_verbosity(verbosity)
        if bars:
            their_logging.enable_progress_bar()
        deepspeed._hf_deepspeed_config_weak_ref = zero3


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "sentencepiece" in text:  # transformers' last resort for a tokenizer whose files it cannot find
        return "there are no files of a tokenizer that transformers can read. Save it there with `save_pretrained`."
    if "trust_remote_code" in text:  # theirs is long, and names the option at its end
        return "it contains custom code. Read that code, and set `trust_remote_code` if it may run."
    return text if len(text) <= 400 else f"{text[:400]}…"
