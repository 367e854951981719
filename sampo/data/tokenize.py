"""Pairs as TRL tokenises them, and how prompt and response meet in tokens.

The response begins where the tokens of prompt and response together leave those of the prompt alone. In text that can
be inside the prompt's last word, because tokenizers merge letters; a template can render a prompt alone differently.

A `datasets.Dataset` is tokenised by TRL itself: `tokenize_by_trl` for a trainer, `tokenize_pairs` without one. The
audit streams its rows and keeps a few numbers of each pair; TRL's `map` would write all tokens to disk and import
torch. It uses [`PairTokenizer`], which repeats TRL's rule for a few pairs at a time (tests/data/test_tokenize.py
compares the two).
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from .chat import ChatTemplate, NotRendered, join_blocks_for_template
from .issues import RowIssue
from .layouts import Pair
from .lengths import TokenCounts, kept_ids
from .repeated_prompts import is_rendered

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TRL = logging.getLogger("trl.trainer.dpo_trainer")
_NOT_A_PREFIX = "The tokenized prompt is not a prefix"


# --- data sets, by TRL -----------------------------------------------------------------------------------------------


def tokenize_by_trl(
    prepare_dataset: Callable[..., Any], dataset: Any, tokenizer: Any, args: Any, name: str
) -> tuple[Any, str | None]:
    """Tokenise pairs by TRL, with content blocks as strings where the template takes no blocks.

    Args:
        prepare_dataset: the bound method `DPOTrainer._prepare_dataset`.
        dataset: with `prompt`, `chosen` and `rejected`, or a stream of such rows.
        tokenizer: of the policy.
        args: of the trainer.
        name: of the data set in log lines and progress bars.

    Returns:
        TRL's data set with `prompt_ids`, `chosen_ids` and `rejected_ids`, and a note to log in place of TRL's warning
        that a prompt is not a prefix, or None.
    """
    from datasets import Dataset

    dataset = join_blocks_for_template(dataset, tokenizer, f"{name} data")
    hide = _HideWarning()
    _TRL.addFilter(hide)
    try:
        prepared = prepare_dataset(dataset, tokenizer, args, name)
    finally:
        _TRL.removeFilter(hide)
    if not isinstance(prepared, Dataset) or not len(prepared) or "prompt" not in prepared.column_names:
        return prepared, None
    merged = count_merged(prepared, tokenizer)
    first = prepared[0]["prompt"]
    if not isinstance(first, str):
        return prepared, note_of_messages(merged, len(prepared))
    has_template = bool(getattr(tokenizer, "chat_template", None)) and not is_rendered(first)
    return prepared, note_of_text(merged, len(prepared), has_template=has_template)


def tokenize_pairs(
    dataset: "Dataset",
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    name: str = "diagnosed",
) -> "Dataset":
    """Tokenise pairs as the trainer does, without a trainer.

    Args:
        dataset: with `prompt`, `chosen` and `rejected`; other columns stay.
        tokenizer: the policy's.
        max_length: tokens of prompt and response together, or None. A pair whose prompt alone fills it is dropped.
        truncation_mode: which end is cut.
        name: of the data set in log lines and progress bars.

    Returns:
        The data set with `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Raises:
        ValueError: a pair has a response of no tokens.
    """
    from trl import DPOTrainer

    # The one stand-in for a trainer: TRL's method asks its `self` for `_tokenizer` alone.
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=truncation_mode)
    prepare_dataset = partial(DPOTrainer._prepare_dataset, trainer)
    prepared, note = tokenize_by_trl(prepare_dataset, dataset, tokenizer, args, name)
    if note is not None:
        logger.warning("%s", note)
    responses = prepared.select_columns(["chosen_ids", "rejected_ids"])
    empty = [row for row, ids in enumerate(responses) if not all(ids.values())]
    if empty:
        raise ValueError(
            f"Each response must have at least one token, got {len(empty)} pairs without, first at rows {empty[:10]}. "
            "Remove them."
        )
    return prepared


class _HideWarning(logging.Filter):
    """Hides TRL's warning, which comes once for each ending of a prompt; we give the share of the pairs."""

    def filter(self, record: logging.LogRecord) -> bool:
        return _NOT_A_PREFIX not in str(record.msg)


def count_merged(prepared: "Dataset", tokenizer: Any) -> int:
    """Count the pairs whose prompt alone has tokens that it does not have before the responses."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    template = ChatTemplate(tokenizer)
    names = [n for n in ("prompt", "prompt_ids", "tools", "chat_template_kwargs") if n in prepared.column_names]
    merged = 0
    for batch in prepared.select_columns(names).with_format(None).iter(batch_size=1000):
        prompts = batch["prompt"]
        is_text = isinstance(prompts[0], str)
        if not is_text:
            extras = [{n: batch[n][i] for n in names[2:]} for i in range(len(prompts))]
            prompts = [template.render_prompt(p, extra) for p, extra in zip(prompts, extras, strict=True)]
        alone = encode(tokenizer, prompts, add_special_tokens=is_text)
        merged += sum(len(a) > len(ids) for a, ids in zip(alone, batch["prompt_ids"], strict=True))
    return merged


def rows_with_other_ends(
    prepared: "Dataset", counts: TokenCounts, max_length: int | None, truncation_mode: str = "keep_start"
) -> list[int]:
    """Return fingerprints of the rows, as the collator makes them, that keep the end tokens of other turns alone.

    A batch does not show which turn an end token ends; in these rows none is the response's own.
    """
    import torch

    from ..weighting import fingerprints

    rows = []
    for row, column in counts.other_ends:
        pair = prepared.with_format(None)[row]
        ids = torch.tensor([kept_ids(pair["prompt_ids"] + pair[column], max_length, truncation_mode)])
        rows.append(int(fingerprints(ids, torch.ones_like(ids))))
    return rows


# --- pairs of a stream, by the same rule -----------------------------------------------------------------------------


class TokenisedPair(NamedTuple):
    """Token ids of a pair.

    Attributes:
        prompt: what both rendered responses begin with of the prompt.
        chosen: the rest of the chosen one.
        rejected: the rest of the rejected one.
        is_merged: whether the prompt alone has tokens that it does not have before the responses.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    is_merged: bool


class PairTokenizer:
    """Tokenises a few pairs at a time, as TRL 1.16's `DPOTrainer` does.

    Messages go through the chat template, texts get the EOS token.

    Args:
        tokenizer: of the model that is to be trained.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer: Any = tokenizer
        self.template = ChatTemplate(tokenizer)

    def tokenize(self, pairs: Sequence[Pair], extras: Sequence[dict[str, Any]]) -> list[TokenisedPair | RowIssue]:
        """Tokenise each pair, or find its issue.

        Args:
            pairs: good pairs, all of texts or all of messages.
            extras: what each row has in the columns `tools` and `chat_template_kwargs`.
        """
        rendered = [self._render(pair, extra) for pair, extra in zip(pairs, extras, strict=True)]
        texts = [text for three in rendered if len(three) == 3 for text in three]
        is_text = bool(pairs) and isinstance(pairs[0][0], str)
        ids = iter(encode(self.tokenizer, texts, add_special_tokens=is_text) if texts else ())
        return [each if len(each) == 2 else _split(next(ids), next(ids), next(ids)) for each in rendered]

    def _render(self, pair: Pair, extra: dict[str, Any]) -> tuple[str, str, str] | RowIssue:
        """Return the prompt alone and the prompt with each response, or what the template does wrong."""
        prompt, *responses = pair
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token
            if eos is None:
                raise ValueError("`tokenizer` must have an EOS token, which ends every completion, got one without.")
            chosen, rejected = (prompt + (text if text.endswith(eos) else text + eos) for text in responses)
            return prompt, chosen, rejected
        if not self.tokenizer.chat_template:
            raise ValueError(
                "`tokenizer` must have a chat template for data of messages, got one without. Name the tokenizer of a "
                "chat model, or leave `tokenizer` out to count words."
            )
        try:
            texts = self.template.render_pair(pair, extra)
        except NotRendered as error:
            self.template.reasons.setdefault("not_rendered", str(error))
            return "not_rendered", ""
        return self.template.find_issue_in_texts(pair, texts) or texts


def _split(alone: list[int], chosen: list[int], rejected: list[int]) -> TokenisedPair | RowIssue:
    """Split the tokens of prompt and response where TRL does."""
    prompt = min(count_shared_start(alone, chosen), count_shared_start(alone, rejected))
    for column, ids in (("chosen", chosen), ("rejected", rejected)):
        if len(ids) == prompt:
            return "no_tokens", column
    return TokenisedPair(chosen[:prompt], chosen[prompt:], rejected[prompt:], prompt < len(alone))


def encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Return the token ids of texts; a rendered conversation has its special tokens already."""
    options = {"return_attention_mask": False, "padding": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]


def count_shared_start(a: list[int], b: list[int]) -> int:
    """Count the elements that two lists share at their start, by bisection: comparing slices is fast."""
    low, high = 0, min(len(a), len(b)) + 1  # the first `low` are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


# --- notes -----------------------------------------------------------------------------------------------------------


def note_of_text(merged: int, pairs: int, *, has_template: bool) -> str | None:
    """Describe what to know about pairs of text, if anything."""
    parts = []
    if has_template:
        parts.append(
            "the pairs are text and the tokenizer has a chat template; text is trained on as it stands, without it. "
            "For a chat model set `text_as_messages: true`, which makes a user and an assistant message of each "
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
    """Describe how a template renders a prompt alone, if it does so in another way than before a response."""
    if not merged:
        return None
    return (
        f"In {merged:,} of {pairs:,} pairs ({100 * merged / pairs:.1f} %) the chat template renders the prompt alone "
        "in another way than before a response. The response begins where the two differ, so the model is trained "
        "on another context than it sees when it answers. Use a template that renders both the same way "
        "(`chat_template`)."
    )
