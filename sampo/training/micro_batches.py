"""The pairs of an optimiser step in micro-batches: as few forward passes as `max_tokens_per_forward` allows.

All pairs of a step are laid out together, whatever batch and process they come from. Each keeps the weight that it has
in its own batch, so the gradients of the micro-batches add up to those of the batches, and the activations of one
micro-batch are in memory at a time. The log-probs then return to their batches, for loss and metrics.

With several processes every process gets all pairs of the step (`(2B, L)` token ids and masks, a few megabytes), each
computes its share, and the log-probs are gathered in the same way. Sending each pair to its destination alone would
move fewer bytes, but needs point-to-point messages that not every backend of torch.distributed has.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .batch import Scored

MICRO_BATCH = "micro_batch"  # among the inputs of a step: which micro-batch they are
PAIR_WEIGHT, TOKEN_WEIGHT = "pair_weight", "token_weight"  # columns of a step's pairs, beside those of the batches

PairTable = dict[str, Tensor]  # columns `(P, k)` or `(P, k, positions)` of P pairs with k = 1 or 2 rows each
PairGroups = list[list[int]]  # pairs of each forward


def pair_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """What each pair of a collated batch costs, in tokens: `(B, 2)`, in a stream and of the longer of its two rows.

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
    return torch.stack([in_stream, rows.view(2, -1).amax(dim=0)], dim=1)


# --- which pairs go together -----------------------------------------------------------------------------------------


def group_cost(group: list[int], streamed: list[int], longest: list[int], *, padded: bool) -> int:
    """Tokens of a forward pass over some pairs; the arguments are those of `group_pairs`."""
    return 2 * len(group) * max(longest[i] for i in group) if padded else sum(streamed[i] for i in group)


