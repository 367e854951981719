"""Merge an adapter into its base, with a check of what that changes.

A merge is checked in float32: log-probs of some texts from base + adapter, and from the merged weights as they were
saved. So the difference is what saving in `dtype` has rounded away, without the rounding of a forward pass in bf16.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import new_folder
from ..models.checks import differing_tokens
from ..models.load import add_adapter, base_of, check_model, create_model, opening, refuse_weights_not_finite

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import BitsAndBytesConfig, PreTrainedModel

logger = logging.getLogger(__name__)

REPORT = "sampo_merge.json"  # the report, in the folder of the merged weights
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Largest change of a token's log-prob that a merge may make, in nats. In float32 only the order of sums differs; the
# others round each weight to 8 or 11 bits, as does loading the model in that type (docs/lora.md has measurements).
BOUNDS = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody asks the dog what it thinks of that.",
    "Question: What is 17 times 23? Answer: 17 times 20 is 340, 17 times 3 is 51, so it is 391.",
    "def mean(values):\n    if not values:\n        raise ValueError('none')\n    return sum(values) / len(values)\n",
    "Human: Can you recommend a short book about the sea?\n\nAssistant: Yes: The Old Man and the Sea, by Hemingway.",
    "La nuit, tous les chats sont gris. Nachts sind alle Katzen grau. By night all cats are grey.",
)


@dataclass(frozen=True)
class Merge:
    """The report of a merge.

    Attributes:
        adapter: Folder or hub id of the adapter.
        base: Folder or hub id of the model that it was merged into.
        dtype: Type of the saved weights.
        quantized: How the base was quantised on loading, as when the adapter was trained; None if it was not.
        tokens: Number of tokens compared.
        adapter_effect_mean: Mean absolute change of a token's log-prob by the adapter, in nats.
        adapter_effect_max: The largest.
        difference_mean: Mean absolute change of a token's log-prob by the merge, in nats.
        difference_max: The largest.
        bound: What `difference_max` may be at most; None where it is only measured.
    """

    adapter: str
    base: str
    dtype: str
    quantized: str | None
    tokens: int
    adapter_effect_mean: float
    adapter_effect_max: float
    difference_mean: float
    difference_max: float
    bound: float | None

    def describe(self) -> str:
        """Describe the report in one line."""
        bound = "no bound" if self.bound is None else f"bound {self.bound:g}"
        return (
            f"{self.tokens} tokens compared: the adapter moves a log-prob by {self.adapter_effect_mean:.2g} nats on "
            f"average and {self.adapter_effect_max:.2g} at most, merging into {self.dtype} changes it by "
            f"{self.difference_mean:.2g} on average and {self.difference_max:.2g} at most ({bound})."
        )


def merge(
    adapter: str,
    out: str | Path,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    dtype: str = "auto",
    texts: Sequence[str] = TEXTS,
    quantization_config: "BitsAndBytesConfig | None" = None,
) -> Merge:
    """Merge an adapter into its base, check the result and save it as an ordinary model folder with its tokenizer.

    Everything is computed on the CPU in float32, 4 bytes a parameter. The folder is written atomically.

    Args:
        adapter: Folder or hub id of a PEFT adapter that can be merged (LoRA, DoRA, …).
        out: Folder to write; must not exist or be empty.
        base: Model to merge into, if not the one that the adapter names.
        base_revision: Its revision on the hub, if not the one that the adapter names.
        dtype: Type of the saved weights; `auto` is that of the base.
        texts: The log-probs of their tokens are compared.
        quantization_config: How the base was quantised on loading when the adapter was trained (QLoRA): the adapter
            is merged into these weights, dequantised.

    Raises:
        ValueError: the adapter cannot be merged, or `out` is in use.
        ArithmeticError: the log-probs of the merged weights differ from those of base + adapter; `out` is not written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {dtype!r}.")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"`out` must not exist or be an empty folder, got {out}. Choose another or remove it.")
    check_model(adapter, option="adapter", base=base)
    if os.path.isdir(adapter) and not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        raise ValueError(
            f"`adapter` must be a folder with an adapter, got {adapter}, which holds a complete model. There is "
            "nothing to merge."
        )
    named, revision = base_of(adapter)
    if base is not None and base != named:
        logger.info("The adapter names %s as its base; it is merged into %s, as requested.", named, base)
        revision = None
    revision = base_revision or revision
    with new_folder(out) as aside:
        report = _merge_into(aside, adapter, base or named, revision, dtype, texts, quantization_config)
        _check_report(report)
        (aside / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _check_report(report: Merge) -> None:
    if report.bound is None:
        logger.warning("Weights were rounded to a few bits, in this merge or before it. %s", report.describe())
    elif not report.difference_max <= report.bound:  # NaN too
        raise ArithmeticError(
            f"The merged model must give the log-probs of base and adapter together, got: {report.describe()} Nothing "
            "was written. Check that no adapted layer shares its weights with another, as tied embeddings do; for "
            "`bfloat16`, try `float32`."
        )
    elif report.dtype != "float32" and report.difference_mean > 0.1 * report.adapter_effect_mean:
        logger.warning(
            "What rounding to %s changes is %.0f %% of what the adapter changes. `float32` keeps all of the adapter.",
            *(report.dtype, 100 * report.difference_mean / max(report.adapter_effect_mean, 1e-30)),
        )


def token_logps(model: "PreTrainedModel | PeftModel", tokenizer: Any, texts: Sequence[str]) -> "Tensor":
    """Log-probs in nats of each token but the first; `(tokens,)` float32.

    A row of tokens drawn from the entire vocabulary is added to the texts.
    """
    import torch

    from ..scoring.scorer import ModelScorer, Rows

    drawn = torch.randint(len(tokenizer), (64,), generator=torch.Generator().manual_seed(0))
    score = ModelScorer(model, own_head=True)  # an adapter may be on the head
    found = []
    for ids in [*(tokenizer(text)["input_ids"] for text in texts), drawn.tolist()]:
        (logps,) = score(Rows.of([(ids[:1], ids[1:])]).inputs)  # (1, L-1)
        found.append(logps[0].cpu())
    return torch.cat(found)


def _merge_into(
    folder: Path,
    adapter: str,
    base: str,
    revision: str | None,
    dtype: str,
    texts: Sequence[str],
    quantization: Any,
) -> Merge:
    """Merge, save in `folder`, load what was saved, compare."""
    processor = _processor(adapter, base, revision)
    tokenizer = getattr(processor, "tokenizer", processor)
    _refuse_another_vocabulary(_trained_with(adapter, base, tokenizer), base, revision)
    model = _with_adapter(_load_float32(base, revision, quantization), adapter)
    refuse_weights_not_finite(model.named_parameters(), f"{base} with {adapter}")
    stays_quantized = quantization is None and bool(getattr(model.config, "quantization_config", None))
    with model.disable_adapter():
        plain = token_logps(model, tokenizer, texts)
    adapted = token_logps(model, tokenizer, texts)
    saved_in = "quantised weights" if stays_quantized else _save_merged(model, folder, dtype, base, revision)
    if stays_quantized:
        model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)
    del model  # at any time one copy of the weights

    effect = (adapted - plain).abs()
    difference = (adapted - token_logps(_load_float32(str(folder)), tokenizer, texts)).abs()
    return Merge(
        adapter=str(adapter),
        base=base,
        dtype=saved_in,
        quantized=None if quantization is None else _describe_quantization(quantization),
        tokens=len(effect),
        adapter_effect_mean=effect.mean().item(),
        adapter_effect_max=effect.max().item(),
        difference_mean=difference.mean().item(),
        difference_max=difference.max().item(),
        bound=None if stays_quantized else BOUNDS[saved_in],
    )


