"""`sampo train --dry_run`: all issues at once; a run that is measured and leaves nothing behind."""

import json
import re
import subprocess
import sys

import pytest
from processes import environment
from tiny import make_pairs, make_tokenizer, save_model

from sampo import cli
from sampo.commands.dry_run import mark_selected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    save_model(folder / "model")
    make_pairs(40, conversational=True).to_json(folder / "pairs.jsonl")
    return folder


def command(folder, **more):
    options = {"model_name_or_path": folder / "model", "dataset_name": folder / "pairs.jsonl", "use_cpu": "true"}
    options |= {"output_dir": folder / "out", "bf16": "false", "per_device_train_batch_size": 2}
    options |= {"gradient_accumulation_steps": 2, "report_to": "none", "num_train_epochs": 3, **more}
    return ["train", "--dry_run", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def issues(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_issues_of_options_folder_model_and_data_are_listed_together(folder, tmp_path, capsys):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    rows = [{"prompt": "a", "chosen": "", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "model").mkdir()
    words = command(folder, output_dir=tmp_path / "out", dataset_name=tmp_path / "pairs.jsonl")
    words += ["--model_name_or_path", str(tmp_path / "model"), "--learning_rate", "x", "--beta", "y", "--betta", "1"]
    said = issues([*words, "--token_weighting", "sampoo"], capsys)
    for part in (
        "`--betta` is no option. Did you mean `--beta`?",
        "`--learning_rate` must be a number, got 'x'.",
        "`--beta` must be a number, got 'y'.",
        "got 'sampoo'. Did you mean `sampo`?",
        "with checkpoint-3. Set `resume: auto`",
        "`model_name_or_path` must be a folder with a model, ",
        "1 of 2 pairs has an empty `chosen`",
    ):
        assert part in said
    assert said.startswith("sampo train: error: ")


def test_issues_are_listed_before_a_launcher_is_started(folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("dry_run: true\n")
    words = command(folder, dataset_name=tmp_path / "none.jsonl", learning_rate="x", config=tmp_path / "run.yaml")
    said = issues([*words, "--accelerate_config", "zero2", "--num_processes", "2", "--use_cpu", "false"], capsys)
    assert "4 issues" in said
    for part in (
        "`dry_run` in",
        "`--learning_rate` must be a number",
        "none.jsonl",
        "`--accelerate_config` of type DEEPSPEED must have a GPU",
    ):
        assert part in said


@pytest.mark.parametrize("more", [{}, {"use_peft": "true", "lora_target_modules": "all-linear"}], ids=["full", "lora"])
def test_a_run_is_described_and_measured_and_nothing_is_written(folder, capsys, more):
    before = sorted(folder.rglob("*"))
    assert cli.main(command(folder, eval_strategy="steps", eval_fraction=0.2, **more)) == 0
    said = capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before
    assert "Nothing was written." in said
    steps = int(re.search(r"steps +(\d+) of 4 pairs each, on 1 process", said).group(1))
    assert steps == 3 * -(-len(kept_pairs(folder)) // 4)
    trained, total = re.search(r"trained +([\d,]+) of ([\d,]+) parameters", said).groups()
    assert (trained == total) == (not more)
    assert re.search(r"time +.* at [\d.e-]+ and [\d.e-]+ s a step", said)
    assert re.search(r"memory +[\d.]+ GiB at the peak of these steps, and the machine has [\d.]+ GiB", said)
    selected = [tuple(map(int, numbers)) for numbers in re.findall(r"(\d+) of (\d+) tokens selected", said)]
    assert len(selected) == 4
    for (n_chosen, chosen), (n_rejected, rejected) in (selected[:2], selected[2:]):
        assert n_chosen == n_rejected == min(chosen, rejected)  # Eq. 10


def kept_pairs(folder):
    """The training pairs that `eval_fraction: 0.2` leaves."""
    from sampo import load_preferences
    from sampo.data.subsets import split_by_prompt

    return split_by_prompt(load_preferences(str(folder / "pairs.jsonl")), 0.2, 42)[0]


@pytest.mark.slow
def test_a_run_of_several_processes_is_measured_on_its_engine(folder):
    words = [*command(folder), "--accelerate_config", "cpu_ddp", "--num_processes", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "sampo.cli", *words], capture_output=True, text=True, env=environment(), check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("Nothing was written.") == 1
    assert re.search(r"steps +15 of 8 pairs each, on 2 processes", run.stdout)
    assert not (folder / "out").exists()


def test_only_selected_tokens_are_in_brackets():
    tokenizer = make_tokenizer()
    ids = tokenizer("the answer is long")["input_ids"]
    text = mark_selected(tokenizer, ids, [1.0] * len(ids))
    assert text == f"⟦{tokenizer.decode(ids)}⟧"
    assert mark_selected(tokenizer, ids, [0.0] * len(ids)) == tokenizer.decode(ids)
    weights = [float(i % 2) for i in range(len(ids))]
    marked = mark_selected(tokenizer, ids, weights)
    assert re.findall("⟦(.*?)⟧", marked) == [tokenizer.decode(ids[i]) for i in range(1, len(ids), 2)]


def test_other_commands_do_not_take_it(capsys):
    assert "`--dry_run` is no option. It is for the command line: `sampo train" in issues(
        ["iterate", "--rounds", "2", "--dry_run"], capsys
    )
