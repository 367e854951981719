"""Slow, plain implementations written from the papers' equations: what the tests compare with. No torch."""

import math
import statistics
from fractions import Fraction

MASK64 = 2**64 - 1


def splitmix64(x: int) -> int:
    """The published generator's output for the state x (Steele, Lea & Flood 2014), in Python's big integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def row_keys(tokens: list[int], seed: int, epoch: int, stream: int = 0) -> list[int]:
    """One key per token of an unpadded row."""
    row, golden = row_state(tokens, seed, epoch, stream)
    return [splitmix64(row + i * golden & MASK64) >> 1 for i in range(len(tokens))]


def row_key(tokens: list[int], seed: int, epoch: int, stream: int = 0) -> int:
    """The key of an unpadded row as a whole."""
    row, golden = row_state(tokens, seed, epoch, stream)
    return splitmix64(row - golden & MASK64) >> 1


def row_state(tokens: list[int], seed: int, epoch: int, stream: int) -> tuple[int, int]:
    """Hash of a row, and the step from one position to the next."""
    golden = 0x9E3779B97F4A7C15
    total = sum(splitmix64(splitmix64(token) + i * golden & MASK64) for i, token in enumerate(tokens)) & MASK64
    fingerprint = splitmix64(total ^ len(tokens))
    run = 0
    for part in (seed, epoch, stream):
        run = splitmix64(run ^ (part & MASK64))
    return splitmix64(fingerprint ^ run), golden


def dataset_budget(name: str, own: int, total_own: int, total_other: int, key: int) -> int | float:
    """Tokens that a response of `own` tokens keeps of the data set's budget; methods of fractions do not round."""
    kept = own * min(Fraction(1), Fraction(total_other, total_own))
    if name == "expected":
        return max(float(kept), 1.0)
    whole = math.floor(kept)
    return max(whole + (key % total_own >= (1 - (kept - whole)) * total_own), 1)


def smallest(values: list[float], count: int) -> set[int]:
    """Indices of the `count` smallest values."""
    return set(sorted(range(len(values)), key=lambda i: values[i])[:count])


def weights(
    name,
    own,
    other,
    *,
    keys=None,
    log_ratios=None,
    end=None,
    whole=False,
    gamma=1.0,
    tail=0.5,
    budget=None,
    given=None,
) -> list[float]:
    """Weights of one response of `own` tokens beside a rival of `other` tokens, from the equations.

    `whole`: this side is not thinned. `end`: index of an end token that must be kept, or None. `budget`: in place of
    the number of tokens that both responses have.
    """
    keep = own if whole else min(own, other) if budget is None else budget
    if name == "all":
        return [1.0] * own
    if name == "mean":
        return [1 / own] * own
    if name == "mean_rescaled":
        return [(own + other) / 2 / own] * own
    if name == "prefix":
        return [1.0 if t < keep else 0.0 for t in range(own)]
    if name in ("column", "otpo"):  # of `otpo`, from `transport_weights`
        return list(given)
    if name == "ld":
        return [1.0 if t < keep else tail for t in range(own)]
    if name == "decay":
        return [gamma**t for t in range(own)]
    if name == "expected":
        if end is None:
            return [keep / own] * own
        return [1.0 if t == end else (keep - 1) / (own - 1) for t in range(own)]  # where own is 1, t is end
    if name not in ("sampo", "top_k"):
        raise NotImplementedError(f"There is no slow reference for {name!r}: add your method here.")
    values = list(keys) if name == "sampo" else [-r for r in log_ratios]
    if end is not None:
        values[end] = -math.inf
    kept = smallest(values, keep)
    return [1.0 if t in kept else 0.0 for t in range(own)]


