import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import make_pairs, save_model

from sampo import cli
from sampo.audit.bias import length_bias
from sampo.commands import recipe_choices as choices
from sampo.commands import train
from sampo.training.memory import SHAPES, gpu_bytes

COMBINATION = {
    "token_weighting": "sampo",
    "sampled_sides": "rejected",
    "token_budget": "dataset",
    "balance_end_token": True,
    "length_penalty": "learned",
}


def method_for(differences, **more):
    """The chosen options for pairs with these T_w - T_l, and the sentence of the decision."""
    rejected = np.full(len(differences), 50)
    bias = length_bias(
        np.ones(len(differences)), rejected + differences, rejected, np.arange(len(differences)), **more
    )
    lines, reasons = choices.choose_method(bias, unit="tokens")
    return {line.name: line.value for line in lines}, " ".join(reasons)


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([10] * 95 + [-10] * 5, "DPO and plain SamPO lengthened the answers more"),
        ([-10] * 95 + [10] * 5, "DPO collapsed on such pairs"),
        ([10] * 140 + [-10] * 60, "DPO lengthened the answers on such pairs, and this did not"),
        ([10] * 60 + [-10] * 140, "has more terms to push down"),
        ([10, -10] * 5, "too few to show"),
    ],
)
def test_the_combination_is_recommended_where_length_matters_or_may_matter(differences, says):
    options, reasons = method_for(np.array(differences))
    assert options == COMBINATION
    assert says in reasons


def test_dpo_is_recommended_where_length_certainly_explains_nothing():
    options, reasons = method_for(np.array([10, -10] * 2000))
    assert options == {"token_weighting": "all"}
    assert "length explains nothing" in reasons
    options, reasons = method_for(np.array([0] * 95 + [10] * 5))
    assert options == {"token_weighting": "all"}
    assert "of equal length" in reasons


def test_the_accuracy_of_length_is_in_the_reasons_and_ties_count_half():
    _, reasons = method_for(np.array([10] * 6 + [0] * 2 + [-10] * 2))
    assert "The longer response is the chosen one in 70.0 % of the pairs" in reasons


def test_without_end_tokens_none_is_balanced():
    differences = np.array([10] * 140 + [-10] * 60)
    options, reasons = method_for(differences, ended=(np.full(200, False), np.full(200, False)))
    assert options == {name: value for name, value in COMBINATION.items() if name != "balance_end_token"}
    assert "no response has an end token" in reasons


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["train"], ("train", None)),
        (["test", "train"], ("train", "test")),
        (["train_sft", "test_sft", "train_prefs", "test_prefs"], ("train_prefs", "test_prefs")),
        (["pairs", "validation"], ("pairs", None)),
    ],
)
def test_held_out_splits_are_for_evaluation(names, chosen):
    assert choices.choose_splits(names) == chosen


def test_data_that_is_all_held_out_is_refused():
    with pytest.raises(ValueError, match=r"`data` must have a split to train on, got \['test', 'dev'\]"):
        choices.choose_splits(["test", "dev"])


def test_max_length_covers_99_of_100_pairs_in_steps_of_128():
    rows = np.array([100] * 98 + [130, 900])
    assert choices.choose_max_length(rows, None) == (256, 1)
    assert choices.choose_max_length(rows, 110) == (110, 2)


@pytest.mark.parametrize(("pairs", "step"), [(24, 4), (399, 4), (400, 8), (6399, 64), (6400, 128), (10**6, 128)])
def test_an_epoch_has_50_steps_where_there_are_enough_pairs(pairs, step):
    assert choices.choose_step(pairs) == step


@pytest.mark.parametrize("name", ["0.5B", "7B", "70B"])
@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_batch_is_the_largest_that_fits_in_the_first_engine_that_does(name, training, gpus):
    limit = choices.USABLE * 80e9

    def needs(engine, batch):
        return sum(gpu_bytes(SHAPES[name], engine, training, gpus=gpus, tokens=2 * batch * 2048).values())

    sizes = choices.choose_sizes(SHAPES[name], training, gpus=gpus, gpu_memory=80e9, max_length=2048, pairs=100_000)
    engines = ("single",) if gpus == 1 else choices.ENGINES_OF[training]
    fitting = [engine for engine in engines if needs(engine, 1) <= limit]
    assert sizes.fits == bool(fitting)
    assert sizes.engine == (fitting[0] if fitting else engines[-1])
    assert sizes.gigabytes == pytest.approx(needs(sizes.engine, sizes.batch) / 1e9)
    if fitting:
        assert needs(sizes.engine, sizes.batch) <= limit
        assert sizes.batch == 16 or needs(sizes.engine, 2 * sizes.batch) > limit
    assert sizes.batch * sizes.accumulation * gpus == 128


