"""What a sweep runs: its definition, the runs that follow from it, their folders and commands."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..io.schemas import read_json
from ..training.round_results import is_trained

START = "start"  # the model that all runs start from, as a name beside those of the runs
GRID = {"learning_rate": "lr", "beta": "beta"}  # options that may take several values, and their names in a run's name


class RefusedSweep(ValueError):
    """The sweep cannot be run with these options; the text gives the reason."""


@dataclass(frozen=True)
class SweptMethod:
    """A method as it stands in the definition: `sampo.methods.Method`, for one round.

    Attributes:
        title: the name in tables.
        options: of `sampo train`.
        beta_per_token: whether beta is multiplied by `answer_tokens` of the definition.
    """

    title: str
    options: dict[str, Any]
    beta_per_token: bool = False


@dataclass(frozen=True)
class SweepRun:
    """One training run; `beta` is that of the grid, `train_beta` the one that it trains with."""

    name: str
    method: str
    title: str
    options: dict[str, Any]
    learning_rate: float
    beta: float
    train_beta: float
    seed: int

    @property
    def cell(self) -> tuple[str, float, float]:
        """All but the seed."""
        return self.method, self.learning_rate, self.beta


@dataclass(frozen=True)
class Definition:
    """Everything that determines the results of a sweep.

    Attributes:
        model: what all runs start from.
        recipe: options of the base recipe, without those of the method.
        words: options of the command line for every run.
        launch: options for the launcher.
        inputs: hashes of the model and of the data, where they are local.
        settings: options of every run that its evaluation needs too: `max_length`, `dtype`, …
        split_seed: of all that divides the data.
        seed: the first one.
        seeds: their number.
        grid: option -> values.
        methods: name -> method.
        answer_tokens: mean tokens of a training response.
        prompts: held-out prompts that each run answers.
        pairs: at most so many held-out pairs are scored, and training pairs diagnosed before training.
        max_tokens: of an answer.
        temperature: of the answers; 0 is greedy.
        chat: whether prompts go through the chat template.
        judge: options of `sampo judge`; nothing without a judge.
        devices: GPUs of each run; 0 on the CPU.
    """

    model: str
    recipe: dict[str, Any]
    words: list[str]
    launch: dict[str, str]
    inputs: dict[str, str]
    settings: dict[str, Any]
    split_seed: int
    seed: int
    seeds: int
    grid: dict[str, list[float]]
    methods: dict[str, SweptMethod]
    answer_tokens: float
    prompts: int
    pairs: int
    max_tokens: int
    temperature: float
    chat: bool
    judge: list[str] = field(default_factory=list)
    devices: int = 0

    @property
    def runs(self) -> list[SweepRun]:
        """All runs; those of the first seed first, so that all methods are seen early."""
        rates, betas = self.grid["learning_rate"], self.grid["beta"]
        cells = itertools.product(range(self.seeds), rates, betas, self.methods.items())
        return [
            SweepRun(
                name=f"{name.replace('=', '_')}-lr{rate:g}-beta{beta:g}-s{self.seed + number}",
                method=name,
                title=method.title,
                options=method.options,
                learning_rate=rate,
                beta=beta,
                train_beta=beta * self.answer_tokens if method.beta_per_token else beta,
                seed=self.seed + number,
            )
            for number, rate, beta, (name, method) in cells
        ]


@dataclass(frozen=True)
class RunOutcome:
    """What the evaluation of a run writes last.

    Attributes:
        run: its name.
        log_ratios: Σ log π − log π_ref of each answer, in the order of the file of answers; empty for the start.
        judge: that has judged the answers, as in the definition.
    """

    run: str
    log_ratios: list[float]
    judge: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """The folder of a sweep: where everything is, and the commands that make it."""

    folder: Path
    definition: Definition

    @property
    def recipe(self) -> Path:
        """The base recipe, as it was at the start."""
        return self.folder / "recipe.yaml"

    @property
    def ref_cache(self) -> Path:
        """The reference's log-probs, which all runs share."""
        return self.folder / "ref_cache"

    def run_folder(self, name: str) -> Path:
        """Of the training run."""
        return self.folder / "runs" / name

    def data(self, name: str) -> Path:
        """`train`, `held_out` or `prompts`."""
        return self.folder / "data" / f"{name}.jsonl"

    def log(self, name: str) -> Path:
        """What the commands of a run print."""
        return self.folder / "logs" / f"{name}.log"

    def answers(self, name: str) -> Path:
        """Of a run or of the start."""
        return self.folder / "answers" / f"{name}.jsonl"

    def judgements(self, name: str) -> Path:
        """Of a run against the start."""
        return self.folder / "judgements" / f"{name}.jsonl"

    def evaluation(self, name: str) -> Path:
        """Folder of the diagnosis and the log-ratios of a run, or of the diagnosis of the start."""
        return self.folder / "evaluation" / name

    def outcome(self, name: str) -> Path:
        """Written last: with it, a run is evaluated."""
        return self.evaluation(name) / "outcome.json"

    def error(self, name: str) -> Path:
        """Why an evaluation has failed."""
        return self.evaluation(name) / "error.txt"

    def is_trained(self, run: SweepRun) -> bool:
        """Whether its training has finished."""
        return is_trained(self.run_folder(run.name))

    def is_evaluated(self, name: str) -> bool:
        """Whether its evaluation has finished, with the judge of the definition."""
        path = self.outcome(name)
        return path.is_file() and (name == START or read_json(path, RunOutcome).judge == self.definition.judge)

    def train_command(self, run: SweepRun, *, resume: bool = True) -> list[str]:
        """The run as an ordinary `sampo train`, which can be run by hand."""
        options: dict[str, Any] = {
            "seed": run.seed,
            "split_seed": self.definition.split_seed,
            "learning_rate": run.learning_rate,
            "beta": run.train_beta,
            **run.options,
            "output_dir": self.run_folder(run.name),
        }
        words = [word for name, value in options.items() for word in (f"--{name}", _as_word(value))]
        launch = [word for name, value in self.definition.launch.items() for word in (f"--{name}", value)]
        shared = ["--precompute_ref_log_probs", "true", "--ref_cache_dir", str(self.ref_cache)]
        again = ["--resume", "auto"] if resume else []
        base = [*launch, "--config", str(self.recipe), *shared, *self.definition.words]
        return ["sampo", "train", *base, *words, *again]

    def cache_command(self) -> list[str]:
        """Fill the cache for all runs: with the end token's probabilities if any of them needs those."""
        runs = self.definition.runs
        run = next((one for one in runs if one.options.get("balance_end_token")), runs[0])
        return ["sampo", "cache", *self.train_command(run, resume=False)[2:]]

    def evaluate_command(self, names: list[str]) -> list[str]:
        """Evaluate runs, or the start, in one process."""
        return ["sampo", "sweep", "--evaluate", str(self.folder), *names]


def _as_word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