def transport_weights(chosen, rejected, reg=1.0, mass_reg=0.2) -> tuple[list[float], list[float]]:
    """OTPO's weights of both responses from their hidden states, by Sinkhorn's scaling until it stands still."""
    cost = [[math.dist(a, b) + 1e-6 for b in rejected] for a in chosen]
    largest = max(1.0, max(map(max, cost)))
    kernel = [[math.exp(-c / largest / reg) for c in row] for row in cost]
    u, v, power, change = [1.0] * len(chosen), [1.0] * len(rejected), mass_reg / (mass_reg + reg), 1.0
    while change > 1e-13:
        before = u
        u = [sum(k * y for k, y in zip(row, v, strict=True)) ** -power for row in kernel]
        v = [sum(row[j] * x for row, x in zip(kernel, u, strict=True)) ** -power for j in range(len(v))]
        change = max(abs(x - y) for x, y in zip(u, before, strict=True))
    plan = [[x * k * y for k, y in zip(row, v, strict=True)] for x, row in zip(u, kernel, strict=True)]
    scale = min(len(u), len(v)) / sum(map(sum, plan))
    return [scale * sum(row) for row in plan], [scale * sum(column) for column in zip(*plan, strict=True)]


def correlation_and_slope(x: list[float], y: list[float]) -> tuple[float, float]:
    """Pearson's r of x and y, and the slope of y on x, by the two-pass formula."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    sxx, syy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
    return sxy / math.sqrt(sxx * syy), sxy / sxx


def win_rate(rows: list[tuple]) -> dict[str, float]:
    """Rows of (prompt, sample, order, preference or nan), both orders asked of each pair; by plain loops."""
    pairs: dict[tuple, dict[int, list[float]]] = {}
    for prompt, sample, order, preference in rows:
        orders = pairs.setdefault((prompt, sample), {0: [], 1: []})
        if not math.isnan(preference):
            orders[order].append(preference)
    prompts: dict = {}
    failed = half = 0
    for (prompt, _), orders in pairs.items():
        scores = prompts.setdefault(prompt, [])
        if orders[0] and orders[1]:
            scores.append((sum(orders[0]) / len(orders[0]) + sum(orders[1]) / len(orders[1])) / 2)
        elif orders[0] or orders[1]:
            half += 1
        else:
            failed += 1
    means = [sum(s) / len(s) for s in prompts.values() if s]
    return {
        "rate": sum(means) / len(means),
        "wins": sum(m > 0.5 + 1e-9 for m in means),
        "ties": sum(abs(m - 0.5) < 1e-9 for m in means),
        "losses": sum(m < 0.5 - 1e-9 for m in means),
        "comparisons": sum(len(s) for s in prompts.values()),
        "failed": failed,
        "half_failed": half,
        "lost_prompts": sum(not s for s in prompts.values()),
    }


def order_consistency(rows: list[tuple]) -> tuple[float, float, int]:
    """Share of pairs with one verdict in both orders, preference for the first answer, pairs; means over prompts."""
    table = {(prompt, sample, order): p for prompt, sample, order, p in rows if not math.isnan(p)}
    same: dict = {}
    first: dict = {}
    for prompt, sample, order in table:
        if order == 0 and (prompt, sample, 1) in table:
            a, b = table[prompt, sample, 0], table[prompt, sample, 1]
            same.setdefault(prompt, []).append((a > 0.5) == (b > 0.5) and (a < 0.5) == (b < 0.5))
            first.setdefault(prompt, []).append((a + 1 - b) / 2)
    mean = [sum(sum(v) / len(v) for v in d.values()) / len(d) for d in (same, first)]
    return mean[0], mean[1], sum(len(v) for v in same.values())


def robust_scale(values) -> float:
    """1.4826 times the median of the absolute deviations from the median that are not 0."""
    deviations = [abs(v - statistics.median(values)) for v in values]
    return 1.4826 * statistics.median(d for d in deviations if d > 1e-9 * max(map(abs, values)))


def length_controlled(preference, system_length, baseline_length, difficulty, minimize) -> dict[str, float]:
    """The length-controlled win rate from its formula, one row per prompt, by a general optimiser."""
    n = len(preference)
    difference = [a - b for a, b in zip(system_length, baseline_length, strict=True)]
    scale = robust_scale(difference)
    hard = [0.0] * n if difficulty is None else [float(d) for d in difficulty]

    def loss(b):
        total = 1e-4 / 2 * (b[0] ** 2 + b[2] ** 2)
        for y, d, h in zip(preference, difference, hard, strict=True):
            eta = b[0] * math.tanh(d / scale) + b[1] + b[2] * h
            total += max(eta, 0) + math.log1p(math.exp(-abs(eta))) - y * eta
        return total

    b = minimize(loss, [0.0, 0.0, 0.0], tol=1e-10).x
    rate = sum(1 / (1 + math.exp(-b[1] - b[2] * h)) for h in hard) / n
    return {"rate": rate, "slope": b[0]}


def joint_difficulty(systems, prior_sd: float, ridge: float, minimize) -> list[float]:
    """Difficulty of prompts from several systems' (preference, difference of lengths), all on the same prompts."""
    prompts = len(systems[0][0])

    def loss(b):
        hard, rest = b[:prompts], b[prompts:]
        total = sum(h * h for h in hard) / 2 / prior_sd**2 + ridge / 2 * sum(r * r for r in rest)
        for m, (preference, difference) in enumerate(systems):
            scale = robust_scale(difference)
            for i in range(prompts):
                eta = rest[2 * m] * math.tanh(difference[i] / scale) + rest[2 * m + 1] + hard[i]
                total += max(eta, 0) + math.log1p(math.exp(-abs(eta))) - preference[i] * eta
        return total

    return minimize(loss, [0.0] * (prompts + 2 * len(systems)), tol=1e-10).x[:prompts]


