"""A prompt that is repeated at the start of the responses, and the role tags of chat templates around it.

Such pairs train the model to repeat the question. As messages the case is plain: a response that begins with a system
or user message. In text it is found by comparing letters: blanks and the role tags of well-known templates are skipped
on both sides, and a default system message of a template may stand in front.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROMPT_ROLES = ("system", "developer", "user")
MANY_SHARE, MANY_ROWS, MANY_SHARE_OF_ROWS = 0.5, 10, 0.05
FEW_BYTES = 8  # to begin as so short a prompt does proves nothing: many answers to `Hello` begin with it

# What only a template writes: ChatML, Llama 2 and 3, Gemma, Zephyr and Phi, DeepSeek, Cohere, gpt-oss.
_OPENERS = (
    r"<\|im_start\|>\s*assistant\b\s*",
    r"(?:<\|eot_id\|>)?<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>\s*",
    r"\[/INST\]\s*",
    r"<start_of_turn>\s*model\b\s*",
    r"<\|assistant\|>\s*",
    r"<｜assistant｜>\s*",
    r"<\|START_OF_TURN_TOKEN\|>\s*<\|CHATBOT_TOKEN\|>\s*",
    r"<\|start\|>\s*assistant(?:<\|channel\|>\w+)?<\|message\|>\s*",
)
_CLOSERS = (
    r"<\|(?:im_end|eot_id|eom_id|end|endoftext|end_of_text|END_OF_TURN_TOKEN|return)\|>",
    r"</s>|<end_of_turn>|<eos>|<｜end▁of▁sentence｜>",
)
_OTHER_TAGS = (
    r"<\|im_start\|>\s*\w*",
    r"<\|start_header_id\|>\s*\w+\s*<\|end_header_id\|>",
    r"\[INST\]|<<SYS>>|<</SYS>>|<s>|<bos>|<start_of_turn>\s*\w*",
    r"<\|(?:system|user|begin_of_text|START_OF_TURN_TOKEN|USER_TOKEN|SYSTEM_TOKEN|message)\|>",
    r"<\|start\|>\s*\w+|<｜(?:User|begin▁of▁sentence)｜>",
)
# What people write too: only at the start of a line, or after a blank in capitals.
_WORD_OPENERS = (r"^[ \t]*(?:###[ ]*)?(?:Response|Assistant|Answer|AI|GPT|A)[ ]*:\s*", r"(?<=\s)ASSISTANT:\s*")
_WORD_TAGS = (
    r"^[ \t]*(?:###[ ]*)?(?:Instruction|Input|Human|User|Question|System|Q)[ ]*:",
    r"(?<=\s)USER:|^[ \t]*###[ ]*(?:Instruction|Response|Input|User|Assistant|Human|System)\b",
    r"Below is an instruction that describes a task[^\n]*",
)
_FLAGS = re.MULTILINE | re.IGNORECASE
OPENER = re.compile("|".join(_OPENERS), _FLAGS)
ANY_OPENER = re.compile("|".join(_OPENERS + _WORD_OPENERS), _FLAGS)
SPECIAL_TAG = re.compile("|".join(_OPENERS + _CLOSERS + _OTHER_TAGS), _FLAGS)
_ANY_TAG = re.compile("|".join(_OPENERS + _CLOSERS + _OTHER_TAGS + _WORD_OPENERS + _WORD_TAGS), _FLAGS)
_SKIPPED = re.compile(rf"(?:{_ANY_TAG.pattern}|\s)+", _FLAGS)
_CLOSER_AT_END = re.compile(rf"(?:{'|'.join(_CLOSERS)})\Z")
_TAG_LETTERS = frozenset("<>|[]:#")


@dataclass(frozen=True)
class Response:
    """A response text without what is no answer.

    Attributes:
        head: what was in front of the answer.
        answer: the rest.
        tagged: whether the head has tags that only a template writes.
        repeats: whether the head repeats the prompt.
    """

    head: str
    answer: str
    tagged: bool
    repeats: bool


def are_many(rows: int, total: int) -> bool:
    """Whether so many rows whose responses begin with the prompt are a mistake of the data set.

    One response may quote its prompt. More than half of the rows do not, nor 5 % of them if these are ten or more.
    Rows with a prompt of less than `FEW_BYTES` bytes are not counted.
    """
    return rows > MANY_SHARE * total or (rows >= MANY_ROWS and rows >= MANY_SHARE_OF_ROWS * total)


def repeated_messages(prompt: Sequence[dict[str, Any]], completion: Sequence[dict[str, Any]]) -> int:
    """Count how many messages at the start of the completion are those at the end of the prompt."""
    for count in range(min(len(prompt), len(completion) - 1), 0, -1):
        if all(map(_same_message, prompt[-count:], completion[:count])):
            return count
    return 0


def _same_message(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["role"] == other["role"] and _words(one.get("content")) == _words(other.get("content"))


def _words(content: Any) -> Any:
    if isinstance(content, list):
        content = "\n".join(str(block.get("text")) if isinstance(block, dict) else str(block) for block in content)
    return content.split() if isinstance(content, str) else content


def split_response(prompt: str, response: str) -> Response | None:
    """The answer in a response that begins with its prompt or with the role tag of a template; None for all others."""
    if (end := _end_of_repeat(prompt, response)) is not None:
        head = response[:end]
        return Response(head, response[end:], bool(SPECIAL_TAG.search(head)), repeats=True)
    begin = OPENER.match(response.lstrip())
    if begin is None:
        return None
    end = len(response) - len(response.lstrip()) + begin.end()
    return Response(response[:end], response[end:], tagged=True, repeats=False)


def _end_of_repeat(prompt: str, response: str) -> int | None:
    """Where the answer begins in a response that begins with its prompt."""
    words = prompt.split()
    if words and words[-1] not in response and _TAG_LETTERS.isdisjoint(words[-1]):  # nearly all responses
        return None
    words = _ANY_TAG.sub(" ", prompt).split()
    if not words or words[-1] not in response:
        return None
    letters = "".join(words)
    for opener in ANY_OPENER.finditer(response):
        head = response[: opener.start()]
        before = "".join(_ANY_TAG.sub(" ", head).split())
        # in front of the prompt only what a template puts there: a system message, after a tag
        if before == letters or (before.endswith(letters) and _ANY_TAG.match(head.lstrip())):
            return opener.end()
    end = len(prompt) if response.startswith(prompt) and prompt[-1].isspace() else _end_of_letters(letters, response)
    if end is None:
        return None
    if closed := _SKIPPED.match(response, end):
        tags = SPECIAL_TAG.search(closed[0])
        return closed.end() if tags else end
    return end


def _end_of_letters(letters: str, response: str) -> int | None:
    """Where the letters end in a text that begins with them, blanks and tags aside."""
    position = done = 0
    while done < len(letters):
        if skipped := _SKIPPED.match(response, position):
            position = skipped.end()
        if position >= len(response) or response[position] != letters[done]:
            return None
        position, done = position + 1, done + 1
    # `Hi` is no beginning of `High`
    inside = position < len(response) and _makes_words(response[position]) and _makes_words(letters[-1])
    return None if inside else position


def _makes_words(letter: str) -> bool:
    """Letters with a case, and digits: Chinese, for example, has no blanks between words."""
    return letter.isdigit() or letter.lower() != letter.upper()


def without_end_tags(answer: str) -> str:
    """The answer without the end tags of a template, and the blanks around them, behind it."""
    kept = answer
    while found := _CLOSER_AT_END.search(kept.rstrip()[-40:]):
        kept = kept.rstrip()[: -len(found[0])]
    return answer if kept == answer else kept.rstrip()


def is_rendered(text: str) -> bool:
    """Whether a template's tags precede or follow a text."""
    return bool(SPECIAL_TAG.match(text.lstrip()) or _CLOSER_AT_END.search(text.rstrip()[-40:]))


def _ends_at_tag(answer: str) -> str:
    """The answer without blanks behind an end tag: TRL appends EOS to what does not end with it."""
    return answer.rstrip() if _CLOSER_AT_END.search(answer.rstrip()[-40:]) else answer


def cut_texts(prompt: str, chosen: Response, rejected: Response) -> tuple[str, str, str] | None:
    """The pair without the repeated prompt; None where the two heads differ and cannot be one prompt.

    With a prompt of plain text the tags are removed. A rendered prompt gets the complete head, with the role tag that
    opens the answer; the end tags then stay, because they are part of that rendering.
    """
    goes_on = all(each.head.lstrip().startswith(prompt.strip()) for each in (chosen, rejected))
    if not SPECIAL_TAG.search(prompt) and not (goes_on and _ANY_TAG.search(prompt)):
        return prompt, without_end_tags(chosen.answer), without_end_tags(rejected.answer)
    if chosen.head.rstrip() != rejected.head.rstrip():
        return None
    head = chosen.head if chosen.repeats else prompt + chosen.head
    return head, _ends_at_tag(chosen.answer), _ends_at_tag(rejected.answer)
