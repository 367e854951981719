"""Iterative SamPO: rounds of training, each a launch of its own that starts from the model of the last.

Following the authors' code (dpo_iterative.sh), a round is a new process with a fresh optimiser and schedule; policy
and reference are the model of the round before. Differences from their code:

1. `reference: initial` keeps the first model as the reference of all rounds.
2. Round k trains with `seed` + k − 1, so that order of data and random subsets are new in each round; what divides
   the data (`eval_fraction`, shards) keeps the first seed.
3. An adapter is merged at the end of a round, and the next round starts from the merged model with a new adapter.
4. `iterate_state.json` records the progress. A finished round is never run again; an interrupted one
   resumes from its last complete checkpoint.

Nothing here loads a model: a round is the command `sampo train …`, which is printed, stored, and can be run by hand.
"""

import json
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ..io.children import start_child
from ..io.files import write_atomic
from ..io.hashing import hash_json, seal, unseal
from ..io.locks import alone_in
from ..io.schemas import WrongFile, named, parse_json, typed
from ..io.versions import versions
from .round_results import has_begun, hash_model, is_trained, read_metrics

STATE = "iterate_state.json"
RECIPE = "recipe.yaml"
DATA = ("full", "shards")
REFERENCES = ("previous", "initial")
OF_THE_MACHINE = ("gpu_ids", "main_process_port")  # launcher's options that change nothing in the weights


Status = Literal[  # the last five are of on-policy rounds
    "waiting", "training", "merging", "failed", "finished", "generating", "pairing", "starting", "answering", "judging"
]


STOP_STATUSES = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # statuses of a round that a signal has ended


class RefusedIteration(ValueError):
    """The rounds cannot be run with these options; the text gives the reason."""


class RoundFailed(RuntimeError):
    """The command of a round has ended with an error.

    Attributes:
        status: its exit status.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Plan:
    """The plan of all rounds: everything that determines their results.

    Attributes:
        rounds: number of rounds.
        data: `full` (each round sees all training pairs) or `shards` (each one a part of the prompts).
        reference: `previous` (the model that the round starts from) or `initial` (the one that round 1 starts from).
        output_dir: folder of the rounds.
        model: what round 1 starts from.
        revision: its revision on the hub.
        seed: of round 1.
        dtype: of the weights in training.
        use_peft: whether a round trains an adapter, which is merged at its end.
        quantization: the arguments of the options, if the weights are quantised on loading.
        recipe: options of the YAML file.
        words: options of the command line, as typed.
        launch: options for the launcher.
        inputs: hashes of local inputs: the model's weights, the data.
    """

    rounds: int
    data: str
    reference: str
    output_dir: str
    model: str
    revision: str
    seed: int
    dtype: str
    use_peft: bool
    quantization: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    launch: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    def round_folder(self, number: int) -> Path:
        """Where round 1, 2, … writes."""
        return self.folder / f"round-{number}"

    def model_after(self, number: int) -> str:
        """The complete model after round 1, 2, …; for 0, the model that round 1 starts from."""
        if number == 0:
            return self.model
        folder = self.round_folder(number)
        return str(folder / "merged" if self.use_peft else folder)

    def train_command(self, number: int) -> list[str]:
        """The command of round 1, 2, …; the last of two equal options holds."""
        start = self.model_after(number - 1)
        arguments = ["sampo", "train"]
        for name, value in self.launch.items():
            arguments += [f"--{name}", value]
        arguments += ["--config", str(self.folder / RECIPE), *self.words]
        arguments += ["--model_name_or_path", start, "--output_dir", str(self.round_folder(number))]
        arguments += ["--seed", str(self.seed + number - 1), "--split_seed", str(self.seed)]
        if self.data == "shards":
            arguments += ["--prompt_shard", f"{number}/{self.rounds}"]
        if number > 1:
            arguments += ["--model_revision", "main"]  # of the round's own folder there is one
        if number > 1 and self.reference == "initial":
            arguments += ["--ref_model_name_or_path", self.model, "--ref_model_revision", self.revision]
        return arguments

    def merge_command(self, number: int) -> list[str] | None:
        """The command that merges the round's adapter; None where a round trains all weights."""
        if not self.use_peft:
            return None
        arguments = ["sampo", "merge", str(self.round_folder(number)), "--base", self.model_after(number - 1)]
        if number == 1:
            arguments += ["--base_revision", self.revision]
        return [*arguments, "--out", self.model_after(number), "--dtype", self.dtype, *self.quantization]

    def steps_before(self, number: int) -> "list[RoundStep]":
        """What a round runs before its training."""
        return []

    def steps_after(self, number: int) -> "list[RoundStep]":
        """What a round runs after its training."""
        return []

    def commands(self, number: int) -> list[str]:
        """All commands of a round, each as one line for a shell."""
        before, after = ([step.command for step in steps(number)] for steps in (self.steps_before, self.steps_after))
        commands = [*before, self.train_command(number), self.merge_command(number), *after]
        return [shlex.join(command) for command in commands if command is not None]

    def new_round(self, number: int) -> "Round":
        """A round that has not begun."""
        commands = self.commands(number)
        digest = hash_json([self.recipe, commands])
        return Round(number, commands=commands, config_sha256=digest, model=self.model_after(number))

    @property
    def state_kind(self) -> "type[State]":
        """What the state file of these rounds holds."""
        return State


