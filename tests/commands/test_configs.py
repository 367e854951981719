"""Every file in `configs/` goes through the loaders of accelerate and DeepSpeed, and is held to what it says.

accelerate refuses unknown keys at the top of a file and ignores those of its nested parts; DeepSpeed the other way.
"""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from sampo.commands.launch import split_options
from sampo.commands.options import make_parser

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = {path.stem: path for path in sorted((ROOT / "configs" / "accelerate").iterdir())}
DEEPSPEED = {path.stem: path for path in sorted((ROOT / "configs" / "deepspeed").iterdir())}
GPU = ["fsdp2", "multi_gpu", "zero1", "zero2", "zero3", "zero3_offload"]
CPU = ["cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3"]


def read(path):
    return yaml.safe_load(path.read_text())


def test_all_configurations_are_here():
    assert sorted(ACCELERATE) == sorted([*CPU, *GPU, *(f"{name}_2nodes" for name in GPU), "single_gpu"])
    assert len(ACCELERATE) == 17
    assert sorted(DEEPSPEED) == ["zero1", "zero2", "zero3", "zero3_offload"]
    assert {path.suffix for path in ACCELERATE.values()} == {".yaml"}
    assert {path.suffix for path in DEEPSPEED.values()} == {".json"}


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_knows_every_key_of_a_configuration(name):
    config = load_config_from_file(str(ACCELERATE[name]))  # raises for unknown keys at the top
    written = read(ACCELERATE[name])
    assert config.num_processes == written["num_processes"]
    assert config.distributed_type == written["distributed_type"]
    known = {action.dest for action in launch_command_parser()._actions}
    nested = [key for value in written.values() if isinstance(value, dict) for key in value]
    assert not [key for key in nested if key not in known]
    assert bool(nested) == (name.startswith(("fsdp2", "zero", "cpu_zero")))


@pytest.mark.parametrize("name", ACCELERATE)
def test_a_header_says_what_for_and_what_was_measured(name):
    lines = ACCELERATE[name].read_text().splitlines()
    header = [line for line in lines if line.startswith("# ")]
    assert lines[: len(header)] == header
    assert "easured" in " ".join(header)
    assert max(map(len, lines)) <= 119


def launched(name):
    """The arguments as `accelerate launch` has them, and the environment that it gives its processes."""
    words = ["--config_file", str(ACCELERATE[name]), "--main_process_port", "0"]
    if name.endswith("_2nodes"):
        words[2:] = ["--main_process_ip", "127.0.0.1"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "script.py"]))
    if args.use_deepspeed:
        fields = read(ACCELERATE[name])["deepspeed_config"]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)  # as `accelerate launch` sets it
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize("name", [name for name in ACCELERATE if "zero" in name])
def test_deepspeed_gets_the_stage_and_the_offload_that_the_name_promises(name, monkeypatch):
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    args, environment = launched(name)
    assert args.num_processes == (2 if name in CPU else 16 if name.endswith("_2nodes") else 8)
    for key, value in environment.items():
        if key.startswith("ACCELERATE_"):
            monkeypatch.setenv(key, value)
    zero = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    config = DeepSpeedZeroConfig(**zero)
    assert config.stage == int(name.removeprefix("cpu_")[4])
    assert [o and o.device == "cpu" for o in (config.offload_optimizer, config.offload_param)] == [
        "offload" in name
    ] * 2
    assert config.gather_16bit_weights_on_model_save == (config.stage == 3)
    if name in DEEPSPEED:
        ours = json.loads(DEEPSPEED[name].read_text())["zero_optimization"]
        same = DeepSpeedZeroConfig(**ours)
        for field in ("stage", "gather_16bit_weights_on_model_save"):
            assert getattr(same, field) == getattr(config, field)
        assert [o and o.device for o in (same.offload_optimizer, same.offload_param)] == (
            ["cpu", "cpu"] if "offload" in name else [None, None]
        )


@pytest.mark.parametrize("name", [name for name in ACCELERATE if "fsdp" in name])
def test_fsdp_gets_version_2_and_a_whole_state_dict(name):
    args, environment = launched(name)
    assert args.use_fsdp
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"


