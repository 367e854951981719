"""Pairs as TRL tokenises them, and what to know about the place where prompt and response meet.

The response begins where the tokens of prompt and response together leave those of the prompt alone. In text that can
be inside the prompt's last word, for tokenizers merge letters; a template can render a prompt alone in another way.
"""

import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .lengths import TokenCounts, kept_ids
from .repeated_prompts import is_rendered

if TYPE_CHECKING:
    from datasets import Dataset

_TRL = logging.getLogger("trl.trainer.dpo_trainer")
_NOT_A_PREFIX = "The tokenized prompt is not a prefix"


class _KeepBack(logging.Filter):
    """Keeps TRL's warning back, which comes once for each ending of a prompt; we give the share of the pairs."""

    def filter(self, record: logging.LogRecord) -> bool:
        return _NOT_A_PREFIX not in str(record.msg)


def prepare(trl_prepares: Callable[[], Any], tokenizer: Any) -> tuple[Any, str | None]:
    """TRL's tokenised pairs, and what is to be said of them in place of its warning.

    Args:
        trl_prepares: `DPOTrainer._prepare_dataset`, with its arguments.
        tokenizer: of the policy.
    """
    from datasets import Dataset

    keep_back = _KeepBack()
    _TRL.addFilter(keep_back)
    try:
        prepared = trl_prepares()
    finally:
        _TRL.removeFilter(keep_back)
    if not isinstance(prepared, Dataset) or not len(prepared) or "prompt" not in prepared.column_names:
        return prepared, None
    merged = count_merged(prepared, tokenizer)
    first = prepared[0]["prompt"]
    if not isinstance(first, str):
        return prepared, note_of_messages(merged, len(prepared))
    has_template = bool(getattr(tokenizer, "chat_template", None)) and not is_rendered(first)
    return prepared, note_of_text(merged, len(prepared), has_template=has_template)


def count_merged(prepared: "Dataset", tokenizer: Any) -> int:
    """Pairs whose prompt alone has tokens that it has not in front of the responses."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    names = [n for n in ("prompt", "prompt_ids", "tools", "chat_template_kwargs") if n in prepared.column_names]
    merged = 0
    for batch in prepared.select_columns(names).with_format(None).iter(batch_size=1000):
        if isinstance(batch["prompt"][0], str):
            alone = tokenizer(batch["prompt"], return_attention_mask=False)["input_ids"]
        else:
            none = [None] * len(batch["prompt"])
            extras = zip(batch.get("tools", none), batch.get("chat_template_kwargs", none), strict=True)
            alone = [_prompt_ids(tokenizer, p, *extra) for p, extra in zip(batch["prompt"], extras, strict=True)]
        merged += sum(len(a) > len(ids) for a, ids in zip(alone, batch["prompt_ids"], strict=True))
    return merged


def _prompt_ids(tokenizer: Any, prompt: list[dict], tools: Any, options: dict[str, Any] | None) -> list[int]:
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(options or {})}
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows_with_other_ends(
    prepared: "Dataset", counts: TokenCounts, max_length: int | None, truncation_mode: str = "keep_start"
) -> list[int]:
    """Fingerprints of the rows that truncation has left the ends of other turns alone, as the collator makes them.

    A batch does not say which turn an end token ends; of these rows none is the response's own.
    """
    import torch

    from ..weighting import fingerprints

    rows = []
    for row, column in counts.other_ends:
        pair = prepared.with_format(None)[row]
        ids = torch.tensor([kept_ids(pair["prompt_ids"] + pair[column], max_length, truncation_mode)])
        rows.append(int(fingerprints(ids, torch.ones_like(ids))))
    return rows


def note_of_text(merged: int, pairs: int, *, has_template: bool) -> str | None:
    """What to know about pairs of text, or None."""
    parts = []
    if has_template:
        parts.append(
            "the pairs are text and the tokenizer has a chat template; text is trained on as it stands, without it. "
            "For a chat model set `text_as_messages: true`, which makes a user's and an assistant's message of each "
            "prompt and response."
        )
    if merged:
        parts.append(
            f"in {merged:,} of {pairs:,} pairs ({100 * merged / pairs:.1f} %) the last token of the prompt merges "
            "with the beginning of a response, so the model is trained on another context than it sees when it "
            "answers. Begin each response with a space or a line break, or set `text_as_messages: true`."
        )
    return " ".join(part[0].upper() + part[1:] for part in parts) or None


def note_of_messages(merged: int, pairs: int) -> str | None:
    """What to know about a template that renders a prompt alone in another way, or None."""
    if not merged:
        return None
    return (
        f"In {merged:,} of {pairs:,} pairs ({100 * merged / pairs:.1f} %) the chat template renders the prompt alone "
        "in another way than in front of a response; the response begins where the two part, so the model is trained "
        "on another context than it sees when it answers. Take a template that renders both alike (`chat_template`)."
    )
