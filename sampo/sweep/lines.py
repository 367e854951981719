"""The lines of a sweep's tables, read from its records."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..io.records import Record
from ..report.numbers import estimate, number
from ..stats.intervals import Estimate
from .plan import GRID, START

SWEEP_COLUMNS: dict[str, tuple[str, str | int]] = {  # record -> head of its column, and how the number is written
    "pressure": ("pressure before", 3),
    "tokens_mean": ("tokens", 1),
    "tokens_ratio": ("length / start", 2),
    "ended": ("ended", "%"),
    "accuracy": ("accuracy", "%"),
    "accuracy_longer": ("chosen longer", "%"),
    "accuracy_shorter": ("chosen shorter", "%"),
    "accuracy_matched": ("equal length", "%"),
    "win_rate": ("win rate", "%"),
    "win_rate/equal_length": ("win rate at equal length", "%"),
    "kl": ("KL", 2),
}
SWEEP_LEGEND = (
    "pressure before: length pressure of the method's token weights on training pairs, before training; below 0 it "
    "lengthens. tokens: mean length of an answer to a held-out prompt, end token included. length / start: to the "
    "start's answers to the same prompts, geometric mean. ended: answers that end before the limit of tokens. "
    "accuracy: held-out pairs whose chosen response has the higher implicit reward (sum of log-ratios over all "
    "tokens, for every method), of all pairs, of those whose chosen response is longer or shorter, and of those whose "
    "lengths differ by at most a tenth. win rate: of the answers against the start's. Intervals are 95 %, over "
    "prompts, the seeds of a method averaged."
)


@dataclass
class ResultLine:
    """The start, a run, a method over its seeds, or two methods."""

    config: dict[str, Any]
    numbers: dict[str, Record] = field(default_factory=dict)

    def get(self, name: str) -> Estimate:
        """A number, possibly without a value."""
        record = self.numbers.get(name)
        return Estimate(None, None, None, None, 0) if record is None else estimate(record)

    def cell(self, name: str) -> str:
        """A number as text."""
        return number(self.get(name), SWEEP_COLUMNS[name][1]) if name in self.numbers else "–"

    @property
    def seeds(self) -> int:
        """Number of seeds of a method."""
        return len(self.config.get("seeds", []))


@dataclass(frozen=True)
class Lines:
    """All lines of a sweep, in the order of its records."""

    start: ResultLine
    runs: list[ResultLine]
    methods: list[ResultLine]
    duels: list[ResultLine]

    @property
    def about(self) -> dict[str, Any]:
        """Settings that all lines share."""
        return self.start.config

    @property
    def shown(self) -> list[str]:
        """The columns that any method has."""
        return [name for name in SWEEP_COLUMNS if any(name in line.numbers for line in self.methods)]

    @property
    def varied(self) -> list[str]:
        """The options of the grid with more than one value."""
        return [option for option in GRID if len({line.config[option] for line in self.methods}) > 1]

    @property
    def finished(self) -> list[ResultLine]:
        """Runs with an outcome."""
        return [line for line in self.runs if "failed" not in line.numbers]

    @property
    def failed(self) -> list[ResultLine]:
        """Runs with an error."""
        return [line for line in self.runs if "failed" in line.numbers]

    def name(self, line: ResultLine) -> str:
        """A method in sentences: its name, with the options that vary."""
        varied = [f"{option} {line.config[option]:g}" for option in self.varied]
        return " ".join([f"`{line.config['method']}`", *([f"({', '.join(varied)})"] if varied else [])])

    def duel_names(self, line: ResultLine) -> tuple[str, str]:
        """The two methods of a comparison, with the values of the grid if any option varies."""
        first, second = line.config["first"], line.config["second"]
        return (first, second) if self.varied else (first.partition(" ")[0], second.partition(" ")[0])


def read_lines(records: Sequence[Record]) -> Lines:
    """Sort records into lines.

    Raises:
        ValueError: there is no record of the start.
    """
    found: dict[str, dict[str, ResultLine]] = {level: {} for level in (START, "run", "method", "duel")}
    for record in records:
        config = record.config
        lines = found[str(config["level"])]
        key = repr([config.get(name) for name in ("run", "method", *GRID, "quality", "first", "second")])
        line = lines.setdefault(key, ResultLine(config))
        line.numbers[record.name.removeprefix("sweep/")] = record
    if not found[START]:
        raise ValueError("records of a sweep must have those of the start, got none")
    (start,) = found[START].values()
    return Lines(start, *(list(found[level].values()) for level in ("run", "method", "duel")))