def test_a_recipe_is_yaml_with_these_values_whatever_the_names_are():
    lines = [
        choices.RecipeLine("text", "a: b # c"),
        choices.RecipeLine("mapping", {"prompt": "question"}),
        choices.RecipeLine("rate", 5e-7, "remark"),
        choices.RecipeLine("switch", True),
        choices.RecipeLine("word", "no"),
    ]
    text = choices.write_recipe("a\nevil: 1\u2028evil: 2", {"Note": ["b\nevil: 3\x85evil: 4"]}, [lines[:2], lines[2:]])
    assert yaml.safe_load(text) == {line.name: line.value for line in lines}
    assert "rate: 5.0e-7  # remark\n" in text


# --- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and pairs."""
    folder = tmp_path_factory.mktemp("init")
    save_model(folder / "model")
    make_pairs(24, conversational=True).to_json(folder / "pairs.jsonl")
    return folder


def test_the_written_recipe_trains_and_is_never_overwritten(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "mine.yaml"
    words = ["init", "--model", str(place / "model"), "--data", str(place / "pairs.jsonl"), "--gpus", "0", "--yes"]
    assert cli.main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    recipe = yaml.safe_load(out.read_text())
    assert recipe.items() >= COMBINATION.items()
    assert recipe["max_length"] == 128
    share = next(line for line in said.splitlines() if line.startswith("The chosen response is longer in"))
    comments = " ".join(line.lstrip("# ") for line in out.read_text().splitlines() if line.startswith("#"))
    assert share in comments
    command = said.strip().splitlines()[-1].strip()
    assert command == f"sampo train --config {out}"
    assert train.start([*command.split()[2:], "--max_steps", "1", "--report_to", "none"]) == 0
    log = json.loads((tmp_path / "runs" / "mine" / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["step"] == 1
    before = out.read_bytes()
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--out", str(out)])
    assert stop.value.code == 2
    assert "sampo init: error: `out` must not exist yet" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_several_gpus_get_an_engine_and_a_split_of_the_step(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(place / "model"), "--data", str(place / "pairs.jsonl"), "--method", "full", "--gpus", "2"]
    assert cli.main(["init", *words, "--yes"]) == 0
    said = capsys.readouterr().out
    assert said.strip().endswith(
        "sampo train --config model-pairs.yaml --accelerate_config multi_gpu --num_processes 2"
    )
    assert "of 80 GB (assumed)" in said
    recipe = yaml.safe_load((tmp_path / "model-pairs.yaml").read_text())
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * 2 == 4
    assert "use_peft" not in recipe


def start(*words, cwd, **options):
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "sampo.cli", "init", *words]
    return subprocess.run(
        command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=120, check=False, **options
    )


def test_a_terminal_is_asked_for_what_is_missing_and_a_pipe_is_not(place, tmp_path):
    ours, theirs = pty.openpty()
    os.write(ours, f"{place / 'model'}\n0\n\n{tmp_path / 'asked.yaml'}\n".encode())
    with os.fdopen(ours, "wb"), os.fdopen(theirs) as terminal:
        done = start("--data", str(place / "pairs.jsonl"), cwd=tmp_path, stdin=terminal)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Model, a folder or a hub id: " in done.stdout
    assert "Preference pairs" not in done.stdout
    recipe = yaml.safe_load((tmp_path / "asked.yaml").read_text())
    assert (recipe["use_peft"], recipe["use_cpu"]) == (True, True)
    done = start("--data", str(place / "pairs.jsonl"), cwd=tmp_path, input="never read\n")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("sampo init: error: `model` must be given. Set `--model` and `--data`.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "./nowhere"], "`model`"),
        (["--gpus", "-1"], "`gpus`"),
        (["--gpu_memory", "0"], "`gpu_memory` must be a positive number of GB, got 0.0"),
        (["--gpu_memory", "nan"], "`gpu_memory` must be a positive number of GB, got nan"),
        (["--out", "no/such/folder.yaml"], "`out` must be in an existing folder"),
    ],
)
def test_bad_input_is_one_sentence(place, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    good = {"--model": str(place / "model"), "--data": str(place / "pairs.jsonl"), "--gpus": "0"}
    good |= dict(zip(words[::2], words[1::2], strict=True))
    with pytest.raises(SystemExit) as stop:
        cli.main(["init", *(word for item in good.items() for word in item), "--yes"])
    assert stop.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sampo init: error: ")]
    assert says in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompt", "becomes"),
    [("what is w1", True), ("<|im_start|>user\nwhat is w1<|im_end|>\n", None)],
    ids=["text", "rendered"],
)
def test_pairs_of_text_become_messages_for_a_chat_model(place, tmp_path, monkeypatch, prompt, becomes):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{prompt} {i}", "chosen": f"w2 w{i % 9}", "rejected": "w3 w4 w5"} for i in range(24)]
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "init",
        "--model",
        str(place / "model"),
        "--data",
        "text.jsonl",
        "--out",
        "run.yaml",
        "--yes",
        "--gpus",
        "0",
    ]
    assert cli.main(words) == 0
    recipe = Path("run.yaml").read_text()
    assert yaml.safe_load(recipe).get("text_as_messages") is becomes
    assert ("`text_as_messages` trains it in the form" in " ".join(recipe.replace("#", "").split())) == bool(becomes)
