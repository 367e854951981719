"""What `python -m studies.run` runs, in which order, and the options of the smaller studies. No torch, for `--help`.

The order is breadth first: every stage gives every method the same, so that wherever it is stopped, what is there is a
fair picture. A stage is a seed and a part: the headline setting, the sweeps over annotators' bias and over the start
and rate of the learned penalty, and the grid of learning rate and beta.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sampo.lab.methods import SLOPE, STUDY_METHODS
from sampo.lab.settings import GROUPS, SFT, STUDY_GROUPS, Run, Settings

SEEDS = 5
GRID = tuple((rate, beta) for rate in (2e-4, 5e-4) for beta in (0.05, 0.1, 0.3))  # of each method on each group
# on pairs of equal length the weights of all other methods are DPO's, and a length penalty is 0; SamPO is the check
EQUAL_METHODS = ("dpo", "sampo", "mean", "otpo", "decay", "tdpo1", "tdpo2", "dpop", "sampo_iterative")
BIASES = (0.0, 1.0, 2.0, 4.0)  # beside the headline's
BIAS_METHODS = (
    *("dpo", "sampo", "sampo_rejected_learned", "dpo_learned", "sampo_rejected"),
    *("dpo_balanced", "rejected_learned_balanced", "rejected_learned_dataset_balanced", "dpo_learned_balanced"),
)
PENALTY_METHODS = ("sampo_rejected_learned", "dpo_learned")
PENALTY_BIASES = (0.5, 2.0)
PENALTY_RATES = (0.01, 0.05, 0.2)
PENALTY_STARTS = (0.0, SLOPE)


def small_parser(name: str, description: str, seeds: int) -> argparse.ArgumentParser:
    """The parser of a smaller study, `python -m studies.NAME`."""
    parser = argparse.ArgumentParser(prog=f"python -m studies.{name}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("study-results"), metavar="DIR", help="records and starts")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help="number of seeds")
    parser.add_argument("--report", action="store_true", help="run nothing; analyse the existing records")
    return parser


def study_plan(settings: Settings, *, seeds: int = SEEDS) -> list[Run]:
    """All runs of the study in the order of running, each once.

    Args:
        settings: the headline setting; sweeps and grid change its bias, learning rate and beta.
        seeds: number of seeds.
    """
    runs: dict[Run, None] = {}  # a set that keeps the order
    for run in _stages(settings, seeds):
        runs.setdefault(run)
    return list(runs)


def _stages(settings: Settings, seeds: int) -> Iterator[Run]:
    softest, hardest = GRID[2], GRID[3]
    for seed in range(seeds):
        yield from headline(settings, seed)
        if seed == min(1, seeds - 1):  # between two seeds and more of them
            for early in range(seed + 1):
                yield from bias_sweep(settings, early)
        if seed == min(2, seeds - 1):  # with the headline three points of a frontier
            yield from grid(settings, 0, "all", [softest, hardest])
            yield from penalty_sweep(settings, 0)
    for group in GROUPS:
        yield from grid(settings, 0, group)
    for seed in range(seeds):
        yield from bias_sweep(settings, seed)
        yield from penalty_sweep(settings, seed)
        for group in GROUPS:
            yield from grid(settings, seed, group)


def headline(settings: Settings, seed: int) -> Iterator[Run]:
    """The start, and every method on every group."""
    yield Run(seed, "", SFT, settings)
    for group in STUDY_GROUPS:
        methods = EQUAL_METHODS if group == "equal" else STUDY_METHODS
        yield from (Run(seed, group, method, settings) for method in methods)


def grid(settings: Settings, seed: int, group: str, cells: Sequence[tuple[float, float]] = GRID) -> Iterator[Run]:
    """Learning rate and beta, every method in every cell."""
    for rate, beta in cells:
        cell = replace(settings, learning_rate=rate, beta=beta)
        yield from (Run(seed, group, method, cell) for method in STUDY_METHODS)


def bias_sweep(settings: Settings, seed: int) -> Iterator[Run]:
    """Annotators who like length more, or less, on mixed pairs."""
    for bias in BIASES:
        yield from (Run(seed, "all", method, replace(settings, bias=bias)) for method in BIAS_METHODS)


def penalty_sweep(settings: Settings, seed: int) -> Iterator[Run]:
    """Start and rate of the learned penalty; the start at 0 with the default rate is the method itself."""
    for bias in PENALTY_BIASES:
        for method in PENALTY_METHODS:
            for start in PENALTY_STARTS:
                for rate in PENALTY_RATES:
                    changes: tuple = (("length_penalty_start", start),) if start else ()
                    changes += (("length_penalty_lr", rate),) if rate != 0.05 else ()
                    yield Run(seed, "all", method, replace(settings, bias=bias), changes)
