"""How often the 95 % intervals of an evaluation hold the truth, and how far control of length errs without overlap.

    python benchmarks/interval_coverage.py --out measurements/interval_coverage.jsonl

simulates judges and systems whose truth is known and writes one record per cell; `python docs/build.py` makes the
tables of docs/evaluation.md from them. `--repeats 50` takes seconds and means nothing.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from sampo.evaluation.results.difficulty import difficulty_from
from sampo.evaluation.results.length_control import ExtrapolationWarning, length_controlled
from sampo.evaluation.results.verdicts import Comparisons
from sampo.evaluation.results.win_rate import win_rate
from sampo.io import records as results
from sampo.stats.intervals import difference_interval, mean_interval, quantile_interval, rate_interval, wilson

SIZES = (10, 20, 50, 100, 400)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
Interval = tuple[float | None, float | None]


def scores(probabilities: tuple[float, float, float]) -> Callable:
    """Scores of wins, ties and losses: the interval, and the plain Wilson interval for as many coins."""
    truth = probabilities[0] + probabilities[1] / 2

    def draw(rng: np.random.Generator, n: int) -> tuple[float, Interval, Interval]:
        values = rng.choice([1.0, 0.5, 0.0], size=n, p=probabilities)
        found = rate_interval(values)
        return truth, (found.low, found.high), wilson(float(values.mean()), n)

    return draw


def soft(a: float, b: float) -> Callable:
    """A judge's probabilities, beta distributed."""

    def draw(rng, n):
        values = rng.beta(a, b, n)
        found = rate_interval(values)
        return a / (a + b), (found.low, found.high), wilson(float(values.mean()), n)

    return draw


def samples(rng, n):
    """Four samples per prompt, prompts differ: the interval, and the one that takes samples for prompts."""
    p = np.repeat(expit(rng.normal(0, 1.5, n)), 4)
    c = Comparisons(prompt=np.repeat(np.arange(n), 4), preference=(rng.random(4 * n) < p) * 1.0)
    found, naive = win_rate(c).rate, rate_interval(c.preference)
    return 0.5, (found.low, found.high), (naive.low, naive.high)


def paired(rng, n):
    """Two systems that differ on a quarter of the prompts, the first better on two thirds of these."""
    values = rng.choice([1.0, 0.0, -1.0], size=n, p=[1 / 6, 3 / 4, 1 / 12])
    found = difference_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(n)
    return 1 / 12, (found.low, found.high), (values.mean() - half, values.mean() + half)


def lengths(kind: str) -> Callable:
    """Lengths with the skewness of real answers (log-normal, 0.7): the interval, and Student's for the mean."""

    def draw(rng, n):
        values = np.exp(rng.normal(5, 0.7, n))
        if kind == "mean":
            found, half = mean_interval(values), 1.96 * values.std(ddof=1) / math.sqrt(n)
            return math.exp(5 + 0.245), (found.low, found.high), (values.mean() - half, values.mean() + half)
        level = {"median": 0.5, "p90": 0.9}[kind]
        found = quantile_interval(values, np.arange(n), level)
        truth = math.exp(5 + 0.7 * float(norm.ppf(level)))
        low = -math.inf if found.low is None else found.low
        return truth, (low, math.inf if found.high is None else found.high), None

    return draw


def controlled(strength: float, shift: float) -> Callable:
    """A judge with a slope of 1 on tanh(Δ / s): the interval at equal length, and that of the raw rate."""

    def draw(rng, n):
        difference = np.round(300 * rng.normal(shift, 1, n))
        preference = (rng.random(n) < expit(np.tanh(difference / 300) + strength)) * 1.0
        theirs = np.full(n, 3000.0)
        c = Comparisons(
            prompt=range(n), preference=preference, system_length=theirs + difference, baseline_length=theirs
        )
        found, raw = length_controlled(c, allow_extrapolation=True).rate, rate_interval(preference)
        return float(expit(strength)), (found.low, found.high), (raw.low, raw.high)

    return draw


# row of the table -> world, and what the last column compares with
WORLDS = {
    "win rate 50 %, no ties": (scores((0.5, 0.0, 0.5)), "plain Wilson"),
    "win rate 20 %, no ties": (scores((0.2, 0.0, 0.8)), "plain Wilson"),
    "win rate 45 %, half ties": (scores((0.2, 0.5, 0.3)), "plain Wilson"),
    "win rate 17 %, a fifth ties": (scores((0.07, 0.2, 0.73)), "plain Wilson"),
    "win rate 40 %, a judge's probabilities": (soft(0.8, 1.2), "plain Wilson"),
    "win rate 50 %, four samples per prompt": (samples, "samples taken for prompts"),
    "paired difference of 8 points": (paired, "±1.96 standard errors"),
    "win rate at equal length, even lengths": (controlled(0.3, 0.0), "raw rate"),
    "win rate at equal length, 79 % longer": (controlled(0.3, 0.8), "raw rate"),
    "win rate at equal length, weak system": (controlled(-1.5, 0.3), "raw rate"),
    "mean length": (lengths("mean"), "±1.96 standard errors"),
    "median length": (lengths("median"), None),
    "90th percentile of length": (lengths("p90"), None),
}


