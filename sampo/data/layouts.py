r"""One row of preference data: from its layout to a normalised pair, or to the list of its issues.

A pair is `prompt`, `chosen` and `rejected`. Rows come in one of six layouts, each with one reader in `READERS`:

| layout | columns | comes out as |
|---|---|---|
| `text` | `prompt`, `chosen`, `rejected` are strings | itself |
| `messages` | all three are lists of messages | itself |
| `shared_text` | `chosen`, `rejected` begin with the prompt (strings) | the shared beginning cut off, by TRL's rule |
| `shared_messages` | the same with lists of messages | the same |
| `transcripts` | `\n\nHuman: … \n\nAssistant: …` in `chosen` and `rejected` | messages |
| `text_beside_messages` | `prompt` is a string, the responses are messages | messages |
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from .issues import RowIssue, RowIssues
from .repeated_prompts import PROMPT_ROLES, repeated_messages

PAIR_COLUMNS = ("prompt", "chosen", "rejected")

HEAD_ROWS = 1000  # first rows of a source: they decide its columns, the spelling of its messages and its layout

EXTRA_COLUMNS = ("tools", "chat_template_kwargs")  # what TRL passes to the chat template

# What a message can consist of. An assistant message that calls a tool need not have content.
MESSAGE_PARTS = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

# Blanks, control characters, and what Unicode calls default ignorable (zero-width spaces and joiners, marks of byte
# order and of direction, soft hyphens, fillers, variation selectors, tags); the blank of Braille.
_INVISIBLE = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff]*"
)

Pair = tuple[Any, Any, Any]  # prompt, chosen, rejected


def _read_text(prompt: Any, chosen: Any, rejected: Any) -> tuple[Pair, RowIssues]:
    issues = _find_cell_issues(_find_text_issue, prompt=prompt, chosen=chosen, rejected=rejected)
    if not issues and chosen == rejected:
        issues = [("identical", "rejected")]
    return (prompt, chosen, rejected), issues


def _read_shared_text(_: Any, chosen: Any, rejected: Any) -> tuple[Pair, RowIssues]:
    issues = _find_cell_issues(_find_text_issue, chosen=chosen, rejected=rejected)
    if issues or chosen == rejected:
        return (None, chosen, rejected), issues or [("identical", "rejected")]
    cut = _shared_length(chosen, rejected)
    if not chosen[:cut].strip():
        return (None, chosen, rejected), [("prompt_not_shared", "prompt")]
    return _read_text(chosen[:cut], chosen[cut:], rejected[cut:])


def _read_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[Pair, RowIssues]:
    issues = _find_cell_issues(_find_messages_issue, prompt=prompt, chosen=chosen, rejected=rejected)
    bad_columns = {column for _, column in issues}
    if "prompt" not in bad_columns:
        issues += [("bad_roles", "prompt")] if not _alternates(prompt) else []
        for column, response in (("chosen", chosen), ("rejected", rejected)):
            if column not in bad_columns and (kind := _find_completion_issue(prompt, response)):
                issues.append((kind, column))
    if not issues and chosen == rejected:
        issues = [("identical", "rejected")]
    return (prompt, chosen, rejected), issues


def _read_shared_messages(_: Any, chosen: Any, rejected: Any) -> tuple[Pair, RowIssues]:
    issues = _find_cell_issues(_find_messages_issue, chosen=chosen, rejected=rejected)
    if issues or chosen == rejected:
        return (None, chosen, rejected), issues or [("identical", "rejected")]
    # Arrow fills the keys that a message lacks with nulls, and the two columns need not have the same keys.
    cut = _shared_length([without_nulls(message) for message in chosen], [without_nulls(m) for m in rejected])
    if not cut:
        return (None, chosen, rejected), [("prompt_not_shared", "prompt")]
    return _read_messages(chosen[:cut], chosen[cut:], rejected[cut:])


def _read_text_beside_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[Pair, RowIssues]:
    """UltraFeedback's layout: a text prompt, and responses that are complete conversations or the answers alone."""
    issues = _find_cell_issues(_find_text_issue, prompt=prompt)
    issues += _find_cell_issues(_find_messages_issue, chosen=chosen, rejected=rejected)
    if issues:
        return (prompt, chosen, rejected), issues
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        return _read_shared_messages(None, chosen, rejected)
    return _read_messages([{"role": "user", "content": prompt}], chosen, rejected)


_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _read_transcripts(_: Any, chosen: Any, rejected: Any) -> tuple[Pair, RowIssues]:
    r"""`\n\nHuman: … \n\nAssistant: …`: all before the last `Assistant:` is the prompt, and must be shared."""
    failed: Pair = (None, chosen, rejected)
    issues = _find_cell_issues(_find_text_issue, chosen=chosen, rejected=rejected)
    if issues:
        return failed, issues
    parts = {"chosen": _split_transcript(chosen), "rejected": _split_transcript(rejected)}
    for column, (prompt, completion) in parts.items():
        if prompt is None:
            issues.append(("not_a_transcript", column))
        elif completion is None:
            issues.append(("bad_roles", column))
        elif is_blank_text(completion):
            issues.append(("empty", column))
    if issues:
        return failed, issues
    prompt, completion = parts["chosen"]
    if prompt != parts["rejected"][0]:
        return failed, [("prompt_not_shared", "prompt")]
    turns = [] if not prompt else _messages_of_transcript(prompt)
    return _read_messages(
        turns,
        [{"role": "assistant", "content": completion}],
        [{"role": "assistant", "content": parts["rejected"][1]}],
    )


