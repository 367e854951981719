"""Prompts and answers as token ids, and a hash that identifies the tokenizer.

Generation and scoring both use `Texts` to tokenise prompts and answers. `sampo.models.inference` loads models.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ..data.chat import ChatTemplate, NotRendered
from ..data.issues import phrase
from ..data.layouts import has_other_content
from ..io.hashing import hash_json
from .answers.answers import Prompt, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("auto", "chat", "raw")


def tokenizer_hash(tokenizer: Any) -> str:
    """Identify a tokenizer by a hash of the rules that split ordinary text into tokens.

    The name is not sufficient: a trained model is saved in its own folder with the tokenizer of its base, and the
    token counts of both are comparable. Special tokens are omitted: training adds some (such as a padding token)
    that change no count.
    """
    rules: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        settings = json.loads(fast.to_str())
        rules = {name: settings[name] for name in ("normalizer", "pre_tokenizer", "model")}
    return f"sha256:{hash_json(rules)[:16]}"


class Texts:
    """Prompts and answers as token ids.

    Args:
        tokenizer: The model's.
        prompt_format: `chat`: the chat template, a string being a message of the user; `raw`: a string as it is;
            `auto`: `chat` if there is a template.
        chat_template: Replaces the tokenizer's own.

    Raises:
        ValueError: `chat` without a template.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt_format: str = "auto", chat_template: str | None = None
    ):
        if prompt_format not in FORMATS:
            raise ValueError(f"`format` must be one of {list(FORMATS)}, got {prompt_format!r}.")
        self.tokenizer = tokenizer
        self._template = chat_template or (tokenizer.get_chat_template() if tokenizer.chat_template else None)
        self.chat = self._template is not None if prompt_format == "auto" else prompt_format == "chat"
        if self.chat and self._template is None:
            raise ValueError(
                "`format: chat` must have a chat template, and the tokenizer has none. Give one with `chat_template`, "
                "or set `format` to `raw`."
            )
        self._chat_template = ChatTemplate(tokenizer, self._template)

    @property
    def template_hash(self) -> str | None:
        """Of the chat template; None where none is used."""
        return hashlib.sha256((self._template or "").encode()).hexdigest()[:16] if self.chat else None

    def prompt(self, prompt: Prompt) -> list[int]:
        """The prompt, up to where the answer begins."""
        if self.chat:
            return self._templated(_messages(prompt), add_generation_prompt=True)
        if not isinstance(prompt, str):
            raise ValueError(
                f"A conversation needs a chat template, got none for {prompt_text(prompt)[:60]!r}. Give one with "
                "`chat_template`, or prompts that are strings."
            )
        return list(self.tokenizer(prompt)["input_ids"])

    def row(self, prompt: Prompt, answer: str) -> tuple[list[int], list[int]]:
        """(prompt, answer with its end token), as the model would have read and written them."""
        prompt_ids = self.prompt(prompt)
        if not self.chat:
            answer_ids = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
            end = self.tokenizer.eos_token_id
            return prompt_ids, answer_ids if end is None else [*answer_ids, end]
        conversation = self._templated([*_messages(prompt), {"role": "assistant", "content": answer}])
        if conversation[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "The chat template must begin a finished conversation as it begins an open one, and does not. Give "
                "another with `chat_template`."
            )
        return prompt_ids, conversation[len(prompt_ids) :]

    def find_issue(self, prompt: Prompt) -> str | None:
        """Why the chat template cannot render this prompt, or None."""
        if not self.chat:
            return None
        messages = _messages(prompt)
        if has_other_content(messages):
            return phrase("not_text", "prompt", 1)
        try:
            text = self._chat_template.render(self._chat_template.adapt_blocks(messages), add_generation_prompt=True)
        except NotRendered as error:
            return f"{phrase('not_rendered', '', 1)}: {error}"
        kind = self._chat_template.find_issue_in_prompt(messages, text)
        return None if kind is None else phrase(kind, "prompt", 1)

    def _templated(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        text = self._chat_template.render(self._chat_template.adapt_blocks(messages), **options)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
