"""Random rows of `sampo diagnose`, for tests of what is computed and drawn from them."""

import numpy as np

from sampo.diagnostics.findings import PairScores


def made_up(n=400, seed=0, per_prompt=1, slope=0.02, noise=1.0) -> tuple[PairScores, np.ndarray]:
    """Rewards that grow with length and with a quality that itself goes with length."""
    rng = np.random.default_rng(seed)
    prompts = np.arange(n) // per_prompt
    tokens = rng.integers(1, 200, size=(2, n))
    quality = (tokens[0] - tokens[1]) / 50 + rng.normal(size=n)
    ratio = slope * tokens + noise * rng.normal(size=(2, n)) + np.stack([quality / 2, -quality / 2])
    counts = np.stack([tokens // 2, tokens - tokens // 2], axis=2)
    sums = counts * rng.normal(size=counts.shape)
    kinds = np.concatenate([counts, np.zeros_like(counts)], axis=2)
    return PairScores(
        prompts=prompts,
        tokens=tokens,
        pressure={"all": rng.normal(size=n) - 0.01 * (tokens[0] - tokens[1])},
        margins={"all": ratio[0] - ratio[1]},
        log_ratio=ratio,
        place_sums=sums,
        place_counts=counts,
        class_sums=kinds * 0.5,
        class_counts=kinds,
    ), quality
