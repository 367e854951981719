"""Which tokens end a response, and which of them ends this one.

The end token of a response is its last EOS or end-of-turn token, if only blanks and special tokens follow. For lists
of ids [`ResponseEnds`] finds it. A batch of training has tensors and no tokenizer: `sampo.weighting.last_end_tokens`
is `last_end_position` for all rows at once, and rows whose end tokens all end other turns are taken out by their
fingerprints (`sampo.data.tokenize.rows_with_other_ends`).
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Literal

from .chat import NotRendered, render_messages

_ANSWER = "An answer."


def end_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """EOS first, then what else ends a turn: the model's other EOS ids, and the template's end-of-turn tokens."""
    eos = getattr(generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids += [token for token in _tokens_after_answer(tokenizer) if token in special]
    return list(dict.fromkeys(i for i in ids if i is not None))


def last_end_position(ids: Sequence[int], end_ids: Collection[int]) -> int:
    """Return the position of the last end token, from 0; −1 for none. Whatever may follow it."""
    return next((i for i in range(len(ids) - 1, -1, -1) if int(ids[i]) in end_ids), -1)


def most_common_end_token(dataset: Any, end_ids: Sequence[int]) -> int:
    """Return the token that ends most responses; EOS, the first of `end_ids`, where none ends one.

    A length pressure is defined for one token's logit. Where several tokens end responses (such as those of other
    templates), it is that of this one.

    Args:
        dataset: `datasets.Dataset` with `chosen_ids` and `rejected_ids`.
        end_ids: tokens that end a response.
    """
    counts: Counter[int] = Counter()
    known = frozenset(end_ids)
    for batch in dataset.select_columns(["chosen_ids", "rejected_ids"]).with_format(None).iter(batch_size=1000):
        for ids in (*batch["chosen_ids"], *batch["rejected_ids"]):
            if (position := last_end_position(ids, known)) >= 0:
                counts[ids[position]] += 1
    return max(counts, key=counts.__getitem__) if counts else end_ids[0]


def _render_turn(tokenizer: Any) -> str:
    """Render a question and an answer; empty where the template is for other roles, or there is none."""
    turn = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        return render_messages(tokenizer, turn) if tokenizer.chat_template else ""
    except NotRendered:  # then EOS has to do
        return ""


def _tokens_after_answer(tokenizer: Any) -> list[int]:
    """Return what the chat template puts after an answer."""
    _, answer, after = _render_turn(tokenizer).rpartition(_ANSWER)
    return tokenizer(after, add_special_tokens=False)["input_ids"] if answer else []


class ResponseEnds:
    """Finds the end token of a response: its last one, if no words follow.

    A response of several turns holds the ends of other turns too. After its own end there is only what the template
    puts there, blanks and special tokens.

    Args:
        tokenizer: of the tokens.
        ids: the tokens that end a response (`end_token_ids`).
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int]):
        self.ids = frozenset(ids)
        self._tokenizer = tokenizer
        after = _tokens_after_answer(tokenizer)
        self.template_fails = _ANSWER not in _render_turn(tokenizer)
        self.template_ends_turns = bool(self.ids & set(after))
        self._known: dict[int, bool] = dict.fromkeys([*after, *tokenizer.all_special_ids], True)

    def find(self, response: Sequence[int]) -> int:
        """Return the position of the end token of a complete response, from 0; −1 for none."""
        position = last_end_position(response, self.ids)
        if position < 0 or not all(map(self._can_come_after, response[position + 1 :])):
            return -1
        return position

    def classify(self, response: Sequence[int], kept: slice) -> Literal["own", "other", "none"]:
        """Find which end tokens the kept part of a response has: its own, only those of other turns, or none."""
        if self.find(response) in range(len(response))[kept]:
            return "own"
        return "none" if last_end_position(response[kept], self.ids) < 0 else "other"

    def _can_come_after(self, token: int) -> bool:
        """Whether a token may follow the end of a response."""
        token = int(token)
        if token not in self._known:
            self._known[token] = not self._tokenizer.decode([token]).strip()
        return self._known[token]
