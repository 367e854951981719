"""Rounds really launched, with a tiny model: what they give is compared with the same commands run by hand."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_pairs, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sampo import cli
from sampo.commands import train
from sampo.commands.iterate import make_plan
from sampo.commands.options import make_parser
from sampo.data.subsets import shard_by_prompt, split_by_prompt
from sampo.io import locks
from sampo.reference_cache.store import cache_folders
from sampo.training.rounds import STATE, Round, hash_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and pairs."""
    folder = tmp_path_factory.mktemp("iterate")
    save_model(folder / "model")
    make_pairs(40, conversational=True).to_json(folder / "pairs.jsonl")
    return folder


def write_recipe(place, name, **more):
    recipe = {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / "pairs.jsonl"),
        "eval_fraction": 0.2,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_steps": 4,
        "seed": 7,
        "use_cpu": True,
        "pair_stream": "false",  # `auto` decides by time, and the runs here are compared to the bit
        "bf16": False,
        "report_to": "none",
        "output_dir": str(place / name),
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**recipe, **more}))
    return str(path)


@pytest.fixture(scope="module")
def two_rounds(place):
    """Two rounds on all data, killed in the second and taken up again: the words and the folder."""
    words, folder = ["iterate", "--config", write_recipe(place, "two", rounds=2)], place / "two"
    process = subprocess.Popen([sys.executable, "-m", "sampo.cli", *words], stdout=subprocess.DEVNULL)
    while not (folder / "round-2" / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (place / "killed.json").write_text((folder / STATE).read_text())
    assert not (folder / "round-2" / "trainer_state.json").exists()
    assert cli.main(words) == 0
    return words, folder


@pytest.fixture(scope="module")
def lora_rounds(place):
    """Two rounds of an adapter, each on its half of the prompts."""
    options = {"use_peft": True, "lora_target_modules": "all-linear", "max_steps": 3, "learning_rate": 1.0e-2}
    options |= {"token_budget": "dataset"}
    assert cli.main(["iterate", "--config", write_recipe(place, "lora", rounds=2, data="shards", **options)]) == 0
    return place / "lora"


def state_of(folder):
    return json.loads((folder / STATE).read_text())


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def run_by_hand(command, output_dir, *more):
    words = shlex.split(command)
    assert words[0] == "sampo"
    assert cli.main([*words[1:], "--output_dir", str(output_dir), *more]) == 0


def rows_of(command):
    """The rows that a stored command trains on."""
    script, training, model, mixture = make_parser().parse_args_and_config(shlex.split(command)[2:])
    rows = train.load_data(script, training, mixture, AutoTokenizer.from_pretrained(model.model_name_or_path))
    return [json.dumps(row, sort_keys=True) for row in rows["train"]], rows["test"]


# --- whole rounds


def test_the_stored_commands_run_by_hand_give_the_same_weights(two_rounds, tmp_path):
    """Those of the second round too, though it was killed and went on from a checkpoint."""
    first, second = (one["commands"] for one in state_of(two_rounds[1])["rounds"])
    assert (len(first), len(second)) == (1, 1)
    run_by_hand(first[0], tmp_path / "1")
    run_by_hand(second[0], tmp_path / "2", "--model_name_or_path", str(tmp_path / "1"))
    for number in (1, 2):
        assert_same_weights(weights(two_rounds[1] / f"round-{number}"), weights(tmp_path / str(number)))
    changed = weights(tmp_path / "1")["lm_head.weight"] - weights(tmp_path / "2")["lm_head.weight"]
    assert changed.abs().max() > 1e-3


def test_policy_and_reference_of_a_round_are_the_model_of_the_last(two_rounds):
    for one in state_of(two_rounds[1])["rounds"]:
        first = one["metrics"]["first"]
        assert first["step"] == 1
        assert first["rewards/margins"] == 0
        assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    second = json.loads((two_rounds[1] / "round-2" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in second if "loss" in entry]
    assert rates[0] == 1e-3  # a fresh schedule
    assert rates == sorted(rates, reverse=True)


def test_the_state_tells_what_each_round_was(two_rounds):
    state = state_of(two_rounds[1])
    for number, one in enumerate(state["rounds"], 1):
        assert one["status"] == "finished"
        assert one["model_sha256"] == hash_model(one["model"]) != ""
        assert one["metrics"]["steps"] == one["metrics"]["eval"]["step"] == 12  # though 12 is no multiple of 5
        assert one["metrics"]["eval"]["eval_loss"] > 0
        assert one["attempts"][0] == one["commands"][0]
        assert set(one["seconds"]) == {"training"}
        assert one["seconds"]["training"] > 1
        assert one["versions"]["trl"].startswith("1.16")
        assert f"--seed {7 + number - 1} --split_seed 7" in one["commands"][0]
    hashes = [[one[name] for one in state["rounds"]] for name in ("config_sha256", "model_sha256")]
    assert all(first != second for first, second in hashes)


def test_the_held_out_prompts_are_those_of_the_first_round_in_all_rounds(two_rounds):
    (train_1, test_1), (train_2, test_2) = (rows_of(one["commands"][0]) for one in state_of(two_rounds[1])["rounds"])
    assert test_1["prompt"] == test_2["prompt"]
    assert train_1 == train_2


def test_what_is_finished_is_not_run_again(two_rounds, capfd):
    before = {path: path.stat().st_mtime_ns for path in two_rounds[1].rglob("*.safetensors")}
    assert cli.main(two_rounds[0]) == 0
    assert {path: path.stat().st_mtime_ns for path in two_rounds[1].rglob("*.safetensors")} == before
    printed = capfd.readouterr().out
    assert "round 2 of 2 is finished" in printed
    assert "training:" not in printed
    assert [len(one["attempts"]) for one in state_of(two_rounds[1])["rounds"]] == [1, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "3"], "`rounds` was 2 and is 3"),
        (["--data", "shards"], "`data` was 'full' and is 'shards'"),
        (["--reference", "initial"], "`reference` was 'previous' and is 'initial'"),
        (["--beta", "0.3"], "`words` was [] and is ['--beta', '0.3']"),
        (["--num_processes", "2"], "launch: `num_processes` was None and is '2'"),
    ],
)
def test_other_rounds_in_the_same_folder_are_refused_with_what_has_changed(two_rounds, capsys, words, said):
    assert cli.main([*two_rounds[0], *words]) == 2
    assert said in capsys.readouterr().err


