"""Pairs and prompts that occur more than once, within a split and across splits, by 64-bit hashes of their text."""

from dataclasses import dataclass

import numpy as np

from .scan import PairNumbers


@dataclass(frozen=True)
class Duplicates:
    """Duplicates within one split.

    Attributes:
        pairs: number of pairs.
        prompts: number of different prompts.
        repeated: pairs that repeat an earlier one.
        contradicted: pairs that also occur in the split with their responses swapped.
    """

    pairs: int
    prompts: int
    repeated: int
    contradicted: int


@dataclass(frozen=True)
class SplitOverlap:
    """Prompts and pairs that two splits share.

    Attributes:
        first: name of one split.
        second: name of the other.
        prompts: different prompts that are in both.
        pairs_of_second: pairs of the second split whose prompt is in the first.
        same_pairs: pairs of the second split that are in the first unchanged.
        swapped_pairs: pairs of the second split that are in the first with their responses swapped.
    """

    first: str
    second: str
    prompts: int
    pairs_of_second: int
    same_pairs: int
    swapped_pairs: int


def count_duplicates(pairs: PairNumbers) -> Duplicates:
    """Count the duplicates within a split."""
    n = len(pairs.pair_hash)
    return Duplicates(
        pairs=n,
        prompts=len(np.unique(pairs.prompt_hash)),
        repeated=n - len(np.unique(pairs.pair_hash)),
        contradicted=int(np.isin(pairs.swapped_hash, pairs.pair_hash).sum()),
    )


def find_overlap(first: str, a: PairNumbers, second: str, b: PairNumbers) -> SplitOverlap:
    """Count the prompts and pairs of split `b` that split `a` also has."""
    return SplitOverlap(
        first,
        second,
        prompts=len(np.intersect1d(a.prompt_hash, b.prompt_hash)),
        pairs_of_second=int(np.isin(b.prompt_hash, a.prompt_hash).sum()),
        same_pairs=int(np.isin(b.pair_hash, a.pair_hash).sum()),
        swapped_pairs=int(np.isin(b.swapped_hash, a.pair_hash).sum()),
    )
