"""A trainer that computes each optimiser step in full micro-batches (`max_tokens_per_forward`).

What it relies on in transformers 5.23, pinned by tests/training/test_trl_contract.py: `get_batch_samples` returns all
batches of a step, and `training_step` is called with each of them in turn, the last time with gradients synchronised.
It divides the loss of a call by `current_gradient_accumulation_steps`, their number. All else that the loop counts, it
counts by these batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .micro_batches import MICRO_BATCH, MicroBatch, Step
from .token_budget import find_token_budget


class MicroBatchTrainer(Trainer):
    """For trainers whose `compute_loss` knows `MICRO_BATCH` among its inputs."""

    args: Any
    passes: Any
    run_state: Any

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the batches are kept for the step."""
        self._batches_of_step, n_items = super().get_batch_samples(*args, **kwargs)
        return self._batches_of_step, n_items

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in transformers; with `max_tokens_per_forward` the last batch of a step brings the pairs of all."""
        if self.args.max_tokens_per_forward is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if inputs is not self._batches_of_step[-1]:
            return torch.zeros((), device=self.args.device)
        step = self.share_pairs(self._batches_of_step)
        for part in step:
            with self._synchronised_at_the_last(model, part):
                super().training_step(model, {**part.inputs, MICRO_BATCH: part}, num_items_in_batch)
        return torch.stack(step.losses).sum() / self.current_gradient_accumulation_steps

    @property
    def tokens_per_forward(self) -> int:
        """`max_tokens_per_forward`; `auto` is found out once in a run and saved with its checkpoints."""
        if not self.args.finds_tokens_per_forward:
            return self.args.max_tokens_per_forward
        if self.run_state.tokens_per_forward is None:
            self.run_state.tokens_per_forward = find_token_budget(self)
        return self.run_state.tokens_per_forward

    def share_pairs(self, batches: list[dict[str, Any]]) -> Step:
        """The pairs of some batches in micro-batches, shared with the other processes."""
        return Step(
            [self._prepare_inputs(batch) for batch in batches],
            self.tokens_per_forward,
            padded=not self.passes.packed,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            gather=self.accelerator.gather,
        )

    @contextmanager
    def _synchronised_at_the_last(self, model: Any, part: MicroBatch) -> Iterator[None]:
        """Gradients of processes, and DeepSpeed's step, wait for the last micro-batch."""
        state, sync = self.accelerator.gradient_state, self.accelerator.sync_gradients
        state._set_sync_gradients(sync and part.is_last)
        try:
            if part.is_last or self.is_deepspeed_enabled:
                yield
            else:
                with self.accelerator.no_sync(model):
                    yield
        finally:
            state._set_sync_gradients(sync)