@dataclass(frozen=True)
class RoundStep:
    """A command beside training and merging.

    Attributes:
        status: of the round while it runs.
        command: its words.
        accepted: exit statuses with which the round goes on.
    """

    status: Status
    command: list[str]
    accepted: tuple[int, ...] = (0,)


@dataclass
class Round:
    """The state of a round; times in seconds.

    Attributes:
        number: 1, 2, …
        status: the current step, or how the round has ended.
        commands: the commands of this round, one line each.
        config_sha256: of the recipe and the commands.
        model: the complete model at its end.
        model_sha256: of that model's weights.
        started: time of the first attempt, UTC.
        seconds: of each step, by its status, in all attempts except those that were killed with this process.
        attempts: the command line of each launch, including resumed ones.
        metrics: `first` and `last` line of the training log, last `eval`, `merge`, and the number of `steps`.
        versions: of the packages that matter.
    """

    number: int
    status: Status = "waiting"
    commands: list[str] = field(default_factory=list)
    config_sha256: str = ""
    model: str = ""
    model_sha256: str = ""
    started: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class State:
    """The content of `iterate_state.json`."""

    plan: Plan
    rounds: Sequence[Round]

    def __post_init__(self) -> None:
        if [one.number for one in self.rounds] != list(range(1, self.plan.rounds + 1)):
            raise ValueError(f"`rounds` must be the {self.plan.rounds} rounds of the plan in their order")


