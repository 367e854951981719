"""Which tokens end a response, and which of them ends this one."""

from collections.abc import Sequence
from typing import Any

from .chat import NotRendered, render

_ANSWER = "An answer."


def end_token_ids(tokenizer, generation_config=None) -> list[int]:
    """EOS first, then whatever else ends a turn: the model's other EOS ids, and the template's end of a turn."""
    eos = getattr(generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids += [token for token in _tokens_after_answer(tokenizer) if token in special]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _text_of_turn(tokenizer) -> str:
    """A question and an answer in the chat template; nothing where it is one for other roles, or there is none."""
    turn = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        return render(tokenizer, turn) if tokenizer.chat_template else ""
    except NotRendered:  # then EOS has to do
        return ""


def _tokens_after_answer(tokenizer) -> list[int]:
    """What the chat template puts behind an answer."""
    _, answer, after = _text_of_turn(tokenizer).rpartition(_ANSWER)
    return tokenizer(after, add_special_tokens=False)["input_ids"] if answer else []


class ResponseEnds:
    """Finds the end token of a response: its last one, if no words follow.

    A response of several turns holds the ends of other turns too. Behind its own end there is only what the template
    puts there, blanks and special tokens.

    Args:
        tokenizer: of the tokens.
        ids: the tokens that end a response (`end_token_ids`).
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int]):
        self.ids = frozenset(ids)
        self._tokenizer = tokenizer
        after = _tokens_after_answer(tokenizer)
        self.template_fails = _ANSWER not in _text_of_turn(tokenizer)
        self.template_ends_turns = bool(self.ids & set(after))
        self._follows: dict[int, bool] = dict.fromkeys([*after, *tokenizer.all_special_ids], True)

    def place(self, response: Sequence[int]) -> int:
        """Where the end token of a whole response stands, from 0; −1 for none."""
        for place in range(len(response) - 1, -1, -1):
            token = int(response[place])
            if token in self.ids:
                return place
            if token not in self._follows:
                self._follows[token] = not self._tokenizer.decode([token]).strip()
            if not self._follows[token]:
                return -1
        return -1

    def is_other_turns(self, response: Sequence[int], kept: slice) -> bool:
        """Whether all end tokens in the kept part of a response end other turns, and there is one."""
        place, part = self.place(response), range(len(response))[kept]
        return place not in part and any(int(response[i]) in self.ids for i in part)
