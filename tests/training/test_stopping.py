"""Ctrl-C, and the templates for clusters: a run that is stopped goes on with the same command."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import ROOT, environment
from tiny import make_pairs, save_model
from torch import distributed

from sampo.checkpointing import files as checkpoints
from sampo.checkpointing.signals import Preempted, SaveOnSignal
from sampo.commands import train
from sampo.commands.models import RefusedRun

SAMPO = [sys.executable, "-m", "sampo.cli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    save_model(folder / "model")
    make_pairs(24, conversational=True).to_json(folder / "pairs.jsonl")
    return folder


def options(folder: Path, out: Path, **more) -> list[str]:
    options = {"model_name_or_path": folder / "model", "dataset_name": folder / "pairs.jsonl", "output_dir": out}
    options |= {"use_cpu": "true", "bf16": "false", "logging_steps": 1, "per_device_train_batch_size": 2}
    options |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_steps": 100000, "report_to": "none"}
    return [word for name, value in (options | more).items() for word in (f"--{name}", str(value))]


def stop_after_a_step(command: list[str], number: int, *, times: int = 1) -> subprocess.CompletedProcess:
    """Start a command, wait for its first step, and send a signal to all of its processes, as a terminal does."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("step "):
                break
        for _ in range(times):
            os.killpg(process.pid, number)
            time.sleep(1.2)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, "".join(said) + out, err)


def losses(out: Path) -> list[int]:
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [line["step"] for line in log if "loss" in line]


