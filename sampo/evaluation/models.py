"""Models for evaluation: load one, with or without an adapter, and say which weights it had.

`Texts` is the one place that turns prompts and answers into tokens, for generating and for scoring alike.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.chat import ChatTemplate, NotRendered
from ..data.issues import phrase
from ..data.layouts import has_other_content
from ..models.load import add_adapter, base_of, check_model, has_adapter, opening, refuse_weights_not_finite
from .answers.answers import Prompt, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMATS = ("auto", "chat", "raw")
WEIGHT_FILES = (".safetensors", ".bin", ".gguf")
PIECES, PIECE_BYTES = 64, 1 << 16  # of each file of weights go into a fingerprint


@dataclass(frozen=True)
class Loaded:
    """A causal model; `base` is what its adapter sits on, None where there is no adapter."""

    model: "PreTrainedModel"
    weights: str | None
    base: str | None


def default_device() -> str:
    """The first accelerator, else the CPU."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def load_causal(
    name: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """A causal language model from a folder or the hub; `name` may itself be an adapter."""
    from transformers import AutoModelForCausalLM

    for each in {name, adapter or name}:
        check_model(each, trust_remote_code=trust_remote_code)
    base, base_revision = name, revision
    if adapter is None and has_adapter(name, revision):
        adapter, (base, base_revision) = name, base_of(name, revision)
    with opening(base, "model"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, revision=base_revision or "main", dtype=dtype, trust_remote_code=trust_remote_code
        )
    weights = fingerprint(base, model)
    if adapter is not None:
        model = add_adapter(model, adapter, revision=revision if adapter == name else None)
        weights = f"{weights}+{fingerprint(adapter, None)}"
    refuse_weights_not_finite(model.named_parameters(), name if adapter is None else adapter)
    return Loaded(model.to(device).eval(), weights, None if adapter is None else base)


def fingerprint(name: str, model: Any) -> str | None:
    """Which weights these are: the commit on the hub, or a hash of pieces of the files of a local folder.

    The pieces are spread over each file: training changes some of them, and reading all would take minutes. The number
    guards against mistakes, not against malice.
    """
    folder = Path(name)
    if not folder.is_dir():
        return getattr(getattr(model, "config", None), "_commit_hash", None)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for piece in range(PIECES):
                file.seek(max(size - PIECE_BYTES, 0) * piece // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return f"sha256:{digest.hexdigest()[:16]}"


def tokenizer_hash(tokenizer: Any) -> str:
    """Whose tokens: a hash of what cuts ordinary text into them.

    Not the name: a trained model lies in a folder of its own with the tokenizer of its base, and their counts compare.
    Special tokens are left out, because training adds some (a padding token, say) that change no count.
    """
    rules: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        whole = json.loads(fast.to_str())
        rules = {name: whole[name] for name in ("normalizer", "pre_tokenizer", "model")}
    return f"sha256:{hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]}"


class Texts:
    """Prompts and answers as token ids.

    Args:
        tokenizer: The model's.
        prompt_format: `chat`: the chat template, a string being a message of the user; `raw`: a string as it is;
            `auto`: `chat` if there is a template.
        chat_template: In place of the tokenizer's own.

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
        asked = self.prompt(prompt)
        if not self.chat:
            said = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
            end = self.tokenizer.eos_token_id
            return asked, said if end is None else [*said, end]
        whole = self._templated([*_messages(prompt), {"role": "assistant", "content": answer}])
        if whole[: len(asked)] != asked:
            raise ValueError(
                "The chat template must begin a finished conversation as it begins an open one, and does not. Give "
                "another with `chat_template`."
            )
        return asked, whole[len(asked) :]

    def fault(self, prompt: Prompt) -> str | None:
        """Why the chat template cannot ask this, or None."""
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
