"""Judges that are models on this machine: a reward model, and the implicit reward of a policy and its reference.

Both score each answer on its own, so the order of the two does not matter to them; length may. The preference is
sigmoid(score A − score B), the Bradley-Terry model that such scores are trained with.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...io.progress import Progress
from ...models.inference import default_device, load_causal, load_reward
from ...models.load import check_model, has_adapter, load_tokenizer
from ..answers.answers import Answer, Prompt
from ..texts import Texts
from .judges import Comparison, Score, Verdict, check_batch_size


class _ScoreJudge(ABC):
    """Scores every different (prompt, answer) once, long ones together."""

    name = ""

    def __init__(self, batch_size: int):
        check_batch_size(batch_size)
        self.batch_size = batch_size

    def judge(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict for each comparison."""
        wanted = {(c.prompt_id, text): c.prompt for c in comparisons for text in (c.answer_a, c.answer_b)}
        scores = self._score_once(wanted, progress)
        return [_verdict(scores[c.prompt_id, c.answer_a], scores[c.prompt_id, c.answer_b]) for c in comparisons]

    def score(self, answers: Sequence[Answer], progress: Progress | None = None) -> list[Score]:
        """A score for each answer; equal answers to a prompt are scored once."""
        scores = self._score_once({(a.prompt_id, a.answer): a.prompt for a in answers}, progress)
        return [scores[a.prompt_id, a.answer] for a in answers]

    def _score_once(
        self, wanted: Mapping[tuple[str, str], Prompt], progress: Progress | None
    ) -> dict[tuple[str, str], Score]:
        """(prompt id, answer) → its score; `wanted` has the prompt of each."""
        rows = [(prompt, answer) for (_, answer), prompt in wanted.items()]
        return dict(zip(wanted, self._score(rows, progress), strict=True))

    @abstractmethod
    def _score(self, rows: Sequence[tuple[Prompt, str]], progress: Progress | None) -> list[Score]:
        """A score of each row, or why there is none."""

    def _in_batches(
        self, lengths: Sequence[int], limit: int | None, score: Callable[[list[int]], list[float]], progress: Any
    ) -> list[Score]:
        """`score` gets row numbers; rows of more than `limit` tokens are not cut but fail."""
        scores: list[Score] = ["too_long"] * len(lengths)
        kept = [i for i in range(len(lengths)) if limit is None or lengths[i] <= limit]
        kept.sort(key=lambda i: -lengths[i])
        for start in range(0, len(kept), self.batch_size):
            batch = kept[start : start + self.batch_size]
            for i, value in zip(batch, score(batch), strict=True):
                scores[i] = value if math.isfinite(value) else "not_finite"
            if progress:
                progress(min(start + self.batch_size, len(kept)), len(kept))
        return scores


def _verdict(a: Score, b: Score) -> Verdict:
    for score in (a, b):
        if isinstance(score, str):
            return Verdict(None, score)
    assert isinstance(a, float)
    assert isinstance(b, float)
    return Verdict(0.5 * (1 + math.tanh((a - b) / 2)))  # sigmoid, without overflow


class RewardJudge(_ScoreJudge):
    """A sequence classifier with one output.

    Args:
        model: Folder or hub id.
        revision: On the hub.
        batch_size: Rows at a time.
        device: Where; the first accelerator, else the CPU.
        dtype: Of the weights; `auto`: as stored.

    Raises:
        ValueError: the model has several outputs, or its head is not in the file.
    """

    name = "reward"

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        batch_size: int = 8,
        device: str | None = None,
        dtype: str = "auto",
    ):
        super().__init__(batch_size)
        loaded = load_reward(model, revision=revision, device=device or default_device(), dtype=dtype)
        self._model = loaded.model
        tokenizer = load_tokenizer(model, revision=revision)
        self._texts = Texts(tokenizer)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        self._model.config.pad_token_id = self._pad  # else a batch of several rows is refused
        self.about = {"model": model, "weights": loaded.weights, "template": self._texts.template_hash}

    def _score(self, rows: Sequence[tuple[Prompt, str]], progress: Progress | None) -> list[Score]:
        import torch

        ids = [prompt + answer for prompt, answer in (self._texts.row(*row) for row in rows)]

        def score(batch: list[int]) -> list[float]:
            width = max(len(ids[i]) for i in batch)
            padded = [ids[i] + [self._pad] * (width - len(ids[i])) for i in batch]
            mask = [[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in batch]
            device = self._model.device
            with torch.no_grad():
                logits = self._model(
                    input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device)
                ).logits  # (B, 1)
            return logits[:, 0].float().tolist()

        return self._in_batches([len(row) for row in ids], _positions(self._model), score, progress)


def check_implicit(policy: str, reference: str | None = None, *, beta: float = 0.1) -> None:
    """Check the models of an `ImplicitJudge` before their weights are read; errors as there."""
    if not 0 < beta < math.inf:
        raise ValueError(f"`beta` must be above 0 and finite, got {beta}.")
    check_model(policy)
    if reference is not None:
        check_model(reference, option="ref_model")
    elif not has_adapter(policy):
        raise ValueError(f"`ref_model` must name the reference, since `model` {policy} is no adapter.")


class ImplicitJudge(_ScoreJudge):
    """β (log π(y|x) − log π_ref(y|x)), summed over the answer and its end token: the reward that DPO has trained.

    An answer that was cut off is scored as if it had ended there.

    Args:
        policy: Folder or hub id of a model or an adapter.
        reference: The same; None for the base of an adapter.
        beta: The β of the training.
        batch_size: Rows at a time.
        device: Where; the first accelerator, else the CPU.
        dtype: Of the weights; `auto`: as stored.

    Raises:
        ValueError: there is no reference, or the two have different vocabularies.
    """

    name = "implicit"

    def __init__(
        self,
        policy: str,
        reference: str | None = None,
        *,
        beta: float = 0.1,
        batch_size: int = 8,
        device: str | None = None,
        dtype: str = "auto",
    ):
        from ...scoring.scorer import ModelScorer

        super().__init__(batch_size)
        check_implicit(policy, reference, beta=beta)
        device = device or default_device()
        loaded = load_causal(policy, device=device, dtype=dtype)
        reference = reference or loaded.base
        assert reference is not None
        tokenizer, other = load_tokenizer(policy), load_tokenizer(reference)
        if tokenizer.get_vocab() != other.get_vocab():
            raise ValueError(f"`ref_model` must have the vocabulary of `model`, got {reference} with another one.")
        self.beta = beta
        ref_model = load_causal(reference, device=device, dtype=dtype).model
        self._policy, self._reference = (ModelScorer(model, own_head=True) for model in (loaded.model, ref_model))
        self._max_length = _positions(loaded.model)
        self._texts = Texts(tokenizer)
        self.about = {
            "model": policy,
            "weights": loaded.weights,
            "ref_model": reference,
            "beta": beta,
            "template": self._texts.template_hash,
        }

    def _score(self, rows: Sequence[tuple[Prompt, str]], progress: Progress | None) -> list[Score]:
        from ...scoring.scorer import Rows

        parts = [self._texts.row(*row) for row in rows]

        def score(batch: list[int]) -> list[float]:
            inputs = Rows.of([parts[i] for i in batch]).inputs
            sums = [scorer(inputs)[0].cpu().double().sum(dim=1) for scorer in (self._policy, self._reference)]
            return [self.beta * (p - r) for p, r in zip(*(each.tolist() for each in sums), strict=True)]

        lengths = [len(prompt) + len(answer) for prompt, answer in parts]
        return self._in_batches(lengths, self._max_length, score, progress)


def _positions(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
