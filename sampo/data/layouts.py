r"""One row of preference data: from its layout to a normalised pair, or to the list of its faults.

A pair is `prompt`, `chosen` and `rejected`. Rows come in one of six layouts, each with one reader in `READERS`:

| layout | columns | comes out as |
|---|---|---|
| `text` | `prompt`, `chosen`, `rejected` are strings | itself |
| `messages` | all three are lists of messages | itself |
| `shared_text` | `chosen`, `rejected` begin with the prompt (strings) | the shared beginning cut off, by TRL's rule |
| `shared_messages` | the same with lists of messages | the same |
| `transcripts` | `\n\nHuman: … \n\nAssistant: …` in `chosen` and `rejected` | messages |
| `text_beside_messages` | `prompt` is a string, the sides are messages | messages |
"""

import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .repeated_prompts import PROMPT_ROLES, repeated_messages

PAIR_COLUMNS = ("prompt", "chosen", "rejected")

EXTRA_COLUMNS = ("tools", "chat_template_kwargs")  # what TRL hands to the chat template

# What a message can consist of. An assistant that calls a tool need not say anything.
SPEAKING_KEYS = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

MAX_DEPTH = 32  # levels of lists and objects in one row: `datasets` fails at about 50, Parquet at 100

# Blanks, control characters, and what Unicode calls default ignorable (zero-width spaces and joiners, marks of byte
# order and of direction, soft hyphens, fillers, variation selectors, tags); the blank of Braille.
_INVISIBLE = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff]*"
)

DROP_CURE = "To leave them out, set `on_bad_rows: drop` (in Python `load_preferences(..., on_bad_rows='drop')`)"
# kind of fault -> (what is said after "12 of 2,312 pairs", the cure)
KINDS = {
    "bad_utf8": ("{are} not valid UTF-8", f"Save the file as UTF-8. {DROP_CURE}."),
    "broken_line": ("{are} no complete JSON", f"Mend the line, or fetch the file again. {DROP_CURE}."),
    "not_an_object": (
        "{are} valid JSON but no object",
        f'Each must look like {{"prompt": …, "chosen": …, "rejected": …}}. {DROP_CURE}.',
    ),
    "repeated_key": (
        "{have} a key twice in one object",
        f"Which of the two values is meant is not known: rename or remove one. {DROP_CURE}.",
    ),
    "too_deep": (
        f"{{are}} nested deeper than {MAX_DEPTH} levels",
        f"Store what is nested as JSON text. {DROP_CURE}.",
    ),
    "null": ("{have} no value (null) in `{column}`", f"Fill it in. {DROP_CURE}."),
    "nan": ("{have} NaN in `{column}`", f"An empty cell of a table is read as NaN; fill it in. {DROP_CURE}."),
    "wrong_type": (
        "{have} a `{column}` of the wrong type",
        "`prompt`, `chosen` and `rejected` must all be strings, or all lists of messages "
        f'{{"role": …, "content": …}}. {DROP_CURE}.',
    ),
    "empty": ("{have} an empty `{column}`", f"Fill it in. {DROP_CURE}."),
    "not_a_transcript": (
        "{have} a `{column}` that does not begin with `Human:`, while most rows do",
        f"Do not mix transcripts with other text. {DROP_CURE}.",
    ),
    "bad_roles": (
        "{have} bad roles in `{column}`",
        "After the system message, user and assistant must take turns, and a completion must end with the assistant. "
        f"{DROP_CURE}.",
    ),
    "prompt_role": (
        "{have} a `{column}` that begins with a system or user message",
        "A response must begin with the assistant: what comes before it belongs to `prompt`, for all of a response is "
        f"trained on. {DROP_CURE}.",
    ),
    "repeated_prompt": (
        "{have} the prompt again at the start of `{column}`",
        "A response must hold the answer alone, for all of it is trained on. Set `repeated_prompt: cut` (`repeated_"
        "prompt='cut'` of `load_preferences`) to cut the prompt there, and the role tags around it. "
        f"{DROP_CURE}.",
    ),
    "role_tags": (
        "{have} role tags of a chat template at the start of `{column}`",
        "The tags belong to the template, or to a `prompt` that is rendered already. Set `repeated_prompt: cut` "
        f"(`repeated_prompt='cut'` of `load_preferences`) to cut them. {DROP_CURE}.",
    ),
    "rendered_text": (
        "{have} role tags of a chat template around `{column}`",
        "With `text_as_messages` the template would be put around text that it has rendered before. Leave the option "
        f"out, or take the tags out of the text. {DROP_CURE}.",
    ),
    "not_text": (
        "{have} content in `{column}` that is no text",
        "Images, audio and the like need a column `images` and a model for them; here content must be a string or "
        f"blocks of type `text`. {DROP_CURE}.",
    ),
    "bad_kwargs": (
        "{have} no object of options in `{column}`",
        f"Each row must have one, with the same keys: fill them in, or remove the column. {DROP_CURE}.",
    ),
    "uneven_kwargs": (
        "{have} other keys in `{column}` than the first row",
        f"What is missing would reach the template as null: give each row the same keys. {DROP_CURE}.",
    ),
    "bad_tools": (
        "{have} `{column}` that are no list of JSON schemas",
        'Each must look like [{"type": "function", "function": {"name": …}}], or be the JSON text of such a list; '
        f"null is no tools. {DROP_CURE}.",
    ),
    "system_lost": (
        "{have} a system message that the tokenizer's chat template leaves out",
        "Take a template that shows system messages (`chat_template`), or put their text into the first user message. "
        f"{DROP_CURE}.",
    ),
    "message_lost": (
        "{have} a message in `{column}` that the tokenizer's chat template does not show",
        f"Take a template for this kind of content (`chat_template`). {DROP_CURE}.",
    ),
    "blocks_as_python": (
        "{have} content blocks in `{column}` that the tokenizer's chat template prints as Python",
        f"Write the content as strings, or take a template for blocks (`chat_template`). {DROP_CURE}.",
    ),
    "prompt_not_shared": (
        "{have} no shared beginning of `chosen` and `rejected` to serve as `prompt`",
        f"Without a `prompt` column both sides must begin with the same prompt. {DROP_CURE}.",
    ),
    "not_rendered": (
        "{are} refused by the tokenizer's chat template",
        f"Take a tokenizer whose template knows these roles and messages. {DROP_CURE}.",
    ),
    "no_tokens": ("{have} a `{column}` without a token", f"The tokenizer leaves nothing of the text. {DROP_CURE}."),
    "unknown_speaker": (
        "{have} a message of a speaker who is not known",
        "`from` must be human, gpt, system, observation or function_call; or write messages as "
        f'{{"role": …, "content": …}}. {DROP_CURE}.',
    ),
    "bad_call": (
        "{have} a call of a function that cannot be read",
        f'Its `value` must be JSON like {{"name": …, "arguments": {{…}}}}. {DROP_CURE}.',
    ),
    "bad_system": (
        "{have} a system message that cannot be put in front of the prompt",
        f"Correct the row, or leave the column out with `columns` system=. {DROP_CURE}.",
    ),
    "bad_input": (
        "{have} an input that cannot be added to the prompt",
        f"Correct the row, or leave the column out with `columns` input=. {DROP_CURE}.",
    ),
    "identical": (
        "{have} the same text in `chosen` and `rejected`",
        f"A pair without a difference teaches nothing. {DROP_CURE}.",
    ),
}


