"""Slow, plain implementations written from the papers' equations: what the tests compare with. No torch."""

import math

MASK64 = 2**64 - 1


def splitmix64(x: int) -> int:
    """The published generator's output for the state x (Steele, Lea & Flood 2014), in Python's big integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def row_keys(tokens: list[int], seed: int, epoch: int, stream: int = 0) -> list[int]:
    """One key per token of an unpadded row."""
    golden = 0x9E3779B97F4A7C15
    total = sum(splitmix64(splitmix64(token) + i * golden & MASK64) for i, token in enumerate(tokens)) & MASK64
    fingerprint = splitmix64(total ^ len(tokens))
    run = 0
    for part in (seed, epoch, stream):
        run = splitmix64(run ^ (part & MASK64))
    row = splitmix64(fingerprint ^ run)
    return [splitmix64(row + i * golden & MASK64) >> 1 for i in range(len(tokens))]


def smallest(values: list[float], count: int) -> set[int]:
    """Indices of the `count` smallest values."""
    return set(sorted(range(len(values)), key=lambda i: values[i])[:count])


def weights(name, own, other, *, keys=None, log_ratios=None, end=None, whole=False, gamma=1.0) -> list[float]:
    """Weights of one response of `own` tokens beside a rival of `other` tokens, from the equations.

    `whole`: this side is not thinned. `end`: index of an end token that must be kept, or None.
    """
    keep = own if whole else min(own, other)
    if name == "all":
        return [1.0] * own
    if name == "mean":
        return [1 / own] * own
    if name == "mean_rescaled":
        return [(own + other) / 2 / own] * own
    if name == "prefix":
        return [1.0 if t < keep else 0.0 for t in range(own)]
    if name == "decay":
        return [gamma**t for t in range(own)]
    if name == "expected":
        if end is None:
            return [keep / own] * own
        return [1.0 if t == end else (keep - 1) / (own - 1) for t in range(own)]
    values = list(keys) if name == "sampo" else [-r for r in log_ratios]
    if end is not None:
        values[end] = -math.inf
    kept = smallest(values, keep)
    return [1.0 if t in kept else 0.0 for t in range(own)]


def correlation_and_slope(x: list[float], y: list[float]) -> tuple[float, float]:
    """Pearson's r of x and y, and the slope of y on x, by the two-pass formula."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    sxx, syy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
    return sxy / math.sqrt(sxx * syy), sxy / sxx
