"""Sweeps really run, with a tiny model: one in two parts, and one that is killed in the middle."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny import make_pairs, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sampo import cli
from sampo.commands.sweep_options import read_request
from sampo.evaluation.answers.answers import Answer
from sampo.evaluation.answers.log_ratios import answer_log_ratios
from sampo.io import locks, records
from sampo.io.records import Record
from sampo.methods import canonical_name, find_method
from sampo.sweep.conclusion import conclude
from sampo.sweep.frontier import at_kl, matched_kl, paths_of
from sampo.sweep.lines import read_lines
from sampo.sweep.plan import Definition, RefusedSweep, Sweep, SweptMethod
from sampo.sweep.processes import divide_devices
from sampo.sweep.state import SweepState, find_changes, restore_state, write_state
from sampo.sweep.table import latex

RECIPE = {
    "eval_fraction": 0.3,
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1.0e-3,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 8,
    "save_steps": 2,
    "seed": 7,
    "use_cpu": True,
    "pair_stream": "false",  # `auto` decides by time, and the runs here are compared to the bit
    "bf16": False,
    "report_to": "none",
    "token_weighting": "sampo",  # gives way to the methods
    "output_dir": "elsewhere",
}
BROKEN = {"broken": {"token_weighting": "all", "beta": 1.0e39}}  # overflows in its first step
RUNS = [f"{method}-lr0.001-beta0.1-s{seed}" for seed in (7, 8) for method in ("dpo", "onesided")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and pairs."""
    folder = tmp_path_factory.mktemp("sweep")
    save_model(folder / "model")
    make_pairs(60, conversational=True).to_json(folder / "pairs.jsonl")
    return folder


def write_config(place, name, *methods, **more):
    """Words of a sweep with a YAML file; the folder is `name`."""
    config = {**RECIPE, "model_name_or_path": str(place / "model"), "dataset_name": str(place / "pairs.jsonl")}
    config |= {"out": str(place / name), "methods": list(methods), "prompts": 6, "max_tokens": 12, "judge": "longer"}
    path = place / f"{name}-{len(list(place.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump({**config, "jobs": 2, **more}))
    return ["sweep", "--config", str(path)]


def kill_in_the_second_run(folder, words):
    """Start a sweep, and kill it when its second run has a checkpoint."""
    process = subprocess.Popen([sys.executable, "-m", "sampo.cli", *words], stdout=subprocess.DEVNULL)
    while not (folder / "runs" / RUNS[1] / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "runs" / RUNS[1] / "trainer_state.json").exists()


@pytest.fixture(scope="module")
def grown(place):
    """Two methods and a seed, killed and continued, then another seed and a judge.

    The folder, its numbers and the times of its models and answers after the first part.
    """
    folder = place / "grown"
    kill_in_the_second_run(folder, write_config(place, "grown", "dpo", "onesided", jobs=1, judge=""))
    before = mtime(folder, RUNS[0])
    assert cli.main(write_config(place, "grown", "dpo", "onesided", judge="")) == 0
    assert mtime(folder, RUNS[0]) == before  # was not run again
    assert [state_of(folder)[name]["attempts"] for name in RUNS[:2]] == [1, 2]
    first = numbers(folder), {name: (mtime(folder, name), answered(folder, name)) for name in RUNS[:2]}
    assert cli.main(write_config(place, "grown", "dpo", "onesided", seeds=2)) == 0
    return folder, *first


@pytest.fixture(scope="module")
def whole(place):
    """The first part, not interrupted, with a method that fails: the folder and the status."""
    return place / "whole", cli.main(write_config(place, "whole", "dpo", "onesided", BROKEN, jobs=2, judge=""))


def mtime(folder, name):
    return (folder / "runs" / name / "model.safetensors").stat().st_mtime_ns


def answered(folder, name):
    return (folder / "answers" / f"{name}.jsonl").stat().st_mtime_ns


def state_of(folder):
    return json.loads((folder / "sweep.json").read_text())["runs"]


def numbers(folder):
    """Records without what every sweep has of its own."""
    found = [replace(one, command="", created="", commit=None) for one in records.read(folder / "records.jsonl")]
    return [one for one in found if one.name != "sweep/failed"]