def test_ctrl_c_saves_a_checkpoint_ends_with_130_and_the_command_goes_on(folder, tmp_path):
    command = [*SAMPO, "train", *options(folder, tmp_path / "out", resume="auto")]
    stopped = stop_after_a_step([*command, "--max_steps", "100000"], signal.SIGINT)
    assert stopped.returncode == 130, stopped.stderr[-2000:]
    (checkpoint,) = checkpoints.numbered_checkpoints(tmp_path / "out")
    assert f"{checkpoint.name} is saved. The same command with `--resume auto` continues." in stopped.stdout
    assert "Traceback" not in stopped.stderr
    step = checkpoints.step_of(checkpoint)
    done = subprocess.run([*command, "--max_steps", str(step + 1)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "out") == list(range(1, step + 2))


def test_a_second_ctrl_c_stops_at_once():
    stop = SaveOnSignal()
    with stop.listening(active=True):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # by a launcher, that hands on the same key press
        assert stop.received == signal.SIGINT
        stop.received_at -= 2  # seconds ago
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert Preempted(Path("checkpoint-1"), signal.SIGINT).code == 130


def test_ctrl_c_while_nothing_is_saved_is_one_line(folder, tmp_path):
    command = [*SAMPO, "train", *options(folder, tmp_path / "out", save_strategy="no", max_steps=100000)]
    stopped = stop_after_a_step(command, signal.SIGINT)
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    assert "sampo train: stopped." in stopped.stderr


@pytest.mark.parametrize("raised", [Preempted(Path("checkpoint-1")), RefusedRun("no data"), FloatingPointError("NaN")])
def test_the_process_group_ends_before_python_does(folder, tmp_path, raised):
    """A thread of gloo that ends after Python has begun to can abort the process, which then exits with 134."""

    def work(*_options):
        raise raised

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        status = train.start_with(train.make_parser(), work, options(folder, tmp_path))
        assert status == {Preempted: 143, RefusedRun: 2, FloatingPointError: 1}[type(raised)]
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_a_process_of_a_group_that_is_stopped_at_once_ends_with_130(folder, tmp_path):
    """Its collectives may never end, so nothing waits for them."""
    code = """
import sys
from torch import distributed
from sampo.commands import train

def work(*options):
    raise KeyboardInterrupt

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
train.start_with(train.make_parser(), work, sys.argv[1:])
sys.exit("did not end at once")
"""
    words = [sys.executable, "-c", code, *options(folder, tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 130, done.stderr[-2000:]
    assert "sampo train: stopped." in done.stderr


def cluster_command(folder: Path, out: Path) -> list[str]:
    """The command of the PyTorchJob, with this machine, two processes and a tiny run in the place of its own."""
    job = yaml.safe_load((ROOT / "configs" / "kubernetes" / "pytorchjob.yaml").read_text())
    container = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    words = shlex.split(container["command"][-1])
    assert words[:3] == ["exec", "sampo", "train"]
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_name_or_path": str(folder / "model")}))
    here = {"--accelerate_config": "cpu_ddp", "--num_machines": "1", "--num_processes": "2", "--machine_rank": "0"}
    here |= {"--main_process_ip": "127.0.0.1", "--main_process_port": "0", "--config": str(recipe)}
    here |= {"--output_dir": str(out)}
    assert here.keys() <= set(words)
    words = [here.get(words[i - 1], word) for i, word in enumerate(words)]
    tiny = options(folder, out)
    places = [tiny.index(name) for name in ("--model_name_or_path", "--output_dir")]
    tiny = [word for i, word in enumerate(tiny) if not any(i in (place, place + 1) for place in places)]
    return [*SAMPO, *words[2:], *tiny]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_command_of_the_kubernetes_template_goes_on_when_it_is_started_again(folder, tmp_path, number):
    command = cluster_command(folder, tmp_path / "out")
    stopped = stop_after_a_step([*command, "--max_steps", "100000"], number)
    assert stopped.returncode == 128 + number, stopped.stderr[-2000:]
    assert "Traceback" not in stopped.stderr
    (checkpoint,) = checkpoints.numbered_checkpoints(tmp_path / "out")
    assert checkpoints.find_checkpoint_issue(checkpoint) is None
    if number == signal.SIGINT:
        return
    step = checkpoints.step_of(checkpoint)
    done = subprocess.run([*command, "--max_steps", str(step + 1)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "out") == list(range(1, step + 2))


def test_the_job_of_the_slurm_template_goes_on_when_it_is_submitted_again(folder, tmp_path, monkeypatch):
    """With stand-ins for Slurm's programs, on this machine and with two processes on the CPU."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "scontrol": "echo 127.0.0.1",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
        "sampo": f'exec {sys.executable} -m sampo.cli "$@"',
    }.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "recipe.yaml").write_text("bf16: false\n")
    job = {
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    job |= {"RECIPE": str(tmp_path / "recipe.yaml"), "ACCELERATE_CONFIG": "cpu_ddp"}
    for name, value in {**job, "PATH": f"{programs}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    command = ["bash", str(ROOT / "scripts" / "launch.slurm"), *options(folder, tmp_path / "out")]
    stopped = stop_after_a_step([*command, "--max_steps", "100000"], signal.SIGTERM)
    assert stopped.returncode != 0
    (checkpoint,) = checkpoints.numbered_checkpoints(tmp_path / "out")
    step = checkpoints.step_of(checkpoint)
    done = subprocess.run([*command, "--max_steps", str(step + 1)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "out") == list(range(1, step + 2))


def test_ctrl_c_in_a_round_is_waited_for_and_the_same_command_goes_on(folder, tmp_path):
    command = [*SAMPO, "iterate", "--rounds", "1", *options(folder, tmp_path / "out", max_steps=100000)]
    stopped = stop_after_a_step(command, signal.SIGINT)
    assert stopped.returncode == 130, stopped.stderr[-2000:]
    assert (
        "Round 1 was stopped while training. The same `sampo iterate` command continues from there." in stopped.stderr
    )
    assert "Traceback" not in stopped.stderr
    (checkpoint,) = checkpoints.numbered_checkpoints(tmp_path / "out" / "round-1")
    assert checkpoints.find_checkpoint_issue(checkpoint) is None


def test_what_fails_in_every_process_is_said_by_the_first_alone(folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "w1", "chosen": "w2", "rejected": "w2"}\n' * 3)
    words = options(folder, tmp_path / "out", dataset_name=bad, accelerate_config="cpu_ddp", num_processes=2)
    done = subprocess.run([*SAMPO, "train", *words], capture_output=True, text=True, env=environment())
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("the same text in `chosen` and `rejected`") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["generate", "diagnose", "audit"])
def test_other_commands_stop_in_one_line(folder, tmp_path, name):
    """Ctrl-C while they work: the data are a pipe that nobody closes."""
    pipe = tmp_path / "pairs.jsonl"
    os.mkfifo(pipe)
    words = {
        "generate": [str(folder / "model"), "--prompts", str(pipe), "--out", str(tmp_path / "a.jsonl")],
        "diagnose": [
            "--policy",
            str(folder / "model"),
            "--data",
            str(pipe),
            "--out",
            str(tmp_path / "d"),
            "--use_cpu",
        ],
        "audit": [str(pipe)],
    }[name]
    with (
        subprocess.Popen(
            [*SAMPO, name, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as process,
        pipe.open("wb"),
    ):  # opens when the command reads
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said[-2000:]
    assert f"sampo {name}: stopped." in said
    assert "Traceback" not in said
