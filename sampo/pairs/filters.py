"""Subsets of preference pairs by the lengths of their responses."""

import numpy as np


def balance(chosen: np.ndarray, rejected: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw pairs so that the longer response is the chosen one as often as the rejected one, for differences alike.

    Differences |T_w − T_l| are alike in one bin: 1, 2 to 3, 4 to 7, and so on by powers of two. Of each bin, pairs of
    the more frequent side are left out at random. Pairs of equal lengths stay.

    Args:
        chosen: `(n,)` int, lengths T_w of the chosen responses.
        rejected: `(n,)` int, lengths T_l of the rejected responses.
        seed: of the draw.

    Returns:
        `(n,)` bool: which pairs stay.
    """
    difference = np.asarray(chosen, dtype=np.int64) - np.asarray(rejected, dtype=np.int64)
    kept = difference == 0
    bins = np.frexp(np.abs(difference))[1]  # |d| = m · 2^bin with m in [0.5, 1): exact for integers
    generator = np.random.default_rng(seed)
    for number in np.unique(bins[~kept]):
        sides = [np.flatnonzero((bins == number) & (sign * difference > 0)) for sign in (1, -1)]
        size = min(map(len, sides))
        for side in sides:
            kept[generator.permutation(side)[:size]] = True
    return kept
