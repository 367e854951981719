"""The one way to score tokens: a model, a batch, positions and k targets give the log-probs of each target.

One forward pass gives them all, packed where that is exact and else over padded rows. The first batch of each model is
computed both ways before the packed forward is trusted. Policy and reference of a training run, the reference cache,
`sampo diagnose`, the implicit-reward judge and `sampo merge` all score through [`Scorer`].
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from ..logs import get_logger
from .attention import StreamRefused, describe_error
from .interface import install, uninstall
from .lm_head import score_positions
from .packing import RowsTooLong, Stream, lay_out, score_packed, too_long, why_not

logger = get_logger(__name__)

MODES = ("auto", "true", "false")  # of `pair_stream`
MASKS = ("input_ids", "attention_mask", "completion_mask")


class Batch(Protocol):
    """What a scorer needs of a batch: R rows of L tokens, N = L − 1 predicted positions.

    Attributes:
        inputs: at least `input_ids` and `attention_mask`, `(R, L)`.
        stream: the rows packed. It is asked for only where a model takes packed rows.
    """

    inputs: dict[str, Any]

    @property
    def stream(self) -> Stream:
        """The rows packed."""


@dataclass
class Rows:
    """Collated pairs, all of whose completion tokens may be scored; or, for padded scoring, any rows.

    Attributes:
        inputs: `input_ids`, `attention_mask` and `completion_mask`, `(R, L)`.
    """

    inputs: dict[str, Any]

    @property
    def mask(self) -> Tensor:
        """`(R, N)` bool, completion tokens."""
        return self.inputs["completion_mask"][:, 1:].bool()

    @cached_property
    def stream(self) -> Stream:
        """The pairs as one row; only for rows that are pairs, chosen first."""
        return lay_out(*(self.inputs[name] for name in MASKS))

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> "Rows":
        """Rows of a prompt and a completion, padded on the right, which a causal model does not see.

        Args:
            rows: the token ids of both, for each row.
        """
        length = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        attention, completions = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            ids[i, :end] = torch.tensor([*prompt, *completion])
            attention[i, :end] = 1
            completions[i, len(prompt) : end] = 1
        return cls(dict(zip(MASKS, (ids, attention, completions), strict=True)))


@dataclass
class Scores:
    """What one pass gave.

    Attributes:
        output: TRL's `FusedCausalLMOutput` for the first target. Fields are `(R, N)`, with more positions in front if
            the model has virtual tokens.
        log_probs: `(R, N)` nats for each target, zero where nothing was scored; without gradient after the first.
    """

    output: Any
    log_probs: list[Tensor]


def masked_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the forward of a causal LM gets of a batch."""
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}