def count_turns(text: str) -> int:
    """Count how often a transcript names a speaker."""
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
        {"role": _ROLES[speaker], "content": "\n\n".join(content.strip() for _, content in messages)}
        for speaker, messages in turns
    ]


READERS: dict[str, Callable[[Any, Any, Any], tuple[Pair, RowIssues]]] = {
    "text": _read_text,
    "messages": _read_messages,
    "shared_text": _read_shared_text,
    "shared_messages": _read_shared_messages,
    "transcripts": _read_transcripts,
    "text_beside_messages": _read_text_beside_messages,
}


def find_option_issue(extra: dict[str, Any], first: dict[str, Any]) -> RowIssue | None:
    """Find what TRL cannot pass to the chat template.

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
    """Whether a message holds blocks that are not text, such as images."""
    return isinstance(messages, list) and any(
        isinstance(message.get("content"), list) and not all(map(is_text_block, message["content"]))
        for message in messages
    )


def detect_layout(columns: list[str], head: list[tuple]) -> str:
    """Return the layout of the data, by the majority of its first rows (`head`: prompt, chosen, rejected of each)."""
    responses = [cell for row in head for cell in row[1:3]]
    messages = sum(isinstance(cell, list) for cell in responses)
    text = [cell for cell in responses if isinstance(cell, str)]
    form = "messages" if messages > len(text) else "text"
    if "prompt" not in columns:
        begun = sum(_split_transcript(cell)[0] is not None for cell in text)
        return "transcripts" if form == "text" and 2 * begun > len(text) else f"shared_{form}"
    prompts = Counter(type(row[0]) for row in head)
    return "text_beside_messages" if form == "messages" and prompts[str] > prompts[list] else form


def _find_cell_issues(find_issue: Callable[[Any], str | None], **cells: Any) -> RowIssues:
    return [(kind, column) for column, value in cells.items() if (kind := find_issue(value)) is not None]


def _find_text_issue(value: Any) -> str | None:
    if isinstance(value, str):
        return "empty" if is_blank_text(value) else None
    return _classify_non_value(value)


def _find_messages_issue(value: Any) -> str | None:
    if not isinstance(value, list):
        return _classify_non_value(value)
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "wrong_type"
        if not isinstance(message.get("content"), str | list | None):
            return "wrong_type"
    return "empty" if all(map(_is_blank_message, value)) else None


def _find_completion_issue(prompt: list[dict], completion: list[dict]) -> str | None:
    if any(message["role"] == "assistant" and _is_blank_message(message) for message in completion):
        return "empty"
    if completion[0]["role"] in PROMPT_ROLES and completion[-1]["role"] == "assistant":
        return "repeated_prompt" if repeated_messages(prompt, completion) else "prompt_role"
    fine = _alternates(prompt[-1:] + completion) and completion[-1]["role"] == "assistant"
    return None if fine else "bad_roles"


def _classify_non_value(value: Any) -> str:
    if value is None:
        return "null"
    return "nan" if isinstance(value, float) and value != value else "wrong_type"


def _is_blank_message(message: dict) -> bool:
    """Whether a message has no content, no reasoning and no call."""
    return all(_is_blank(message.get(key)) for key in MESSAGE_PARTS)


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
    """Whether a part of a message's content is text, and not for example an image."""
    return isinstance(block, dict) and block.get("type") == "text"


def _alternates(messages: list[dict]) -> bool:
    """Whether user and assistant take turns; an assistant may send two messages, the first of which calls a tool."""
    return not any(
        before["role"] == after["role"] and after["role"] in ("user", "assistant") and not before.get("tool_calls")
        for before, after in itertools.pairwise(messages)
    )


def without_nulls(message: dict) -> dict:
    """The message without the keys that Arrow filled with nulls because another message has them."""
    return {key: value for key, value in message.items() if value is not None}


def _shared_length(chosen: Any, rejected: Any) -> int:
    """Return the length of the implicit prompt of two different responses, by the rule of `trl.extract_prompt`.

    TRL keeps a space before the first difference with the completions, and the last element of a response that the
    other one continues.
    """
    low, high = 0, min(len(chosen), len(rejected))  # the first `low` elements are equal, the first `high` are not
    if chosen[:high] == rejected[:high]:
        return high - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chosen[:middle] == rejected[:middle] else (low, middle)
    return low - 1 if low and chosen[low - 1] == " " else low


def serialize(part: Any) -> str:
    """Return a prompt or response as one text, equal for equal content: Arrow adds nulls to messages."""
    return json.dumps([without_nulls(message) for message in part], sort_keys=True) if isinstance(part, list) else part


def visible_text(part: str | list[dict]) -> str:
    """Return the text of a prompt or response: the content of messages, without template, tool calls and reasoning."""
    if isinstance(part, str):
        return part
    texts = []
    for message in part:
        content = message.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts += [block["text"] for block in blocks if is_text_block(block) and block["text"]]
    return "\n".join(texts)
