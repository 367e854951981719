import dataclasses
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from sampo import SamPOConfig
from sampo.io import records as results
from sampo.lab.experiment import RECORDS, no_progress, run_all, unmeasured
from sampo.lab.methods import SLOPE, STUDY_METHODS
from sampo.lab.pressure import logistic_slope, mean_weights
from sampo.lab.settings import GROUPS, SFT, Run, Settings
from sampo.lab.world import World
from sampo.weighting import WEIGHTINGS
from studies.plan import BIAS_METHODS, EQUAL_METHODS, GRID, SEEDS, headline, study_plan
from studies.run import main, make_parser

# --- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_has_each_run_once_and_gives_every_method_the_same_cells():
    runs = study_plan(Settings())
    keys = [results.config_key(run.config) for run in runs]
    assert len(set(keys)) == len(keys)
    cells = {}
    for run in runs:
        if run.group in GROUPS and run.settings.bias == 0.5 and not run.changes:
            cells.setdefault(run.method, set()).add(
                (run.seed, run.group, run.settings.learning_rate, run.settings.beta)
            )
    assert cells.keys() == STUDY_METHODS.keys()
    assert len({frozenset(found) for found in cells.values()}) == 1
    assert len(cells["dpo"]) == SEEDS * len(GROUPS) * len(GRID)
    assert (5e-4, 0.1) in GRID  # the headline setting is a cell of it
    biased = Counter((run.method, run.seed) for run in runs if run.settings.bias != 0.5 and not run.changes)
    assert set(biased.values()) == {4}
    assert {method for method, _ in biased} == set(BIAS_METHODS)


def test_wherever_the_plan_is_stopped_no_method_is_more_than_a_round_ahead():
    runs = [run for run in study_plan(Settings()) if run.method != SFT]
    first = len(GROUPS) * len(STUDY_METHODS)
    assert [run.seed for run in runs[:first]] == [0] * first
    seen = Counter()
    for run in runs:
        if run.group in GROUPS and run.settings.bias == 0.5 and not run.changes:
            seen[run.method] += 1
            assert max(seen.values()) - min(seen.get(name, 0) for name in STUDY_METHODS) <= 1
    stages = [bias for bias, _ in groupby(runs, key=lambda run: run.settings.bias)]
    assert stages[0] == 0.5


def test_every_weighting_and_every_option_of_ours_is_in_the_study():
    options = [method.options for method in STUDY_METHODS.values()]
    assert {each["token_weighting"] for each in options} == {
        name for name, weighting in WEIGHTINGS.items() if not weighting.from_data
    }
    kept = {each["token_weighting"] for each in options if each.get("keep_end_token")}
    assert kept == {name for name, weighting in WEIGHTINGS.items() if weighting.can_keep_end}
    for run in study_plan(Settings(), seeds=1):
        if run.group:
            known = {name: value for name, value in run.definition.options.items() if value != SLOPE}
            SamPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **known)


@pytest.mark.parametrize("change", [{"length_penalty_lr": 0.2}, {"length_penalty_start": SLOPE}])
def test_a_change_of_a_run_is_part_of_its_settings(change):
    run = Run(0, "all", "dpo_learned", Settings())
    changed = dataclasses.replace(run, changes=tuple(change.items()))
    assert run.config.items() < changed.config.items()
    assert STUDY_METHODS["dpo_learned"].options == run.definition.options  # and not of its method


# --- running --------------------------------------------------------------------------------------------------------

MICRO = Settings(sft_steps=6, steps=3, pairs=64, questions=24, judged_pairs=40, demonstrations=600)
FIRST = 4  # runs of the plan
SLOPED = Run(0, "all", "dpo_learned", MICRO, (("length_penalty_start", SLOPE), ("length_penalty_lr", 0.01)))
FEW = [
    *study_plan(MICRO, seeds=1)[:FIRST],
    Run(0, "all", "sampo_iterative", MICRO),
    SLOPED,
]


def measured(path):
    return {
        (record.key, record.name): (record.value, record.interval, record.n)
        for record in results.read(path)
        if record.name != "train_seconds"
    }


