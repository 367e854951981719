"""Backends that generate answers: transformers in this process, or any OpenAI-compatible server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.inference import generate_ids
from ..texts import tokenizer_hash
from .generate import Job, Output, Sampling

if TYPE_CHECKING:
    from ...models.inference import Loaded
    from ..endpoint import Endpoint
    from ..texts import Texts

Row = tuple[list[int], Job]  # tokens of the prompt, and what is wanted

# --- transformers --------------------------------------------------------------------------------------------------


class TransformersBackend:
    """`generate` of transformers, batches padded on the left, long prompts first.

    Of the model's own generation settings only the end tokens are used.

    Args:
        name: What to call the model in the records.
        loaded: The model.
        texts: Its tokenizer and template.
        batch_size: Rows at a time.
        stop_tokens: Further end tokens.
    """

    def __init__(
        self,
        name: str,
        loaded: "Loaded",
        texts: "Texts",
        *,
        batch_size: int = 32,
        stop_tokens: Sequence[str] = (),
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self._model: Any = loaded.model
        self._texts, self._batch_size = texts, batch_size
        self.stop_ids = end_tokens(texts.tokenizer, self._model.generation_config, stop_tokens)
        self.options = {"stop_tokens": list(stop_tokens)} if stop_tokens else {}
        self.about = {
            "model": name,
            "weights": loaded.weights,
            "backend": "transformers",
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_hash(texts.tokenizer),
            "template": texts.template_hash,
        }

    def check(self, jobs: Sequence[Job], sampling: Sampling) -> dict[int, str]:
        """Prompts that leave no room for `max_tokens`."""
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return {}
        lengths = [len(self._texts.prompt(job.prompt)) for job in jobs]
        return {
            number: f"{length} tokens and `max_tokens` {sampling.max_tokens} for {limit} positions"
            for number, length in enumerate(lengths)
            if length + sampling.max_tokens > limit
        }

    def generate(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[tuple[Job, Output]]]:
        """One batch at a time."""
        for batch in self.batches(jobs):
            yield self.answer(batch, sampling)

    def batches(self, jobs: Sequence[Job]) -> list[list[Row]]:
        """The jobs in batches, each with the tokens of its prompt."""
        rows = sorted(((self._texts.prompt(job.prompt), job) for job in jobs), key=lambda row: -len(row[0]))
        return [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]

    def answer(self, batch: Sequence[Row], sampling: Sampling) -> list[tuple[Job, Output]]:
        """The outputs of one batch."""
        outputs = self._batch([ids for ids, _ in batch], [job.seed(sampling) for _, job in batch], sampling)
        return [(job, output) for (_, job), output in zip(batch, outputs, strict=True)]

    def stream(self, job: Job, sampling: Sampling, put: Callable[[str], None]) -> Output:
        """One job, as `generate` does it; `put` gets each part of the text as soon as its words are complete."""
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                put(text)

        streamer = Streamer(self._texts.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return self._batch([self._texts.prompt(job.prompt)], [job.seed(sampling)], sampling, streamer)[0]

    def _batch(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, streamer: Any = None
    ) -> list[Output]:
        width = max(map(len, prompts))
        pad = self.stop_ids[0] if self._texts.tokenizer.pad_token_id is None else self._texts.tokenizer.pad_token_id
        found = generate_ids(
            self._model,
            prompts,
            max_tokens=sampling.max_tokens,
            end_ids=self.stop_ids,
            pad_id=pad,
            logits_processor=[] if sampling.greedy else [RowSampler(seeds, width, sampling)],
            streamer=streamer,
        )
        return [self._output(answer) for answer in found]

    def _output(self, ids: list[int]) -> Output:
        ended = ids[-1] in self.stop_ids
        text = str(self._texts.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))
        return Output(text, len(ids), "eos" if ended else "length")


def end_tokens(tokenizer: Any, generation_config: Any, further: Sequence[str] = ()) -> list[int]:
    """Ids that end an answer: those of the model, of its tokenizer, and `further` ones.

    Raises:
        ValueError: no end token exists, or one is not a single token.
    """
    found = generation_config.eos_token_id if generation_config is not None else None
    ids = [*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id]
    for token in further:
        number = tokenizer.convert_tokens_to_ids(token)
        if number is None or number == tokenizer.unk_token_id:
            raise ValueError(f"`stop_tokens` must be tokens of the model, got {token!r}.")
        ids.append(number)
    known = list(dict.fromkeys(number for number in ids if number is not None))
    if not known:
        raise ValueError("The model must have an end token, and has none. Name one with `stop_tokens`.")
    return known


class RowSampler:
    """A logits processor that keeps one token: the one that a row's own random number selects.

    Number t of a row is a quantile of the distribution over the tokens, in the order of their ids. So a draw needs one
    number, whatever the size of the vocabulary, and no generator that the rows of a batch share.

    Args:
        seeds: (B,) one for each row.
        width: Length of the padded prompts.
        sampling: Temperature, `top_k`, `top_p` and `max_tokens`.

    Attributes:
        numbers: (B, max_tokens) float64, from 0 to just below 1.
    """

    def __init__(self, seeds: Sequence[int], width: int, sampling: Sampling):
        import torch
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._width = width
        numbers = [np.random.default_rng(seed).integers(2**32, size=sampling.max_tokens) for seed in seeds]
        self.numbers: Any = (torch.from_numpy(np.stack(numbers)) / 2**32).double()  # (B, max_tokens)
        self._warp = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            self._warp.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warp.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores (B, V) in which only the drawn token is finite."""
        import torch

        warped = self._warp(input_ids, scores.float())
        if warped.device.type == "mps":  # has no float64
            warped = warped.cpu()
        cumulative = warped.double().softmax(dim=1).cumsum(dim=1)  # (B, V)
        number = self.numbers[:, input_ids.shape[1] - self._width].to(cumulative.device)  # (B,)
        target = number[:, None] * cumulative[:, -1:]  # below the last sum, which rounding leaves not quite at 1
        drawn = torch.searchsorted(cumulative, target, right=True).to(scores.device)  # (B, 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


