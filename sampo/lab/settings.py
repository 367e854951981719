"""Settings of the lab, and the list of runs that follows from them. No torch: the command line imports this."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import __version__
from ..methods import Method
from .methods import STUDY_METHODS

GROUPS = {
    "all": "all pairs",
    "short": "pairs whose chosen answer is shorter",
    "long": "pairs whose chosen answer is longer",
}
STUDY_GROUPS = {**GROUPS, "equal": "pairs of answers of equal length"}
SFT = "sft"
VERSION = 1  # of the definitions below and in `world`: increase it when their meaning changes
UNEQUAL_TOKENS = 2  # pairs whose lengths differ by no more than this count as neither longer nor shorter
MIN_QUALITY = 0.6  # the start must know the facts, or "say less" is the best policy and quality means little


@dataclass(frozen=True)
class Settings:
    """Settings shared by all runs of an experiment. The texts are the help of `sampo lab`."""

    bias: float = field(default=0.5, metadata={"help": "log-odds by which annotators prefer ten tokens more"})
    steps: int = field(default=100, metadata={"help": "training steps of each method, 32 pairs each"})
    learning_rate: float = field(default=5e-4, metadata={"help": "of each method, with 10 % warm-up and linear decay"})
    beta: float = field(default=0.1, metadata={"help": "of each method"})
    pairs: int = field(default=2048, metadata={"help": "preference pairs in each group"})
    sft_steps: int = field(default=1000, metadata={"help": "steps of the supervised start, 64 answers each"})
    questions: int = field(default=768, metadata={"help": "held-out questions answered by each model"})
    judged_pairs: int = field(default=3000, metadata={"help": "held-out pairs for the accuracy of implicit rewards"})
    demonstrations: int = 25_600
    batch_size: int = 32
    max_tokens: int = 120

    def __post_init__(self) -> None:
        for name in ("steps", "pairs", "sft_steps", "questions", "judged_pairs", "learning_rate", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")
        if not math.isfinite(self.bias):
            raise ValueError(f"`bias` must be finite, got {self.bias}.")

    @property
    def of_start(self) -> dict[str, int]:
        """The settings that the supervised start depends on."""
        return {"sft_steps": self.sft_steps, "demonstrations": self.demonstrations}

    @property
    def of_sampling(self) -> dict[str, int]:
        """The settings of the start and of the answers by which it is judged."""
        return {**self.of_start, "questions": self.questions, "max_tokens": self.max_tokens}


@dataclass(frozen=True)
class Run:
    """One row of the table for one seed; `group` is empty for the supervised start.

    `changes` are options of `SamPOConfig` in which a run of the study differs from its method.
    """

    seed: int
    group: str
    method: str
    settings: Settings
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def definition(self) -> Method:
        """Its method, with the changes."""
        method = STUDY_METHODS[self.method]
        return method._replace(options=method.options | dict(self.changes))

    @property
    def config(self) -> dict[str, Any]:
        """Everything the numbers depend on."""
        config = {"experiment": "lab", "lab_version": VERSION, "sampo_version": __version__}
        config |= {"seed": self.seed, "group": self.group, "method": self.method}
        if self.method == SFT:
            return config | self.settings.of_sampling
        definition = self.definition
        config |= asdict(self.settings) | definition.options
        if definition.beta_per_token:
            config["beta_per_token"] = True
        if definition.rounds > 1:
            config["rounds"] = definition.rounds
        return config

    @property
    def title(self) -> str:
        """The name in progress bars and logs."""
        if not self.group:
            return f"seed {self.seed}, supervised start"
        shared = {"lr": self.settings.learning_rate, "beta": self.settings.beta, "bias": self.settings.bias}
        changes = "".join(f", {name} {value}" for name, value in (*shared.items(), *self.changes))
        return f"seed {self.seed}, {self.group}, {self.method}" + changes


def plan(settings: Settings, *, seeds: int, groups: Sequence[str], methods: Sequence[str]) -> list[Run]:
    """All runs in the order of running: each seed's start, then its groups and methods."""
    runs = []
    for seed in range(seeds):
        runs.append(Run(seed, "", SFT, settings))
        runs += [Run(seed, group, method, settings) for group in groups for method in methods]
    return runs
