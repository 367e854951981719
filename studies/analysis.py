"""From the records of a study to comparisons: over seeds, at equal KL, along a frontier. numpy and scipy alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from sampo.io.records import Record
from sampo.lab.settings import SFT, Settings

from .plan import GRID

FEW_SEEDS = 3  # with fewer nothing is decided
HEADLINE = Settings()
KL_LEVELS = (1.0, 2.0, 4.0)  # at which methods are compared
WIN_RATES = {"all": 0.7, "long": 0.6, "short": 0.6}  # and on each group, chosen so that most reach them
_FREE = ("seed", "group", "method", "learning_rate", "beta", "bias")  # what may differ between the runs of a study
_CHANGES = ("length_penalty_start", "length_penalty_lr")


class Spread(NamedTuple):
    """Mean over seeds with its 95 % t interval; without one for a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def side(self) -> int:
        """1 or -1 where the interval lies on one side of 0, else 0; 0 as well for fewer than `FEW_SEEDS`."""
        if self.low is None or self.high is None or self.n < FEW_SEEDS:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def over_seeds(values: Sequence[float]) -> Spread | None:
    """One value per seed; None without any."""
    from scipy.stats import t

    n = len(values)
    if n == 0:
        return None
    mean = float(np.mean(values))
    if n == 1:
        return Spread(mean, None, None, 1)
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Spread(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Cell:
    """One run and its numbers; undefined ones are omitted."""

    seed: int
    group: str
    method: str
    learning_rate: float
    beta: float
    bias: float
    changes: tuple[tuple[str, Any], ...]
    numbers: dict[str, float]

    @property
    def is_headline(self) -> bool:
        """Whether it differs from the headline setting in seed, group and method only."""
        return self.is_at(HEADLINE.learning_rate, HEADLINE.beta)

    def is_at(self, learning_rate: float, beta: float, bias: float = HEADLINE.bias) -> bool:
        """Whether it is this cell of the grid, or this bias, without changes."""
        return (self.learning_rate, self.beta, self.bias, self.changes) == (learning_rate, beta, bias, ())


class Study:
    """The finished runs of one study.

    Attributes:
        cells: all runs but the starts.
        starts: numbers of the supervised start of each seed.

    Raises:
        ValueError: the records are of studies with different settings.
    """

    def __init__(self, records: Iterable[Record]):
        runs: dict[str, dict[str, Record]] = {}
        for record in records:
            runs.setdefault(record.key, {})[record.name] = record
        self.starts: dict[int, dict[str, float]] = {}
        self.cells: list[Cell] = []
        shared = {}
        for found in runs.values():
            config = next(iter(found.values())).config
            numbers = {name: record.value for name, record in found.items() if record.value is not None}
            if config["method"] == SFT:
                self.starts[config["seed"]] = numbers
            elif "train_seconds" in numbers:  # written last
                self.cells.append(_cell(config, numbers))
                settings = {n: config[n] for n in vars(HEADLINE) if n not in _FREE}
                shared[tuple(settings.items())] = settings
        if len(shared) > 1:
            raise ValueError(
                f"The records must be of one study, got {len(shared)} different settings beside learning rate, beta "
                "and bias. Split them."
            )
        self.cells = [cell for cell in self.cells if cell.seed in self.starts]

    def values(self, name: str, where: Callable[[Cell], bool]) -> dict[int, float]:
        """One number per seed; `where` must leave one run per seed."""
        found: dict[int, float] = {}
        for cell in self.cells:
            if name in cell.numbers and where(cell):
                if cell.seed in found:
                    raise ValueError(f"`where` must leave one run per seed, got several for seed {cell.seed}.")
                found[cell.seed] = cell.numbers[name]
        return found

    def headline(self, method: str, group: str, name: str, *, bias: float = HEADLINE.bias) -> dict[int, float]:
        """A number of each seed in the headline setting, or under annotators with another bias."""

        def where(cell: Cell) -> bool:
            at = cell.is_at(HEADLINE.learning_rate, HEADLINE.beta, bias)
            return at and (cell.method, cell.group) == (method, group)

        return self.values(name, where)

    def grid(self, method: str, group: str) -> dict[int, list[Cell]]:
        """Of each seed the runs in the cells of the grid of learning rate and beta."""
        found: dict[int, list[Cell]] = {seed: [] for seed in self.starts}
        for cell in self.cells:
            if (cell.method, cell.group, cell.bias, cell.changes) == (method, group, HEADLINE.bias, ()):
                found[cell.seed].append(cell)
        return found

    def start(self, name: str) -> dict[int, float]:
        """A number of each seed's start."""
        return {seed: numbers[name] for seed, numbers in self.starts.items() if name in numbers}


def _cell(config: dict[str, Any], numbers: dict[str, float]) -> Cell:
    changes = tuple((name, config[name]) for name in _CHANGES if name in config)
    return Cell(**{name: config[name] for name in _FREE}, changes=changes, numbers=numbers)


def paired(first: dict[int, float], second: dict[int, float]) -> Spread | None:
    """Spread of first minus second over the seeds that both have."""
    return over_seeds([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def interpolate(cells: Sequence[Cell], name: str, *, by: str, level: float) -> float | None:
    """A number where `by` reaches `level`, interpolated along the runs of one method and seed.

    Runs are ordered by the logarithm of `by`, which must be positive; where `level` lies outside their range nothing
    is said.
    """
    points = sorted((c.numbers[by], c.numbers[name]) for c in cells if c.numbers.get(by, 0) > 0 and name in c.numbers)
    if len(points) < 2 or not points[0][0] <= level <= points[-1][0]:
        return None
    x, y = zip(*points, strict=True)
    return float(np.interp(np.log(level), np.log(x), y))


def interpolate_grid(
    study: Study, method: str, group: str, name: str, *, level: float, by: str = "kl"
) -> dict[int, float]:
    """`interpolate` over the method's grid of learning rate and beta, one value per seed that has one."""
    values = {seed: interpolate(cells, name, by=by, level=level) for seed, cells in study.grid(method, group).items()}
    return {seed: value for seed, value in values.items() if value is not None}


def complete_grids(study: Study, method: str, group: str) -> dict[int, dict[tuple[float, float], Cell]]:
    """Runs of a method by learning rate and beta, for each seed with a complete grid."""
    grids = {seed: {(c.learning_rate, c.beta): c for c in cells} for seed, cells in study.grid(method, group).items()}
    return {seed: cells for seed, cells in grids.items() if cells.keys() >= set(GRID)}


def tuned(study: Study, method: str, group: str) -> dict[int, Cell]:
    """Of each seed the run in the cell of the grid that has the highest mean win rate over the other seeds.

    So a seed has no part in the choice of what it is measured by, and every method has the same cells to choose from.
    Seeds with an incomplete grid are ignored; with a single seed nothing is chosen.
    """
    grids = complete_grids(study, method, group)

    def best_without(seed: int) -> tuple[float, float]:
        others = [cells for other, cells in grids.items() if other != seed]
        return max(GRID, key=lambda cell: sum(cells[cell].numbers["win_rate"] for cells in others))

    return {seed: cells[best_without(seed)] for seed, cells in grids.items()} if len(grids) > 1 else {}


def first_reaching(study: Study, method: str, group: str, win_rate: float) -> dict[int, dict[str, float]]:
    """`kl` and `tokens` where a method first reaches a win rate, of each seed in which it does.

    A seed's runs over the whole grid are ordered by KL, from its start on, and win rate and tokens interpolated
    between neighbours, linearly in √KL, the distance of arXiv 2210.10760. A seed whose start has that win rate already
    says nothing.
    """
    found = {}
    for seed, cells in complete_grids(study, method, group).items():
        runs = [{**study.starts[seed], "kl": 0.0}, *(cell.numbers for cell in cells.values())]
        points = sorted((max(run["kl"], 0.0) ** 0.5, run["win_rate"], run["tokens"]) for run in runs)
        for (d0, wins0, tokens0), (d1, wins1, tokens1) in pairwise(points):
            if wins0 >= win_rate:
                break
            if wins1 >= win_rate:
                share = (win_rate - wins0) / (wins1 - wins0)
                distance = d0 + share * (d1 - d0)
                found[seed] = {"kl": distance**2, "tokens": tokens0 + share * (tokens1 - tokens0)}
                break
    return found


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points (tokens, quality) that no other one beats by being as short and better, or shorter."""

    def beaten(i: int) -> bool:
        tokens, quality = points[i]
        return any(t <= tokens and q >= quality and (t, q) != (tokens, quality) for t, q in points)

    return [i for i in range(len(points)) if not beaten(i)]


def prediction(study: Study, name: str, where: Callable[[Cell], bool] = lambda cell: True) -> Spread | None:
    """Spearman's correlation of a number known before training with the change of length after it.

    Of each seed over its runs, then the spread over seeds: runs of a seed share their world and their start, so they
    are no independent evidence. The change is log(tokens / tokens of the start). A seed with fewer than five runs, or
    with runs that are all alike, is left out.
    """
    from scipy.stats import spearmanr

    correlations = []
    for seed, start in study.starts.items():
        cells = [c for c in study.cells if c.seed == seed and name in c.numbers and where(c)]
        before = [c.numbers[name] for c in cells]
        change = [np.log(c.numbers["tokens"] / start["tokens"]) for c in cells]
        if len(cells) >= 5 and np.ptp(before) > 0 and np.ptp(change) > 0:
            correlations.append(float(spearmanr(before, change).statistic))
    return over_seeds(correlations)
