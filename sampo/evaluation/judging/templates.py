"""The prompts of judges, as versioned data in `prompts/*.yaml`, and the parsing of a verdict.

The texts to be judged are data: they stand between marks that cannot be predicted, and they are filled in once, so
that fields inside them stay as they are. A verdict counts at one position only: in a written reply, its last line,
which must be the prefix and a verdict and nothing but decoration (`verdict_text`); with log-probabilities, the one
token of the reply.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Template
from typing import Any

from ...io.hashing import hash_json
from ...io.schemas import read_yaml
from .verdict_text import read_verdict

FOLDER = Path(__file__).parent / "prompts"
REPLIES = ("text", "logprobs")
FIELDS = ("prompt", "answer_a", "answer_b", "mark")
REFERENCE = "reference"  # a field that a template may have: a right answer, or a checklist
NO_REFERENCE = "(none is given)"
MAX_P = 1.001  # a probability above 1 by more than rounding is none
MIN_MASS = 0.5  # share of the verdicts among all next tokens, below which the judge did not answer the question


@dataclass(frozen=True, kw_only=True)
class JudgePrompt:
    """One file.

    Attributes:
        name: Its name.
        version: Higher with every change of what the judge sees.
        description: For people.
        source: Where the form is from.
        reply: `text` or `logprobs`.
        verdicts: Word → preference for answer A.
        user: The message, with `$prompt`, `$answer_a`, `$answer_b` and `$mark`; `$reference` may be there too.
        system: System message, if there is one.
        prefix: Text before the verdict in the last line; "" if the line is the verdict alone.
        max_tokens: Room for the reply.
    """

    name: str
    version: int
    description: str
    source: str
    reply: str
    verdicts: Mapping[str, float]
    user: str
    system: str = ""
    prefix: str = ""
    max_tokens: int = 1

    def __post_init__(self) -> None:
        missing = [f"${name}" for name in FIELDS if f"${name}" not in self.user]
        if missing:
            raise ValueError(f"`user` of the judge's prompt must hold all texts and the mark, got no {missing}.")
        allowed = (*FIELDS, REFERENCE)
        others = sorted(set(Template(self.user).get_identifiers()) - set(allowed))
        if others or not Template(self.user).is_valid():
            raise ValueError(
                f"`user` of the judge's prompt must name no fields but {[f'${name}' for name in allowed]}, got "
                f"{others or 'another `$`'}. Write `$$` for a dollar sign."
            )
        if self.max_tokens < 1:
            raise ValueError(f"`max_tokens` of the judge's prompt must be at least 1, got {self.max_tokens}.")
        if self.reply not in REPLIES:
            raise ValueError(f"`reply` of the judge's prompt must be one of {list(REPLIES)}, got {self.reply!r}.")
        if not {0.0, 1.0} <= set(self.verdicts.values()) or not all(0 <= p <= 1 for p in self.verdicts.values()):
            raise ValueError(f"`verdicts` must map words to preferences from 0 to 1, both used, got {self.verdicts}.")

    @cached_property
    def hash(self) -> str:
        """Sixteen hex digits of all that a verdict depends on."""
        parts = [self.system, self.user, self.reply, self.prefix, dict(self.verdicts)]
        return hash_json(parts)[:16]

    def messages(
        self, prompt: str, answer_a: str, answer_b: str, reference: str | None = None
    ) -> list[dict[str, str]]:
        """The messages for the judge; `reference` counts if the template has a field for it.

        The mark is a hash of all texts: the same for the same question, so that replies can be kept, and unknown
        to whoever writes one of them.
        """
        texts = {"prompt": prompt, "answer_a": answer_a, "answer_b": answer_b}
        if REFERENCE in Template(self.user).get_identifiers():
            texts[REFERENCE] = NO_REFERENCE if reference is None else reference
        mark = hashlib.sha256(json.dumps([self.hash, *texts.values()]).encode()).hexdigest()[:12]
        filled = Template(self.user).substitute(texts, mark=mark)
        system = [{"role": "system", "content": self.system.strip()}] if self.system.strip() else []
        return [*system, {"role": "user", "content": filled.strip()}]

    def options(self, top_logprobs: int) -> dict[str, Any]:
        """Fields of the request that the form of the reply asks for."""
        if self.reply == "logprobs":
            return {"max_tokens": 1, "logprobs": True, "top_logprobs": top_logprobs}
        return {"max_tokens": self.max_tokens}

    def verdict(self, choice: Mapping[str, Any]) -> tuple[float | None, str]:
        """(preference for answer A, "") or (None, reason) from the first choice of a reply."""
        message = choice["message"]
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            return None, "refused"
        if self.reply == "logprobs":
            return self._from_logprobs(choice)
        if choice.get("finish_reason") == "length":
            return None, "truncated"  # its last line is anything, a quotation perhaps
        return self._from_text(message["content"])

    def _from_text(self, content: Any) -> tuple[float | None, str]:
        found = read_verdict(content, self.prefix, self.verdicts) if isinstance(content, str) else None
        return (None, "unparseable") if found is None else (found, "")

    def _from_logprobs(self, choice: Mapping[str, Any]) -> tuple[float | None, str]:
        """Σ P(word) · preference / Σ P(word) over the likeliest first tokens."""
        try:
            top = choice["logprobs"]["content"][0]["top_logprobs"]
            found = [(str(entry["token"]).strip(), math.exp(float(entry["logprob"]))) for entry in top]
        except (LookupError, TypeError, ValueError, OverflowError):
            return None, "no_logprobs"
        if not all(0 <= p <= MAX_P for _, p in found):  # NaN too
            return None, "no_logprobs"
        mass = sum(p for word, p in found if word in self.verdicts)
        if not mass >= MIN_MASS:
            return None, "unparseable"
        return min(sum(p * self.verdicts[word] for word, p in found if word in self.verdicts) / mass, 1.0), ""


def names() -> list[str]:
    """The prompts that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str | Path) -> JudgePrompt:
    """A prompt by name, or from a file that ends in `.yaml`.

    Raises:
        ValueError: there is none of that name, or the file is not as it must be.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"`template` must be one of {names()} or a YAML file, got {str(name)!r}.")
    return read_yaml(path, JudgePrompt)
