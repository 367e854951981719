"""Chat templates: rendered within a time limit, and checked against the messages of each pair.

A template is a program of its author. It may refuse a conversation, leave a message out, print content blocks as
Python, or never end; all of that is known from its text alone, before a model is loaded.
"""

import ctypes
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .issues import RowIssue
from .layouts import PAIR_COLUMNS, Pair, is_text_block
from .repeated_prompts import PROMPT_ROLES

logger = logging.getLogger(__name__)

LIMIT = 10.0  # seconds for one conversation, which takes well under a millisecond


class NotRendered(ValueError):
    """A chat template fails on a conversation; the text gives the reason."""


def render_messages(tokenizer: Any, messages: list[dict], **options: Any) -> str:
    """Return the text that a chat template makes of a conversation.

    Args:
        tokenizer: with `apply_chat_template`.
        messages: the conversation.
        options: of `apply_chat_template`.

    Raises:
        NotRendered: the template fails, whatever the reason, or takes longer than `LIMIT`.
    """
    try:
        with time_limit(LIMIT):
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template can raise whatever Python can
        reason = " ".join(str(error).split()) or "no reason"
        name = type(error).__name__
        raise NotRendered(reason if name == "TemplateError" else f"{name}: {reason}") from error


def join_text_blocks(messages: list[dict]) -> list[dict]:
    """Join content of text blocks to one string, with line breaks between blocks; other content stays."""
    return [
        {**message, "content": "\n".join(block["text"] or "" for block in message["content"])}
        if isinstance(message.get("content"), list) and all(map(is_text_block, message["content"]))
        else message
        for message in messages
    ]


def join_blocks_for_template(dataset: Any, tokenizer: Any, label: str) -> Any:
    """Replace content blocks of text by strings, if the chat template does not take blocks.

    Other data sets, including streams, are returned unchanged.
    """
    from datasets import Dataset

    template = template_of(tokenizer)
    if template is None or not isinstance(dataset, Dataset):
        return dataset
    names = [name for name in PAIR_COLUMNS if name in dataset.column_names]
    if not any(_can_hold_blocks(dataset.features[name]) for name in names):
        return dataset

    def join(batch: dict[str, list]) -> dict[str, list]:
        return {name: [template.adapt_blocks(messages) for messages in batch[name]] for name in names}

    if template.takes_blocks:
        return dataset
    joined = dataset.with_format(None).map(join, batched=True, desc="Joining blocks of text")
    if joined.features != dataset.features:
        logger.info("%s: content blocks of text joined to strings, because the chat template takes no blocks", label)
    return joined


def _can_hold_blocks(feature: Any) -> bool:
    """Whether the messages of a column have content that is not plainly a string."""
    message = getattr(feature, "feature", None)
    return isinstance(message, dict) and getattr(message.get("content"), "dtype", None) not in ("string", "null")


