"""Starts real processes that train (tests/support/distributed_worker.py), and reads what each of them saw."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")
LIMIT_S = 400  # a first launch of DeepSpeed builds an extension


def launch_runs(model, out, runs, *, processes, config=None, check=True, shim=True):
    """Train several runs, one after the other, in the same processes.

    Args:
        model: folder of the model.
        out: folder for the results and, by its name, each run.
        runs: name: settings, as `distributed_worker.train` takes them.
        processes: how many.
        config: an accelerate configuration for `accelerate launch`; `torchrun` without.
        check: the launch must end well.
        shim: let accelerate have FSDP2 on the CPU.

    Returns:
        For each run what each rank wrote; without `check` the ended process.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if config is not None:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += [str(WORKER), "--model", str(model), "--out", str(out), "--runs", json.dumps(runs)]
    extra = {} if shim else {"NO_SHIM": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=environment(**extra), check=False
    )
    if not check:
        return done
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]
    (out / "stderr.txt").write_text(done.stderr)
    return {name: [rank[name] for rank in ranks] for name in runs}


def environment(**extra) -> dict[str, str]:
    """Of a process: one thread, the tests' modules, and `ninja` of this environment, active or not."""
    modules = os.pathsep.join([str(WORKER.parent), os.environ.get("PYTHONPATH", "")])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": modules, "PATH": programs, **extra}


def launch(model, out, *, processes, batch, config=None, check=True, no_shard_on=None, **options):
    """One run, in the folder `run`; what each rank wrote, or without `check` the ended process."""
    runs = {"run": {"batch": batch, "options": options, "no_shard_on": no_shard_on}}
    done = launch_runs(model, out, runs, processes=processes, config=config, check=check)
    return done["run"] if check else done
