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
        beta: its own in place of the grid's, for a method whose beta is another quantity.
        not_taken: options of the base recipe and the command line that its trainer does not have.
    """

    title: str
    options: dict[str, Any]
    beta_per_token: bool = False
    beta: float | None = None
    not_taken: list[str] = field(default_factory=list)

    @property
    def trainer(self) -> str:
        """The value of `trainer`."""
        return str(self.options.get("trainer", "dpo"))


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
    has_own_beta: bool = False

    @property
    def cell(self) -> tuple[str, float, float]:
        """All but the seed."""
        return self.method, self.learning_rate, self.beta

    @property
    def reads_cache(self) -> bool:
        """Whether the reference's log-probs come from the cache; a method can need a live reference."""
        return self.options.get("precompute_ref_log_probs", True) is not False


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
        product = itertools.product(range(self.seeds), rates, betas, self.methods.items())
        cells = [  # a beta of its own is run once
            (number, rate, beta if method.beta is None else method.beta, (name, method))
            for number, rate, beta, (name, method) in product
            if method.beta is None or beta == betas[0]
        ]
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
                has_own_beta=method.beta is not None,
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
        return self.recipe_of("dpo")

    def recipe_of(self, trainer: str) -> Path:
        """The base recipe without the options that a trainer does not have."""
        return self.folder / ("recipe.yaml" if trainer == "dpo" else f"recipe-{trainer}.yaml")

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
        method = self.definition.methods[run.method]
        shared = ["--precompute_ref_log_probs", "true", "--ref_cache_dir", str(self.ref_cache)]
        if method.trainer != "dpo":
            shared = []
        again = ["--resume", "auto"] if resume else []
        given = without_options(self.definition.words, method.not_taken)
        base = [*launch, "--config", str(self.recipe_of(method.trainer)), *shared, *given]
        return ["sampo", "train", *base, *words, *again]

    @property
    def cached_runs(self) -> list[SweepRun]:
        """The runs that share the cache of the reference."""
        methods = self.definition.methods
        return [run for run in self.definition.runs if methods[run.method].trainer == "dpo" and run.reads_cache]

    def cache_command(self) -> list[str]:
        """Fill the cache for `cached_runs`: with the end token's probabilities if any of them needs those."""
        runs = self.cached_runs
        run = next((one for one in runs if one.options.get("balance_end_token")), runs[0])
        return ["sampo", "cache", *self.train_command(run, resume=False)[2:]]

    def evaluate_command(self, names: list[str]) -> list[str]:
        """Evaluate runs, or the start, in one process."""
        return ["sampo", "sweep", "--evaluate", str(self.folder), *names]


def without_options(words: list[str], names: list[str]) -> list[str]:
    """Words of a command line without some options and their values."""
    kept, keeps = [], True
    for word in words:
        if word.startswith("--"):
            keeps = word.split("=")[0].lstrip("-").replace("-", "_") not in names
        if keeps:
            kept.append(word)
    return kept


def _as_word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
