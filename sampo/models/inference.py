"""Open a model to generate or score with, a causal language model or a reward model, identify its weights, generate.

Built on `load`: a model is checked before its weights are read, and refused if they are missing or not finite.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.hashing import hash_file_samples
from .checks import find_path_issues, weight_files
from .load import ModelError, add_adapter, base_of, check_model, has_adapter, opening, refuse_weights_not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Loaded:
    """A causal language model or a reward model.

    Attributes:
        model: in evaluation mode, on its device.
        weights: fingerprint of its weights, with that of the adapter after a `+`; None if not known.
        base: name of the model below the adapter; None without an adapter.
    """

    model: "PreTrainedModel"
    weights: str | None
    base: str | None


def default_device() -> str:
    """The first accelerator, else the CPU."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def load_causal(
    name: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a causal language model, with its adapter if it has one.

    Args:
        name: folder or hub id of a model, or of an adapter, which is loaded on its base.
        adapter: folder or hub id of an adapter for `name`.
        revision: of `name` on the hub.
        device: to put the model on.
        dtype: of the weights; `auto` for that of the files.
        trust_remote_code: whether the model may bring code of its own.

    Raises:
        ModelError: it cannot be used.
    """
    from transformers import AutoModelForCausalLM

    for checked in {name, adapter or name}:
        check_model(checked, trust_remote_code=trust_remote_code)
    base, base_revision = name, revision
    if adapter is None and has_adapter(name, revision):
        adapter, (base, base_revision) = name, base_of(name, revision)
    with opening(base, "model"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, revision=base_revision or "main", dtype=dtype, trust_remote_code=trust_remote_code
        )
    weights = fingerprint(base, model)
    if adapter is not None:
        model = add_adapter(model, adapter, revision=revision if adapter == name else None)
        weights = f"{weights}+{fingerprint(adapter, None)}"
    refuse_weights_not_finite(model.named_parameters(), name if adapter is None else adapter)
    return Loaded(model.to(device).eval(), weights, None if adapter is None else base)


_REWARD = "`model` must be a reward model with one output"


def check_reward(name: str, *, revision: str | None = None) -> None:
    """Check a reward model before its weights are read; errors as `load_reward`."""
    from transformers import AutoConfig

    if issues := find_path_issues(name, option="model"):
        raise ModelError(" ".join(issues))
    with opening(name, "model"):
        outputs = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False).num_labels
    if outputs != 1:
        raise ValueError(f"{_REWARD}, got {outputs} outputs in {name}.")
    check_model(name, reward=True)


def load_reward(name: str, *, revision: str | None = None, device: str = "cpu", dtype: str = "auto") -> Loaded:
    """Load a reward model: a sequence classifier with one output. Code of its own is never run.

    Args:
        name: folder or hub id.
        revision: of `name` on the hub.
        device: to put the model on.
        dtype: of the weights; `auto` for that of the files.

    Raises:
        ModelError: it cannot be used.
        ValueError: it has several outputs, or its head is not in the files.
    """
    from transformers import AutoModelForSequenceClassification

    check_reward(name, revision=revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    with opening(name, "model"):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True, num_labels=1, **options
        )
    refuse_weights_not_finite(model.named_parameters(), name)
    if found["missing_keys"]:
        raise ValueError(f"{_REWARD}, got no weights of {sorted(found['missing_keys'])} in {name}.")
    return Loaded(model.to(device).eval(), fingerprint(name, model), None)


def fingerprint(name: str, model: Any) -> str | None:
    """Identify weights: by the commit on the hub, or by a hash of samples of the files of a local folder.

    The samples are spread evenly over each file: training changes some of them, and hashing all bytes would take
    minutes. The fingerprint detects mistakes, not manipulation.

    Args:
        name: folder or hub id.
        model: loaded from the hub, which knows its commit; None if it is not loaded.

    Returns:
        `sha256:…` of a folder, the commit of a hub id; None if it is not known.
    """
    folder = Path(name)
    if not folder.is_dir():
        return getattr(getattr(model, "config", None), "_commit_hash", None)
    return f"sha256:{hash_file_samples(weight_files(folder))[:16]}"


def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end_ids: Collection[int],
    pad_id: int,
    **options: Any,
) -> list[list[int]]:
    """The tokens that a model continues prompts with, in one batch that is padded on the left.

    Of the model's own generation settings none is used; without options the choice is greedy.

    Args:
        model: a causal language model in evaluation mode, with or without an adapter.
        prompts: token ids, at least one each.
        max_tokens: of each continuation.
        end_ids: tokens that end one.
        pad_id: fills a batch up.
        **options: of transformers' `generate`.

    Returns:
        Of each prompt its continuation: up to its first end token, with it, or `max_tokens` tokens without one.
    """
    import torch
    from transformers import GenerationConfig

    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[pad_id] * (width - len(p)) + [*p] for p in prompts], device=device)  # (B, width)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    settings = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=list(end_ids), pad_token_id=pad_id
    )
    with _replaced_settings(model, settings):
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **options)
    return [_up_to_end(row, end_ids) for row in found[:, width:].tolist()]


def _up_to_end(ids: list[int], end_ids: Collection[int]) -> list[int]:
    end = next((position for position, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: end + 1]


@contextmanager
def _replaced_settings(model: Any, settings: Any) -> Iterator[None]:
    """Replace the model's own generation settings: transformers takes from them what given settings omit.

    With an adapter, the base model generates with settings of its own, so these are replaced too.
    """
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    kept = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = settings
        yield
    finally:
        for owner, own in zip(owners, kept, strict=True):
            owner.generation_config = own
