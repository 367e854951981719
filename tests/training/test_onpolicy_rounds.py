"""On-policy rounds really launched with a tiny model; each step is a command that can be run by hand."""

import json
import random
import re
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from processes import environment
from safetensors.torch import load_file
from tiny import WORDS, save_model

from sampo import cli
from sampo.data.subsets import shard_of_prompt
from sampo.io.journal import read_rows
from sampo.training.onpolicy import OnPolicyPlan
from sampo.training.rounds import STATE

SERVER = Path(__file__).parents[1] / "support" / "model_server.py"
SERVED = "--temperature 1 --url http://localhost/v1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and prompts."""
    folder, rng = tmp_path_factory.mktemp("onpolicy"), random.Random(0)
    save_model(folder / "model")
    for name, n in (("prompts", 24), ("held_out", 6)):
        rows = [{"prompt": " ".join(rng.choices(WORDS, k=6))} for _ in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(place, name, **more):
    options = {
        "on_policy": True,
        "rounds": 2,
        "prompts": str(place / "prompts.jsonl"),
        "generate": "--samples 4 --temperature 1 --max_tokens 60",
        "judge": "longer",
        "pairs": "--choice best_worst",
        "model_name_or_path": str(place / "model"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0e-3,
        "logging_steps": 1,
        "save_steps": 1,
        "seed": 7,
        "use_cpu": True,
        "pair_stream": "false",
        "bf16": False,
        "report_to": "none",
        "output_dir": str(place / name),
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**options, **more}))
    return str(path)


def state_of(folder):
    return json.loads((folder / STATE).read_text())


def test_a_round_answers_judges_pairs_and_trains_and_is_not_run_again(place, capfd):
    words = ["iterate", "--config", recipe(place, "one", rounds=1)]
    assert cli.main(words) == 0
    (one,) = state_of(place / "one")["rounds"]
    assert (one["status"], one["done"]) == ("finished", ["generating", "pairing"])
    folder = place / "one" / "round-1" / "onpolicy"
    answers, pairs = read_rows(folder / "answers.jsonl"), read_rows(folder / "pairs.jsonl")
    assert len(answers) == 24 * 4
    ended = {row["answer"] for row in answers if row["stop"] == "eos"}
    assert {row[side][0]["content"] for row in pairs for side in ("chosen", "rejected")} <= ended
    measured = one["metrics"]["on_policy"]
    assert (measured["prompts"], measured["pairs"]) == (24, len(pairs))
    assert measured["answers_tokens"] == pytest.approx(sum(row["tokens"] for row in answers) / len(answers))
    assert [shlex.split(command)[1] for command in one["commands"]] == ["generate", "pairs", "train"]
    before = {path: path.stat().st_mtime_ns for path in (place / "one" / "round-1").rglob("*")}
    assert f"{len(pairs)} pairs of 24 prompts" in capfd.readouterr().out
    assert cli.main(words) == 0
    assert "round 1 of 1 is finished" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (place / "one" / "round-1").rglob("*")} == before
    assert cli.main([*words, "--judge", "exact"]) == 2
    assert "`judge` was ['longer'] and is ['exact']" in capfd.readouterr().err