# --- any OpenAI-compatible server ----------------------------------------------------------------------------------


class EndpointBackend:
    """A server. It counts its own tokens and applies its own template; whether the seed has an effect is up to it."""

    def __init__(self, endpoint: "Endpoint", options: Mapping[str, Any] | None = None):
        self._endpoint, self.options = endpoint, dict(options or {})
        self.about = {
            "model": endpoint.model,
            "weights": None,
            "backend": endpoint.url,
            "dtype": None,
            "tokenizer": f"{endpoint.model} at {endpoint.url}",
            "template": None,
        }

    def check(self, jobs: Sequence[Job], sampling: Sampling) -> dict[int, str]:
        """The server knows its limits."""
        return {}

    def generate(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[tuple[Job, Output]]]:
        """One answer at a time, as they come."""
        from ..endpoint import Unanswered

        def ask(job: Job) -> Output:
            prompt = job.prompt
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                return _of_reply(self._endpoint.ask(messages, self._request(job, sampling)))
            except Unanswered as failure:
                return Output(failure=failure.reason, detail=failure.detail)

        for number, output in self._endpoint.for_each(jobs, ask):
            yield [(jobs[number], output)]

    def _request(self, job: Job, sampling: Sampling) -> dict[str, Any]:
        fields: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        if not sampling.greedy:
            fields |= {"seed": job.seed(sampling)}
            fields |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
            fields |= {"top_k": sampling.top_k} if sampling.top_k else {}  # known to vLLM and others, not to OpenAI
        return {key: value for key, value in (fields | self.options).items() if value is not None}


def _of_reply(body: str) -> Output:
    from ..server_text import read_reply, usage_of, visible

    choice, failure = read_reply(body)
    if choice is None:
        return Output(failure=failure, detail=visible(body[:200]))
    message, reason = choice["message"], choice.get("finish_reason")
    if message.get("refusal") or reason == "content_filter":
        return Output(failure="refused", detail=visible(body[:200]))
    if not isinstance(message["content"], str):
        return Output(failure="no_text", detail=visible(body[:200]))
    if any("\ud800" <= letter <= "\udfff" for letter in message["content"]):
        return Output(failure="not_utf8", detail=visible(body[:200]))
    stop = {"stop": "eos", "length": "length"}.get(str(reason), "unknown")
    return Output(message["content"], usage_of(body)[1] or None, stop)