def cover(draw: Callable, n: int, repeats: int, seed: int) -> tuple[float, float | None]:
    """Share of intervals that hold the truth, ours and the one to compare with."""
    rng = np.random.default_rng(seed)
    ours, other = [], []
    for _ in range(repeats):
        truth, interval, compared = draw(rng, n)
        ours.append(interval[0] <= truth <= interval[1])
        if compared is not None:
            other.append(compared[0] <= truth <= compared[1])
    return float(np.mean(ours)), float(np.mean(other)) if other else None


SHAPES = {  # what the judge's logit really does with log2 of the ratio of lengths; the model knows only tanh
    "proportional to the log ratio": lambda x: 0.8 * x,
    "a step: longer or not": lambda x: 0.8 * np.sign(x),
    "only much longer helps": lambda x: 1.5 * np.maximum(x - 0.5, 0.0),
}


def error_of_control(share: float, shape: Callable, repeats: int, seed: int, n: int = 400) -> tuple[float, float]:
    """Mean error of the rate at equal length, in score, and the root mean square error."""
    rng = np.random.default_rng(seed)
    errors = []
    for _ in range(repeats):
        doublings = rng.normal(float(norm.ppf(share)) * 0.7, 0.7, n)
        preference = (rng.random(n) < expit(shape(doublings) - 0.4)) * 1.0
        theirs = np.exp(rng.normal(7, 0.5, n))
        c = Comparisons(
            prompt=range(n), preference=preference, system_length=theirs * 2**doublings, baseline_length=theirs
        )
        truth = expit(shape(np.zeros(1))[0] - 0.4)
        errors.append(length_controlled(c, allow_extrapolation=True).rate.value - truth)
    return float(np.mean(errors)), float(np.sqrt(np.mean(np.square(errors))))


CORRELATIONS = (0.0, 0.25, 0.5)  # of the difficulty of a prompt and the difference of lengths there
KNOWN = {"no difficulty": 0, "of one other system": 1, "of three other systems": 3, "the true one": None}


def error_with_difficulty(
    correlation: float, others: int | None, repeats: int, seed: int, n: int = 400
) -> tuple[float, float]:
    """Mean error of the rate at equal length where hard prompts have longer answers, and coverage of its interval.

    `others`: systems that the difficulty is estimated from; 0 for none, None for the true difficulty.
    """
    rng = np.random.default_rng(seed)
    truth = float(expit(1.5 * _normal_grid() - 0.5).mean())
    errors, hits = [], []
    for _ in range(repeats):
        hard = rng.normal(0, 1, n)
        system, *rest = (_of_difficulty(rng, hard, correlation, s) for s in (-0.5, *rng.normal(0, 0.5, others or 0)))
        known = dict(enumerate((1.5 * hard).tolist())) if others is None else difficulty_from(rest) if rest else None
        found = length_controlled(system, difficulty=known).rate
        errors.append(found.value - truth)
        hits.append(found.low <= truth <= found.high)
    return float(np.mean(errors)), float(np.mean(hits))


def _of_difficulty(rng: np.random.Generator, hard: np.ndarray, correlation: float, strength: float) -> Comparisons:
    noise = rng.normal(0, 1, len(hard))
    difference = 300 * (0.3 + correlation * hard + math.sqrt(1 - correlation**2) * noise)
    preference = (rng.random(len(hard)) < expit(np.tanh(difference / 300) + 1.5 * hard + strength)) * 1.0
    theirs = np.full(len(hard), 3000.0)
    return Comparisons(
        prompt=range(len(hard)), preference=preference, system_length=theirs + difference, baseline_length=theirs
    )


def _normal_grid() -> np.ndarray:
    return norm.ppf((np.arange(10_000) + 0.5) / 10_000)


