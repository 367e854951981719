"""On-policy rounds: before its training, a round answers prompts with the current model and makes pairs of them.

Each step is an ordinary command of sampo in a process of its own, stored in the state file, and continues by itself
what a killed one has begun; a step that is done is noted there and never run again. All files of a round are in
`round-1/onpolicy`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..io.hashing import hash_json
from .rounds import Plan, Round, RoundStep, State

SOME_MISSING = (0, 3)  # exit statuses: some answers or scores may be missing, and are counted
PROCESSES = ("num_processes", "gpu_ids")  # options of the launcher that `sampo generate` has too
GREEDY = ("--samples", "1", "--temperature", "0", "--top_p", "1", "--top_k", "0")


@dataclass(frozen=True)
class OnPolicyPlan(Plan):
    """The plan of on-policy rounds. With `data` `shards`, each round answers a part of the prompts.

    Attributes:
        prompts: file or hub id of the prompts to answer.
        eval_prompts: of the prompts that every round's model answers at its end; empty for no evaluation.
        generate: further options of `sampo generate`, as words.
        judge: options of the judge, as words, the first one being its kind.
        choice: further options of `sampo pairs`, as words.
        on_cpu: whether generation and judging use the CPU too.
    """

    prompts: str = ""
    eval_prompts: str = ""
    generate: list[str] = field(default_factory=list)
    judge: list[str] = field(default_factory=list)
    choice: list[str] = field(default_factory=list)
    on_cpu: bool = False

    def file(self, number: int, name: str) -> Path:
        """A file of a round; of round 0, of the model that round 1 starts from."""
        folder = self.round_folder(number) if number else self.folder / "start"
        return folder / "onpolicy" / name

    def train_command(self, number: int) -> list[str]:
        """The command of round 1, 2, …, on its own pairs."""
        words = super().train_command(number)
        if self.data == "shards":  # it is the prompts that are divided
            place = words.index("--prompt_shard")
            words = [*words[:place], *words[place + 2 :]]
        return [*words, "--dataset_name", str(self.file(number, "pairs.jsonl"))]

    def steps_before(self, number: int) -> list[RoundStep]:
        """Answer the prompts, and make pairs of the answers."""
        answers, seed = self.file(number, "answers.jsonl"), ["--seed", str(self.seed + number - 1)]
        shard = ["--prompt_shard", f"{number}/{self.rounds}"] if self.data == "shards" else []
        generate = [*self._generate(number - 1, self.prompts, answers), *shard, *self.generate, *seed]
        pairs = ["sampo", "pairs", "--answers", str(answers), *self._judge(number), *self.choice, *seed]
        pairs += ["--out", str(self.file(number, "pairs.jsonl"))]
        return [RoundStep("generating", generate, SOME_MISSING), RoundStep("pairing", pairs, SOME_MISSING)]

    def steps_after(self, number: int) -> list[RoundStep]:
        """Answer the held-out prompts, and compare the answers with those of the first model."""
        if not self.eval_prompts:
            return []
        answers = {one: self.file(one, "eval.jsonl") for one in (0, number)}
        steps = [
            [*self._generate(one, self.eval_prompts, path), *self.generate, *GREEDY] for one, path in answers.items()
        ]
        judge = ["sampo", "judge", "--system", str(answers[number]), "--baseline", str(answers[0]), "--matched_only"]
        judge += [*self._judge(number), "--out", str(self.file(number, "judgements.jsonl"))]
        first = [RoundStep("starting", steps[0], SOME_MISSING)] if number == 1 else []
        return [
            *first,
            RoundStep("answering", steps[1], SOME_MISSING),
            RoundStep("judging", judge, SOME_MISSING),
        ]

    def _generate(self, number: int, prompts: str, out: Path) -> list[str]:
        """The words that answer prompts with the model after a round; 0 is the one that round 1 starts from."""
        words = ["sampo", "generate", self.model_after(number), "--prompts", prompts, "--out", str(out)]
        words += ["--revision", self.revision] if number == 0 else []
        if not any(word.split("=")[0] == "--url" for word in self.generate):  # as many processes as train
            words += [w for name in PROCESSES if name in self.launch for w in (f"--{name}", self.launch[name])]
        return [*words, *(["--device", "cpu"] if self.on_cpu else [])]

    def _judge(self, number: int) -> list[str]:
        cache = ["--cache", str(self.file(number, "replies.jsonl"))] if self.judge[0] == "endpoint" else []
        return ["--judge", *self.judge, *cache, *(["--device", "cpu"] if self.on_cpu else [])]

    def new_round(self, number: int) -> "OnPolicyRound":
        """A round that has not begun."""
        commands = self.commands(number)
        digest = hash_json([self.recipe, commands])
        return OnPolicyRound(number, commands=commands, config_sha256=digest, model=self.model_after(number))

    @property
    def state_kind(self) -> type[State]:
        """What the state file of these rounds holds."""
        return OnPolicyState


@dataclass
class OnPolicyRound(Round):
    """The state of a round; `done` has the statuses of the steps that are done, besides training and merging."""

    done: list[str] = field(default_factory=list)


@dataclass
class OnPolicyState(State):
    """The content of `iterate_state.json`."""

    plan: OnPolicyPlan
    rounds: Sequence[OnPolicyRound]