def test_another_recipe_or_other_data_are_refused_too(two_rounds, place, capsys):
    before = state_of(two_rounds[1])
    write_recipe(place, "two", rounds=2, learning_rate=2e-3)
    pairs = place / "pairs.jsonl"
    text = pairs.read_text()
    pairs.write_text(text + text.splitlines()[0] + "\n")
    try:
        assert cli.main(two_rounds[0]) == 2
    finally:
        pairs.write_text(text)
        write_recipe(place, "two", rounds=2)
    said = capsys.readouterr().err
    assert "recipe: `learning_rate` was 0.001 and is 0.002" in said
    assert "data has other content than before" in said
    assert state_of(two_rounds[1]) == before


def test_killed_in_the_second_round_it_goes_on_there(two_rounds, place):
    killed, rounds = json.loads((place / "killed.json").read_text())["rounds"], state_of(two_rounds[1])["rounds"]
    assert [one["status"] for one in killed] == ["finished", "training"]
    assert rounds[0] == killed[0]
    command = rounds[1]["commands"][0]
    assert rounds[1]["attempts"] == [command, f"{command} --resume auto"]


def test_a_round_is_not_started_from_a_model_that_has_changed(two_rounds, place, capsys):
    """As if round 2 had not ended, with one number of the model of round 1 another."""
    words, folder = two_rounds
    state, model = (folder / STATE).read_text(), folder / "round-1" / "model.safetensors"
    content = model.read_bytes()
    try:
        (folder / STATE).write_text((place / "killed.json").read_text())
        model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert cli.main(words) == 2
        model.unlink()
        assert cli.main(words) == 2
    finally:
        (folder / STATE).write_text(state)
        model.write_bytes(content)
    said = capsys.readouterr().err
    assert "must be as round 1 left it, got other weights" in said
    assert "must be as round 1 left it, got no weights" in said