def iterate(
    plan: Plan,
    say: Callable[[str], None],
    after: Callable[[Round], None] | None = None,
    measure: Callable[[Round], dict[str, Any]] = lambda one: {},
) -> list[Round]:
    """Run all rounds that are not finished.

    Args:
        plan: The plan.
        say: Called with each line of progress.
        after: Called with each round that finishes in this call.
        measure: Further metrics of a round at its end.

    Raises:
        RefusedIteration: the folder belongs to other rounds.
        FolderInUseError: another process works in it.
        RoundFailed: a round's command has failed.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(plan.folder) as lock:
        rounds = restore_rounds(plan)
        write_atomic(plan.folder / RECIPE, _as_yaml(plan.recipe))
        for one in rounds:
            if one.status == "finished":
                say(f"round {one.number} of {plan.rounds} is finished: {one.model}")
                continue
            _check_start(plan, rounds, one.number)
            _run_round(plan, rounds, one, say, lock, measure)
            if after is not None:
                after(one)
    return rounds


def restore_rounds(plan: Plan) -> list[Round]:
    """The rounds as the state file knows them, or new ones."""
    path = plan.folder / STATE
    saved = read_state(path, plan.state_kind)
    if saved is not None:
        rounds = list(saved.rounds)
        changes = list(describe_changes(asdict(saved.plan), json.loads(json.dumps(asdict(plan)))))
        if not changes:
            return rounds
        if any(one.status == "finished" for one in rounds) or has_begun(plan.round_folder(1)):
            raise RefusedIteration(
                f"{path} must be of the same rounds to continue them, got changes: {'; '.join(changes)}. Undo them, "
                "or set another `output_dir`."
            )
    elif any(plan.round_folder(number).exists() for number in range(1, plan.rounds + 1)):
        raise RefusedIteration(
            f"`output_dir` must have no rounds without a state file, got some in {plan.folder}. Set another "
            "`output_dir`, or remove them."
        )
    rounds = [plan.new_round(number) for number in range(1, plan.rounds + 1)]
    save_state(plan, rounds)
    return rounds


def describe_changes(old: dict[str, Any], new: dict[str, Any], begin: str = "") -> Iterator[str]:
    """Describe each difference."""
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if name in ("recipe", "launch", "inputs", "settings") and not begin:
            yield from describe_changes(was or {}, now or {}, f"{name}: ")
        elif was != now and begin == "inputs: ":
            yield f"{name} has other content than before"
        elif was != now and not (begin == "launch: " and name in OF_THE_MACHINE):
            yield f"{begin}`{name}` was {was!r} and is {now!r}"


def _check_start(plan: Plan, rounds: list[Round], number: int) -> None:
    """Raise if the model that the round starts from has changed since the round before."""
    if number == 1:
        return
    before = rounds[number - 2]
    found = hash_model(before.model)
    if found != before.model_sha256:
        raise RefusedIteration(
            f"{before.model} must be as round {before.number} left it, got "
            f"{'other weights' if found else 'no weights'}. Put it back, or remove {plan.folder} to start again."
        )


def _run_round(
    plan: Plan, rounds: list[Round], one: Round, say: Callable[[str], None], lock: int, measure: Callable[[Round], Any]
) -> None:
    """Train, merge and store the results; finished steps are skipped."""
    one.started = one.started or datetime.now(UTC).isoformat(timespec="seconds")
    one.versions = versions()
    folder = plan.round_folder(one.number)
    for step in plan.steps_before(one.number):
        _step_once(plan, rounds, one, step, say, lock)
    if not is_trained(folder):
        again = ["--resume", "auto"] if has_begun(folder) else []
        _step(plan, rounds, one, "training", [*plan.train_command(one.number), *again], say, lock)
    merge = plan.merge_command(one.number)
    if merge is not None and not Path(one.model).is_dir():  # it is complete or absent
        _step(plan, rounds, one, "merging", merge, say, lock)
    for step in plan.steps_after(one.number):
        _step_once(plan, rounds, one, step, say, lock)
    one.metrics = {**read_metrics(folder, Path(one.model)), **measure(one)}
    one.model_sha256 = hash_model(one.model)
    if not one.model_sha256:
        raise RoundFailed(f"Round {one.number} has ended without weights in {one.model}.", 1)
    one.status = "finished"
    save_state(plan, rounds)
    say(f"round {one.number} of {plan.rounds} finished after {sum(one.seconds.values()):.0f} s: {one.model}")


def _step_once(plan: Plan, rounds: list[Round], one: Any, step: RoundStep, say: Any, lock: int) -> None:
    """Run a step that is not done; one that was stopped is run again, and its command continues."""
    if step.status not in one.done:
        _step(plan, rounds, one, step.status, step.command, say, lock, step.accepted)
        one.done.append(step.status)
        save_state(plan, rounds)


def _step(
    plan: Any,
    rounds: list[Round],
    one: Round,
    status: Status,
    command: list[str],
    say: Any,
    lock: int,
    accepted: tuple[int, ...] = (0,),
) -> None:
    """Run one command, and save the state before and after it."""
    one.status = status
    one.attempts.append(shlex.join(command))
    save_state(plan, rounds)
    say(f"round {one.number} of {plan.rounds}, {status}: {one.attempts[-1]}")
    began = time.monotonic()
    status_code = _launch(command, lock)
    one.seconds[status] = round(one.seconds.get(status, 0.0) + time.monotonic() - began, 1)
    if status_code not in accepted:
        one.status = "failed"
        save_state(plan, rounds)
        if status_code in STOP_STATUSES:
            raise RoundFailed(
                f"Round {one.number} was stopped while {status}. The same `sampo iterate` command continues from "
                "there.",
                status_code,
            )
        raise RoundFailed(
            f"Round {one.number} must end with status 0, got {status_code} while {status}. Fix the cause; the same "
            "`sampo iterate` command then continues from there.",
            status_code if status_code > 0 else 128 - status_code,
        )


def _launch(command: list[str], lock: int) -> int:
    """Run `sampo …` in a process of its own, which holds the lock as long as it lives."""
    process = start_child(command, lock)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # it may want to save, and we wait for it
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the process gets the signal from the terminal too
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


# --- files -----------------------------------------------------------------------------------------------------------


def save_state(plan: Plan, rounds: list[Round]) -> None:
    """Write the progress of the rounds into `iterate_state.json`."""
    write_atomic(plan.folder / STATE, seal(asdict(State(plan, rounds))))


def read_state(path: Path, kind: type[State] = State) -> State | None:
    """Read the state of the rounds; None if there is no file."""
    try:
        with named(path, "Restore it, or move it and the rounds away"):
            return typed(kind, unseal(typed(dict[str, Any], parse_json(path.read_bytes()))), complete=True)
    except FileNotFoundError:
        return None
    except (OSError, WrongFile) as error:
        raise RefusedIteration(str(error)) from None


def _as_yaml(recipe: dict[str, Any]) -> str:
    import yaml

    begin = "# The recipe of all rounds, as it was at the start. Written by `sampo iterate`.\n"
    return begin + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