# --- sweeps that ran


@pytest.mark.slow
def test_a_killed_sweep_gives_the_records_of_one_that_was_not(whole, grown):
    assert numbers(whole[0]) == grown[1]


@pytest.mark.slow
def test_a_seed_and_a_judge_are_added_and_nothing_is_run_again(grown):
    folder, first, files = grown
    assert {name: (mtime(folder, name), answered(folder, name)) for name in files} == files
    assert not [one for one in first if one.name == "sweep/win_rate"]
    judged = {one.config["run"] for one in numbers(folder) if one.name == "sweep/win_rate" and "run" in one.config}
    assert judged == set(RUNS)
    assert [state_of(folder)[name]["attempts"] for name in RUNS] == [1, 2, 1, 1]
    assert {record.config.get("run") for record in numbers(folder)} >= set(RUNS)


@pytest.mark.slow
def test_a_run_that_fails_is_shown_and_stops_no_other(whole):
    folder, status = whole
    assert status == 1
    (failed,) = [record for record in records.read(folder / "records.jsonl") if record.name == "sweep/failed"]
    assert failed.config["run"] == "broken-lr0.001-beta1e+39-s7"
    assert "finite" in failed.config["error"]
    text = (folder / "table.md").read_text()
    assert "`broken-lr0.001-beta1e+39-s7` has failed and is in no number below" in text
    assert "| broken-lr0.001-beta1e+39-s7 | failed |" in text


@pytest.mark.slow
def test_all_runs_have_the_same_pairs_steps_and_reference(grown):
    folder = grown[0]
    steps = [record.value for record in numbers(folder) if record.name == "sweep/steps"]
    assert steps == [8.0] * 4
    logs = [(folder / "logs" / f"{name}.log").read_text() for name in RUNS]
    assert all("of the train data: 34 of 34 rows from the cache" in log for log in logs)
    state = json.loads((folder / "sweep.json").read_text())
    assert state["cached_rows"] == 60
    assert "equal budget: 8 optimiser steps each" in (folder / "table.md").read_text()
    assert not list(folder.glob("runs/*/checkpoint-*"))