def group_pairs(
    streamed: list[int], longest: list[int], limit: int, *, padded: bool, processes: int = 1
) -> PairGroups:
    """Pairs in as few groups of like cost as the limit allows.

    Args:
        streamed: tokens of each pair in a stream.
        longest: tokens of the longer row of each pair.
        limit: tokens of a group. A pair that is longer forms a group of its own.
        padded: count both rows of each pair at the length of the group's longest row, as the plain forward does.
        processes: the number of groups is a multiple of it, unless there are too few pairs.

    Returns:
        Indices of the pairs of each group.
    """
    sizes = longest if padded else streamed
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    groups = (_fill_with_like_sizes if padded else _fill_first_fit)(order, sizes, limit)
    count = min(-(-len(groups) // processes) * processes, len(order))
    balanced = (_split_like_sizes if padded else _spread)(order, sizes, count)

    def cost(group: list[int]) -> int:
        return group_cost(group, streamed, longest, padded=padded)

    if all(cost(group) <= limit or len(group) == 1 for group in balanced):
        groups = balanced
    while len(groups) < count:
        largest = max((group for group in groups if len(group) > 1), key=cost)
        groups.remove(largest)
        groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return groups


def _fill_first_fit(order: list[int], sizes: list[int], limit: int) -> PairGroups:
    """Each pair, the largest first, into the first group with room: at most 11/9 of the fewest groups, and one."""
    groups: PairGroups = []
    room: list[int] = []
    for i in order:
        number = next((number for number, left in enumerate(room) if sizes[i] <= left), len(groups))
        if number == len(groups):
            groups.append([])
            room.append(limit)
        groups[number].append(i)
        room[number] -= sizes[i]
    return groups


def _fill_with_like_sizes(order: list[int], longest: list[int], limit: int) -> PairGroups:
    """The next largest pair into the last group, if it has room: the fewest groups, for the longest row decides."""
    groups: PairGroups = []
    for i in order:
        if groups and 2 * (len(groups[-1]) + 1) * longest[groups[-1][0]] <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _spread(order: list[int], sizes: list[int], count: int) -> PairGroups:
    """The next largest pair to the smallest group."""
    groups: PairGroups = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for i in order:
        total, number = heap[0]
        groups[number].append(i)
        heapq.heapreplace(heap, (total + sizes[i], number))
    return groups


def _split_like_sizes(order: list[int], longest: list[int], count: int) -> PairGroups:
    """At most so many groups of like sizes, of which the most expensive one is as cheap as it can be."""
    low, high = 2 * longest[order[0]], 2 * longest[order[0]] * len(order)
    while low < high:
        middle = (low + high) // 2
        enough = len(_fill_with_like_sizes(order, longest, middle)) <= count
        low, high = (low, middle) if enough else (middle + 1, high)
    return _fill_with_like_sizes(order, longest, low)


def deal_groups(groups: PairGroups, costs: list[int], processes: int) -> list[PairGroups]:
    """PairGroups of like cost at the same time, and of like cost in total, to each process.

    Args:
        groups: of all pairs.
        costs: tokens of each.
        processes: how many.

    Returns:
        Of each process as many groups; the last one is empty where there are too few.
    """
    order = [group for _, group in sorted(zip(costs, groups, strict=True), key=lambda each: -each[0])]
    order += [[]] * (-len(order) % processes)
    rounds = [order[i : i + processes] for i in range(0, len(order), processes)]
    for each in rounds[1::2]:
        each.reverse()
    return [list(groups) for groups in zip(*rounds, strict=True)]


# --- pairs in a table ------------------------------------------------------------------------------------------------


def by_pair(rows: dict[str, Tensor], n_pairs: int) -> PairTable:
    """From `(kB, …)`, chosen rows first, to `(B, k, …)`: k is 2, or 1 for a column with one value a pair."""
    return {name: value.unflatten(0, (-1, n_pairs)).transpose(0, 1) for name, value in rows.items()}


def by_row(pairs: PairTable) -> dict[str, Tensor]:
    """From `(B, k, …)` to `(kB, …)`."""
    return {name: value.transpose(0, 1).flatten(0, 1) for name, value in pairs.items()}


def widen_table(pairs: PairTable, positions: int) -> PairTable:
    """Add positions at the end of the rows; a negative number cuts them off."""
    return {name: pad(value, (0, positions)) if value.dim() == 3 else value for name, value in pairs.items()}


def join_tables(tables: list[PairTable]) -> PairTable:
    """All pairs of tables of one width."""
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


# --- a step ----------------------------------------------------------------------------------------------------------


class Step:
    """The pairs of an optimiser step on their way through the models.

    Iterating gives the micro-batches of this process: as many on every process, because a forward pass may wait for
    all processes.

    Args:
        batches: the collated batches of this process, prepared.
        limit: tokens of a forward pass.
        padded: as in `group_pairs`.
        processes: how many share the pairs.
        rank: of this process.
        gather: a tensor of one shape, of all processes, in the order of their ranks.

    Attributes:
        losses: of each batch, when the last micro-batch is done.
    """

    def __init__(
        self,
        batches: list[dict[str, Tensor]],
        limit: int,
        *,
        padded: bool,
        processes: int = 1,
        rank: int = 0,
        gather: Callable[[Tensor], Tensor] = lambda values: values,
    ):
        self.batches, self.rank, self._gather = batches, rank, gather
        self.losses: list[Tensor] = []
        self._sizes = [len(batch["input_ids"]) // 2 for batch in batches]
        device = batches[0]["input_ids"].device
        counts = gather(torch.tensor([sum(self._sizes)], device=device)).tolist()
        self._most = max(counts)
        tokens = self._gather_pairs({"tokens": torch.cat([pair_tokens(each) for each in batches])}, self._most)
        streamed, longest = tokens["tokens"].T.tolist()
        known = [process * self._most + i for process, count in enumerate(counts) for i in range(count)]
        self._longest, self._length = longest, max(longest)
        sizes = [streamed[i] for i in known], [longest[i] for i in known]
        groups = group_pairs(*sizes, limit, padded=padded, processes=processes)
        costs = [group_cost(group, *sizes, padded=padded) for group in groups]
        self._dealt = deal_groups([[known[i] for i in group] for group in groups], costs, processes)
        self._shortest = min(known, key=longest.__getitem__)
        tables = [self._table_of(batch, n_pairs) for batch, n_pairs in zip(batches, self._sizes, strict=True)]
        self._pairs = self._gather_pairs(join_tables(tables), self._most)
        self._done: list[PairTable] = []

    def _table_of(self, batch: dict[str, Tensor], n_pairs: int) -> PairTable:
        """The pairs of a batch, as long as the longest of the step, and their weights in the loss of the batch."""
        chosen_tokens = batch["completion_mask"][:n_pairs, 1:].sum().clamp(min=1)
        each = torch.ones(n_pairs, device=chosen_tokens.device)
        weights = {PAIR_WEIGHT: each / n_pairs, TOKEN_WEIGHT: each / chosen_tokens}
        table = by_pair({**batch, **weights}, n_pairs)
        return widen_table(table, self._length - batch["input_ids"].size(1))

    def _gather_pairs(self, table: PairTable, most: int) -> PairTable:
        """The pairs of all processes, those of each filled up to `most`."""

        def filled(value: Tensor) -> Tensor:
            return torch.cat([value, value.new_zeros((most - len(value), *value.shape[1:]))])

        return {name: self._gather(filled(value).contiguous()) for name, value in table.items()}

    def __iter__(self) -> "Iterator[MicroBatch]":
        groups = self._dealt[self.rank]
        return (MicroBatch(self, number, pairs) for number, pairs in enumerate(groups))

    @property
    def n_forwards(self) -> int:
        """Number of micro-batches of each process."""
        return len(self._dealt[self.rank])

    def take(self, pairs: list[int]) -> PairTable:
        """Some pairs, with no more padding than they need.

        A process that has no pairs for its last forward pass repeats the shortest of the step, with the weight 0.
        """
        taken = {name: value[pairs or [self._shortest]] for name, value in self._pairs.items()}
        if not pairs:
            taken |= {name: torch.zeros_like(taken[name]) for name in (PAIR_WEIGHT, TOKEN_WEIGHT)}
        longest = max(self._longest[i] for i in pairs or [self._shortest])
        return widen_table(taken, longest - self._length)

    def keep(self, scored: Scored, pairs: list[int]) -> None:
        """Keep the log-probs of a micro-batch, without gradient, for the batches of its pairs."""
        table = by_pair(scored.tensors(), max(len(pairs), 1))
        table = widen_table(table, self._length - 1 - table["logps"].size(2))
        self._done.append({name: value[: len(pairs)] for name, value in table.items()})

    def scored_batches(self) -> list[Scored]:
        """The log-probs of each batch of this process, when all micro-batches are done."""
        computed = [[i for group in groups for i in group] for groups in self._dealt]
        most = max(map(len, computed))
        found = self._gather_pairs(join_tables(self._done), most)
        place = {i: process * most + k for process, pairs in enumerate(computed) for k, i in enumerate(pairs)}
        own = torch.tensor([place[self.rank * self._most + i] for i in range(sum(self._sizes))])
        tables = [{name: value[at] for name, value in found.items()} for at in own.split(self._sizes)]
        return [
            Scored.of(by_row(widen_table(table, batch["input_ids"].size(1) - self._length)))
            for table, batch in zip(tables, self.batches, strict=True)
        ]


@dataclass
class MicroBatch:
    """Some pairs of a step.

    Attributes:
        step: whose pairs they are.
        number: of the micro-batch, from 0.
        pairs: their indices among those of the step; none on a process for which none is left.
    """

    step: Step
    number: int
    pairs: list[int]

    @cached_property
    def _rows(self) -> dict[str, Tensor]:
        return by_row(self.step.take(self.pairs))

    @property
    def inputs(self) -> dict[str, Any]:
        """The pairs as a collated batch."""
        return {name: value for name, value in self._rows.items() if name not in (PAIR_WEIGHT, TOKEN_WEIGHT)}

    @property
    def pair_weights(self) -> Tensor:
        """`(B,)` the weight of each pair in the loss of its batch, which is a mean over pairs."""
        return self._rows[PAIR_WEIGHT]

    @property
    def token_weights(self) -> Tensor:
        """`(B,)` the weight of each chosen token in a mean over the chosen tokens of its batch."""
        return self._rows[TOKEN_WEIGHT]

    @property
    def is_last(self) -> bool:
        """Whether all others are done."""
        return self.number == self.step.n_forwards - 1

    def keep(self, scored: Scored) -> None:
        """Keep its log-probs for the batches of its pairs."""
        self.step.keep(scored, self.pairs)
