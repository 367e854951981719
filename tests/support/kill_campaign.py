"""Kills a training run again and again, with `kill -9` and at random, and compares what comes out at last.

`python tests/support/kill_campaign.py --kills 40 --processes 1 --out records.jsonl` runs one campaign and writes its
figures; test_resume.py runs a short one, and longer ones when slow tests are asked for.
"""

import argparse
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import forkserver
from pathlib import Path

from sampo.checkpointing.files import MANIFEST, STAGING, numbered_checkpoints

LIMIT_S = 300


@dataclass
class Campaign:
    """What happened.

    Attributes:
        seed: Of the moments.
        processes: That train together; one of them is killed each time.
        kills: Launches that were killed.
        kills_in_save: Of these, with a checkpoint half written.
        kills_before_training: Of these, before the first micro-batch of the launch.
        steps: Of the run.
        steps_again: That were trained more than once, since the last checkpoint was older than the kill.
        half_checkpoints: Folders `checkpoint-N` without a manifest seen after a kill. None is ever expected.
        differences: What differs from the run that nobody killed: micro-batches, weights, theta, log.
        events: One line a launch.
    """

    seed: int
    processes: int
    kills: int = 0
    kills_in_save: int = 0
    kills_before_training: int = 0
    steps: int = 0
    steps_again: int = 0
    half_checkpoints: int = 0
    differences: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


class Runs:
    """Launches of one run, each in processes of its own that have imported everything beforehand."""

    def __init__(self, model: str, folder: Path, processes: int, options: dict):
        self.model, self.folder, self.processes, self.options = model, folder, processes, options
        self.context = multiprocessing.get_context("forkserver")
        self.launches = 0
        start_server()

    def start(self) -> list:
        """Start all processes of a launch."""
        from resume_worker import launch

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.launches += 1
        each = [
            self.context.Process(
                target=launch,
                args=(self.model, str(self.folder), self.launches, rank, self.processes, port, self.options),
            )
            for rank in range(self.processes)
        ]
        for process in each:
            process.start()
        return each

    def finish(self) -> None:
        """One launch that nobody kills."""
        for process in self.start():
            process.join(LIMIT_S)
            if process.exitcode != 0:
                said = (self.folder / f"said.{self.launches}.0").read_text()
                raise RuntimeError(f"a launch must end by itself, got exit code {process.exitcode}: {said[-3000:]}")

    def trace(self, number: int, rank: int) -> list[dict]:
        """What a process saw; the last line may have been cut off by the kill."""
        path = self.folder / f"trace.{number}.{rank}"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def outcome(self) -> dict:
        return json.loads((self.folder / "outcome.0").read_text())


def start_server() -> None:
    """The process that imports everything once and is forked for each launch."""
    before = os.environ.get("PYTHONPATH")
    # up to Python 3.12 the server knows no `sys.path` but this
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.set_forkserver_preload(["resume_worker"])
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run_campaign(model: str, folder: Path, *, kills: int, seed: int, processes: int = 1, **options) -> Campaign:
    """Train once undisturbed, then once more with `kills` launches killed, and compare."""
    rng = random.Random(seed)
    whole = Runs(model, folder / "whole", processes, options)
    whole.finish()
    expected = [whole.trace(1, rank) for rank in range(processes)]
    killed = Runs(model, folder / "killed", processes, options)
    result = Campaign(seed, processes, steps=whole.outcome()["step"])
    while result.kills < kills:
        _launch_and_kill(killed, rng, result, aim_at_save=result.kills % 2 == 0)
    killed.finish()
    for rank in range(processes):
        _compare_traces(killed, rank, expected[rank], result)
    for name, value in whole.outcome().items():
        if killed.outcome()[name] != value:
            result.differences.append(f"{name} of the end")
    (folder / "campaign.log").write_text("\n".join(result.events) + "\n")
    return result