def test_two_do_not_work_in_one_folder(two_rounds, capsys, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with open(two_rounds[1] / locks.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(two_rounds[0]) == 2
    (two_rounds[1] / locks.LOCK).unlink()
    assert "One process at a time can write into" in capsys.readouterr().err


# --- adapters and shards


def test_an_adapter_is_merged_into_what_its_round_started_from(lora_rounds, place):
    rounds = state_of(lora_rounds)["rounds"]
    starts = [str(place / "model"), rounds[0]["model"]]
    for one, start in zip(rounds, starts, strict=True):
        adapter = Path(one["model"]).parent
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == start
        base = AutoModelForCausalLM.from_pretrained(start)
        ids = torch.randint(4, 69, (3, 20), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            plain = base(ids).logits.log_softmax(-1)
            adapted = PeftModel.from_pretrained(base, adapter).eval()(ids).logits.log_softmax(-1)
            merged = AutoModelForCausalLM.from_pretrained(one["model"])(ids).logits.log_softmax(-1)
        assert (merged - adapted).abs().max() < 1e-5
        assert (merged - plain).abs().max() > 1e-2
        assert one["metrics"]["merge"]["difference_max"] < 1e-5
        assert one["metrics"]["first"]["rewards/margins"] == 0
        assert one["commands"][1].startswith(f"sampo merge {adapter} --base {start}")
        assert hash_model(one["model"]) == one["model_sha256"]
        assert one["attempts"] == one["commands"]


def test_shards_share_no_prompt_and_leave_no_pair_out(lora_rounds, two_rounds):
    first, second = (rows_of(one["commands"][0]) for one in state_of(lora_rounds)["rounds"])
    whole = rows_of(state_of(two_rounds[1])["rounds"][0]["commands"][0])
    assert sorted(first[0] + second[0]) == sorted(whole[0])
    assert first[1]["prompt"] == second[1]["prompt"] == whole[1]["prompt"]
    prompts = [{json.dumps(json.loads(row)["prompt"]) for row in rows} for rows in (first[0], second[0])]
    assert not prompts[0] & prompts[1]
    assert min(map(len, prompts)) >= 8


def test_the_token_budget_of_a_round_is_that_of_its_own_pairs(place, lora_rounds):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")

    def count(row, side):
        prompt, whole = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=begun, return_dict=True)["input_ids"]
            for messages, begun in ((row["prompt"], True), (row["prompt"] + row[side], False))
        )
        return len(whole) - len(prompt)

    said = []
    for one in state_of(lora_rounds)["rounds"]:
        rows = [json.loads(row) for row in rows_of(one["commands"][0])[0]]
        totals = [sum(count(row, side) for row in rows) for side in ("chosen", "rejected")]
        said.append(f"of {totals[0]:,} chosen and {totals[1]:,} rejected tokens")
        assert said[-1] in (Path(one["model"]).parent / "README.md").read_text()
    assert len(set(said)) == 2


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_divide_any_data_by_prompt_and_about_equally(shards):
    pairs = make_pairs(700, seed=shards)
    pairs = pairs.map(lambda row, i: {"prompt": f"prompt {i % 350}"}, with_indices=True)
    rest, _ = split_by_prompt(pairs, 0.3, seed=5)
    parts = [shard_by_prompt(rest, number, shards, seed=5) for number in range(1, shards + 1)]
    prompts = [set(part["prompt"]) for part in parts]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == len(set(rest["prompt"]))
    assert sum(map(len, parts)) == len(rest)
    share = len(rest) / shards
    assert all(abs(len(part) - share) < 5 * (2 * share) ** 0.5 for part in parts)  # 5 standard deviations of drawing


def test_a_shard_without_pairs_is_refused():
    pairs = make_pairs(1)
    with pytest.raises(ValueError, match="at least one pair"):
        [shard_by_prompt(pairs, number, 2) for number in (1, 2)]
    with pytest.raises(ValueError, match="must lie in 1"):
        shard_by_prompt(make_pairs(4), 0, 3)


# --- the reference


def test_the_first_model_stays_the_reference_where_that_is_asked_for(two_rounds, tmp_path):
    """Round 2 of `reference: initial`, from the first round above; its margins against sums that are made here."""
    words, folder = two_rounds
    options = {"token_weighting": "all", "logging_steps": 1, "max_steps": 1, "per_device_train_batch_size": 32}
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    plan, _ = make_plan({"reference": "initial"}, [*words[1:], *more])
    assert plan.train_command(1) == make_plan({}, [*words[1:], *more])[0].train_command(1)
    start = plan.model_after(0)
    run_by_hand(shlex.join(plan.train_command(2)), tmp_path / "out")
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]

    rows, _ = rows_of(shlex.join(plan.train_command(2)))
    margins = [margin_of(json.loads(row), folder / "round-1", start, beta=0.1) for row in rows]
    assert 20 < len(margins) <= 32  # one batch
    assert log[0]["rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert abs(log[0]["rewards/margins"]) > 1e-3


def margin_of(row, policy, reference, *, beta):
    """β·(log-ratio of chosen − of rejected), one row at a time and without padding."""
    tokenizer = AutoTokenizer.from_pretrained(reference)

    def ratio(side):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]
        sums = []
        for name in (policy, reference):
            with torch.no_grad():
                logps = AutoModelForCausalLM.from_pretrained(name)(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logps[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        return sums[0] - sums[1]

    return beta * (ratio("chosen") - ratio("rejected"))


# --- caches of reference log-probs


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_a_cache_is_removed_once_no_later_round_can_use_it_and_others_stay(place, tmp_path, monkeypatch, reference):
    monkeypatch.setenv("SAMPO_CACHE", str(tmp_path))
    recipe = write_recipe(place, "cached")
    words = ["--precompute_ref_log_probs", "--max_steps", "1", "--save_strategy", "no"]

    def caches(output_dir, *more):
        assert cli.main(["train", "--config", recipe, *words, "--output_dir", str(output_dir), *more]) == 0
        return set(cache_folders(tmp_path / "ref_logps"))

    own = {"rounds": 2, "reference": reference, "remove_old_caches": True}
    plan, cleans = make_plan(own, ["--config", recipe, *words])
    ours = caches(plan.round_folder(1))
    assert len(ours) == 2  # of training and of evaluation
    others = caches(tmp_path / "other", "--eval_fraction", "0.5") - ours
    assert len(others) == 2
    cleans(Round(1))
    left = set(cache_folders(tmp_path / "ref_logps"))
    assert left == (others if reference == "previous" else ours | others)
    cleans(Round(2))
    assert set(cache_folders(tmp_path / "ref_logps")) == others
    assert make_plan({**own, "remove_old_caches": False}, ["--config", recipe, *words])[1] is None


# --- what is refused before anything runs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "`rounds` must be a number of at least 1, got None"),
        (["--rounds", "0"], "`rounds` must be a number of at least 1, got 0"),
        (["--rounds", "2", "--prompt_shard", "1/2"], "`prompt_shard` is set by each round"),
        (["--rounds", "2", "--resume_from_checkpoint", "true"], "`resume_from_checkpoint` is set by each round"),
        (["--rounds", "2", "--num_machines", "2"], "runs on one machine, got ['num_machines']"),
        (["--rounds", "2", "--hub_token", "secret"], "Set the environment variable HF_TOKEN"),
        (["--rounds", "2", "--bata", "0.3"], "Did you mean `--beta`?"),
        (["--rounds", "2", "--eval_fraction", "1.5"], "`eval_fraction` must lie in [0, 1)"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(place, capsys, words, said):
    try:
        status = cli.main(["iterate", "--config", write_recipe(place, "refused"), *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert said in capsys.readouterr().err
    assert not (place / "refused").exists()


def test_a_recipe_of_rounds_is_no_recipe_of_sampo_train(place, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args_and_config(["--config", write_recipe(place, "refused", rounds=2)])
    assert "It is for `sampo iterate`." in capsys.readouterr().err


def test_rounds_without_a_state_file_are_left_alone(place, capsys):
    (place / "old" / "round-1").mkdir(parents=True)
    assert cli.main(["iterate", "--config", write_recipe(place, "old"), "--rounds", "2"]) == 2
    assert "no rounds without a state file" in capsys.readouterr().err


@pytest.mark.slow  # a launch for itself
def test_a_round_that_fails_says_so_and_may_be_corrected_before_it_has_trained(place, capfd):
    recipe = write_recipe(place, "failed", mask_samples=0)
    assert cli.main(["iterate", "--config", recipe, "--rounds", "1"]) == 2
    said = capfd.readouterr().err
    assert "`mask_samples` must be a whole number" in said
    assert "Round 1 must end with status 0, got 2 while training" in said
    assert state_of(place / "failed")["rounds"][0]["status"] == "failed"
    plan, _ = make_plan({"rounds": 1}, ["--config", write_recipe(place, "failed")])
    from sampo.training.rounds import restore_rounds

    assert [one.status for one in restore_rounds(plan)] == ["waiting"]
