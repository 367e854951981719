"""What a run says without being asked: to a script that sets no logging up, and on the command line."""

import contextlib
import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tiny import make_pairs, save_model
from transformers.integrations import integration_utils

from sampo.cli import main
from sampo.logs import get_logger, show_logs
from sampo.training.preflight import LOGGERS, find_logger_issues

SUPPORT = Path(__file__).resolve().parents[1] / "support"
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
{setup}
from tiny import make_pairs, training_options
from sampo import SamPOConfig, SamPOTrainer

def run(**options):
    args = SamPOConfig(**training_options({out!r}, max_steps=2, save_strategy="steps", **options))
    trainer = SamPOTrainer(model={model!r}, args=args, train_dataset=make_pairs(16))
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))

{body}
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def script(model_folder, tmp_path, setup="", body="run(pair_stream='auto')") -> str:
    text = SCRIPT.format(here=str(SUPPORT), setup=setup, out=str(tmp_path / "out"), model=model_folder, body=body)
    path = tmp_path / "run.py"
    path.write_text(text)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True, timeout=300)
    return done.stderr + done.stdout


def test_a_script_that_swaps_the_class_sees_method_reference_and_stream_once_and_no_noise(model_folder, tmp_path):
    body = "run(pair_stream='auto', logging_steps=0.5)\nrun(pair_stream='auto', logging_steps=0.5, save_steps=1, "
    text = script(model_folder, tmp_path, body=body + "resume_from_checkpoint=True)")
    for line in ("method: SamPO (`token_weighting: sampo`", "reference: a copy of the initial policy"):
        assert text.count(f"\n{line}") == 2  # of two trainers
    assert len(re.findall(r"pair_stream: packed rows\..* which is rounding \(the bound is 0\.0001\)\.", text)) == 1
    for noise in ("[RANK", "Setting accelerator to CPU", "arguments do not match"):
        assert noise not in text


def test_who_sets_logging_up_decides(model_folder, tmp_path):
    setup = "import logging; logging.basicConfig(level=logging.INFO, format='ours %(message)s')"
    text = script(model_folder, tmp_path, setup)
    assert text.count("method:") == text.count("ours method:") == 1


def test_a_handler_is_added_once_where_there_is_none_and_levels_are_kept(monkeypatch):
    logger = logging.getLogger("sampo.nobody")
    logger.propagate = False  # pytest has a handler at the root
    monkeypatch.setattr("sampo.logs.ROOT", "sampo.nobody")
    try:
        for _ in range(2):
            show_logs(logging.WARNING)
        assert len(logger.handlers) == 1
        assert logger.level == logging.WARNING
        logger.handlers.clear()
        logger.setLevel(logging.ERROR)
        show_logs()
        assert logger.level == logging.ERROR
    finally:
        logger.handlers.clear()


def test_other_processes_than_the_first_are_silent(monkeypatch, caplog):
    from accelerate import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    logger = get_logger("sampo.somewhere")
    for rank, heard in (("1", 0), ("0", 1)):
        caplog.clear()
        monkeypatch.setenv("RANK", rank)
        logger.warning("heard")
        assert len(caplog.records) == heard


@pytest.mark.parametrize(("world", "said"), [("1", "padding"), ("2", "[RANK 0] padding")])
def test_the_prefix_of_trl_goes_on_one_process_and_stays_on_several(monkeypatch, caplog, world, said):
    from accelerate import PartialState
    from trl.trainer import dpo_trainer

    PartialState()
    monkeypatch.setenv("WORLD_SIZE", world)
    dpo_trainer.logger.warning("padding")
    assert caplog.messages == [said]


# --- where metrics are reported to -----------------------------------------------------------------------------------


def test_every_logger_of_transformers_is_known():
    assert LOGGERS.keys() == integration_utils.INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.parametrize("name", list(LOGGERS))
def test_a_logger_without_its_package_is_refused_in_one_sentence_and_one_with_it_is_not(monkeypatch, name):
    look_for, package = LOGGERS[name]
    for there in (True, False):
        monkeypatch.setattr(integration_utils, f"is_{look_for}_available", lambda there=there: there)
        faults = find_logger_issues([name])
        assert len(faults) == (not there)
    assert faults[0].startswith(f"`report_to: {name}` needs")
    assert f"`pip install {package}`" in faults[0] or not package


