"""What can be set in the lab, and the list of runs that follows. No torch here, for the command line reads this."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .. import __version__

GROUPS = {
    "all": "all pairs",
    "short": "pairs whose chosen answer is shorter",
    "long": "pairs whose chosen answer is longer",
}
SFT = "sft"
VERSION = 1  # of the definitions below and in `world`: a change of meaning makes old records another experiment
UNEQUAL_TOKENS = 2  # pairs whose lengths differ by no more than this count as neither longer nor shorter
MIN_QUALITY = 0.6  # the start must know the facts, or "say less" is the best policy and quality means little


@dataclass(frozen=True)
class Settings:
    """What all runs of an experiment share. The texts are the help of `sampo lab`."""

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

    def __post_init__(self):
        for name in ("steps", "pairs", "sft_steps", "questions", "judged_pairs", "learning_rate", "beta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

    @property
    def of_start(self) -> dict[str, int]:
        """The settings that the supervised start depends on."""
        return {"sft_steps": self.sft_steps, "demonstrations": self.demonstrations}

    @property
    def of_sampling(self) -> dict[str, int]:
        """Those of the start and of the answers that it is judged by."""
        return {**self.of_start, "questions": self.questions, "max_tokens": self.max_tokens}


class Method(NamedTuple):
    """A name for people, and the options of `SamPOConfig`."""

    title: str
    options: dict[str, Any]


METHODS = {
    "dpo": Method("DPO", {"token_weighting": "all"}),
    "sampo": Method("SamPO", {"token_weighting": "sampo"}),
    "sampo_rejected_learned": Method(
        "SamPO, rejected + learned",
        {"token_weighting": "sampo", "sampled_sides": "rejected", "length_penalty": "learned"},
    ),
}


@dataclass(frozen=True)
class Run:
    """One row of the table for one seed; `group` is empty for the supervised start."""

    seed: int
    group: str
    method: str
    settings: Settings

    @property
    def config(self) -> dict[str, Any]:
        """Everything the numbers depend on."""
        config = {"experiment": "lab", "lab_version": VERSION, "sampo_version": __version__}
        config |= {"seed": self.seed, "group": self.group, "method": self.method}
        if self.method == SFT:
            return config | self.settings.of_sampling
        return config | asdict(self.settings) | METHODS[self.method].options

    @property
    def title(self) -> str:
        """For progress and logs."""
        return f"seed {self.seed}, " + (f"{self.group}, {self.method}" if self.group else "supervised start")


def plan(settings: Settings, *, seeds: int, groups: Sequence[str], methods: Sequence[str]) -> list[Run]:
    """All runs in the order of running: each seed's start, then its groups and methods."""
    runs = []
    for seed in range(seeds):
        runs.append(Run(seed, "", SFT, settings))
        runs += [Run(seed, group, method, settings) for group in groups for method in methods]
    return runs
