"""A judge behind an OpenAI-compatible URL. Every reply is kept, so no request is sent twice.

Every reply goes to the cache as it came, before it is read; a verdict is read from the cache each time. So an improved
parser needs no new request. A reply that cannot be read is asked for again, at most `attempts` times in all runs
together.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...io.hashing import hash_json
from ...io.journal import Journal
from ...io.progress import Progress
from ...io.schemas import named, typed
from ..answers.answers import prompt_text
from ..endpoint import Endpoint, Unanswered
from ..server_text import read_reply, usage_of, visible
from .judges import Comparison, Verdict
from .templates import JudgePrompt

CHARS_PER_TOKEN = 4  # of English, roughly; for the estimate of a dry run alone
Wanted = tuple[str, list[dict[str, str]], str]  # key, messages and prompt of a request


@dataclass(frozen=True)
class KeptReply:
    """The fields of a row of the cache that are read: the hash of a request, and the server's reply as it came."""

    key: str
    reply: str


@dataclass(frozen=True)
class RequestEstimate:
    """Requirements of a run: replies kept, requests at least and at most, tokens to read, tokens to write at most."""

    kept: int
    requests: int
    requests_at_most: int
    tokens_in: int
    tokens_out_at_most: int


class EndpointJudge:
    """Asks an endpoint, and keeps its replies.

    Args:
        endpoint: Server of the judge.
        template: Prompt of the judge.
        cache: JSONL file of replies; may be shared by judges and runs, one at a time.
        temperature: Of the judge.
        top_logprobs: For a template that reads log-probabilities.
        attempts: How often a reply that cannot be read is asked for, in all runs together.
        options: Further fields of the request; None takes one out.
    """

    name = "endpoint"

    def __init__(
        self,
        endpoint: Endpoint,
        template: JudgePrompt,
        cache: str | Path,
        *,
        temperature: float = 0.0,
        top_logprobs: int = 20,
        attempts: int = 2,
        options: Mapping[str, Any] | None = None,
    ):
        if attempts < 1:
            raise ValueError(f"`attempts` must be at least 1, got {attempts}.")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be at least 0 and finite, got {temperature}.")
        if top_logprobs < 1:
            raise ValueError(f"`top_logprobs` must be at least 1, got {top_logprobs}.")
        fields = {"temperature": temperature, **template.options(top_logprobs), **(options or {})}
        self.endpoint, self.template, self.attempts = endpoint, template, attempts
        self.options = {key: value for key, value in fields.items() if value is not None}
        self._journal = Journal(cache)
        self._replies: dict[str, list[str]] = {}
        try:
            for number, row in enumerate(self._journal.rows, 1):
                with named(cache, "Restore it, or delete the line", line=number):
                    kept = typed(KeptReply, row, ignore_unknown=True)
                self._replies.setdefault(kept.key, []).append(kept.reply)
        except ValueError:
            self.close()
            raise

    @property
    def about(self) -> dict[str, Any]:
        """The settings that the verdicts depend on."""
        return {
            "url": self.endpoint.url,
            "model": self.endpoint.model,
            "options": self.options,
            "template": self.template.name,
            "template_version": self.template.version,
            "template_hash": self.template.hash,
        }

    def close(self) -> None:
        """Release the cache, and close the connections."""
        self._journal.close()
        self.endpoint.close()

    def key(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Hash of the complete request: URL, model, all options, template, prompt, both answers, their order."""
        request = {"url": self.endpoint.url, "model": self.endpoint.model, "messages": messages, **self.options}
        return hash_json(request)

    def estimate(self, comparisons: Sequence[Comparison]) -> RequestEstimate:
        """What [`judge`] would ask for, without asking."""
        requests = {key: messages for key, messages, _ in self._requests(comparisons)}
        open_ = {key: m for key, m in requests.items() if self._wanted(key)}
        chars = sum(len(message["content"]) for messages in open_.values() for message in messages)
        at_most = sum(self.attempts - len(self._kept(key)) for key in open_)
        room = self.options.get("max_tokens") or self.options.get("max_completion_tokens") or self.template.max_tokens
        return RequestEstimate(
            len(requests) - len(open_), len(open_), at_most, round(chars / CHARS_PER_TOKEN), len(open_) * room
        )

    def judge(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict for each comparison; each different request is made once, two equal answers need none."""
        requests: dict[str, tuple[list[dict[str, str]], str]] = {}
        for key, messages, prompt_id in self._requests(comparisons):
            requests.setdefault(key, (messages, prompt_id))
        wanted = [(key, *request) for key, request in requests.items() if self._wanted(key)]
        failures = self._ask(wanted, progress)
        return [self._verdict(shown, failures) for shown in comparisons]

    def paid(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        """Tokens and price of all kept replies to these questions, whichever run made them."""
        replies = [reply for key in {key for key, *_ in self._requests(comparisons)} for reply in self._kept(key)]
        tokens_in, tokens_out = (sum(counts) for counts in zip((0, 0), *map(usage_of, replies), strict=True))
        price = self.endpoint.spending.price(tokens_in, tokens_out)
        return {"replies": len(replies), "tokens_in": tokens_in, "tokens_out": tokens_out, "price": price}

    def _kept(self, key: str) -> list[str]:
        return self._replies.get(key, [])

    def _ask(self, wanted: Sequence[Wanted], progress: Progress | None) -> dict[str, Unanswered]:
        """Ask for what is missing and keep the replies; why some requests have none, by their key."""
        failures: dict[str, Unanswered] = {}
        for done, (number, failure) in enumerate(self.endpoint.for_each(wanted, self._fetch), 1):
            if failure is not None:
                failures[wanted[number][0]] = failure
            if progress:
                progress(done, len(wanted))
        return failures

    def _requests(self, comparisons: Sequence[Comparison]) -> Iterator[Wanted]:
        for shown in comparisons:
            if shown.answer_a != shown.answer_b:
                messages = self._messages(shown)
                yield self.key(messages), messages, shown.prompt_id

    def _messages(self, shown: Comparison) -> list[dict[str, str]]:
        return self.template.messages(prompt_text(shown.prompt), shown.answer_a, shown.answer_b, shown.reference)

    def _wanted(self, key: str) -> bool:
        replies = self._kept(key)
        return len(replies) < self.attempts and all(self._read(reply).failure for reply in replies)

    def _fetch(self, request: Wanted) -> Unanswered | None:
        """Ask until a reply can be read or the attempts are spent; why there is no reply, or None."""
        key, messages, prompt_id = request
        while self._wanted(key):
            try:
                reply = self.endpoint.ask(messages, self.options)
            except Unanswered as failure:
                return failure
            self._keep([(key, prompt_id, reply)])
        return None

    def _keep(self, replies: Iterable[tuple[str, str, str]], **more: Any) -> None:
        """Write replies, as (key, prompt, reply), to the cache before anything reads them."""
        about = {
            "model": self.endpoint.model,
            "template": f"{self.template.name} {self.template.version}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        }
        replies = list(replies)
        self._journal.append(*({"key": k, "prompt_id": prompt, **about, "reply": r} for k, prompt, r in replies))
        for key, _, reply in replies:
            self._replies.setdefault(key, []).append(reply)

    def _read(self, reply: str) -> Verdict:
        choice, failure = read_reply(reply)
        if choice is None:
            return Verdict(None, failure, visible(reply[:200]))
        preference, failure = self.template.verdict(choice)
        if preference is not None:
            return Verdict(preference)
        content = choice["message"]["content"]
        return Verdict(None, failure, visible(content[-200:] if isinstance(content, str) and content else reply[:200]))

    def _verdict(self, shown: Comparison, failures: Mapping[str, Unanswered]) -> Verdict:
        if shown.answer_a == shown.answer_b:
            return Verdict(0.5)
        key = self.key(self._messages(shown))
        verdicts = [self._read(reply) for reply in self._kept(key)]
        good = next((verdict for verdict in verdicts if verdict.failure is None), None)
        if good is not None:
            return good
        if key in failures:  # of this run, and the reason why there are no more attempts
            return Verdict(None, failures[key].reason, failures[key].detail)
        return verdicts[-1]
