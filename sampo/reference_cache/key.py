"""What per-token reference log-probs depend on: a key with one field for each thing, and the hashes that fill it.

Omitted on purpose:

- the tokenizer, the chat template and the text: all that they do to a log-prob, they do through the token ids;
- what changes rounding alone: the batch, the padding, `pair_stream`, the device, the number of processes.

What no hash can see (another version of a library, code patched into a model) is what `ref_cache_check` is for.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..io.hashing import hash_files, hash_json
from ..scoring.interface import own_implementation

KEY_SCHEMA = 1
OWN_TOKENS = "tokens"  # as `targets` of a key

# of a model's config: fields on its origin or other abilities, which do not affect its log-probs
_NOT_ABOUT_VALUES = (
    *("architectures", "attn_implementation", "dtype", "id2label", "label2id", "pad_token_id", "torch_dtype"),
    *("transformers_version", "use_cache"),
)


@dataclass(frozen=True, kw_only=True)
class RefKey:
    """What the numbers of one cache depend on.

    Attributes:
        weights: hash of the reference's parameters as it is used: with PEFT those of the base model, and of the "ref"
            adapter if there is one. Or the hash of its files, where it was given as a folder.
        config: hash of its config, and of the "ref" adapter's.
        compute_dtype: type of the parameters, and of the arithmetic where autocast changes it.
        attention: attention implementation.
        data: hash of the token ids of all rows in their order.
        max_length: tokens of prompt and response together, or None.
        truncation_mode: which end is cut.
        storage_dtype: type of the numbers on disk.
        targets: whose log-probs they are: `tokens`, those of the completion; or, in words, the end token's.
        schema: version of this list and of the files.
    """

    weights: str
    config: str
    compute_dtype: str
    attention: str
    data: str
    max_length: int | None
    truncation_mode: str
    storage_dtype: str
    targets: str = OWN_TOKENS
    schema: int = KEY_SCHEMA

    def as_dict(self) -> dict[str, Any]:
        """The fields, as the manifest keeps them."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """Name of the cache: 24 hex digits over all fields."""
        return hash_json(self.as_dict())[:24]


def identity_of_files(folder: str, settings: dict[str, Any], arithmetic: str = "no") -> dict[str, Any] | None:
    """The fields of a key that a reference fills, from its files alone; None where the files are not enough.

    Args:
        folder: of the model.
        settings: with which it would be loaded, `dtype` and `attn_implementation` among them.
        arithmetic: type to which autocast changes the arithmetic, or `no`.
    """
    hashed = hash_model_files(folder)
    if hashed is None:
        return None
    return {
        "weights": hashed,
        "config": str(sorted((k, str(v)) for k, v in settings.items())),
        "compute_dtype": str(settings["dtype"]) + _describe_autocast(arithmetic),
        "attention": str(settings["attn_implementation"]),
    }


def identity_of_model(model: Any, arithmetic: str = "no", adapter: str = "ref") -> dict[str, Any]:
    """The same from a model at hand, not wrapped; under ZeRO-3 and FSDP2 all processes must call this.

    Args:
        model: A PEFT model stands for its base, with the adapter of this name if it has one.
        arithmetic: type to which autocast changes the arithmetic, or `no`.
        adapter: "ref" for the model that it is a reference of, another name for what it is itself.
    """
    attention = model.config.get_text_config()._attn_implementation
    return {
        "weights": hash_weights(model, adapter),
        "config": hash_config(model, adapter),
        "compute_dtype": str(model.dtype).removeprefix("torch.") + _describe_autocast(arithmetic),
        "attention": own_implementation(attention),  # packing registers a name of its own in its place
    }


def _describe_autocast(arithmetic: str) -> str:
    return "" if arithmetic == "no" else f" in {arithmetic}"


def hash_model_files(folder: str | Path) -> str | None:
    """Hash of a model's files in a local folder, without loading it; None where that is not all the model is.

    A folder with an adapter refers to a base model elsewhere, and one without safetensors may hold anything.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not weights or not (folder / "config.json").is_file() or (folder / "adapter_config.json").exists():
        return None
    named = [(path.name, path) for path in [folder / "config.json", *weights]]
    return f"files:{hash_files(named)}"


def hash_weights(model: Any, adapter: str = "ref") -> str:
    """Hash of the parameters with which a model is the reference.

    Under ZeRO-3 and FSDP2 each process holds a part of each parameter: then all processes must call this.

    Args:
        model: not wrapped. A PEFT model stands for its base, with the adapter of this name if it has one.
        adapter: its name.
    """
    total = hashlib.sha256()
    for name, tensor in _reference_tensors(model, adapter):
        with _gathered(tensor) as full:
            total.update(f"{name} {full.dtype} {list(full.shape)}\n".encode())
            total.update(full.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"tensors:{total.hexdigest()}"


def hash_config(model: Any, adapter: str = "ref") -> str:
    """Hash of a model's config, and of that adapter's if it has it, without what has no influence on log-probs."""
    parts = [_plain(model.config.to_dict())]
    if is_peft_model(model) and adapter in model.peft_config:
        settings = model.peft_config[adapter].to_dict()
        parts.append({k: v for k, v in settings.items() if k not in ("base_model_name_or_path", "inference_mode")})
    return hash_json(parts, default=_stable)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    kept = {str(k): v for k, v in config.items() if k not in _NOT_ABOUT_VALUES and not str(k).startswith("_")}
    return {k: _plain(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _stable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else str(value)


def _reference_tensors(model: Any, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by name, sorted; names are those of the base model without adapters."""
    adapters = set(model.peft_config) if is_peft_model(model) else set()
    base = model.get_base_model() if adapters else model
    saved = set(base.state_dict()) if any(True for _ in base.buffers()) else set()
    tensors = dict(base.named_parameters()) | {n: b for n, b in base.named_buffers() if n in saved}
    found = {}
    for name, tensor in tensors.items():
        if not adapters & set(name.split(".")):
            found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    if adapter in adapters:
        found |= {f"{adapter}/{name}": p for name, p in model.named_parameters() if adapter in name.split(".")}
    yield from sorted(found.items())


@contextmanager
def _gathered(tensor: Tensor) -> Iterator[Tensor]:
    """A parameter with all its elements, of which this process may hold a part; all processes must enter."""
    if hasattr(tensor, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
