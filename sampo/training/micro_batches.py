"""A batch of pairs in micro-batches: which pairs go through the model together when a forward takes few tokens.

The loss of a batch is the mean over its pairs, so the gradients of its micro-batches, each times its share of the
pairs, add up to that of the batch; the activations of one micro-batch are in memory at a time. The last one computes
the loss and the metrics of the full batch, with the log-probs of the earlier ones as constants.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..scoring.lm_head import PER_TOKEN
from .batch import Draw, PairBatch, Scored

MICRO_BATCH = "micro_batch"  # among the inputs of a step: which micro-batch they are


def pair_tokens(inputs: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """What each pair of a collated batch costs, in tokens: `(B,)` in a stream, and `(B,)` the longer of its two rows.

    A stream contains the prompt once, without its last token, and no branch has its last token. Rows without the same
    prompt share nothing.
    """
    real, completion = inputs["attention_mask"].bool(), inputs["completion_mask"].bool()
    rows = real.sum(dim=1)  # (2B,)
    prompts = rows - completion.sum(dim=1)
    chosen, rejected = (inputs["input_ids"] * (real & ~completion)).chunk(2)
    first, second = prompts.chunk(2)
    shared = (chosen == rejected).all(dim=1) & (first == second)
    in_stream = (rows - 1).view(2, -1).sum(dim=0) - shared * (first - 1).clamp(min=0)
    return in_stream.tolist(), rows.view(2, -1).amax(dim=0).tolist()


def group_pairs(streamed: list[int], longest: list[int], limit: int, *, padded: bool, at_least: int = 1) -> list[list]:
    """Pairs in as few groups of like size as the limit allows.

    Args:
        streamed: tokens of each pair in a stream.
        longest: tokens of the longer row of each pair.
        limit: tokens of a group. A pair that is longer forms a group of its own.
        padded: count both rows of each pair at the length of the group's longest row, as the plain forward does.
        at_least: number of groups to begin with; as many as there are pairs at the most.

    Returns:
        Indices of the pairs of each group.
    """

    def cost(group: list[int]) -> int:
        return 2 * len(group) * max(longest[i] for i in group) if padded else sum(streamed[i] for i in group)

    size = longest if padded else streamed
    order = sorted(range(len(size)), key=lambda i: -size[i])
    groups: list[list[int]] = []
    for count in range(min(at_least, len(order)), len(order) + 1):
        if padded:  # like with like, for the longest row decides
            groups = [part.tolist() for part in torch.tensor(order).tensor_split(count)]
        else:  # the next largest to the smallest group
            groups = [[] for _ in range(count)]
            for i in order:
                min(groups, key=lambda group: sum(streamed[j] for j in group)).append(i)
        if all(cost(group) <= limit or len(group) == 1 for group in groups):
            break
    return groups


def take_pairs(inputs: dict[str, Tensor], pairs: list[int]) -> dict[str, Tensor]:
    """Some pairs of a collated batch, with no more padding than they need.

    Tensors of 2B rows are chosen rows first; those of B rows have one row a pair. The second dimension, where there is
    one, is a position in the row.
    """
    n_pairs, length = inputs["input_ids"].size(0) // 2, inputs["input_ids"].size(1)
    both = pairs + [i + n_pairs for i in pairs]
    longest = int(inputs["attention_mask"][both].sum(dim=1).max())
    taken = {}
    for name, value in inputs.items():
        rows = value[both if value.size(0) == 2 * n_pairs else pairs]
        taken[name] = rows if rows.dim() == 1 else rows[:, : longest + value.size(1) - length]
    return taken


def put_pairs(full: Tensor, pairs: list[int], part: Tensor, *, n_pairs: int) -> None:
    """Write the rows of a micro-batch, one or two a pair, to their positions in the batch of `n_pairs`, in place."""
    rows = pairs if part.size(0) == len(pairs) else pairs + [i + n_pairs for i in pairs]
    if full.dim() == 1:
        full[rows] = part
    else:
        full[rows, : part.size(1)] = part


class MicroBatches:
    """A batch on its way through the models, one micro-batch after the other.

    Args:
        inputs: the collated batch.
        groups: the pairs of each micro-batch.
    """

    def __init__(self, inputs: dict[str, Any], groups: list[list[int]]):
        self.inputs, self.groups = inputs, groups
        self.n_pairs = inputs["input_ids"].size(0) // 2
        self.chosen_tokens = int(inputs["completion_mask"][: self.n_pairs, 1:].sum())
        self.done: list[Scored] = []

    def __iter__(self) -> "Iterator[MicroBatch]":
        return (MicroBatch(self, number) for number in range(len(self.groups)))


@dataclass
class MicroBatch:
    """One of them.

    Attributes:
        of: all of them.
        number: from 0.
    """

    of: MicroBatches
    number: int

    @property
    def inputs(self) -> dict[str, Any]:
        """Its pairs as a collated batch, and itself under the key `MICRO_BATCH`."""
        return {**take_pairs(self.of.inputs, self.of.groups[self.number]), MICRO_BATCH: self}

    @property
    def is_last(self) -> bool:
        """Whether all others are done."""
        return self.number == len(self.of.groups) - 1

    @property
    def share(self) -> float:
        """Its part in the mean over the pairs of the batch."""
        return len(self.of.groups[self.number]) / self.of.n_pairs

    def keep(self, scored: Scored) -> None:
        """Keep its log-probs, without gradient, for the last one."""
        output = SimpleNamespace(**{name: _detached(getattr(scored.output, name)) for name in PER_TOKEN})
        self.of.done.append(replace(scored, output=output, logps=scored.logps.detach()))

    def join(self, full: PairBatch, scored: Scored) -> Scored:
        """The log-probs of the full batch; those of the last micro-batch keep their gradient.

        Args:
            full: the batch.
            scored: of the last micro-batch.
        """
        parts = [*self.of.done, scored]

        def join(values: list[Any]) -> Any:
            if values[0] is None:
                return None
            rows = full.n_pairs * values[0].size(0) // len(self.of.groups[0])
            joined = values[0].new_zeros((rows, *full.mask.shape[1:])[: values[0].dim()])
            for group, part in zip(self.of.groups, values, strict=True):
                put_pairs(joined, group, part, n_pairs=full.n_pairs)
            return joined

        def draw(k: int) -> Draw:
            names = ("weights", "ref_sums", "scores")
            return Draw(**{name: join([getattr(part.draws[k], name) for part in parts]) for name in names})

        output = {name: join([getattr(part.output, name) for part in parts]) for name in PER_TOKEN}
        return Scored(
            output=SimpleNamespace(**output),
            logps=join([part.logps for part in parts]),
            ref_logps=join([part.ref_logps for part in parts]),
            draws=[draw(k) for k in range(len(scored.draws))],
            pressure=join([part.pressure for part in parts]),
        )


def _detached(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach()
