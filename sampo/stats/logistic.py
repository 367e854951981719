"""Logistic regression with soft labels, weights and a ridge; several fits at once, for a fast bootstrap."""

import numpy as np
from scipy import stats
from scipy.special import expit

from .intervals import Estimate, undefined

SLOPE_RIDGE = 1e-8  # ridge on the slope in units of its scale: too small to matter where the slope is finite


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
        for _ in range(40):  # halve the steps that would increase the objective
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


def slope_through_zero(
    x: np.ndarray, y: np.ndarray, codes: np.ndarray, confidence: float = 0.95
) -> tuple[Estimate, np.ndarray]:
    """Slope of the log-odds on one difference, P = σ(slope · x), without an intercept.

    That is the model of two things in an arbitrary order: swapping them turns x into −x and y into 1 − y, and changes
    nothing. Every row has the same weight; the standard error is the sandwich's with the prompt as its unit.

    Args:
        x: `(n,)` differences.
        y: `(n,)` in [0, 1].
        codes: `(n,)` number of each row's prompt, from 0.
        confidence: of the interval.

    Returns:
        The slope, and `(P,)` the influence of each prompt on it: the sum of their squares is its variance, and the
        influences of two slopes on the same prompts give the variance of their difference. The slope is undefined,
        with influences of 0, where x predicts every y without an error: the likelihood then has no maximum.
    """
    clusters = int(codes.max()) + 1 if len(codes) else 0
    agrees = x * (2 * y - 1)
    if not len(x) or not x.any() or (agrees == np.abs(x)).all() or (agrees == -np.abs(x)).all():
        return undefined(clusters), np.zeros(clusters)
    scale = float(np.sqrt((x.astype(float) ** 2).mean()))
    scaled = x / scale
    ones = np.ones((1, len(scaled)))
    beta = float(newton(scaled[None, :, None], y, ones, np.array([SLOPE_RIDGE]))[0, 0])
    p = expit(beta * scaled)
    information = float((p * (1 - p) * scaled**2).sum())
    influence = np.bincount(codes, weights=(y - p) * scaled) / information / scale
    value = beta / scale
    if clusters == 1:
        return Estimate(value, None, None, None, 1), influence
    influence *= np.sqrt(clusters / (clusters - 1))
    se = float(np.sqrt((influence**2).sum()))
    half_width = float(stats.t.ppf((1 + confidence) / 2, clusters - 1)) * se
    return Estimate(value, value - half_width, value + half_width, se, clusters), influence


def lasso(design: np.ndarray, y: np.ndarray, weight: np.ndarray, penalty: float) -> np.ndarray:
    """One logistic regression with an L1 penalty: the minimum of Σ w · loss + penalty · Σ |b|.

    Args:
        design: `(n, k)` with a handful of columns.
        y: `(n,)` in [0, 1].
        weight: `(n,)`, 0 or more.
        penalty: above 0.

    Returns:
        `(k,)` coefficients, by proximal Newton steps: each minimises the local parabola plus the penalty.
    """
    beta = np.zeros(design.shape[1])

    def objective(b: np.ndarray) -> float:
        eta = design @ b
        return float((weight * (np.logaddexp(0, eta) - y * eta)).sum() + penalty * np.abs(b).sum())

    value = objective(beta)
    for _ in range(100):
        p = expit(design @ beta)
        gradient = design.T @ (weight * (p - y))
        curvature = (design * (weight * p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(len(beta))
        step = _nearest_minimum(gradient, curvature, beta, penalty) - beta
        size = 1.0
        while (new := objective(beta + size * step)) > value + 1e-13 * abs(value) and size > 1e-9:
            size /= 2
        beta, done = beta + size * step, abs(value - new) <= 1e-13 * abs(value)
        value = new
        if done:
            break
    return beta


def _nearest_minimum(gradient: np.ndarray, curvature: np.ndarray, beta: np.ndarray, penalty: float) -> np.ndarray:
    """Minimum of the parabola at `beta` plus the penalty, by coordinate descent."""
    found = beta.copy()
    for _ in range(500):
        largest = 0.0
        for j in range(len(found)):
            slope = gradient[j] + curvature[j] @ (found - beta) - curvature[j, j] * found[j]
            new = -np.sign(slope) * max(abs(slope) - penalty, 0.0) / curvature[j, j]
            largest = max(largest, abs(new - found[j]))
            found[j] = new
        if largest < 1e-10:
            break
    return found