def _trained_with(adapter: str, base: str, tokenizer: Any) -> Any:
    """The tokenizer of the training: that of the adapter, or else that of its base model."""
    from transformers import AutoTokenizer

    named, revision = base_of(adapter)
    if base == named or _holds_tokenizer(adapter):
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(named, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError):
        logger.warning("The tokenizer of %s, the base that the adapter names, is not there to be compared.", named)
        return tokenizer


def _holds_tokenizer(adapter: str) -> bool:
    return not os.path.isdir(adapter) or os.path.isfile(os.path.join(adapter, "tokenizer_config.json"))


def _refuse_another_vocabulary(tokenizer: Any, base: str, revision: str | None) -> None:
    """Raise if the tokenizer of the adapter is not that of the base: token ids must keep their meaning."""
    from transformers import AutoConfig, AutoTokenizer

    with opening(base, "base"):
        rows = (
            AutoConfig.from_pretrained(base, revision=revision or "main", trust_remote_code=False)
            .get_text_config()
            .vocab_size
        )
    if max(tokenizer.get_vocab().values()) >= rows:
        raise ValueError(
            f"The base must have the vocabulary that the adapter was trained with, got {base} with {rows:,} rows of "
            f"embeddings for token numbers up to {max(tokenizer.get_vocab().values()):,}. Name the right `base`."
        )
    try:
        theirs = AutoTokenizer.from_pretrained(base, revision=revision or "main", trust_remote_code=False).get_vocab()
    except (OSError, ValueError):  # a base without a tokenizer of its own
        return
    if differing := differing_tokens(tokenizer.get_vocab(), theirs):
        raise ValueError(
            f"The base must have the vocabulary that the adapter was trained with, got {base} with {differing}. Name "
            "the right `base`."
        )


def _describe_quantization(quantization: "BitsAndBytesConfig") -> str:
    if quantization.load_in_8bit:
        return "8bit"
    return f"4bit {quantization.bnb_4bit_quant_type}{' nested' if quantization.bnb_4bit_use_double_quant else ''}"


def _save_merged(model: "PeftModel", folder: Path, dtype: str, base: str, revision: str | None) -> str:
    """Merge and save in `dtype`; returns its name."""
    import torch
    from transformers import AutoConfig

    if dtype == "auto":
        stored = AutoConfig.from_pretrained(base, revision=revision).dtype or torch.float32
        dtype = str(stored).removeprefix("torch.")
        dtype = dtype if dtype in BOUNDS else "float32"
    merged = model.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    merged.config.dtype = getattr(torch, dtype)
    merged.save_pretrained(folder)
    return dtype


def _load_float32(name: str, revision: str | None = None, quantization: Any = None) -> "PreTrainedModel":
    """The model in float32 on the CPU; if asked for with the weights that quantising leaves of it."""
    options: dict[str, Any] = {"dtype": "float32", "device_map": {"": "cpu"}, "revision": revision or "main"}
    if quantization is None:
        return create_model(name, option="base", **options).eval()
    # the products with quantised weights round on their own, by device and kernel
    return create_model(name, option="base", quantization_config=quantization, **options).dequantize().eval()


def _with_adapter(model: "PreTrainedModel", adapter: str) -> "PeftModel":
    adapted = add_adapter(model, adapter)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type
        raise ValueError(f"`adapter` must be of a kind that can be merged, as LoRA, got {kind} in {adapter}.")
    return adapted.eval()


def _processor(adapter: str, base: str, revision: str | None) -> Any:
    """The tokenizer (or processor) that lies with the adapter, else that of its base."""
    from transformers import AutoProcessor

    name, revision = (adapter, None) if _holds_tokenizer(adapter) else (base, revision)
    with opening(name, "tokenizer of the merged model"):
        return AutoProcessor.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
