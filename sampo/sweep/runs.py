"""Starts the commands of a sweep: the shared cache and the start, then the runs, and the evaluation of trained ones.

Each command is a process of its own with a log file. A run that fails is noted, and the others go on. An evaluation
loads its libraries and models anew, so it takes all runs that are trained at that time: at once where no training is
left, else at most every `EVALUATE_EVERY` seconds.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..reference_cache.store import cache_folders, read_cache_manifest
from ..training.rounds import STOP_STATUSES
from .plan import START, Sweep, SweepRun
from .processes import Started, Starter
from .state import SweepState, write_state

EVALUATE_EVERY = 600.0  # seconds
EVALUATED_TOGETHER = 2  # at least, where there are as many: what they load is loaded once
POLL_EVERY = 0.1


class SweepStopped(RuntimeError):
    """The sweep cannot go on, or was stopped.

    Attributes:
        status: the exit status.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class _Task:
    """A command that runs: what it is, for whom, where, and since when."""

    kind: str  # `cache`, `evaluate` or `train`
    names: list[str]
    environment: dict[str, str]
    started: Started
    began: float


class SweepRunner:
    """Runs everything that is missing.

    Args:
        sweep: the folder and the definition.
        state: of the runs; written after each change.
        start: starts a command.
        environments: one for each job that may run at a time.
        say: called with each line of progress.
        show: called after each evaluation while trainings are left.
        after_training: called with each run that has finished training.
    """

    def __init__(
        self,
        sweep: Sweep,
        state: SweepState,
        start: Starter,
        environments: list[dict[str, str]],
        *,
        say: Callable[[str], None],
        show: Callable[[], None],
        after_training: Callable[[SweepRun], None],
    ):
        self.sweep, self.state = sweep, state
        self._start, self._free, self._jobs = start, list(environments), len(environments)
        self._say, self._show, self._after_training = say, show, after_training
        self._tasks: list[_Task] = []
        self._tried: set[str] = set()  # in this call: what failed is not tried again before the next
        self._evaluated_at = time.monotonic()
        self._stop: int | None = None
        self._seconds_here: list[float] = []  # of the trainings that finished in this call
        self._runs = {run.name: run for run in sweep.definition.runs}

    def run(self) -> None:
        """Fill the cache and evaluate the start; then train and evaluate all runs.

        Raises:
            SweepStopped: by a signal, or the first two have failed.
        """
        with self._signals():
            self._prepare()
            while True:
                self._begin_what_can()
                if not self._tasks:
                    break
                self._wait()
        self._refuse_if_stopped()

    def _prepare(self) -> None:
        todo = []
        cached = self.sweep.cached_runs
        if not all(map(self.sweep.is_trained, cached)) and self.state.cached_by != self.sweep.cache_command():
            todo.append(("cache", [START], self.sweep.cache_command()))
        if not self.sweep.is_evaluated(START):
            todo.append(("evaluate", [START], self.sweep.evaluate_command([START])))
        while todo or self._tasks:
            while todo and self._free and self._stop is None:
                self._begin(*todo.pop(0))
            self._wait()
            self._refuse_if_stopped()

    def _begin_what_can(self) -> None:
        while self._free and self._stop is None:
            trained = [name for name in self._runs if self._is_due(name)]
            waiting = [
                run for run in self._runs.values() if run.name not in self._tried and not self.sweep.is_trained(run)
            ]
            trains = waiting or any(task.kind == "train" for task in self._tasks)
            if trained and (not trains or time.monotonic() - self._evaluated_at > EVALUATE_EVERY):
                self._evaluated_at = time.monotonic()
                size = max(EVALUATED_TOGETHER, -(-len(trained) // len(self._free)))
                part = trained if trains else trained[:size]
                self._tried.update(part)
                for name in part:
                    self.state.runs[name].error = ""
                self._begin("evaluate", part, self.sweep.evaluate_command(part))
            elif waiting:
                self._tried.add(waiting[0].name)
                self.state.runs[waiting[0].name].error = ""
                self._begin("train", [waiting[0].name], self.sweep.train_command(waiting[0]))
            else:
                return

    def _is_due(self, name: str) -> bool:
        busy = any(name in task.names for task in self._tasks)
        failed = name in self._tried and self.state.runs[name].error
        return (
            not busy and not failed and self.sweep.is_trained(self._runs[name]) and not self.sweep.is_evaluated(name)
        )

    def _begin(self, kind: str, names: list[str], command: list[str]) -> None:
        environment = self._free.pop(0)
        log = "cache" if kind == "cache" else names[0] if kind == "train" else f"evaluate-{names[0]}"
        what = {"cache": "the reference is scored once for all runs", "train": f"{names[0]} trains"}.get(
            kind, f"evaluation of {', '.join(names)}"
        )
        self._say(f"{what}; log in {self.sweep.log(log)}")
        if kind == "train":
            self.state.runs[names[0]].attempts += 1
            write_state(self.sweep.folder, self.state)
        self._tasks.append(_Task(kind, names, environment, self._start(command, log, environment), time.monotonic()))

    def _wait(self) -> None:
        """Until a task has ended."""
        while self._tasks:
            ended = [(task, status) for task in self._tasks if (status := task.started.poll()) is not None]
            for task, status in ended:
                self._tasks.remove(task)
                self._free.append(task.environment)
                self._end(task, status)
            if ended:
                return
            time.sleep(POLL_EVERY)

    def _end(self, task: _Task, status: int) -> None:
        seconds = time.monotonic() - task.began
        if status in STOP_STATUSES or -status in (signal.SIGINT, signal.SIGTERM):
            self._stop = self._stop or (status if status > 0 else 128 - status)
        elif task.names == [START] and status != 0:
            raise SweepStopped(f"{self._last_error(task)} Fix the cause; the same command then continues.", 1)
        elif task.kind == "cache":
            self.state.cached_by = self.sweep.cache_command()
            self.state.cached_rows, self.state.cache_seconds = count_cached_rows(self.sweep), round(seconds, 1)
            runs = len(self.sweep.cached_runs)
            self._say(
                f"reference scored: {self.state.cached_rows:,} pairs in {seconds:.0f} s, shared by {runs} runs, so "
                f"{(runs - 1) * self.state.cached_rows:,} passes of pairs through the reference are not computed again"
            )
        elif task.kind == "train":
            self._end_training(task, status, seconds)
        else:
            for name in task.names:
                if name != START and not self.sweep.is_evaluated(name):
                    self.state.runs[name].error = f"evaluation: {self._last_error(task, name)}"
                    self._say(f"{name}: {self.state.runs[name].error}")
            if not all(map(self.sweep.is_trained, self._runs.values())):  # else the results at the end will do
                self._show()
        write_state(self.sweep.folder, self.state)

    def _end_training(self, task: _Task, status: int, seconds: float) -> None:
        name = task.names[0]
        state = self.state.runs[name]
        state.seconds = round(state.seconds + seconds, 1)
        if status != 0 or not self.sweep.is_trained(self._runs[name]):
            state.error = self._last_error(task)
            self._say(f"{name} has failed, the others go on: {state.error}")
            return
        self._seconds_here.append(seconds)
        self._after_training(self._runs[name])
        trained = sum(self.sweep.is_trained(run) for run in self._runs.values())
        failed = sum(bool(one.error) for one in self.state.runs.values())
        left = len(self._runs) - trained - failed
        mean = sum(self._seconds_here) / len(self._seconds_here)
        rest = f"about {_duration(mean * left / self._jobs)} of training left" if left else "no training is left"
        self._say(f"{name} trained in {_duration(seconds)}: {trained} of {len(self._runs)} runs, {rest}")

    def _last_error(self, task: _Task, name: str = "") -> str:
        """What the command has printed last, as far as it is about an error."""
        if name and self.sweep.error(name).is_file():
            return self.sweep.error(name).read_text(encoding="utf-8")
        log = "cache" if task.kind == "cache" else task.names[0]
        path = self.sweep.log(log if task.kind != "evaluate" else f"evaluate-{log}")
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        lines = [line for line in lines if line and not line.startswith("$ ")]
        errors = [line for line in lines[-20:] if "error: " in line]
        return (errors or lines or ["it ended without a message."])[-1]

    def _refuse_if_stopped(self) -> None:
        if self._stop is not None and not self._tasks:
            raise SweepStopped("stopped. The same command continues where it stopped.", self._stop)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the commands, which may save a checkpoint first, and start no others."""

        def stop(number: int, _: Any) -> None:
            self._stop = 128 + number
            for task in self._tasks:
                task.started.terminate()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for task in self._tasks:
                task.started.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)


def count_cached_rows(sweep: Sweep) -> int:
    """Pairs of the shared cache, training and evaluation together."""
    manifests = [read_cache_manifest(path / "manifest.json") for path in cache_folders(sweep.ref_cache)]
    return sum(one.rows for one in manifests if one is not None and one.key.get("targets") == "tokens")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