class ChatTemplate:
    """The chat template of a tokenizer, and what it does to the pairs of a data set.

    Args:
        tokenizer: with a chat template.
        template: replaces the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        self.tokenizer = tokenizer
        self._own: dict[str, Any] = {} if template is None else {"chat_template": template}
        self.reasons: dict[str, str] = {}  # kind of issue -> what the template raised on the first pair
        self._takes_blocks: bool | None = None

    @property
    def takes_blocks(self) -> bool:
        """Whether it shows the text of content blocks, and not their Python or JSON form."""
        if self._takes_blocks is None:
            content = [{"type": "text", "text": "A question?"}]
            try:
                text = self.render([{"role": "user", "content": content}])
            except NotRendered:
                text = ""
            self._takes_blocks = "A question?" in text and "type" not in text.split("A question?")[0][-40:]
        return self._takes_blocks

    def render(self, messages: list[dict], **options: Any) -> str:
        """Render a conversation; raises `NotRendered` if the template fails."""
        return render_messages(self.tokenizer, messages, **self._own, **options)

    def adapt_blocks(self, messages: list[dict]) -> list[dict]:
        """Return the messages as the template takes them: with strings instead of text blocks, if necessary."""
        if not any(isinstance(message.get("content"), list) for message in messages) or self.takes_blocks:
            return messages
        return join_text_blocks(messages)

    def render_pair(self, pair: Pair, extra: dict[str, Any]) -> tuple[str, str, str]:
        """Render the prompt alone, and the prompt with each response, as TRL does.

        Args:
            pair: of messages.
            extra: values of the columns `tools` and `chat_template_kwargs`.

        Raises:
            NotRendered: the template fails.
        """
        prompt, *responses = map(self.adapt_blocks, pair)
        options = _read_options(extra)
        alone = self.render_prompt(prompt, extra)
        chosen, rejected = (self.render(prompt + response, **options) for response in responses)
        return alone, chosen, rejected

    def render_prompt(self, prompt: list[dict], extra: dict[str, Any]) -> str:
        """Render a prompt alone, up to where the answer begins; raises `NotRendered` if the template fails."""
        return self.render(self.adapt_blocks(prompt), add_generation_prompt=True, **_read_options(extra))

    def find_issue(self, pair: Pair, extra: dict[str, Any]) -> RowIssue | None:
        """Render a pair and find its issue."""
        try:
            texts = self.render_pair(pair, extra)
        except NotRendered as error:
            self.reasons.setdefault("not_rendered", str(error))
            return "not_rendered", ""
        return self.find_issue_in_texts(pair, texts)

    def find_issue_in_texts(self, pair: Pair, texts: tuple[str, str, str]) -> RowIssue | None:
        """Find the first message that the rendered texts do not show."""
        prompt, *responses = pair
        if kind := self.find_issue_in_prompt(prompt, texts[0]):
            return kind, "prompt"
        for column, response, text in zip(("chosen", "rejected"), responses, texts[1:], strict=True):
            if kind := _find_issue_in_message(self.adapt_blocks(response)[-1], text):
                return kind, column
        return None

    def find_issue_in_prompt(self, prompt: list[dict], text: str) -> str | None:
        """Return the kind of issue of the first system or user message that the rendered prompt does not show."""
        for message in self.adapt_blocks(prompt):
            if message["role"] in PROMPT_ROLES and (kind := _find_issue_in_message(message, text)):
                return "system_lost" if kind == "message_lost" and message["role"] != "user" else kind
        return None


def _read_options(extra: dict[str, Any]) -> dict[str, Any]:
    """Options of the template, from the columns `tools` and `chat_template_kwargs` of a row."""
    tools = extra.get("tools")
    return {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(extra.get("chat_template_kwargs") or {}),
    }


def template_of(tokenizer: Any) -> ChatTemplate | None:
    """Return the template that messages go through, if the tokenizer has one; a processor's is for more than text."""
    is_processor = hasattr(tokenizer, "tokenizer")
    return ChatTemplate(tokenizer) if not is_processor and getattr(tokenizer, "chat_template", None) else None


def _find_issue_in_message(message: dict, text: str) -> str | None:
    content = message.get("content")
    if isinstance(content, list) and str(content) in text:
        return "blocks_as_python"
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    expected = [part["text"] for part in parts if is_text_block(part) and part["text"]]
    return None if all(_is_shown(each, text) for each in expected) else "message_lost"


def _is_shown(expected: str, text: str) -> bool:
    """Whether a rendered text contains a text: templates strip blanks, move reasoning, and some write JSON."""
    expected = expected.rsplit("</think>", 1)[-1].strip()
    if expected in text:
        return True
    return "".join(expected.split()) in "".join(text.split()) or json.dumps(expected)[1:-1] in text


# --- a time limit on Python code, in any thread ---------------------------------------------------------------------


class _TooLong(BaseException):  # not an Exception: a template must not be able to catch it
    pass


class _Watchdog:
    """One thread that checks the deadlines of all others, and raises `_TooLong` in those that are late."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}  # thread -> time
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self.watch, name="chat-template-limit", daemon=True)
            self.thread.start()

    def watch(self) -> None:
        while True:
            time.sleep(0.1)
            with self.lock:
                late = [thread for thread, end in self.deadlines.items() if time.monotonic() > end]
                for thread in late:
                    del self.deadlines[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooLong))


_watchdog = _Watchdog()


def _forget_threads() -> None:
    """Start again in a forked process, which has no other threads."""
    global _watchdog
    _watchdog = _Watchdog()


os.register_at_fork(after_in_child=_forget_threads)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop Python code that takes longer. Not by a signal: it reaches the main thread only, and other code uses it.

    Raises:
        TimeoutError: it took longer.
    """
    me, dog = threading.get_ident(), _watchdog
    dog.start()
    try:
        with dog.lock:
            dog.deadlines[me] = time.monotonic() + seconds
        try:
            yield
        finally:
            with dog.lock:
                in_time = dog.deadlines.pop(me, None) is not None
            if not in_time:
                time.sleep(0)  # an exception that was set in this thread is raised here at the latest
    except _TooLong:
        raise TimeoutError(f"it takes more than {seconds:g} seconds for one conversation") from None
