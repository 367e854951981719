"""The one way to score tokens: a model, a batch, positions and k targets give the log-probs of each target.

One forward pass gives them all, over packed rows where that is exact and faster, else over rows grouped by length or
over padded rows (`ways`). Policy and reference of a training run, the reference cache, `sampo diagnose`, the
implicit-reward judge and `sampo merge` all score through [`Scorer`].
"""

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

from .cpu_head import fast_head
from .lm_head import PER_TOKEN, score_positions
from .packing import Stream, lay_out, score_packed
from .ways import GROUPED, PACKED, PADDED, Ways, group_rows

N_GROUPS = 4  # forwards of rows grouped by length: a constant, so that all processes run as many
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
        states: `(R, N, H)` the hidden states from which the tokens were predicted, if asked for.
        head: with them, weight `(V, H)` and bias of the LM head.
    """

    output: Any
    log_probs: list[Tensor]
    states: Tensor | None = None
    head: tuple[Tensor, Tensor | None] | None = None


def masked_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the forward of a causal LM gets of a batch."""
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}


class Scorer:
    """Scores tokens of batches with one or several models, by the fastest exact forward.

    Args:
        models: all that will score, not wrapped, with TRL's fused head: a policy, and its reference if it is another
            model.
        pair_stream: `auto`, `true` or `false`.
        refuse: a reason against packing that the caller knows of.
        may_group: the rows of a batch can be computed in several forwards.
        reduced: the models compute in less than float32, so that rounding is larger.
        head: how padded rows are scored. `positions`: TRL's head gets the scored positions only. `labels`: the model
            is called with padded labels, as TRL calls it, because it is compiled or its rows are not those of the
            batch; each target is then a pass of its own. `logits`: the model's own head, with any adapter on it.
        unwrap: from the model that is called to the one that `models` holds.
        options: from the inputs of a batch to what the model's padded forward gets.
        autocast: entered around each pass.
        largest: of each number of a tensor, the largest over all processes, so that all decide alike.

    Raises:
        ValueError: `pair_stream: true`, and there is a reason against it.
    """

    def __init__(
        self,
        models: Sequence[Any],
        *,
        pair_stream: str = "auto",
        refuse: str | None = None,
        may_group: bool = True,
        reduced: bool = False,
        head: str = "positions",
        unwrap: Callable[[Any], Any] = lambda model: model,
        options: Callable[[dict[str, Any]], dict[str, Any]] = masked_inputs,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        largest: Callable[[Tensor], list[float]] = Tensor.tolist,
    ):
        self.models, self._head = list(models), head
        self._head_function = nullcontext if pair_stream == "false" else fast_head  # `false` is TRL's to the bit
        self.ways = Ways(pair_stream, models, refuse=refuse, may_group=may_group)
        self._tolerance = 0.1 if reduced else 1e-4  # rounding is a few hundredths in bf16 and 1e-6 in float32
        self._unwrap, self._options, self._autocast, self._largest = unwrap, options, autocast, largest

    def __call__(
        self, model: Any, batch: Batch, positions: Tensor, *targets: Tensor, keep_states: bool = False, **more: Any
    ) -> Scores:
        """Score.

        Args:
            model: one of the scorer's, possibly wrapped.
            batch: on the model's device.
            positions: `(R, N)` bool, where.
            targets: each `(R, N)`, the tokens to be scored there; the batch's own tokens if none is given.
            keep_states: also give the hidden states; only with the head `positions`.
            more: `output_router_logits`, if this pass computes an auxiliary loss.
        """
        assert self._head == "positions" or not keep_states
        each = list(targets) or [batch.inputs["input_ids"][:, 1:]]
        with self._autocast(), self._head_function():
            unwrapped = self._unwrap(model)
            if self.ways.is_on_trial(unwrapped):
                self._compare(model, batch, positions, each, **more)
            way = self.ways.of(unwrapped, lambda: batch.stream)
            # asked for only where it is, because a model of rows with labels would be given the argument
            kept = {"keep_states": True} if keep_states else {}
            output, others = self._score(way, model, batch, positions, each, **kept, **more)
        states = vars(output).pop("states", None)  # not kept with the output until the step ends
        n = batch.inputs["input_ids"].size(1) - 1
        scores = Scores(output, [scored[:, -n:] for scored in (output.log_probs, *others)], states)
        if keep_states:  # now, for an adapter that has a head of its own may be disabled for this pass
            module = _base(unwrapped).get_output_embeddings()
            scores.head = module.weight, getattr(module, "bias", None)
        return scores

    def _score(
        self, way: str, model: Any, batch: Batch, positions: Tensor, targets: list[Tensor], **more: Any
    ) -> tuple[Any, list[Tensor]]:
        if way == PACKED:
            backbone = _base(self._unwrap(model)).base_model
            return score_packed(model, backbone, batch.stream, positions, targets, **more)
        by_rows = self._grouped if way == GROUPED else self._padded
        return by_rows(model, {**self._options(batch.inputs), **more}, positions, targets)

    def _padded(
        self, model: Any, options: dict[str, Any], positions: Tensor, targets: list[Tensor]
    ) -> tuple[Any, list[Tensor]]:
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

    def _grouped(
        self, model: Any, options: dict[str, Any], positions: Tensor, targets: list[Tensor]
    ) -> tuple[Any, list[Tensor]]:
        """As `_padded`, in a few forwards of rows of like length."""
        parts = []
        for rows, length in _row_groups(options["attention_mask"]):
            here = [each[rows, : length - 1] for each in (positions, *targets)]
            parts.append((rows, *self._padded(model, take_rows(options, rows, length), here[0], here[1:])))

        def join(values: list[Tensor]) -> Tensor:
            full = values[0].new_zeros(*positions.shape, *values[0].shape[2:])
            for (rows, *_), value in zip(parts, values, strict=True):
                full[rows, : value.size(1)] = value
            return full

        outputs, others = [output for _, output, _ in parts], [others for _, _, others in parts]
        known = [name for name in (*PER_TOKEN, "states") if getattr(outputs[0], name, None) is not None]
        joined = {name: join([getattr(output, name) for output in outputs]) for name in known}
        missing = dict.fromkeys(PER_TOKEN)
        return SimpleNamespace(**missing | joined), [join(list(each)) for each in zip(*others, strict=True)]

    @torch.no_grad()
    def _compare(self, model: Any, batch: Batch, positions: Tensor, targets: list[Tensor], **more: Any) -> None:
        way, real = self.ways.way, batch.inputs["attention_mask"]

        def at_positions(scored: tuple[Any, list[Tensor]]) -> Tensor:
            output, others = scored
            found = torch.cat([each[positions] for each in (output.log_probs, *others)])
            # an auxiliary loss weighs as much as all tokens together
            return torch.cat((found, output.aux_loss.expand(len(found)))) if more else found

        if way == PACKED:
            tokens = batch.stream.input_ids.numel()
        else:
            tokens = sum(len(rows) * length for rows, length in _row_groups(real))
        self.ways.compare(
            self._unwrap(model),
            lambda: at_positions(self._score(way, model, batch, positions, targets, **more)),
            lambda: at_positions(self._score(PADDED, model, batch, positions, targets, **more)),
            tolerance=self._tolerance,
            largest=self._largest,
            tokens=(real.numel(), tokens),
        )