def test_none_all_and_unknown_loggers():
    assert (
        find_logger_issues(None)
        == find_logger_issues([])
        == find_logger_issues("none")
        == find_logger_issues("all")
        == []
    )
    assert "got 'wandbb'" in find_logger_issues("wandbb")[0]


@pytest.mark.parametrize("command", [["train"], ["iterate", "--rounds", "2"], ["cache"]], ids=" ".join)
def test_commands_say_it_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    make_pairs(8).to_json(tmp_path / "pairs.jsonl")
    options = {"model_name_or_path": "/no/such/model", "dataset_name": tmp_path / "pairs.jsonl"}
    options |= {"output_dir": tmp_path / "out", "report_to": "wandb", "use_cpu": True, "bf16": False}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    try:
        status = main([*command, *words])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2
    assert "`report_to: wandb` needs a package that is not installed. `pip install wandb`" in said
    assert "Traceback" not in said


# --- what a training prints at each log ------------------------------------------------------------------------------


def training(model_folder, folder, **more) -> list[str]:
    make_pairs(40).to_json(folder / "pairs.jsonl")
    options = {"model_name_or_path": model_folder, "dataset_name": folder / "pairs.jsonl"}
    options |= {"output_dir": folder / "out", "use_cpu": True, "bf16": False, "max_steps": 3, "logging_steps": 1}
    options |= {"per_device_train_batch_size": 2}
    options |= {"eval_fraction": 0.3, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no"} | more
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_a_log_is_one_line_and_the_state_keeps_every_metric(model_folder, tmp_path, capsys):
    assert main(training(model_folder, tmp_path)) == 0
    printed = capsys.readouterr().out.splitlines()
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    steps, (evaluation,), (end,) = (
        [entry for entry in log if name in entry] for name in ("loss", "eval_loss", "train_runtime")
    )
    lines = [line for line in printed if line.startswith("step ")]
    for number, (line, entry) in enumerate(zip(lines, steps, strict=True), 1):
        assert len(line) <= 100
        assert line.startswith(f"step {number}/3  loss {entry['loss']:.4f}  margin {entry['rewards/margins']:.4f}  ")
        assert re.search(r"  [\d,]+ tokens/s  ETA \d+:\d\d:\d\d$", line)
        assert {"grad_norm", "learning_rate", "length/selected", "logps/chosen"} <= entry.keys()
    assert lines[-1].endswith("ETA 0:00:00")
    (line,) = (line for line in printed if line.startswith("eval 3/3  "))
    assert f"loss {evaluation['eval_loss']:.4f}" in line
    for name in ("longer", "shorter"):
        value = evaluation.get(f"eval_accuracies/chosen_{name}")
        assert (f"  {name} {value:.2f}" in line) if value is not None else (f"  {name} " not in line)
    assert f"3 steps in 0:00:0{round(end['train_runtime'])}, mean loss {end['train_loss']:.4f}" in "\n".join(printed)
    assert "{'" not in "".join(printed)


def test_log_line_full_prints_every_metric(model_folder, tmp_path, capsys):
    assert main(training(model_folder, tmp_path, log_line="full", max_steps=1)) == 0
    printed = capsys.readouterr().out
    assert "'logps/chosen'" in printed
    assert "step 1/1" not in printed


def test_the_line_stays_out_of_the_bar_of_a_terminal(model_folder, tmp_path):
    """Each line begins where the bar was taken away, and ends before it is drawn again."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, "-m", "sampo.cli", *training(model_folder, tmp_path)]
    there = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=there) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal ends with its last process
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert "3/3 [" in text  # the bar
    lines = re.findall(r"\r *\r(step \d/3  loss [^\r\n]*|pair_stream: auto takes [^\r\n]*)\r\n", text)
    assert len(lines) == 4
    assert all("it/s" not in line and "|" not in line for line in lines)
    assert "{'" not in text