class Scorer:
    """Scores tokens of batches with one or several models, packed where that is exact.

    Args:
        models: all that will score, not wrapped, with TRL's fused head: a policy, and its reference if it is another
            model.
        pair_stream: `auto`, `true` or `false`.
        refuse: a reason against packing that the caller knows of.
        reduced: the models compute in less than float32, so that rounding is larger.
        head: how padded rows are scored. `positions`: TRL's head gets the scored positions only. `labels`: the model
            is called with padded labels, as TRL calls it, because it is compiled or its rows are not those of the
            batch; each target is then a pass of its own. `logits`: the model's own head, with any adapter on it.
        unwrap: from the model that is called to the one that `models` holds.
        options: from the inputs of a batch to what the model's padded forward gets.
        autocast: entered around each pass.
        largest: of a number, the largest over all processes, so that all decide alike.

    Raises:
        ValueError: `pair_stream: true`, and there is a reason against it.
    """

    def __init__(
        self,
        models: Sequence[Any],
        *,
        pair_stream: str = "auto",
        refuse: str | None = None,
        reduced: bool = False,
        head: str = "positions",
        unwrap: Callable[[Any], Any] = lambda model: model,
        options: Callable[[dict[str, Any]], dict[str, Any]] = masked_inputs,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        largest: Callable[[Tensor], float] = Tensor.item,
    ):
        self.models, self._head = list(models), head
        self.packing = Packing(pair_stream, models, refuse=refuse)
        self._tolerance = 0.1 if reduced else 1e-4  # rounding is a few hundredths in bf16 and 1e-6 in float32
        self._unwrap, self._options, self._autocast, self._largest = unwrap, options, autocast, largest

    def __call__(self, model: Any, batch: Batch, positions: Tensor, *targets: Tensor, **more: Any) -> Scores:
        """Score.

        Args:
            model: one of the scorer's, possibly wrapped.
            batch: on the model's device.
            positions: `(R, N)` bool, where.
            targets: each `(R, N)`, the tokens to be scored there; the batch's own tokens if none is given.
            more: `output_router_logits`, if this pass computes an auxiliary loss.
        """
        each = list(targets) or [batch.inputs["input_ids"][:, 1:]]
        with self._autocast():
            if self.packing.is_to_be_compared(self._unwrap(model)):
                self._compare(model, batch, positions, each, **more)
            if self.packing.takes(batch):
                output, others = self._packed(model, batch, positions, each, **more)
            else:
                output, others = self._padded(model, batch, positions, each, **more)
        n = batch.inputs["input_ids"].size(1) - 1
        return Scores(output, [scored[:, -n:] for scored in (output.log_probs, *others)])

    def _packed(
        self, model: Any, batch: Batch, positions: Tensor, targets: list[Tensor], **more: Any
    ) -> tuple[Any, list[Tensor]]:
        return score_packed(model, _base(self._unwrap(model)).base_model, batch.stream, positions, targets, **more)

    def _padded(
        self, model: Any, batch: Batch, positions: Tensor, targets: list[Tensor], **more: Any
    ) -> tuple[Any, list[Tensor]]:
        options = {**self._options(batch.inputs), **more}
        if self._head == "positions":
            rows, columns = positions.nonzero(as_tuple=True)
            at = rows, columns
            return score_positions(model, _base(self._unwrap(model)).base_model, at, at, targets, **options)
        if self._head == "logits":
            logps = model(**options).logits[:, :-1].float().log_softmax(dim=2)  # (R, N, V)
            first, *others = (logps.gather(2, each[..., None])[..., 0] * positions for each in targets)
            return SimpleNamespace(log_probs=first), [each.detach() for each in others]
        first, *others = targets
        output = model(**options, labels=_labels(first, positions), fused_lm_head=True)
        with torch.no_grad():
            return output, [
                model(**options, labels=_labels(each, positions), fused_lm_head=True).log_probs for each in others
            ]

    @torch.no_grad()
    def _compare(self, model: Any, batch: Batch, positions: Tensor, targets: list[Tensor], **more: Any) -> None:
        def at_positions(scored: tuple[Any, list[Tensor]]) -> Tensor:
            output, others = scored
            found = torch.cat([each[positions] for each in (output.log_probs, *others)])
            # an auxiliary loss weighs as much as all tokens together
            return torch.cat((found, output.aux_loss.expand(len(found)))) if more else found

        self.packing.compare(
            self._unwrap(model),
            lambda: at_positions(self._packed(model, batch, positions, targets, **more)),
            lambda: at_positions(self._padded(model, batch, positions, targets, **more)),
            tolerance=self._tolerance,
            largest=self._largest,
            padded_tokens=batch.inputs["input_ids"].numel(),
            packed_tokens=batch.stream.input_ids.numel(),
        )


class ModelScorer:
    """One model in evaluation mode with its scorer: all completion tokens of a batch, outside of training.

    Args:
        model: a causal LM, with or without an adapter. It is given TRL's fused head, unless `own_head`.
        pair_stream: `auto`, `true` or `false`.
        bf16: compute under autocast, as a training run with `bf16: true` does.
        own_head: score by the logits of the model's own forward, over padded rows of any kind.

    Raises:
        ValueError: an adapter whose rows are longer than those of the batch; `pair_stream: true`, and it cannot be.
    """

    def __init__(self, model: Any, *, pair_stream: str = "auto", bf16: bool = False, own_head: bool = False):
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            raise ValueError("A model must not have a prompt-learning adapter, whose rows are longer than the pairs'.")
        if not own_head:
            add_fused_lm_head(_base(model))

        def autocast() -> AbstractContextManager:
            return torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()

        self._model = model
        self._scorer = Scorer(
            [model],
            pair_stream="false" if own_head else pair_stream,
            head="logits" if own_head else "positions",
            reduced=bf16 or model.dtype != torch.float32,
            autocast=autocast,
        )

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], *targets: Tensor) -> list[Tensor]:
        """Score.

        Args:
            inputs: a collated batch of pairs; with `own_head` any rows.
            targets: each `(R, N)`, the tokens to be scored at the positions of the completion tokens; the batch's own
                tokens if none is given.

        Returns:
            `(R, N)` nats, float32, for each target; zero outside the completion.
        """
        device = self._model.device
        rows = Rows({name: inputs[name].to(device) for name in MASKS})
        scores = self._scorer(self._model, rows, rows.mask, *(each.to(device) for each in targets))
        return [each.float() for each in scores.log_probs]


def _base(model: Any) -> Any:
    """The causal LM below an adapter."""
    return model.get_base_model() if is_peft_model(model) else model