@dataclass(frozen=True)
class Fault:
    """One kind of fault in one column: the first `rows` that have it (counted from 0), and how many do in all."""

    kind: str
    column: str
    rows: list[int]
    count: int
    cure: str

    def in_words(self, total: int) -> str:
        """`12 of 2,312 pairs have an empty `rejected`, first at rows [81, 90, …]`, and the cure."""
        if self.kind not in KINDS:
            return self.cure
        what = f"{self.count:,} of {total:,} pairs {phrase(self.kind, self.column, self.count)}"
        where, more = ("first at rows", ", …") if self.count > len(self.rows) else ("at rows", "")
        return f"{what}, {where} [{', '.join(map(str, self.rows))}{more}]. {self.cure}"


def phrase(kind: str, column: str, count: int) -> str:
    """What is wrong with `count` pairs, after their number."""
    one = count == 1
    return KINDS[kind][0].format(column=column, have="has" if one else "have", are="is" if one else "are")


class PreferenceDataError(ValueError):
    """Preference data that cannot be trained on; `faults` lists everything that is wrong with it."""

    def __init__(self, message: str, faults: Iterable[Fault] = ()):
        super().__init__(message)
        self.faults = list(faults)


Faults = list[tuple[str, str]]  # (kind, column)
Pair = tuple[Any, Any, Any]  # prompt, chosen, rejected


def _read_text(prompt: Any, chosen: Any, rejected: Any) -> tuple[Pair, Faults]:
    faults = _cell_faults(_text_fault, prompt=prompt, chosen=chosen, rejected=rejected)
    if not faults and chosen == rejected:
        faults = [("identical", "rejected")]
    return (prompt, chosen, rejected), faults


def _read_shared_text(_: Any, chosen: Any, rejected: Any) -> tuple[Pair, Faults]:
    faults = _cell_faults(_text_fault, chosen=chosen, rejected=rejected)
    if faults or chosen == rejected:
        return (None, chosen, rejected), faults or [("identical", "rejected")]
    cut = _shared_length(chosen, rejected)
    if not chosen[:cut].strip():
        return (None, chosen, rejected), [("prompt_not_shared", "prompt")]
    return _read_text(chosen[:cut], chosen[cut:], rejected[cut:])


