"""Logistic regression with soft labels, weights and a ridge; several fits at once, which makes a bootstrap cheap."""

import numpy as np
from scipy.special import expit


def newton(design: np.ndarray, y: np.ndarray, weight: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """Logistic regressions with soft labels, several at once.

    Args:
        design: `(R, n, k)`.
        y: `(n,)` in [0, 1].
        weight: `(R, n)`, 0 or more.
        ridge: `(k,)` above 0; half of it times the square of a coefficient is added to the negative log-likelihood,
            so that labels which are all 0, all 1 or separated have finite coefficients too.

    Returns:
        `(R, k)` coefficients.
    """
    beta = np.zeros((design.shape[0], design.shape[2]))

    def objective(b: np.ndarray) -> np.ndarray:
        eta = np.einsum("rnk,rk->rn", design, b)
        return (weight * (np.logaddexp(0, eta) - y * eta)).sum(axis=1) + (ridge * b**2).sum(axis=1) / 2

    value = objective(beta)
    for _ in range(200):
        p = expit(np.einsum("rnk,rk->rn", design, beta))
        gradient = np.einsum("rnk,rn->rk", design, weight * (p - y)) + ridge * beta
        step = np.linalg.solve(curvature_of(design, weight * p * (1 - p), ridge), gradient[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, 8 / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        for _ in range(40):  # halve what would climb
            new_value = objective(beta - step)
            climbs = new_value > value + 1e-12 * (1 + np.abs(value))
            if not climbs.any():
                break
            step[climbs] /= 2
        beta, value = beta - step, new_value
        if np.abs(step).max() < 1e-11:
            break
    return beta


def curvature_of(design: np.ndarray, weight: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """Second derivative of the objective: `(R, n, k)` and `(R, n)` -> `(R, k, k)`."""
    return np.swapaxes(design * weight[:, :, None], 1, 2) @ design + np.diag(ridge)


def sum_by_prompt(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Sums over the rows of each prompt: `(n, k)` -> `(P, k)`."""
    out = np.zeros((int(codes.max()) + 1, rows.shape[1]))
    np.add.at(out, codes, rows)
    return out
