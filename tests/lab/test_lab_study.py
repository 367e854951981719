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
from oracles import weights as weights_of

from sampo import SamPOConfig
from sampo.cli import main
from sampo.io import records as results
from sampo.lab import model as lm
from sampo.lab.experiment import RECORDS, run_all, unmeasured, unseen
from sampo.lab.methods import SLOPE, STUDY_METHODS
from sampo.lab.pressure import logistic_slope, mean_pressures, mean_weights
from sampo.lab.settings import GROUPS, SFT, Run, Settings
from sampo.lab.study import BIAS_METHODS, EQUAL_METHODS, GRID, SEEDS, headline, study_plan
from sampo.lab.world import EOS, World
from sampo.weighting import WEIGHTINGS, draw_keys, token_weights

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
    assert [run.seed for run in runs[:57]] == [0] * 57
    seen = Counter()
    for run in runs:
        if run.group in GROUPS and run.settings.bias == 0.5 and not run.changes:
            seen[run.method] += 1
            assert max(seen.values()) - min(seen.get(name, 0) for name in STUDY_METHODS) <= 1
    stages = [bias for bias, _ in groupby(runs, key=lambda run: run.settings.bias)]
    assert stages[0] == 0.5


def test_every_weighting_and_every_option_of_ours_is_in_the_study():
    options = [method.options for method in STUDY_METHODS.values()]
    assert {each["token_weighting"] for each in options} == set(WEIGHTINGS)
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


# --- length pressure before training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def start(world):
    rows = [(question.prompt, answer) for question, answer in world.demonstrations(2000)]
    return lm.train_supervised(rows, steps=25, seed=0)


class Shifted(torch.nn.Module):
    """A model whose logit of the end token is higher by a constant."""

    def __init__(self, model, shift):
        super().__init__()
        self.model, self.config, self.shift = model, model.config, shift

    def forward(self, **kwargs):
        output = self.model(**kwargs)
        output.logits[..., EOS] += self.shift
        return output


@torch.no_grad()
def token_logps(model, prompt, answer):
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(dim=1)[range(len(answer)), answer].numpy()


def naive_weights(t_w, t_l, options, end_probs):
    """Weights of the chosen and of the rejected answer, token by token: random ones by their mean."""
    balanced = options.get("balance_end_token", False)
    name, keeps = options["token_weighting"], options.get("keep_end_token", balanced)
    sides = []
    for own, other, is_chosen in ((t_w, t_l, True), (t_l, t_w, False)):
        if name == "all":
            side = [1.0 if t < min(own, other) else options.get("ld_alpha", 1.0) for t in range(own)]
        else:
            end = own - 1 if keeps and name in ("sampo", "expected") else None
            whole = is_chosen and options.get("sampled_sides") == "rejected"
            gamma = options.get("decay_gamma", 1.0)
            mean = "expected" if name == "sampo" else name
            side = weights_of(mean, own, other, end=end, whole=whole, gamma=gamma)
        if balanced:
            p = end_probs[len(sides)]
            side[-1] = sum(w * q for w, q in zip(side[:-1], p[:-1], strict=True)) / (1 - p[-1])
        sides.append(np.array(side))
    return sides


WITH_PRESSURE = [name for name, method in STUDY_METHODS.items() if method.options["token_weighting"] != "top_k"]


@pytest.mark.parametrize("name", WITH_PRESSURE)
def test_the_pressure_is_the_derivative_of_the_weighted_margin_by_the_end_logit(world, start, name):
    options = STUDY_METHODS[name].options
    pairs = world.annotated_pairs(25, bias=0.5)
    rows = [(p.question.prompt, p.chosen) for p in pairs] + [(p.question.prompt, p.rejected) for p in pairs]
    probs = lm.end_probs(start, rows)
    found = mean_pressures([p.chosen for p in pairs], [p.rejected for p in pairs], probs, options)
    step = 0.05  # the logits are float32
    for i, pair in enumerate(pairs):
        weights = naive_weights(len(pair.chosen), len(pair.rejected), options, (probs[i], probs[25 + i]))
        margins = []
        for shift in (-step, step):
            model = Shifted(start, shift)
            chosen, rejected = (
                token_logps(model, pair.question.prompt, side) for side in (pair.chosen, pair.rejected)
            )
            margins.append((weights[0] * chosen).sum() - (weights[1] * rejected).sum())
        if options.get("balance_end_token"):
            assert found["pressure"][i] == pytest.approx(0, abs=1e-6)
        assert found["pressure"][i] == pytest.approx((margins[1] - margins[0]) / (2 * step), abs=2e-3)
        penalty = options.get("length_penalty", 0.0)
        logit = 0.0 if penalty == "learned" else penalty * pair.length_difference
        assert found["push"][i] == pytest.approx(found["pressure"][i] * 2 / (1 + np.exp(logit)))


def test_the_mean_weight_of_a_random_subset_is_the_mean_over_its_draws():
    lengths = [9, 4, 5, 7]  # two pairs, chosen ones first
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    end = torch.arange(9) == torch.tensor(lengths)[:, None] - 1
    ids = torch.randint(50, (4, 10), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"keep_end_token": True}, {"sampled_sides": "rejected"}):
        draws = [
            token_weights("sampo", mask, end=end, keys=draw_keys(ids, torch.ones(4, 10), seed=s, epoch=0), **options)
            for s in range(1000)
        ]
        expected = mean_weights(lengths, {"token_weighting": "sampo", **options})
        assert torch.stack(draws).mean(dim=0).numpy() == pytest.approx(
            expected.numpy(), abs=0.065
        )  # four standard errors of a coin


def test_the_logistic_slope_is_the_best_of_a_fine_grid_and_needs_both_signs():
    rng = np.random.default_rng(0)
    for true in (0.0, 0.05, -0.4, 3.0):
        gap = rng.normal(size=400) * 10
        signed = np.where(rng.random(400) < 1 / (1 + np.exp(-true * gap)), gap, -gap)
        if signed.min() > 0:
            continue
        slope = logistic_slope(signed)
        grid = slope + np.linspace(-0.5, 0.5, 1001) * max(abs(slope), 0.1)
        likelihood = [-np.logaddexp(0, -s * signed).sum() for s in grid]
        assert np.argmax(likelihood) == 500
    with pytest.raises(ValueError, match="needs pairs with longer and with shorter chosen answers"):
        logistic_slope([3, 1, 2])


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
        return list(run_all(runs, folder, command="made here", progress=unseen))
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
    going = run_all(FEW, tmp_path, command="made here", progress=unseen)
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
COMMAND = [sys.executable, "-m", "sampo.cli", "lab", "study", "--seeds", "1", "--jobs", "2", "--runs", str(FIRST)]
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
        with pytest.raises(SystemExit, match=f"sampo lab study: `{option}` must be at least 1, got 0"):
            main(["lab", "study", option, "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="sampo lab study: `beta` must be positive, got 0"):
        main(["lab", "study", "--beta", "0", "--out", str(tmp_path)])


def test_equal_pairs_are_only_for_the_methods_that_can_differ_there():
    found = {run.method for run in headline(Settings(), 0) if run.group == "equal"}
    assert found == set(EQUAL_METHODS)
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, size=12)
    dpo = mean_weights([*lengths, *lengths], {"token_weighting": "all"})
    for name in WITH_PRESSURE:  # the others keep as many tokens as there are
        same = torch.equal(mean_weights([*lengths, *lengths], STUDY_METHODS[name].options), dpo)
        assert same or name in EQUAL_METHODS, name