def run_serially(runs, folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of a parallel run have
    try:
        return list(run_all(runs, folder, command="made here", progress=no_progress))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serial")
    assert [run for run, _ in run_serially(FEW, folder)] == FEW
    return folder


def test_a_learned_penalty_starts_at_the_slope_and_hardly_moves_at_a_low_rate(serial):
    records = [r for r in results.read(serial / RECORDS) if (r.name, r.config) == ("penalty_per_token", SLOPED.config)]
    assert [r.config["length_penalty_start"] for r in records] == [SLOPE]
    pairs = World(0).annotated_pairs(64, bias=0.5)
    differences = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    scale = np.sqrt(np.mean(np.square(differences)))
    slope = logistic_slope(differences)
    assert abs(slope) > 0.005
    assert records[0].value == pytest.approx(slope, abs=3 * 0.011 / scale)  # three steps of Adam


def test_rounds_of_iterative_training_are_runs_of_their_own(serial):
    numbers = {r.config["method"]: r.value for r in results.read(serial / RECORDS) if r.name == "kl"}
    assert numbers["sampo_iterative"] == 0  # three rounds of one step, and a first step has a learning rate of 0
    assert numbers["sampo"] > 0


def test_a_study_that_was_stopped_within_a_record_goes_on_where_it_was(serial, tmp_path):
    going = run_all(FEW, tmp_path, command="made here", progress=no_progress)
    stopped = [next(going)[0], next(going)[0]]
    going.close()
    path = tmp_path / RECORDS
    assert stopped == FEW[:2]
    assert unmeasured(FEW, tmp_path) == FEW[2:]
    path.write_bytes(path.read_bytes()[:-30])  # as if killed while it wrote
    assert unmeasured(FEW, tmp_path) == FEW[1:]
    assert [run for run, _ in run_serially(FEW, tmp_path)] == FEW
    assert measured(path) == measured(serial / RECORDS)


ASKED = dataclasses.replace(MICRO, demonstrations=Settings().demonstrations)  # it is no option
COMMAND = [sys.executable, "-m", "studies.run", "--seeds", "1", "--jobs", "2", "--runs", str(FIRST)]
COMMAND += [w for n, v in dataclasses.asdict(ASKED).items() if v != getattr(Settings(), n) for w in (f"--{n}", str(v))]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs_still(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
def test_a_killed_parallel_study_goes_on_where_it_was_and_measures_what_one_process_does(tmp_path):
    runs = study_plan(ASKED, seeds=1)[:FIRST]
    alone = tmp_path / "alone"
    run_serially(runs, alone)
    path, errors = tmp_path / RECORDS, tmp_path / "errors"
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, "--out", str(tmp_path)], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + 200
        while len({r.key for r in results.read(path)}) < 2:
            assert process.poll() is None, errors.read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = children(process.pid)
        process.kill()
        process.wait()
    before = path.read_bytes()
    kept = {r.key for r in results.read(path)}
    assert len(kept) < FIRST
    deadline = time.monotonic() + 20
    while any(runs_still(pid) for pid in workers):  # nobody waits for work that never comes
        assert time.monotonic() < deadline
        time.sleep(0.05)

    done = run_serially(runs, tmp_path)
    assert {run for run, _ in done} == set(runs)
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert measured(path) == measured(alone / RECORDS)
    assert max(Counter((r.key, r.name) for r in results.read(path)).values()) == 1


def test_the_command_says_what_must_hold(tmp_path):
    for option in ("--seeds", "--jobs", "--runs"):
        with pytest.raises(SystemExit, match=f"study: `{option}` must be at least 1, got 0"):
            main(make_parser().parse_args([option, "0", "--out", str(tmp_path)]))
    with pytest.raises(SystemExit, match="study: `beta` must be positive and finite, got 0"):
        main(make_parser().parse_args(["--beta", "0", "--out", str(tmp_path)]))


def test_equal_pairs_are_only_for_the_methods_that_can_differ_there():
    found = {run.method for run in headline(Settings(), 0) if run.group == "equal"}
    assert found == set(EQUAL_METHODS)
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, size=12)
    dpo = mean_weights([*lengths, *lengths], {"token_weighting": "all"})
    for name, method in STUDY_METHODS.items():
        if WEIGHTINGS[method.options["token_weighting"]].needs_policy:
            continue
        same = torch.equal(mean_weights([*lengths, *lengths], method.options), dpo)
        assert same or name in EQUAL_METHODS, name
