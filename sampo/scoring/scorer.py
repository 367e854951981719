"""Log-probs of several tokens at each place of the pairs' completions, by one forward pass and outside of training."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from .lm_head import score_places
from .packing import PairStreams, Stream, lay_out, score


@dataclass
class _Batch:
    """A collated batch, and its layout as one stream.

    Attributes:
        inputs: `input_ids`, `attention_mask` and `completion_mask`, `(2B, L)`.
        mask: `(2B, N)` bool, completion tokens, N = L − 1.
    """

    inputs: dict[str, Tensor]
    mask: Tensor

    @cached_property
    def stream(self) -> Stream:
        return lay_out(*(self.inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")))


class TokenScorer:
    """Log-probs of several tokens at each place of a completion, by one forward pass of a model.

    Args:
        model: a causal LM, with or without an adapter, in evaluation mode. It is given TRL's fused head.
        pair_stream: `auto`, `true` or `false`.
        bf16: compute under autocast, as a training run with `bf16: true` does.

    Raises:
        ValueError: an adapter whose rows are longer than those of the batch; `pair_stream: true`, and it cannot be.
    """

    def __init__(self, model, *, pair_stream: str = "auto", bf16: bool = False):
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            raise ValueError("A model must not have a prompt-learning adapter, whose rows are longer than the pairs'.")
        base = model.get_base_model() if is_peft_model(model) else model
        add_fused_lm_head(base)
        self._model, self._backbone, self._bf16 = model, base.base_model, bf16
        self._streams = PairStreams(pair_stream, [model])
        self._tolerance = 0.1 if bf16 or model.dtype != torch.float32 else 1e-4  # as in training

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], *targets: Tensor) -> list[Tensor]:
        """Score.

        Args:
            inputs: a collated batch of pairs.
            targets: each `(2B, N)`, the tokens to be scored at the places of the completion tokens.

        Returns:
            `(2B, N)` nats, float32, for each of `targets`; zero outside the completion.
        """
        device = self._model.device
        inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask", "completion_mask")}
        batch = _Batch(inputs, inputs["completion_mask"][:, 1:].bool())
        every = torch.cat([each.to(device) for each in targets])  # (k·2B, N)
        places = batch.mask.repeat(len(targets), 1)
        with torch.autocast(device.type, torch.bfloat16) if self._bf16 else nullcontext():
            if self._streams.to_be_compared:
                self._compare(batch, places, every)
            forward = self._streamed if self._streams.take(batch) else self._plain
            logps = forward(batch, places, every).float()
        return list(logps.chunk(len(targets)))

    def _streamed(self, batch: _Batch, places: Tensor, targets: Tensor) -> Tensor:
        stream, rows = batch.stream, batch.mask.size(0)
        copies = places.size(0) // rows
        several = replace(
            stream,
            positions=stream.positions.repeat(copies),
            rows=torch.cat([stream.rows + i * rows for i in range(copies)]),
            columns=stream.columns.repeat(copies),
        )
        return score(self._model, self._backbone, several, places, targets).log_probs

    def _plain(self, batch: _Batch, places: Tensor, targets: Tensor) -> Tensor:
        rows, columns = places.nonzero(as_tuple=True)
        kwargs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        at = (rows % batch.mask.size(0), columns)
        return score_places(
            self._model, self._backbone, at, (rows, columns), targets, use_cache=False, **kwargs
        ).log_probs

    def _compare(self, batch: _Batch, places: Tensor, targets: Tensor) -> None:
        self._streams.compare(
            lambda: self._streamed(batch, places, targets)[places],
            lambda: self._plain(batch, places, targets)[places],
            tolerance=self._tolerance,
            largest=lambda difference: difference.item(),
            padded_tokens=batch.inputs["input_ids"].numel(),
            stream_tokens=batch.stream.input_ids.numel(),
        )