def take_rows(options: dict[str, Any], rows: list[int], length: int) -> dict[str, Any]:
    """What a model's forward gets for some rows, cut to a length.

    Args:
        options: for all R rows. The second dimension of a tensor, where it is that of `input_ids`, is a position.
        rows: which.
        length: L of the result.

    Raises:
        ValueError: a tensor does not have R rows, as the images of some models.
    """
    n_rows, n_positions = options["input_ids"].shape
    taken = {}
    for name, value in options.items():
        if isinstance(value, Tensor):
            if value.size(0) != n_rows:
                raise ValueError(f"`{name}` must have a row for each of the batch's {n_rows}, got {value.size(0)}.")
            value = value[rows]
            value = value[:, :length] if value.dim() > 1 and value.size(1) == n_positions else value
        taken[name] = value
    return taken


def _row_groups(attention_mask: Tensor) -> list[tuple[list[int], int]]:
    """Rows of like length with the largest length of each group."""
    lengths = attention_mask.sum(dim=1).tolist()
    groups = group_rows(lengths, min(N_GROUPS, len(lengths)))
    return [(rows, max(lengths[row] for row in rows)) for rows in groups]


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

    def __call__(self, inputs: dict[str, Tensor], *targets: Tensor) -> list[Tensor]:
        """The log-probs of `score`."""
        return self.score(inputs, *targets)[0]

    @torch.no_grad()
    def score(
        self, inputs: dict[str, Tensor], *targets: Tensor, keep_states: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Score.

        Args:
            inputs: a collated batch of pairs; with `own_head` any rows.
            targets: each `(R, N)`, the tokens to be scored at the positions of the completion tokens; the batch's own
                tokens if none is given.
            keep_states: also give the hidden states; not with `own_head`.

        Returns:
            `(R, N)` nats, float32, for each target, zero outside the completion; and `(R, N, H)` states or None.
        """
        device = self._model.device
        rows = Rows({name: inputs[name].to(device) for name in MASKS})
        wanted = [each.to(device) for each in targets]
        scores = self._scorer(self._model, rows, rows.mask, *wanted, keep_states=keep_states)
        return [each.float() for each in scores.log_probs], scores.states


def _base(model: Any) -> Any:
    """The causal LM below an adapter."""
    return model.get_base_model() if is_peft_model(model) else model


def _labels(targets: Tensor, positions: Tensor) -> Tensor:
    """`(R, L)` labels as TRL gives them: −100 where nothing is scored, the first token of a row among them."""
    return torch.nn.functional.pad(targets.masked_fill(~positions, -100), (1, 0), value=-100)