def _launch_and_kill(runs: Runs, rng: random.Random, result: Campaign, *, aim_at_save: bool) -> None:
    run = runs.folder / "run"
    before = len(numbered_checkpoints(run))
    each = runs.start()
    began = time.monotonic()
    if aim_at_save:  # when so many micro-batches were seen and so many files of the next checkpoint lie there
        micro_batches, files = rng.randint(1, 8), rng.randint(1, 10)
        _wait_until(lambda: len(runs.trace(runs.launches, 0)) >= micro_batches, 0.005)
        _wait_until(lambda: _is_being_written(run, files) or each[0].exitcode is not None, 0.0002)
    elif rng.random() < 0.25:
        time.sleep(rng.uniform(0, 3))  # most likely before the first step
    else:
        _wait_until(lambda: runs.trace(runs.launches, 0), 0.005)
        time.sleep(rng.uniform(0, 2))
    victim = rng.randrange(len(each))
    each[victim].kill()
    each[victim].join()
    in_save = bool(numbered_checkpoints(run / STAGING))  # before the others clear it
    for process in each:  # the others notice that a peer is gone
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
    if each[victim].exitcode != -9:
        result.events.append(f"launch {runs.launches}: ended before it was killed")
        raise RuntimeError("the run must be longer than the campaign, got one that is finished. Give it more steps.")
    seen = runs.trace(runs.launches, 0)
    half = [path for path in numbered_checkpoints(run) if not (path / MANIFEST).exists()]
    result.kills += 1
    result.kills_in_save += in_save
    result.kills_before_training += not seen
    result.half_checkpoints += len(half)
    place = f"in step {seen[-1]['step'] + 1}" if seen else "before the first step"
    result.events.append(
        f"launch {runs.launches}: process {victim} killed after {time.monotonic() - began:.3f} s, {place}"
        f"{', during a save' if in_save else ''}; checkpoints {before} -> {len(numbered_checkpoints(run))}"
    )


def _is_being_written(run: Path, files: int) -> bool:
    staged = numbered_checkpoints(run / STAGING)
    try:
        return bool(staged) and len(list(staged[0].iterdir())) >= files
    except FileNotFoundError:  # it has just got its name
        return False


def _wait_until(there: Callable[[], object], pause_s: float) -> None:
    end = time.monotonic() + LIMIT_S
    while not there() and time.monotonic() < end:
        time.sleep(pause_s)


def _compare_traces(runs: Runs, rank: int, expected: list[dict], result: Campaign) -> None:
    """Each launch must have seen a part of the whole run that begins with a step."""
    steps_seen: set[int] = set()
    for number in range(1, runs.launches + 1):
        seen = runs.trace(number, rank)
        if not seen:
            continue
        start = next(i for i, line in enumerate(expected) if line["step"] == seen[0]["step"])
        if seen != expected[start : start + len(seen)]:
            result.differences.append(f"micro-batches of launch {number}, process {rank}")
        steps = {line["step"] for line in seen}
        if rank == 0:
            result.steps_again += len(steps & steps_seen)
        steps_seen |= steps
    if steps_seen != {line["step"] for line in expected}:
        result.differences.append(f"steps seen by process {rank}")


def main(argv: list[str] | None = None) -> int:
    """Run one campaign and append its figures to a file of records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    from tiny import save_model

    from sampo.io.records import Record, append, provenance

    options = {"max_steps": args.steps, "save_total_limit": 2, "lora": args.lora}
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model")
        result = run_campaign(
            model, Path(folder), kills=args.kills, seed=args.seed, processes=args.processes, **options
        )
    print("\n".join(result.events))
    figures = {**asdict(result), "differences": len(result.differences)}
    print(figures["kills"], result)
    if args.out:
        command = f"python tests/support/kill_campaign.py {' '.join(sys.argv[1:])}"
        config = {"processes": args.processes, "lora": args.lora, "steps": args.steps, "seed": args.seed}
        names = [f.name for f in fields(Campaign) if f.name not in ("seed", "processes", "events")]
        append(
            args.out,
            [
                Record(name=name, value=figures[name], n=args.kills, config=config, command=command, **provenance())
                for name in names
            ],
        )
    return 1 if result.differences or result.half_checkpoints else 0


if __name__ == "__main__":
    sys.exit(main())
