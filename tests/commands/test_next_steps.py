"""The commands that a command names at its end are parsed, and those without a gap are run."""

import argparse
import json
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from tiny import make_pairs, save_model

from sampo import cli
from sampo.commands import next_steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder")  # whose name needs quotes
    save_model(folder / "model")
    make_pairs(12).to_json(folder / "pairs.jsonl")
    return folder


def named(printed: str) -> list[list[str]]:
    """The words of each command below `Next:`, which are the last lines."""
    lines = printed.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("Next: "))
    return [shlex.split(line[6:]) for line in lines[first:]]


def train(folder: Path, out: Path, **more: object) -> list[str]:
    options = {"model_name_or_path": folder / "model", "dataset_name": folder / "pairs.jsonl", "output_dir": out}
    options |= {"use_cpu": True, "bf16": False, "max_steps": 1, "save_strategy": "no"} | more
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_a_trained_model_answers_prompts_by_the_command_that_was_printed(folder, tmp_path, capsys):
    assert cli.main(train(folder, tmp_path / "out")) == 0
    generate, chat, report = named(capsys.readouterr().out)
    assert chat == ["sampo", "chat", str(tmp_path / "out"), str(folder / "model")]
    assert cli.main([*generate[1:], "--max_tokens", "3", "--device", "cpu"]) == 0
    (judge,) = named(capsys.readouterr().out)
    answers = tmp_path / "out" / "answers.jsonl"
    assert len(answers.read_text().splitlines()) == 12
    assert judge[:4] == ["sampo", "judge", "--system", str(answers)]
    words = ["--system", str(answers), "--baseline", str(answers), "--judge", "longer", "--out", judge[-1]]
    assert cli.main(["judge", *words]) == 0
    compare, again = named(capsys.readouterr().out)
    assert again == report
    assert compare[:4] == ["sampo", "compare", "--judgements", str(tmp_path / "out" / "judgements.jsonl")]
    assert cli.main(report[1:]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_adapter_is_merged_by_the_command_that_was_printed(folder, tmp_path, capsys):
    assert cli.main(train(folder, tmp_path / "out", use_peft=True, lora_target_modules="all-linear")) == 0
    merge, *_ = named(capsys.readouterr().out)
    assert cli.main(merge[1:]) == 0
    merged = tmp_path / "out-merged"
    assert json.loads((merged / "config.json").read_text())["architectures"]
    assert named(capsys.readouterr().out)[0][:3] == ["sampo", "generate", str(merged)]


def test_an_audit_leads_to_a_diagnosis_and_that_to_a_training(folder, tmp_path, capsys):
    assert cli.main(["audit", str(folder / "pairs.jsonl"), "--tokenizer", str(folder / "model")]) == 0
    (diagnose,) = named(capsys.readouterr().out)
    assert cli.main([*diagnose[1:], "--use_cpu", "--out", str(tmp_path / "d")]) == 0
    (training,) = named(capsys.readouterr().out)
    assert training[-2:] == ["--output_dir", "FOLDER"]
    words = [str(tmp_path / "out") if word == "FOLDER" else word for word in training[1:]]
    assert cli.main([*words, "--use_cpu", "--bf16", "false", "--max_steps", "1"]) == 0


def test_bad_rows_come_before_a_next_command(tmp_path, capsys):
    rows = [*make_pairs(4), {"prompt": "p", "chosen": "", "rejected": "r"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as stop:
        cli.main(["audit", str(tmp_path / "pairs.jsonl")])
    assert stop.value.code == 3
    assert "Next: " not in capsys.readouterr().out


def test_options_of_the_data_go_on(folder):
    data = argparse.Namespace(
        dataset_name="hub/pairs", dataset_config=None, eval_fraction=0, columns=["prompt=question"]
    )
    data.dataset_test_split, data.dataset_train_split, data.text_as_messages = "test_prefs", "train_prefs", True
    generate, *_ = next_steps.after_training("out", "model", data, evaluates=True)
    args = import_module("sampo.commands.generate").make_parser().parse_args([str(word) for word in generate[2:]])
    assert (args.split, args.columns, args.text_as_messages) == ("test_prefs[:100]", ["prompt=question"], True)
    generate, *_ = next_steps.after_training("out", "model", data, evaluates=False)
    assert "train_prefs[:100]" in generate
    data.dataset_config = "en"  # which `generate` cannot read
    assert "PROMPTS" in next_steps.after_training("out", "model", data, evaluates=True)[0]


@pytest.mark.parametrize(
    "command",
    [
        *next_steps.after_generating(Path("a.jsonl")),
        *next_steps.after_judging(Path("j.jsonl")),
        *next_steps.after_comparing(Path("c")),
        *next_steps.after_merging(Path("m")),
        *next_steps.after_sweep(Path("s")),
        ["sampo", "chat", "out", "model"],
    ],
    ids=lambda command: command[1],
)
def test_commands_with_a_gap_are_parsed(command):
    _, name, *words = map(str, command)
    import_module(f"sampo.{cli.COMMANDS[name][0]}").make_parser().parse_args(words)
