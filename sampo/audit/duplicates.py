"""Pairs and prompts that come more than once, within a split and across splits, by 64-bit hashes of their text."""

from dataclasses import dataclass

import numpy as np

from .scan import PairNumbers


@dataclass(frozen=True)
class Repeats:
    """What one split says more than once.

    Attributes:
        pairs: number of pairs.
        prompts: number of different prompts.
        repeated: pairs that repeat an earlier one.
        contradicted: pairs that stand in the split with their sides swapped too.
    """

    pairs: int
    prompts: int
    repeated: int
    contradicted: int


@dataclass(frozen=True)
class Overlap:
    """What two splits share.

    Attributes:
        first: name of one split.
        second: name of the other.
        prompts: different prompts that are in both.
        pairs_of_second: pairs of the second split whose prompt is in the first.
        same_pairs: pairs of the second split that are in the first as they are.
        swapped_pairs: pairs of the second split that are in the first with their sides swapped.
    """

    first: str
    second: str
    prompts: int
    pairs_of_second: int
    same_pairs: int
    swapped_pairs: int


def repeats(pairs: PairNumbers) -> Repeats:
    """Count the repetitions within a split."""
    n = len(pairs.pair_hash)
    return Repeats(
        pairs=n,
        prompts=len(np.unique(pairs.prompt_hash)),
        repeated=n - len(np.unique(pairs.pair_hash)),
        contradicted=int(np.isin(pairs.swapped_hash, pairs.pair_hash).sum()),
    )


def overlap(first: str, a: PairNumbers, second: str, b: PairNumbers) -> Overlap:
    """Count what the split `b` repeats of the split `a`."""
    return Overlap(
        first,
        second,
        prompts=len(np.intersect1d(a.prompt_hash, b.prompt_hash)),
        pairs_of_second=int(np.isin(b.prompt_hash, a.prompt_hash).sum()),
        same_pairs=int(np.isin(b.pair_hash, a.pair_hash).sum()),
        swapped_pairs=int(np.isin(b.swapped_hash, a.pair_hash).sum()),
    )
