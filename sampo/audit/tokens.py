"""Lengths of a pair: in words, or in the tokens that TRL's trainer makes of it."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.chat import ChatTemplate, NotRendered
from ..data.end_tokens import ResponseEnds, end_token_ids
from ..data.issues import RowIssue
from ..data.layouts import Pair, visible_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is known of a pair besides its hashes: lengths of prompt, chosen and rejected; place of the last end token of
# the two sides, -1 for none; how many tokens the two sides share at the start and at the end.
Measure = tuple[int, int, int, int, int, int, int]


class WordCounter:
    """Whitespace words, without template and end token."""

    unit = "words"
    about: dict[str, Any] = {}

    def measure(self, pairs: Sequence[Pair], extras: Sequence[dict[str, Any]]) -> list[Measure | RowIssue]:
        """Lengths of each pair; places and shares are not known of words."""
        return [self._one(*(len(visible_text(part).split()) for part in pair)) for pair in pairs]

    def _one(self, prompt: int, chosen: int, rejected: int) -> Measure:
        return prompt, chosen, rejected, -1, -1, 0, 0


class TokenCounter:
    """Completion tokens as TRL 1.16's `DPOTrainer` makes them, pinned by a test.

    Messages go through the chat template, texts get the EOS token. The completion begins where the tokens of prompt
    and completion together leave those of the prompt alone.

    Args:
        tokenizer: of the model that is to be trained.
        name: of the tokenizer.
    """

    unit = "tokens"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str):
        self.tokenizer: Any = tokenizer
        self.ends = ResponseEnds(tokenizer, end_token_ids(tokenizer))
        self.template = ChatTemplate(tokenizer)
        self.texts = self.merged = 0  # pairs of text, and those whose tokens merge where the response begins
        self.about = {"tokenizer": name, "tokenizer_hash": self._hash()}

    def _hash(self) -> str | None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        return hashlib.sha256(f"{backend.to_str()}\n{self.tokenizer.chat_template}".encode()).hexdigest()[:16]

    def measure(self, pairs: Sequence[Pair], extras: Sequence[dict[str, Any]]) -> list[Measure | RowIssue]:
        """Lengths, end tokens and shared tokens of each pair, or its fault.

        Args:
            pairs: good pairs, all of texts or all of messages.
            extras: what each row has in the columns `tools` and `chat_template_kwargs`.
        """
        rendered = [self._render(pair, extra) for pair, extra in zip(pairs, extras, strict=True)]
        texts = [text for three in rendered if len(three) == 3 for text in three]
        ids = iter(self._encode(texts, messages=bool(pairs) and isinstance(pairs[0][0], list)))
        return [
            three if len(three) == 2 else self._one(next(ids), next(ids), next(ids), is_text=isinstance(pair[0], str))
            for pair, three in zip(pairs, rendered, strict=True)
        ]

    def _encode(self, texts: list[str], *, messages: bool) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=not messages, return_attention_mask=False, padding=False, verbose=False
        )["input_ids"]

    def _render(self, pair: Pair, extra: dict[str, Any]) -> tuple[str, str, str] | RowIssue:
        """The prompt alone, and the prompt with each side; or what the template does wrong."""
        prompt, *sides = pair
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token
            if eos is None:
                raise ValueError("`tokenizer` must have an EOS token, which ends every completion, got one without.")
            chosen, rejected = (prompt + (side if side.endswith(eos) else side + eos) for side in sides)
            return prompt, chosen, rejected
        if not self.tokenizer.chat_template:
            raise ValueError(
                "`tokenizer` must have a chat template for data of messages, got one without. Name the tokenizer of a "
                "chat model, or leave `tokenizer` out to count words."
            )
        try:
            texts = self.template.texts(pair, extra)
        except NotRendered as error:
            self.template.reasons.setdefault("not_rendered", str(error))
            return "not_rendered", ""
        return self.template.find_issue_in_texts(pair, texts) or texts

    def _one(self, alone: list[int], chosen: list[int], rejected: list[int], *, is_text: bool) -> Measure | RowIssue:
        prompt = min(_shared_start(alone, chosen), _shared_start(alone, rejected))
        self.texts += is_text
        self.merged += is_text and prompt < len(alone)
        chosen, rejected = chosen[prompt:], rejected[prompt:]
        for column, side in (("chosen", chosen), ("rejected", rejected)):
            if not side:
                return "no_tokens", column
        return (
            *(prompt, len(chosen), len(rejected), self.ends.place(chosen), self.ends.place(rejected)),
            *(_shared_start(chosen, rejected), _shared_start(chosen[::-1], rejected[::-1])),
        )


def _shared_start(a: list[int], b: list[int]) -> int:
    """How many elements two lists share at their start, by bisection: comparing slices is fast."""
    low, high = 0, min(len(a), len(b)) + 1  # the first `low` are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low