@pytest.mark.parametrize("name", GPU)
def test_the_counterpart_of_two_machines_differs_in_their_number_alone(name):
    one, two = read(ACCELERATE[name]), read(ACCELERATE[f"{name}_2nodes"])
    assert {key for key in {*one, *two} if one.get(key) != two.get(key)} == {
        *("num_machines", "num_processes", "main_process_port")
    }
    assert (two["num_machines"], two["num_processes"]) == (2, 2 * one["num_processes"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_counterpart_of_the_cpu_differs_in_device_size_and_precision_alone(stage):
    gpu, cpu = read(ACCELERATE[f"zero{stage}"]), read(ACCELERATE[f"cpu_zero{stage}"])
    assert {key for key in gpu if gpu[key] != cpu[key]} == {"num_processes", "use_cpu", "mixed_precision"}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_takes_every_key_of_its_own_configurations(name):
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(DEEPSPEED[name].read_text())
    words = " ".join(config.pop("_comment"))
    assert f"--deepspeed configs/deepspeed/{name}.json" in words
    assert "easured" in words
    assert {key for key, value in config.items() if value == "auto"} == {
        *("gradient_clipping", "gradient_accumulation_steps"),
        *("train_batch_size", "train_micro_batch_size_per_gpu"),
    }
    filled = {**config, "gradient_clipping": 1.0, "gradient_accumulation_steps": 2}
    filled |= {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}
    filled |= {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
    read_back = DeepSpeedConfig(filled)
    assert read_back.zero_optimization_stage == int(name[4])
    assert read_back.train_batch_size == 4
    with pytest.raises(ValueError, match="stagee"):
        DeepSpeedZeroConfig(**config["zero_optimization"], stagee=1)


# --- what starts the processes on a cluster


def test_the_slurm_script_is_bash_and_starts_what_the_options_name(tmp_path):
    script = ROOT / "scripts" / "launch.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    # Stand-ins for the programs of a cluster: `srun` runs its words here, `sampo` prints its own.
    for name, text in {
        "scontrol": "echo first-node; echo second-node",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; SLURM_NODEID=1 exec "$@"',
        "sampo": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "123457", "RECIPE": "recipe.yaml"}
    environment |= {"MODEL": "org/model", "ACCELERATE_CONFIG": "fsdp2"}
    command = ["bash", str(script), "--max_steps", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    launch, rest = split_options(done.stdout.splitlines()[1:])
    port = int(launch.pop("main_process_port"))
    assert 10_000 < port < 65_536
    assert launch == {
        **{"accelerate_config": "fsdp2", "num_machines": "2", "num_processes": "16"},
        **{"machine_rank": "1", "main_process_ip": "first-node"},
    }
    assert rest == [
        *("--config", "recipe.yaml", "--resume", "auto", "--model_name_or_path", "org/model", "--max_steps", "3"),
    ]
    missing = subprocess.run(["bash", str(script)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert missing.returncode != 0
    assert "RECIPE" in missing.stderr


def test_the_kubernetes_example_is_a_pytorchjob_that_runs_our_command_on_two_machines():
    job = read(ROOT / "configs" / "kubernetes" / "pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in replicas.items()} == {"Master": 1, "Worker": 1}
    for spec in replicas.values():
        assert spec["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        (container,) = spec["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator gives its variables to the container of this name
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert container["command"][:2] == ["bash", "-c"]
        line = container["command"][2]
        subprocess.run(["bash", "-n", "-c", line], check=True)
        words = shlex.split(line.replace("\\\n", " "))
        assert words[:3] == ["exec", "sampo", "train"]
        launch, rest = split_options(words[3:])
        assert launch["accelerate_config"] in ACCELERATE
        assert int(launch["num_machines"]) == 2
        assert int(launch["num_processes"]) == 2 * gpus
        # what the operator sets in every container
        assert launch["machine_rank"] == "$RANK"
        assert (launch["main_process_ip"], launch["main_process_port"]) == ("$MASTER_ADDR", "$MASTER_PORT")
        assert not make_parser().find_unknown(
            [word for word in rest if word not in ("--config", "/recipes/recipe.yaml")]
        )
