"""Lengths of a pair: in words, or in tokens as TRL's trainer counts them."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.end_tokens import ResponseEnds, end_token_ids
from ..data.issues import RowIssue
from ..data.layouts import Pair, visible_text
from ..data.tokenize import PairTokenizer, TokenisedPair, count_shared_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The numbers of a pair besides its hashes: lengths of prompt, chosen and rejected; position of the last end token of
# the two responses, -1 for none; how many tokens the two responses share at the start and at the end.
Measure = tuple[int, int, int, int, int, int, int]


class WordCounter:
    """Counts whitespace words, without template and end token."""

    unit = "words"
    about: dict[str, Any] = {}

    def measure(self, pairs: Sequence[Pair], extras: Sequence[dict[str, Any]]) -> list[Measure | RowIssue]:
        """Measure each pair; in words, end tokens and shared tokens are unknown."""
        lengths = ([len(visible_text(part).split()) for part in pair] for pair in pairs)
        return [(prompt, chosen, rejected, -1, -1, 0, 0) for prompt, chosen, rejected in lengths]


class TokenCounter:
    """Counts the tokens that `sampo.data.tokenize` makes of a pair.

    Args:
        tokenizer: of the model that is to be trained.
        name: of the tokenizer.
    """

    unit = "tokens"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str):
        self.tokenizer: Any = tokenizer
        self.pair_tokenizer = PairTokenizer(tokenizer)
        self.template = self.pair_tokenizer.template
        self.ends = ResponseEnds(tokenizer, end_token_ids(tokenizer))
        self.texts = self.merged = 0  # pairs of text, and those whose tokens merge where the response begins
        self.about = {"tokenizer": name, "tokenizer_hash": self._hash()}

    def _hash(self) -> str | None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        return hashlib.sha256(f"{backend.to_str()}\n{self.tokenizer.chat_template}".encode()).hexdigest()[:16]

    def measure(self, pairs: Sequence[Pair], extras: Sequence[dict[str, Any]]) -> list[Measure | RowIssue]:
        """Measure each pair, or find its issue.

        Args:
            pairs: good pairs, all of texts or all of messages.
            extras: values of each row in the columns `tools` and `chat_template_kwargs`.
        """
        tokenised = self.pair_tokenizer.tokenize(pairs, extras)
        if pairs and isinstance(pairs[0][0], str):
            self.texts += len(pairs)
            self.merged += sum(pair.is_merged for pair in tokenised if isinstance(pair, TokenisedPair))
        return [self._measure(pair) if isinstance(pair, TokenisedPair) else pair for pair in tokenised]

    def _measure(self, pair: TokenisedPair) -> Measure:
        chosen, rejected = pair.chosen, pair.rejected
        return (
            *(len(pair.prompt), len(chosen), len(rejected), self.ends.find(chosen), self.ends.find(rejected)),
            *(count_shared_start(chosen, rejected), count_shared_start(chosen[::-1], rejected[::-1])),
        )
