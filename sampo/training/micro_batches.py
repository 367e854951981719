"""A batch of pairs in pieces: which pairs go through the model together when a forward may take only so many tokens.

A piece is a group of whole pairs. The loss of a batch is the mean over its pairs, so the gradients of the pieces, each
times its share of the pairs, add up to that of the batch; one piece's activations are in memory at a time.
"""

import torch
from torch import Tensor


def pair_tokens(inputs: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """What each pair of a collated batch costs, in tokens: `(B,)` in a stream, and `(B,)` the longer of its two rows.

    In a stream the prompt stands once, but for its last token, and no branch has its last token. Rows without the same
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


def put_pairs(whole: Tensor, pairs: list[int], part: Tensor, *, n_pairs: int) -> None:
    """Write a piece's rows, one or two a pair, to their places in those of the batch of `n_pairs`, in place."""
    rows = pairs if part.size(0) == len(pairs) else pairs + [i + n_pairs for i in pairs]
    if whole.dim() == 1:
        whole[rows] = part
    else:
        whole[rows, : part.size(1)] = part