@pytest.mark.slow
def test_the_numbers_are_those_of_the_commands(grown):
    """Accuracy and length of one run from what `diagnose` and `generate` wrote, computed anew."""
    folder, name = grown[0], RUNS[3]
    found = {r.name: r.value for r in numbers(folder) if r.config.get("run") == name}
    shown = {
        (r.name, r.config.get("group")): r.value
        for r in records.read(folder / "evaluation" / name / "diagnosis" / "records.jsonl")
        if r.config.get("method") == "all"
    }
    for ours, group in {"": "all", "_longer": "chosen longer", "_matched": "matched length"}.items():
        assert found[f"sweep/accuracy{ours}"] == shown["diagnose/accuracy", group]
    answers = [json.loads(line) for line in (folder / "answers" / f"{name}.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    assert found["sweep/tokens_mean"] == pytest.approx(sum(answer["tokens"] for answer in answers) / 6)
    assert found["sweep/ended"] == pytest.approx(sum(answer["stop"] == "eos" for answer in answers) / 6)
    log_ratios = json.loads((folder / "evaluation" / name / "outcome.json").read_text())["log_ratios"]
    assert found["sweep/kl"] == pytest.approx(sum(log_ratios) / 6)
    both = [r.value for r in numbers(folder) if r.name == "sweep/kl" and r.config.get("method") == "onesided"]
    assert both[2] == pytest.approx((both[0] + both[1]) / 2)  # of the two runs, and of the method over its seeds


@pytest.mark.slow
def test_the_folder_has_tables_figures_and_a_page(grown):
    folder = grown[0]
    assert {"table.tex", "frontier.svg", "frontier.pdf"} <= {path.name for path in folder.iterdir()}
    page = (folder / "report.html").read_text()
    assert "Methods over their seeds" in page
    assert "This judge takes the longer answer" in page
    assert "onesided-lr0.001-beta0.1-s8" in page


@pytest.mark.slow
def test_another_definition_in_the_folder_is_refused_with_what_changed(place, grown, capsys):
    words = write_config(place, "grown", "dpo", seeds=2, max_tokens=13, max_steps=9)
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "recipe: `max_steps` was 8 and is 9" in said
    assert "`max_tokens` was 12 and is 13" in said
    assert "the method `onesided` is missing" in said


@pytest.mark.slow
def test_a_second_sweep_in_the_folder_is_locked_out(place, grown, monkeypatch, capsys):
    words = write_config(place, "grown", "dpo", "onesided", seeds=2)
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with open(grown[0] / locks.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(words) == 2
    (grown[0] / locks.LOCK).unlink()
    assert "One process at a time can write into" in capsys.readouterr().err


# --- before anything runs


def test_all_issues_of_all_runs_are_in_one_error(place, capsys):
    words = write_config(place, "wrong", "dpo", {"odd": {"token_weighting": "mean", "sampled_sides": "rejected"}})
    assert cli.main([*words, "--learning_rat", "1", "--warmup_steps", "many"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sampo sweep: error: 3 issues:")
    assert "`--learning_rat` is no option" in said
    assert "`--warmup_steps` must be" in said
    assert "odd-lr0.001-beta0.1-s7: SamPOConfig" in said
    assert not (place / "wrong").exists()


def test_own_options_are_checked(place, capsys):
    words = write_config(place, "wrong", "dpoo", "sampo_iterative", seeds=0, judge="nobody --x", eval_strategy="no")
    assert cli.main([*words, "--token_weighting", "all", "--output_dir", "x"]) == 2
    said = capsys.readouterr().err
    for part in ("Did you mean `dpo`?", "use `sampo iterate`", "`seeds` must be", "`judge` must begin with"):
        assert part in said
    assert "`token_weighting` is set by `methods`" in said
    assert "`output_dir` is set by each run" in said
    wrong = {"jobs": "many", "launcher": "pbs", "keep_checkpoints": "maybe", "slurm": 3}
    wrong |= {"learning_rate": [], "beta": [True], "temperature": "hot", "out": 3}
    assert cli.main(write_config(place, "wrong", "dpo", **wrong)) == 2
    said = capsys.readouterr().err
    assert said.startswith("sampo sweep: error: 8 issues:")
    assert all(re.search(f"`{name}` must (be|name)", said) for name in wrong)
    assert cli.main(write_config(place, "wrong", "dpo", eval_strategy="no", eval_fraction=0.0)) == 2
    assert "`eval_strategy` must evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judge", "issue"),
    [
        ("reward", "`model` must be given for `judge` reward"),
        ("reward --model ./nowhere", "there is no such folder"),
        ("reward --model {place}/model", "must be a reward model with one output, got 2 outputs"),
        ("reward --modle x", "`judge` must hold options of `sampo judge`, got ['--modle', 'x']"),
        ("endpoint --model m", "`url` must name the server"),
        ("endpoint --model m --url http://127.0.0.1:9/v1 --template no", "template"),
        ("implicit --model {place}/model", "`ref_model` must name the reference"),
        ("longer --out x.jsonl", "`judge` must go without `--out`"),
        ("longer --dry_run", "`judge` must go without `--dry_run`"),
        ('longer "x', "No closing quotation"),
        ("human --annotations x.csv", "`judge` must begin with one of"),
        ("longer --batch", "`batch` goes with `judge` endpoint"),
    ],
)
def test_a_judge_is_checked_before_anything_is_trained(place, judge, issue, capsys):
    words = write_config(place, "judged", "dpo", judge=judge.replace("{place}", str(place)))
    assert cli.main(words) == 2
    assert issue in capsys.readouterr().err
    assert not (place / "judged").exists()


@pytest.mark.parametrize(
    ("methods", "issue"),
    [
        ([{"mine": {"learning_rate": 1.0, "output_dir": "x"}}], "must not set `learning_rate`, `output_dir`"),
        ([{"a b": {}}], "Names of methods must be letters, digits and `_`, got 'a b'"),
        (["dpo", {"dpo": {"token_weighting": "mean"}}], "`methods` must have different names, got `dpo` twice"),
        (["rdpo=0.01", "rdpo=1e-2"], "must have different names, got `rdpo=0.01` twice"),
        (["dataset", "recommended"], "`methods` must differ, got `dataset` and `recommended` with the same options"),
        ("dpo", "`methods` must be a list"),
    ],
)
def test_methods_are_told_apart(place, methods, issue, capsys):
    assert cli.main(write_config(place, "wrong", "dpo", **{"methods": methods})) == 2
    assert issue in capsys.readouterr().err


def test_a_method_of_ones_own_may_have_a_beta_of_its_own(place):
    words = write_config(place, "own", "dpo", {"mine": {"token_weighting": "all", "beta": 0.5}}, beta=[0.1, 0.2])
    methods = read_request(words[1:]).methods
    assert methods["mine"].beta == 0.5
    assert methods["mine"].options == {"token_weighting": "all"}
    runs = make_definition(methods=methods, grid={"learning_rate": [1e-6], "beta": [0.1, 0.2]}, seeds=1).runs
    assert [(run.method, run.train_beta) for run in runs] == [("dpo", 0.1), ("mine", 0.5), ("dpo", 0.2)]


def test_the_dry_run_writes_nothing(place, capsys):
    words = write_config(place, "preview", "dpo", "rdpo=0.01", "mean", seeds=2)
    assert cli.main([*words, "--learning_rate", "5e-7", "1e-6", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "12 runs" in said
    assert "rdpo_0.01-lr5e-07-beta0.1-s8" in said
    assert "8 steps each, on 34 pairs; 26 are held out" in said
    assert "6 models of" not in said
    assert "12 models of" in said
    assert not (place / "preview").exists()


# --- parts


def test_a_method_is_found_by_its_name_its_short_name_or_with_a_number():
    assert find_method("onesided") == find_method("rejected_learned_balanced")
    assert find_method("rdpo=0.02").options == find_method("rdpo_02").options
    assert find_method("ld_dpo=0.25").options == {"token_weighting": "all", "ld_alpha": 0.25}
    assert find_method("dpop=50") == find_method("dpop")
    assert find_method("tdpo2=0.5").options == find_method("tdpo2").options
    assert find_method("rdpo=1e-2") == find_method("rdpo=0.010") == find_method("rdpo=0.01")
    assert {canonical_name(name) for name in ("rdpo=1e-2", "rdpo=0.010", "rdpo=0.01")} == {"rdpo=0.01"}
    assert canonical_name("rdpo=1e-5") == "rdpo=1e-05"
    for name, part in {
        "rdpo=x": "followed by a number",
        "dpoo": "Did you mean `dpo`",
        "rdp": "mean `rdpo=NUMBER`",
    }.items():
        with pytest.raises(ValueError, match=part):
            find_method(name)


def make_definition(**more):
    plain = {"model": "m", "recipe": {}, "words": [], "launch": {}, "inputs": {}, "settings": {}, "split_seed": 1}
    plain |= {"seed": 1, "seeds": 2, "grid": {"learning_rate": [1e-6], "beta": [0.1]}, "answer_tokens": 50.0}
    plain |= {"prompts": 2, "pairs": 2, "max_tokens": 2, "temperature": 1.0, "chat": True}
    return Definition(**{**plain, "methods": {"dpo": SweptMethod("DPO", {"token_weighting": "all"})}, **more})


def test_a_judge_can_be_changed_until_it_has_judged(tmp_path):
    old, new = (make_definition(judge=words) for words in (["reward"], ["longer"]))
    write_state(tmp_path, SweepState(old, {}))
    assert restore_state(tmp_path, new).definition == new
    judged = Sweep(tmp_path, old).judgements(old.runs[0].name)
    judged.parent.mkdir()
    judged.touch()
    with pytest.raises(RefusedSweep, match=r"`judge` was .* and is"):
        restore_state(tmp_path, new)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default needs a GPU, and there is one")
def test_the_default_of_bf16_without_a_gpu_is_refused_with_what_to_set(place, capsys):
    assert cli.main(write_config(place, "wrong", "dpo", use_cpu=False, bf16=True)) == 2
    assert "`bf16`, TRL's default, needs a GPU, got none. Set `use_cpu: true`" in capsys.readouterr().err


def test_a_run_with_a_live_reference_says_so_after_what_all_runs_share(tmp_path):
    names = ("dpo", "tdpo1")
    methods = {name: SweptMethod(find_method(name).title, find_method(name).options) for name in names}
    sweep = Sweep(tmp_path, make_definition(methods=methods, seeds=1))
    assert [run.reads_cache for run in sweep.definition.runs] == [True, False]
    for run in sweep.definition.runs:
        words = sweep.train_command(run)
        last = max(i for i, word in enumerate(words) if word == "--precompute_ref_log_probs")
        assert words[last + 1] == ("true" if run.reads_cache else "false")


def test_a_definition_may_grow_and_nothing_else():
    old = make_definition()
    mean = SweptMethod("mean", {"token_weighting": "mean"}, beta_per_token=True)
    grid = {"learning_rate": [1e-6, 2e-6], "beta": [0.1]}
    new = make_definition(seeds=3, grid=grid, methods={**old.methods, "mean": mean})
    assert list(find_changes(old, new)) == []
    assert len(list(find_changes(new, old))) == 3
    judged = make_definition(judge=["longer"])
    assert list(find_changes(old, judged)) == []
    assert len(list(find_changes(judged, make_definition(judge=["shorter"])))) == 1
    assert list(find_changes(judged, make_definition(judge=["shorter"]), judged=False)) == []
    names = [run.name for run in new.runs]
    assert len(names) == len(set(names)) == 12
    assert {run.name for run in old.runs} <= set(names)
    assert {run.train_beta for run in new.runs if run.method == "mean"} == {5.0}  # 0.1 times the mean length


def test_a_method_of_another_trainer_has_its_beta_its_recipe_and_no_cache(tmp_path):
    methods = {
        "dpo": SweptMethod("DPO", {"token_weighting": "all"}, not_taken=["simpo_gamma"]),
        "simpo": SweptMethod("SimPO", {"trainer": "simpo"}, beta=2.0, not_taken=["pair_stream", "ref_cache_check"]),
    }
    words = ["--pair_stream", "false", "--max_steps", "3", "--ref_cache_check=0", "--simpo_gamma", "0.5"]
    grid = {"learning_rate": [1e-6, 2e-6], "beta": [0.1, 0.2]}
    sweep = Sweep(tmp_path, make_definition(methods=methods, grid=grid, words=words, seeds=1))
    runs = sweep.definition.runs
    assert [run.name for run in runs if run.method == "simpo"] == ["simpo-lr1e-06-beta2-s1", "simpo-lr2e-06-beta2-s1"]
    assert [run.method for run in sweep.cached_runs] == ["dpo"] * 4
    dpo, simpo = (sweep.train_command(run) for run in runs[:2])
    assert dpo[2:4] == ["--config", str(tmp_path / "recipe.yaml")]
    assert simpo[2:4] == ["--config", str(tmp_path / "recipe-simpo.yaml")]
    assert simpo[4:8] == ["--max_steps", "3", "--simpo_gamma", "0.5"]
    assert "--pair_stream false --max_steps 3 --ref_cache_check=0 --seed" in " ".join(dpo)
    assert "--precompute_ref_log_probs" in dpo
    assert not {"--precompute_ref_log_probs", "--ref_cache_dir"} & set(simpo)
    assert " ".join(simpo).endswith(
        f"--beta 2 --trainer simpo --output_dir {sweep.run_folder(runs[1].name)} --resume auto"
    )


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_options_of_other_trainers_are_sorted_into_their_recipes(place, capsys):
    words = write_config(
        place, "wrong", "simpo", "dpo", simpo_gamma=0.7, desirable_weight=2, truncation_mode="keep_end"
    )
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "2 issues" in said
    assert "`desirable_weight` in" in said
    assert "It is of `trainer: kto`." in said
    assert "`truncation_mode` must be keep_start beside ['simpo']" in said
    assert cli.main([*write_config(place, "preview", "simpo", "dpo", simpo_gamma=0.7), "--dry_run"]) == 0
    assert "simpo-lr0.001-beta2-s7" in capsys.readouterr().out


@pytest.mark.slow
def test_methods_of_other_trainers_run_beside_dpo_with_the_same_budget(place):
    words = write_config(place, "others", "dpo", "simpo", "orpo=0.3", "kto", simpo_gamma=0.7)
    assert cli.main(words) == 0
    folder = place / "others"
    assert [record.value for record in numbers(folder) if record.name == "sweep/steps"] == [8.0] * 4
    table = (folder / "table.md").read_text()
    assert "4 runs with equal budget: 8 optimiser steps each" in table
    assert "Methods with a beta of their own: `simpo` 2, `orpo=0.3` 0.3, `kto` 0.1." in table
    duels = {(r.config["first"], r.config["second"]) for r in numbers(folder) if r.name == "sweep/p_holm"}
    assert ("dpo lr 0.001 beta 0.1", "simpo lr 0.001 beta 2") in duels
    assert yaml.safe_load((folder / "recipe-simpo.yaml").read_text())["simpo_gamma"] == 0.7
    assert "pair_stream" not in yaml.safe_load((folder / "recipe-simpo.yaml").read_text())
    assert "simpo_gamma" not in yaml.safe_load((folder / "recipe.yaml").read_text())


def test_jobs_get_their_share_of_the_devices(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    four = ["0", "1", "4", "5"]
    assert divide_devices(2, four, 8) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "4,5"}]
    assert divide_devices(3, four, 8) == [{"CUDA_VISIBLE_DEVICES": one} for one in four[:3]]
    assert divide_devices(2, [], 8) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert divide_devices(1, [], 8) == [{}]


def made_up(p, agree, kls=((1.0, 3.0), (2.0, 4.0)), ratio=(1.2, 1.1, 1.3)):
    """Records of two methods at two grid values and two seeds."""
    shared = {
        "experiment": "sweep",
        "model": "m",
        "split_seed": 1,
        "max_tokens": 9,
        "temperature": 1,
        "judge": "reward",
    }

    def record(level, name, value, interval=None, **config):
        return Record(
            name=f"sweep/{name}", value=value, n=9, interval=interval, config={**shared, "level": level, **config}
        )

    made = [record("start", "tokens_mean", 10.0)]
    for method, each in zip(("dpo", "sampo"), kls, strict=True):
        for rate, kl in zip((1e-6, 2e-6), each, strict=True):
            config = {"method": method, "title": method.upper(), "learning_rate": rate, "beta": 0.1}
            for seed in (1, 2):
                run = {**config, "run": f"{method}-{rate}-{seed}", "seed": seed}
                made += [record("run", "steps", 5.0, **run), record("run", "tokens_ratio", ratio[0], **run)]
            cell = {**config, "seeds": [1, 2]}
            made += [record("method", "kl", kl, **cell), record("method", "win_rate", 0.5 + kl / 10, **cell)]
            made += [record("method", "tokens_ratio", ratio[0], ratio[1:], **cell)]
    duel = {"quality": "win rate", "first": "dpo", "second": "sampo", "seeds_agree": agree, "seeds": [1, 2]}
    return [*made, record("duel", "difference", -0.1, (-0.2, -0.01), **duel), record("duel", "p_holm", p, **duel)]


@pytest.mark.parametrize(("p", "agree", "decided"), [(0.01, 2, True), (0.06, 2, False), (0.01, 1, False)])
def test_a_difference_is_named_only_with_a_small_p_and_seeds_that_agree(p, agree, decided):
    said = " ".join(conclude(read_lines(made_up(p, agree))))
    assert ("`sampo` has the higher win rate than `dpo`" in said) == decided
    assert (f"Not decided by win rate: `dpo` and `sampo` (p = {p:.2g})" in said) == (not decided)


def test_a_sweep_that_is_not_finished_counts_the_seeds_that_both_methods_have():
    records = made_up(0.01, 1)
    for one in records:
        if one.config["level"] == "duel" or one.config.get("method") == "dpo":
            one.config["seeds"] = [1]
    said = " ".join(conclude(read_lines(records)))
    assert "in 1 of 1 seed." in said
    assert "One seed of `dpo` (learning_rate 1e-06), `dpo` (learning_rate 2e-06): the intervals" in said


def test_many_open_comparisons_are_counted():
    records = made_up(1.0, 2)
    start, duels = records[:-2], records[-2:]
    for number in range(7):
        for one in duels:
            value = number / 10 if one.name.endswith("p_holm") else one.value
            start.append(replace(one, value=value, config={**one.config, "second": f"other{number}"}))
    said = " ".join(conclude(read_lines(start)))
    assert "Not decided by win rate: 6 of 7 comparisons, with p from 0.1 to 0.6." in said


def test_a_beta_of_its_own_is_named_and_that_of_another_trainer_explained():
    records = made_up(1.0, 2)
    for one in records:
        if one.config.get("method") == "sampo":
            one.config.update({"own_beta": True, "beta": 0.5, "options": {"token_weighting": "sampo"}})
    said = " ".join(conclude(read_lines(records)))
    assert "Methods with a beta of their own: `sampo` 0.5." in said
    assert "other trainers" not in said
    for one in records:
        if one.config.get("method") == "sampo":
            one.config["options"] = {"trainer": "simpo"}
    assert "In the methods of TRL's other trainers beta is another quantity" in " ".join(conclude(read_lines(records)))


def test_a_length_is_named_only_where_its_interval_excludes_one():
    assert "answers are longer than the start's: 1.20 (1.10 to 1.30)" in " ".join(
        conclude(read_lines(made_up(1.0, 0)))
    )
    open_one = " ".join(conclude(read_lines(made_up(1.0, 0, ratio=(1.2, 0.9, 1.3)))))
    assert "longer than the start's:" not in open_one
    assert "Not decided, whether the answers are longer or shorter" in open_one


def test_methods_are_compared_at_a_kl_that_all_have_measured_around():
    lines = read_lines(made_up(1.0, 0))
    assert matched_kl(lines) == 3.0  # dpo from 1 to 3, sampo from 2 to 4
    assert at_kl(paths_of(lines)["sampo"], "win_rate", 3.0) == pytest.approx(0.8)
    assert matched_kl(read_lines(made_up(1.0, 0, kls=((1.0, 2.0), (3.0, 4.0))))) is None


def test_the_latex_table_escapes_what_latex_would_read():
    text = latex(read_lines(made_up(1.0, 0)))
    assert r"learning\_rate" in text
    assert r"60.0 \%" in text
    assert all(
        line.count("&") == text.splitlines()[2].count("&") for line in text.splitlines() if line.endswith(r"\\")
    )


def test_log_ratios_are_those_of_the_two_models(tmp_path):
    """Against plain forward passes of transformers; a cut answer has no end token."""
    names = [save_model(tmp_path / str(seed), chat=False, seed=seed) for seed in (0, 1)]
    tokenizer = AutoTokenizer.from_pretrained(names[0])
    rows = [("w1 w2 w3 ", "w4 w5 w6", "eos"), ("w7 ", "w8 w9", "length")]
    answers = [Answer(prompt=prompt, answer=text, stop=stop) for prompt, text, stop in rows]

    def log_prob(name, prompt, text, stop):
        start = tokenizer(prompt)["input_ids"]
        ids = [*start, *tokenizer(text)["input_ids"], *([tokenizer.eos_token_id] if stop == "eos" else [])]
        logits = AutoModelForCausalLM.from_pretrained(name)(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(logits[place - 1, ids[place]].item() for place in range(len(start), len(ids)))

    found = answer_log_ratios(*names, answers, prompt_format="raw", device="cpu")
    assert found == pytest.approx([log_prob(names[0], *row) - log_prob(names[1], *row) for row in rows], abs=1e-4)
    assert answer_log_ratios(names[0], names[0], answers, prompt_format="raw", device="cpu") == [0.0, 0.0]


def test_a_job_of_submitit_runs_the_command(tmp_path):
    pytest.importorskip("submitit")
    from sampo.sweep.plan import Sweep
    from sampo.sweep.slurm import slurm_starter

    start = slurm_starter(Sweep(Path(tmp_path), make_definition()), {"timeout_min": "5"}, cluster="local")
    jobs = {
        status: start(["sampo", *words], name, {})
        for status, words, name in ((0, ["--version"], "good"), (2, ["nothing"], "bad"))
    }
    for status, job in jobs.items():
        while job.poll() is None:
            time.sleep(0.1)
        assert job.poll() == status
    assert "sampo 0" in (tmp_path / "logs" / "good.log").read_text()
