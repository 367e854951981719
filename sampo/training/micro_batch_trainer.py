"""A trainer that back-propagates a batch in micro-batches of complete pairs (`max_tokens_per_forward`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .micro_batches import MicroBatch, MicroBatches, group_pairs, pair_tokens


class MicroBatchTrainer(Trainer):
    """For trainers whose `compute_loss` knows `MICRO_BATCH` among its inputs."""

    args: Any
    passes: Any

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in transformers; with `max_tokens_per_forward` a batch is back-propagated in micro-batches."""
        groups = self.micro_batch_groups(inputs)
        if len(groups) == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        for part in MicroBatches(self._prepare_inputs(inputs), groups):
            with self._synchronised_at_the_last(model, part):
                loss = super().training_step(model, part.inputs, num_items_in_batch)
        return loss  # the last one's is that of the full batch

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

    def micro_batch_groups(self, inputs: dict[str, Any]) -> list[list[int]]:
        """The pairs of each forward; as many groups on every process, because a forward waits for all processes."""
        if self.args.max_tokens_per_forward is None:
            return [[]]
        packed, longest = pair_tokens(inputs)
        limit, padded = self.args.max_tokens_per_forward, not self.passes.packed
        groups = group_pairs(packed, longest, limit, padded=padded)
        counts = self.accelerator.gather(torch.tensor([len(groups), -len(longest)], device=self.args.device))
        most, fewest_pairs = counts.view(-1, 2).amax(dim=0).tolist()
        if most > -fewest_pairs:
            raise RuntimeError(
                f"`max_tokens_per_forward` needs as many forwards on every process, got a batch that has to be cut "
                f"into {most} micro-batches on one process and has {-fewest_pairs} pairs on another. Raise it, or set "
                "`dataloader_drop_last: true`."
            )
        return group_pairs(packed, longest, limit, padded=padded, at_least=most)