def _read_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[Pair, Faults]:
    faults = _cell_faults(_messages_fault, prompt=prompt, chosen=chosen, rejected=rejected)
    faulty = {column for _, column in faults}
    if "prompt" not in faulty:
        faults += [("bad_roles", "prompt")] if not _alternates(prompt) else []
        for column, side in (("chosen", chosen), ("rejected", rejected)):
            if column not in faulty and (kind := _completion_fault(prompt, side)):
                faults.append((kind, column))
    if not faults and chosen == rejected:
        faults = [("identical", "rejected")]
    return (prompt, chosen, rejected), faults


def _read_shared_messages(_: Any, chosen: Any, rejected: Any) -> tuple[Pair, Faults]:
    faults = _cell_faults(_messages_fault, chosen=chosen, rejected=rejected)
    if faults or chosen == rejected:
        return (None, chosen, rejected), faults or [("identical", "rejected")]
    # Arrow fills the keys that a message lacks with nulls, and the two columns need not have the same keys.
    cut = _shared_length([without_nulls(message) for message in chosen], [without_nulls(m) for m in rejected])
    if not cut:
        return (None, chosen, rejected), [("prompt_not_shared", "prompt")]
    return _read_messages(chosen[:cut], chosen[cut:], rejected[cut:])


def _read_text_beside_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[Pair, Faults]:
    """UltraFeedback's layout: the prompt as text, and whole conversations (or the answers alone) on the sides."""
    faults = _cell_faults(_text_fault, prompt=prompt) + _cell_faults(_messages_fault, chosen=chosen, rejected=rejected)
    if faults:
        return (prompt, chosen, rejected), faults
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        return _read_shared_messages(None, chosen, rejected)
    return _read_messages([{"role": "user", "content": prompt}], chosen, rejected)


_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _read_transcripts(_: Any, chosen: Any, rejected: Any) -> tuple[Pair, Faults]:
    r"""`\n\nHuman: … \n\nAssistant: …`: all before the last `Assistant:` is the prompt, and must be shared."""
    failed: Pair = (None, chosen, rejected)
    faults = _cell_faults(_text_fault, chosen=chosen, rejected=rejected)
    if faults:
        return failed, faults
    sides = {"chosen": _split_transcript(chosen), "rejected": _split_transcript(rejected)}
    for column, (prompt, completion) in sides.items():
        if prompt is None:
            faults.append(("not_a_transcript", column))
        elif completion is None:
            faults.append(("bad_roles", column))
        elif is_blank_text(completion):
            faults.append(("empty", column))
    if faults:
        return failed, faults
    prompt, completion = sides["chosen"]
    if prompt != sides["rejected"][0]:
        return failed, [("prompt_not_shared", "prompt")]
    turns = [] if not prompt else _messages_of_transcript(prompt)
    return _read_messages(
        turns,
        [{"role": "assistant", "content": completion}],
        [{"role": "assistant", "content": sides["rejected"][1]}],
    )


def count_turns(text: str) -> int:
    """How often a transcript names a speaker."""
    return len(_TURN.findall("\n\n" + text.lstrip()))


def _split_transcript(text: str) -> tuple[str | None, str | None]:
    """(text before the last turn, stripped text of the last turn); None for what is not there."""
    text = "\n\n" + text.lstrip()
    turns = list(_TURN.finditer(text))
    if not turns or turns[0].start() > 0:
        return None, None
    last = turns[-1]
    return text[: last.start()], text[last.end() :].strip() if last[1] == "Assistant" else None


def _messages_of_transcript(text: str) -> list[dict[str, str]]:
    """The turns of a transcript. Some rows name a speaker twice in a row: that is one turn of two paragraphs."""
    _, *parts = _TURN.split(text)
    turns = itertools.groupby(zip(parts[::2], parts[1::2], strict=True), key=lambda turn: turn[0])
    return [
        {"role": _ROLES[speaker], "content": "\n\n".join(content.strip() for _, content in said)}
        for speaker, said in turns
    ]


READERS: dict[str, Callable[[Any, Any, Any], tuple[Pair, Faults]]] = {
    "text": _read_text,
    "messages": _read_messages,
    "shared_text": _read_shared_text,
    "shared_messages": _read_shared_messages,
    "transcripts": _read_transcripts,
    "text_beside_messages": _read_text_beside_messages,
}


