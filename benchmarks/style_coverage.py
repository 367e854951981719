"""How well the win rate at equal style finds a known truth: bias, error and coverage of its 95 % interval.

    python benchmarks/style_coverage.py --out measurements/style_coverage.jsonl

simulates systems whose answers differ in length, headings, lists, bold parts and code, and judges with known slopes on
all of them. It writes one record per cell; `python docs/build.py` makes the table of docs/evaluation.md from them.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.special import expit

from sampo.evaluation.results.length_control import ExtrapolationWarning, length_controlled
from sampo.evaluation.results.style_control import style_controlled
from sampo.evaluation.results.verdicts import Comparisons
from sampo.evaluation.results.win_rate import win_rate
from sampo.io import records as results
from sampo.stats.intervals import wilson

SIZES = (50, 200, 800)
RATES = {
    "style": lambda c: style_controlled(c, allow_extrapolation=True).rate,
    "length": lambda c: length_controlled(c, allow_extrapolation=True).rate,
    "raw": lambda c: win_rate(c).rate,
}
SLOPES = {"length": 0.8, "headers": 0.5, "lists": 0.5, "bold": 0.3, "code": -0.3}  # of the judge, on tanh(Δ / scale)
SCALES = {"length": 500.0, "headers": 1.5, "lists": 4.0, "bold": 3.0, "code": 1.0}
# feature -> its amount, from a standard normal number: log-normal lengths, and counts that are often 0
AMOUNTS: dict[str, Callable] = {
    "length": lambda rng, z: np.round(np.exp(6 + 0.6 * z)),
    "headers": lambda rng, z: rng.poisson(np.exp(0.5 * z)),
    "lists": lambda rng, z: rng.poisson(3 * np.exp(0.7 * z)),
    "bold": lambda rng, z: rng.poisson(2 * np.exp(0.7 * z)),
    "code": lambda rng, z: rng.poisson(0.3 * np.exp(0.7 * z)),
}


def world(correlation: float, shift: float, strength: float, samples: int = 1) -> Callable:
    """Comparisons of a system and a baseline, and the true win rate at equal style.

    Args:
        correlation: of the normal numbers behind the features of one answer.
        shift: of the system's, in their standard deviations.
        strength: of the system, in logits.
        samples: per prompt; with several, prompts differ by a standard deviation of one logit.
    """

    def draw(rng: np.random.Generator, n: int) -> tuple[float, Comparisons]:
        rows, own = n * samples, np.sqrt(1 - correlation)
        common = np.sqrt(correlation) * rng.normal(size=(rows, 2)) + shift * np.array([1.0, 0.0])
        style = {name: amount(rng, common + own * rng.normal(size=(rows, 2))) for name, amount in AMOUNTS.items()}
        style = {name: column.astype(float) for name, column in style.items()}
        hard = np.repeat(rng.normal(size=n), samples) if samples > 1 else np.zeros(rows)
        eta = strength + hard
        for name, column in style.items():
            eta = eta + SLOPES[name] * np.tanh((column[:, 0] - column[:, 1]) / SCALES[name])
        comparisons = Comparisons(
            prompt=np.repeat(np.arange(n), samples),
            preference=(rng.random(rows) < expit(eta)) * 1.0,
            system_length=style["length"][:, 0],
            baseline_length=style["length"][:, 1],
            style=style,
        )
        return _mean_of_logits(strength, samples), comparisons

    return draw


def _mean_of_logits(strength: float, samples: int) -> float:
    """True mean of σ(strength + difficulty), the difficulty as in `world`."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float(weights @ expit(strength + (nodes if samples > 1 else 0 * nodes)) / weights.sum())


WORLDS = {  # row of the table
    "independent features, same style": world(0.0, 0.0, 0.3),
    "independent features, system has more": world(0.0, 0.5, 0.3),
    "correlated features (.5), same style": world(0.5, 0.0, 0.3),
    "correlated features (.5), system has more": world(0.5, 0.5, 0.3),
    "correlated features (.9), system has more": world(0.9, 0.5, 0.3),
    "correlated features (.5), weak system has more": world(0.5, 0.5, -1.5),
    "the same, four samples of each prompt": world(0.5, 0.5, -1.5, samples=4),
}


def simulate(draw: Callable, n: int, repeats: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """Bias, root mean square error and coverage of each of `RATES`."""
    rng = np.random.default_rng(seed)
    errors: dict[str, list[float]] = {name: [] for name in RATES}
    hits: dict[str, list[bool]] = {name: [] for name in RATES}
    for _ in range(repeats):
        truth, comparisons = draw(rng, n)
        for name, rate in RATES.items():
            found = rate(comparisons)
            errors[name].append(found.value - truth)
            hits[name].append(found.low <= truth <= found.high)
    return {
        name: (float(np.mean(e)), float(np.sqrt(np.mean(np.square(e)))), float(np.mean(hits[name])))
        for name, e in errors.items()
    }


def measure(repeats: int, seed: int, command: str, only: str = "") -> Iterator[results.Record]:
    """Three records per cell and rate, of the rows whose name holds `only`."""
    where = results.provenance()
    for position, (name, draw) in enumerate(WORLDS.items()):
        for n in SIZES if only in name else ():
            for rate, (bias, rms, coverage) in simulate(draw, n, repeats, seed + 1000 * position + n).items():
                numbers = {"bias": (bias, None), "rms_error": (rms, None)}
                numbers["coverage"] = (coverage, wilson(coverage, repeats))
                for kind, (value, interval) in numbers.items():
                    yield results.Record(
                        name=f"style/{kind}",
                        value=value,
                        n=repeats,
                        interval=interval,
                        config={"world": name, "prompts": n, "rate": rate},
                        seed=seed,
                        command=command,
                        **where,
                    )


def style_coverage_table(records: list[results.Record]) -> str:
    """Rows: worlds; columns: prompts for the rate at equal style, and the other two rates at 200."""
    newest = {(r.name, r.config["world"], r.config["prompts"], r.config["rate"]): r for r in records}

    def cell(name: str, n: int, rate: str) -> str:
        bias, rms, coverage = (newest[f"style/{kind}", name, n, rate] for kind in ("bias", "rms_error", "coverage"))
        return f"{100 * bias.value:+.1f} ({100 * rms.value:.1f}), {100 * coverage.value:.1f} %"

    heads = [*(f"n = {n}" for n in SIZES), "equal length, n = 200", "raw, n = 200"]
    lines = [f"| simulated comparison | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in WORLDS:
        cells = [cell(name, n, "style") for n in SIZES] + [cell(name, 200, rate) for rate in ("length", "raw")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    one = records[-1]
    tail = (
        f"Points of bias (root mean square error), coverage of the 95 % interval; {one.n:,} simulated evaluations per"
    )
    return "\n".join([*lines, "", f"{tail} cell; `{one.command.split(' --only')[0]}`."])


def main() -> None:
    """Simulate, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name holds this; the others keep their records")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ExtrapolationWarning)
    command = f"python benchmarks/style_coverage.py --repeats {options.repeats} --seed {options.seed}"
    command += f" --only '{options.only}'" if options.only else ""
    results.append(options.out, measure(options.repeats, options.seed, command, options.only))
    sys.stdout.write(f"{style_coverage_table(results.read(options.out))}\n")


if __name__ == "__main__":
    main()