def logistic_slope(x, y) -> tuple[float, float]:
    """Slope of a logistic regression and its standard error from the information matrix, by textbook Newton steps."""
    a = b = 0.0
    for _ in range(30):
        s0 = s1 = h00 = h01 = h11 = 0.0
        for xi, yi in zip(x, y, strict=True):
            p = 1 / (1 + math.exp(-a * xi - b))
            s1, s0 = s1 + (yi - p) * xi, s0 + (yi - p)
            h11, h01, h00 = h11 + p * (1 - p) * xi * xi, h01 + p * (1 - p) * xi, h00 + p * (1 - p)
        det = h11 * h00 - h01 * h01
        a, b = a + (h00 * s1 - h01 * s0) / det, b + (h11 * s0 - h01 * s1) / det
    return a, math.sqrt(h00 / det)


def alpaca_eval_fit(rows, labels, weights, groups: int, minimize) -> list[float]:
    """AlpacaEval 2's estimator from its description: an L1 penalty whose strength five folds choose by log loss.

    `rows` of three features, `labels` in [0, 1], `weights`; scikit-learn deals rows out to folds from the last one.
    Its liblinear minimises |b| + C · Σ w · loss, and its grid has ten C from 1e-4 to 1e4. With numpy for its speed.
    """
    import numpy as np

    order = np.argsort(np.full(len(labels), 2))[::-1]
    folds = np.array([list(order).index(i) % groups for i in range(len(labels))])

    x, y, w = np.asarray(rows), np.asarray(labels), np.asarray(weights)

    def fit(c, part):
        a, t, v = x[part], y[part], w[part]

        def objective(b):  # b = b⁺ − b⁻, both at least 0
            eta = a @ (b[:3] - b[3:])
            slope = c * a.T @ (v * (1 / (1 + np.exp(-eta)) - t))
            loss = b.sum() + c * (v * (np.logaddexp(0, eta) - t * eta)).sum()
            return loss, np.concatenate([1 + slope, 1 - slope])

        done = minimize(objective, np.full(6, 0.01), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 6, tol=1e-13)
        return done.x[:3] - done.x[3:]

    def held_out(c):
        total = 0.0
        for fold in range(groups):
            inside = folds != fold
            eta = x[~inside] @ fit(c, inside)
            total += (w[~inside] * (np.logaddexp(0, eta) - y[~inside] * eta)).sum()
        return total

    return list(fit(min(np.logspace(-4, 4, 10), key=held_out), np.ones(len(y), dtype=bool)))