def fault_of_options(extra: dict[str, Any], first: dict[str, Any]) -> tuple[str, str] | None:
    """Kind and column of what TRL cannot hand to the chat template.

    Args:
        extra: values of those of `EXTRA_COLUMNS` that the data has.
        first: the same of the first row.
    """
    if not _are_tools(extra.get("tools")):
        return "bad_tools", "tools"
    if "chat_template_kwargs" in extra:
        options, others = extra["chat_template_kwargs"], first["chat_template_kwargs"]
        if not isinstance(options, dict):
            return "bad_kwargs", "chat_template_kwargs"
        if isinstance(others, dict) and without_nulls(options).keys() != without_nulls(others).keys():
            return "uneven_kwargs", "chat_template_kwargs"
    return None


def _are_tools(tools: Any) -> bool:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return False
    return tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))


def has_other_content(messages: Any) -> bool:
    """Whether a message holds blocks that are no text: images, say."""
    return isinstance(messages, list) and any(
        isinstance(message.get("content"), list) and not all(map(is_text_block, message["content"]))
        for message in messages
    )


def layout_of(columns: list[str], head: list[tuple]) -> str:
    """The layout of the data, by the majority of its first rows (`head`: prompt, chosen, rejected of each)."""
    sides = [side for row in head for side in row[1:]]
    messages = sum(isinstance(side, list) for side in sides)
    text = [side for side in sides if isinstance(side, str)]
    form = "messages" if messages > len(text) else "text"
    if "prompt" not in columns:
        begun = sum(_split_transcript(side)[0] is not None for side in text)
        return "transcripts" if form == "text" and 2 * begun > len(text) else f"shared_{form}"
    prompts = Counter(type(row[0]) for row in head)
    return "text_beside_messages" if form == "messages" and prompts[str] > prompts[list] else form


def _cell_faults(fault_of: Callable[[Any], str | None], **cells: Any) -> Faults:
    return [(kind, column) for column, value in cells.items() if (kind := fault_of(value)) is not None]


def _text_fault(value: Any) -> str | None:
    if isinstance(value, str):
        return "empty" if is_blank_text(value) else None
    return _no_value_fault(value)


def _messages_fault(value: Any) -> str | None:
    if not isinstance(value, list):
        return _no_value_fault(value)
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "wrong_type"
        if not isinstance(message.get("content"), str | list | None):
            return "wrong_type"
    return "empty" if all(map(_is_blank_message, value)) else None


def _completion_fault(prompt: list[dict], completion: list[dict]) -> str | None:
    if any(message["role"] == "assistant" and _is_blank_message(message) for message in completion):
        return "empty"
    if completion[0]["role"] in PROMPT_ROLES and completion[-1]["role"] == "assistant":
        return "repeated_prompt" if repeated_messages(prompt, completion) else "prompt_role"
    fine = _alternates(prompt[-1:] + completion) and completion[-1]["role"] == "assistant"
    return None if fine else "bad_roles"


def _no_value_fault(value: Any) -> str:
    if value is None:
        return "null"
    return "nan" if isinstance(value, float) and value != value else "wrong_type"


def _is_blank_message(message: dict) -> bool:
    """Nothing said, thought or called."""
    return all(_is_blank(message.get(key)) for key in SPEAKING_KEYS)


def is_blank_text(text: str) -> bool:
    """Whether a text has no visible character."""
    return _INVISIBLE.fullmatch(text) is not None


def _is_blank(value: Any) -> bool:
    if isinstance(value, str):
        return is_blank_text(value)
    if isinstance(value, list):
        return all(_is_blank(block.get("text")) if is_text_block(block) else not block for block in value)
    return not value


def is_text_block(block: Any) -> bool:
    """Whether a part of a message's content is text (and no image, say)."""
    return isinstance(block, dict) and block.get("type") == "text"


def _alternates(messages: list[dict]) -> bool:
    """Neither user nor assistant speaks twice in a row; an assistant may, after calling a tool."""
    return not any(
        before["role"] == after["role"] and after["role"] in ("user", "assistant") and not before.get("tool_calls")
        for before, after in itertools.pairwise(messages)
    )


def without_nulls(message: dict) -> dict:
    """The message without the keys that Arrow filled with nulls because another message has them."""
    return {key: value for key, value in message.items() if value is not None}


def _shared_length(chosen: Any, rejected: Any) -> int:
    """Length of the implicit prompt of two different sides: the rule of `trl.extract_prompt`, with fewer steps.

    TRL keeps a space before the first difference with the completions, and the last element of a side that the other
    one goes on from.
    """
    low, high = 0, min(len(chosen), len(rejected))  # the first `low` elements are equal, the first `high` are not
    if chosen[:high] == rejected[:high]:
        return high - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chosen[:middle] == rejected[:middle] else (low, middle)
    return low - 1 if low and chosen[low - 1] == " " else low


def guess(value: str, choices: Iterable) -> str:
    """End of an error message: the choice that was probably meant, if one is near."""
    close = difflib.get_close_matches(value, [str(choice) for choice in choices], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