def _labels(targets: Tensor, positions: Tensor) -> Tensor:
    """`(R, L)` labels as TRL gives them: −100 where nothing is scored, the first token of a row among them."""
    return torch.nn.functional.pad(targets.masked_fill(~positions, -100), (1, 0), value=-100)


class Packing:
    """Whether batches are packed: decided for the models at the start, and for each by its first batch.

    Attributes:
        on: packing is in use.
    """

    def __init__(self, mode: str, models: Sequence[Any], *, refuse: str | None = None):
        """Make the models ready.

        Args:
            mode: `auto`, `true` or `false`.
            models: policy and, if there is one, reference; not wrapped.
            refuse: a reason against packing that the caller knows of.

        Raises:
            ValueError: `true`, and there is a reason against it.
        """
        self.mode, self.on, self._models = mode, False, list(models)
        self._compared: set[int] = set()  # ids of the models whose first batch agreed
        if mode == "false":
            return
        reason = refuse or next(filter(None, map(why_not, models)), None)
        if reason:
            self._refuse(reason)
            return
        for model in models:
            install(model)
        self.on = True

    def is_to_be_compared(self, model: Any) -> bool:
        """Packing is on, and no batch has been computed both ways by this model yet."""
        return self.on and id(model) not in self._compared

    def takes(self, batch: Batch) -> bool:
        """Whether this batch is packed; not if a model computes rows of its length differently.

        Raises:
            ValueError: `true`, and the batch cannot be packed.
        """
        if not self.on:
            return False
        reason = next(filter(None, (too_long(model.config, batch.stream) for model in self._models)), None)
        if reason and self.mode == "true":
            raise ValueError(
                f"`pair_stream: true` must be exact for every batch, but {reason}. Set a smaller `max_length`, or use "
                "`auto`, which takes the plain forward for such batches."
            )
        return not reason

    def compare(
        self,
        model: Any,
        packed: Callable[[], Tensor],
        padded: Callable[[], Tensor],
        *,
        tolerance: float,
        largest: Callable[[Tensor], float],
        padded_tokens: int,
        packed_tokens: int,
    ) -> None:
        """Keep packing if both forwards agree on a batch. A batch with rows that are too long is skipped.

        Args:
            model: one of the models.
            packed: computes the log-probs of the batch's completion tokens by the packed forward, `(M,)` nats.
            padded: and by the padded forward, in the same order.
            tolerance: largest mean difference of a token. The largest difference is not informative: in bf16 a rare
                token can differ by 0.3 because of rounding alone.
            largest: of a number, the largest over all processes, so that all decide alike. Called exactly once.
            padded_tokens: tokens of the padded forward.
            packed_tokens: tokens of the packed forward.

        Raises:
            ValueError: `true`, and the ways do not agree, or the packed forward fails.
        """
        expected = padded()
        mine, failure = expected.new_tensor(-1.0), None
        try:
            mine = (packed() - expected).abs().mean()
        except RowsTooLong:
            padded()  # other processes may have run the packed forward: all run the same number of forwards
        except AssertionError:
            raise  # a bug in packing, not in the model
        except Exception as error:  # the padded forward ran, so the model cannot take packed rows
            mine, failure = expected.new_tensor(math.inf), error
        difference = largest(mine)
        if difference < 0:
            return
        first = not self._compared
        self._compared.add(id(model))
        if failure is None and difference <= tolerance:
            log = logger.info if first else logger.debug
            log(
                f"pair_stream: on. The first batch has {packed_tokens:,} tokens instead of {padded_tokens:,}; its "
                f"log-probs differ from those of the plain forward by {difference:.1g} nats a token, which is "
                f"rounding (the bound is {tolerance:g})."
            )
            return
        reason = (
            f"the log-probs of the first batch differ from those of the plain forward by {difference:.2g} nats a "
            f"token, which is more than rounding (the bound is {tolerance:g})"
        )
        if failure is not None:
            reason = (
                failure.reason if isinstance(failure, StreamRefused) else f"it failed with {describe_error(failure)}"
            )
        elif difference == math.inf:
            reason = "it failed in another process"
        self._refuse(reason, failure)

    def _refuse(self, reason: str, cause: Exception | None = None) -> None:
        if self.on:
            for model in self._models:
                uninstall(model)
        self.on = False
        if self.mode == "true":
            raise ValueError(
                f"`pair_stream: true` must be exact for this model, but {reason}. Use `auto`, which takes the plain "
                "forward then, or `false`."
            ) from cause
        logger.warning(f"pair_stream: auto takes the plain forward, because {reason}.")