def measure(repeats: int, seed: int, command: str, only: str = "") -> Iterator[results.Record]:
    """One record per cell, of the rows whose name holds `only`."""
    where = results.provenance()
    for position, (world, (draw, compared)) in enumerate(WORLDS.items()):
        if only not in world:
            continue
        for n in SIZES:
            ours, other = cover(draw, n, repeats, seed + 1000 * position + n)
            for name, value in (("coverage", ours), ("coverage/compared", other)):
                if value is not None:
                    yield results.Record(
                        name=name,
                        value=value,
                        n=repeats,
                        interval=wilson(value, repeats),
                        config={"world": world, "prompts": n, "compared": compared},
                        seed=seed,
                        command=command,
                        **where,
                    )
    for position, (shape, curve) in enumerate(SHAPES.items()):
        if only not in shape:
            continue
        for share in SHARES:
            bias, rms = error_of_control(share, curve, max(repeats // 10, 5), seed + 100_000 + 100 * position)
            for name, value in (("control/bias", bias), ("control/rms_error", rms)):
                yield results.Record(
                    name=name,
                    value=value,
                    n=max(repeats // 10, 5),
                    config={"shape": shape, "share_longer": share, "prompts": 400},
                    seed=seed,
                    command=command,
                    **where,
                )

    for position, (known, others) in enumerate(KNOWN.items()):
        if only not in known:
            continue
        for correlation in CORRELATIONS:
            count = max(repeats // 10, 5)
            bias, hits = error_with_difficulty(correlation, others, count, seed + 200_000 + 100 * position)
            for name, value in (("difficulty/bias", bias), ("difficulty/coverage", hits)):
                yield results.Record(
                    name=name,
                    value=value,
                    n=count,
                    config={"difficulty": known, "correlation": correlation, "prompts": 400},
                    seed=seed,
                    command=command,
                    **where,
                )


def _newest(records: list[results.Record], name: str) -> dict[str, results.Record]:
    return {record.key: record for record in records if record.name == name}


def coverage_table(records: list[results.Record]) -> str:
    """Rows: worlds; columns: prompts, and what another interval does at 100 of them."""
    ours, other = _newest(records, "coverage"), _newest(records, "coverage/compared")
    lines = [
        f"| 95 % interval of | {' | '.join(f'n = {n}' for n in SIZES)} | instead, n = 100 |",
        "|---" * (len(SIZES) + 2) + "|",
    ]
    for world, (_, compared) in WORLDS.items():
        cells = []
        for n in SIZES:
            key = results.config_key({"world": world, "prompts": n, "compared": compared})
            cells.append(f"{100 * ours[key].value:.1f}")
        key = results.config_key({"world": world, "prompts": 100, "compared": compared})
        last = f"{100 * other[key].value:.1f} ({compared})" if key in other else "–"
        lines.append(f"| {world} | {' | '.join(cells)} | {last} |")
    repeats = sorted({record.n for record in ours.values()})
    command = next(iter(ours.values())).command.split(" --only")[0]  # each cell has its own seed: parts add up to it
    counts = " or ".join(f"{n:,}" for n in repeats)
    return "\n".join([*lines, "", f"Per cent of {counts} simulated evaluations per cell; `{command}`."])


def overlap_table(records: list[results.Record]) -> str:
    """Rows: what the judge really does with length; columns: share of longer answers."""
    bias, rms = _newest(records, "control/bias"), _newest(records, "control/rms_error")
    lines = [
        f"| the judge's logit | {' | '.join(f'{share:.0%} longer' for share in SHARES)} |",
        "|---" * (len(SHARES) + 1) + "|",
    ]
    for shape in SHAPES:
        cells = []
        for share in SHARES:
            key = results.config_key({"shape": shape, "share_longer": share, "prompts": 400})
            cells.append(f"{100 * bias[key].value:+.1f} ({100 * rms[key].value:.1f})")
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    some = next(iter(bias.values()))
    tail = f"Points of bias (root mean square error) over {some.n:,} simulated evaluations of 400 prompts."
    return "\n".join([*lines, "", tail])


def difficulty_table(records: list[results.Record]) -> str:
    """Rows: what the fit knows of the difficulty; columns: how far it goes with length."""
    bias, hits = _newest(records, "difficulty/bias"), _newest(records, "difficulty/coverage")
    lines = [
        f"| difficulty in the fit | {' | '.join(f'r = {r:g}' for r in CORRELATIONS)} |",
        "|---" * (len(CORRELATIONS) + 1) + "|",
    ]
    for known in KNOWN:
        keys = [results.config_key({"difficulty": known, "correlation": r, "prompts": 400}) for r in CORRELATIONS]
        cells = [f"{100 * bias[key].value:+.1f} ({100 * hits[key].value:.0f} %)" for key in keys]
        lines.append(f"| {known} | {' | '.join(cells)} |")
    some = next(iter(bias.values()))
    tail = f"Points of bias (coverage of the 95 % interval) over {some.n:,} simulated evaluations of 400 prompts."
    return "\n".join([*lines, "", tail])


def main() -> None:
    """Simulate, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name holds this; the others keep their records")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ExtrapolationWarning)
    command = f"python benchmarks/interval_coverage.py --repeats {options.repeats} --seed {options.seed}"
    command += f" --only '{options.only}'" if options.only else ""
    results.append(options.out, measure(options.repeats, options.seed, command, options.only))
    found = results.read(options.out)
    sys.stdout.write(f"{coverage_table(found)}\n\n{overlap_table(found)}\n\n{difficulty_table(found)}\n")


if __name__ == "__main__":
    main()