def test_each_round_is_answered_by_a_server_of_its_own_model(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = shlex.join([sys.executable, str(SERVER), "{model}", str(port)])
    serve = f"--samples 4 --temperature 1 --max_tokens 60 --url http://127.0.0.1:{port}/v1 --serve '{server}'"
    more = {"rounds": 1, "eval_prompts": str(place / "held_out.jsonl"), "generate": serve}
    assert cli.main(["iterate", "--config", recipe(place, "served", **more)]) == 0
    found = {}
    for part, model in (("start", place / "model"), ("round-1", place / "served" / "round-1")):
        folder = place / "served" / part / "onpolicy"
        assert (folder / "eval.server.log").read_text() == f"serving {model}\n"
        words = ["--prompts", str(place / "held_out.jsonl"), "--max_tokens", "60", "--device", "cpu"]
        assert cli.main(["generate", str(model), *words, "--out", str(place / f"{part}.jsonl")]) == 0
        files = (folder / "eval.jsonl", place / f"{part}.jsonl")
        served, found[part] = ([(row["answer"], row["tokens"]) for row in read_rows(path)] for path in files)
        assert served == found[part]
    assert found["start"] != found["round-1"]


def test_rounds_are_answered_by_as_many_processes_as_train():
    plan = OnPolicyPlan(1, "full", "previous", "out", "m", "main", 0, "float32", False, launch={"num_processes": "4"})
    asked = [replace(plan, judge=["longer"], generate=words) for words in ([], ["--url=http://localhost/v1"])]
    alone, served = ([w for w in one.steps_before(1)[0].command if "num_processes" in w] for one in asked)
    assert (alone, served) == (["--num_processes"], [])


STEPS = ("generating", "pairing", "training", "starting", "answering", "judging")
PLACES = [(number, step, again) for number in (1, 2) for step in STEPS for again in (0, 1)]
MOST_SECONDS = (1.5, 5.0)  # after a step has begun, of its first kill and of its second


def has_reached(folder, number, step):
    """Whether a round is at that step, or has passed it."""
    status = state_of(folder)["rounds"][number - 1]["status"] if (folder / STATE).is_file() else "waiting"
    return status == "finished" or (status in STEPS and STEPS.index(status) >= STEPS.index(step))


@pytest.mark.slow  # about four minutes: two rounds of six launches, twice, and two kills in each step of both
def test_rounds_that_were_killed_in_every_step_end_with_the_weights_of_rounds_that_were_not(place):
    more = {"eval_prompts": str(place / "held_out.jsonl")}
    assert cli.main(["iterate", "--config", recipe(place, "whole", **more)]) == 0
    words = [sys.executable, "-m", "sampo.cli", "iterate", "--config", recipe(place, "killed", **more)]
    kills = 0
    for number, step, again in PLACES:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        while process.poll() is None and not has_reached(place / "killed", number, step):
            time.sleep(0.01)
        time.sleep(random.Random(f"{number} {step} {again}").uniform(0, MOST_SECONDS[again]))
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 20
    assert subprocess.run(words, check=False, env=environment()).returncode == 0
    _assert_equal_rounds(place)
    first, second = state_of(place / "whole")["rounds"]
    assert first["metrics"]["on_policy"]["eval_win_rate"] is not None
    files = [place / "whole" / f"round-{number}" / "onpolicy" / "answers.jsonl" for number in (1, 2)]
    shards = [{row["prompt"] for row in read_rows(path)} for path in files]
    assert not shards[0] & shards[1]
    assert len(shards[0] | shards[1]) == 24
    assert all(shard_of_prompt(prompt, 2) == number for number in (1, 2) for prompt in shards[number - 1])
    assert all("starting" not in command for command in second["done"])


def _assert_equal_rounds(place):
    for number in (1, 2):
        one, other = (place / name / f"round-{number}" for name in ("whole", "killed"))
        weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        for name in ("answers.jsonl", "eval.jsonl", "pairs.jsonl", "pairs.account.jsonl"):
            rows = [read_rows(folder / "onpolicy" / name) for folder in (one, other)]
            for row in rows[0] + rows[1]:  # the model's name is the folder of the round before
                for key in ("model", "chosen_model", "rejected_model"):
                    row.pop(key, None)
            assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompts": None}, "`prompts` must be given with `on_policy`"),
        ({"dataset_name": "x.jsonl"}, "`dataset_name` is set by each round"),
        ({"generate": "--samples 1"}, "`generate` must have at least two `--samples`, got 1"),
        ({"generate": "--samples 3"}, "With `temperature` 0 nothing is sampled"),
        ({"generate": "--sampels 3"}, "`generate` must hold options of `sampo generate`, got ['--sampels', '3']"),
        ({"generate": "--samples x"}, "argument --samples: invalid int value: 'x'"),
        ({"generate": f"{SERVED} --samples 4"}, "must start a server of the round's model, .* got no `--serve`"),
        ({"generate": f"{SERVED} --samples 4 --serve 'serve it'"}, "got `--serve 'serve it'`"),
        ({"generate": "--samples 4 --temperature 1 --out x"}, "`generate` must go without `--out`"),
        ({"generate": "--samples 4 --temperature 1 --seed 3"}, "`generate` must go without `--seed`"),
        ({"generate": "--samples '4"}, "`generate` must be options as for a shell"),
        ({"judge": "nobody"}, "`judge` must begin with one of"),
        ({"judge": "human"}, "`judge` must begin with one of"),
        ({"judge": "reward"}, "`model` must be given for `judge` reward"),
        ({"judge": "reward --model ./nowhere"}, "there is no such folder"),
        ({"pairs": "--judge exact"}, "`pairs` must go without `--judge`"),
        ({"pairs": "--margin 1"}, "`margin` goes with `choice` all_above"),
        ({"on_policy": False}, "`prompts` goes with `on_policy`"),
        ({"on_policy": "yes please"}, "`on_policy` must be true or false"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(place, capsys, more, said):
    more = {"dataset_name": "x.jsonl", **more} if more.get("on_policy") is False else more
    try:
        status = cli.main(["iterate", "--config", recipe(place, "refused", **more)])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert re.search(said if ".*" in said else re.escape(said), capsys.readouterr().err)
    assert not (place / "refused").exists()
