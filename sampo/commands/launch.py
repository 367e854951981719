"""How `sampo train` starts processes: by `accelerate launch`, with a configuration by name."""

import argparse
import difflib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.schemas import WrongFile, read_yaml
from .recipes import packaged

# Options of `accelerate launch` that `sampo train` passes on. Others go into a configuration file.
OPTIONS = {
    "accelerate_config": "name of a packaged configuration, or the path of a file",
    "num_processes": "processes in total, over all machines",
    "num_machines": "machines",
    "machine_rank": "number of this machine, from 0",
    "main_process_ip": "address of machine 0",
    "main_process_port": "port of machine 0; on a single machine a free one is found",
    "gpu_ids": "devices to use, as `0,1`",
}


@dataclass(frozen=True)
class LauncherConfig:
    """The fields that we read of an accelerate configuration."""

    distributed_type: str | bool | None = None  # NO is a boolean in YAML
    use_cpu: bool | None = None
    num_machines: int | str | None = None
    main_process_ip: str | None = None
    main_process_port: int | str | None = None


def split_options(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split the arguments into the launcher's options and all others, in their order."""
    parser = argparse.ArgumentParser(prog="sampo train", add_help=False, allow_abbrev=False)
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, help=text)
    known, rest = parser.parse_known_args(argv)
    return {name: value for name, value in vars(known).items() if value is not None}, rest


def launch_command(options: dict[str, str], rest: list[str]) -> list[str] | None:
    """The command that starts the processes, up to the module; `None` where this process can do the work itself.

    Without options, processes are started only if the user has an accelerate configuration or several GPUs, as
    `accelerate launch` would. A process that a launcher has started starts no others.

    Args:
        options: The launcher's options.
        rest: Those of the training, to which `--use_cpu` is added if the configuration asks for it.
    """
    if not options and ("WORLD_SIZE" in os.environ or not _would_launch()):
        return None
    options = dict(options)
    command = [sys.executable, "-m", "sampo.commands.launcher"]
    config: dict = {}
    if "accelerate_config" in options:
        path = accelerate_config(options.pop("accelerate_config"))
        command += ["--config_file", str(path)]
        config = _read_config(path)
    if config.get("use_cpu") and not {"--use_cpu", "--use-cpu"} & set(rest):
        rest.append("--use_cpu")  # accelerate's launcher does not pass it on to several processes
    _refuse_fsdp_without_devices(config, rest)
    machines = _number("num_machines", options.get("num_machines") or config.get("num_machines") or 1)
    _refuse_lone_machine(machines, config, options)
    if machines == 1 and not config.get("main_process_port"):
        options.setdefault("main_process_port", "0")  # a free one, so that two runs on one machine do not collide
    for name, value in options.items():
        command += [f"--{name}", value]
    if not config and _number("num_processes", options.get("num_processes", 1)) > 1:
        command.append("--multi_gpu")
    return command


def _read_config(path: Path) -> dict[str, Any]:
    """Read an accelerate configuration; accelerate itself checks the other fields."""
    try:
        return vars(read_yaml(path, LauncherConfig, ignore_unknown=True))
    except (OSError, WrongFile) as error:
        raise SystemExit(
            f"sampo train: `--accelerate_config` must be a configuration of accelerate. {error}"
        ) from None


def _number(name: str, value: Any) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise SystemExit(f"sampo train: `--{name}` must be a whole number of at least 1, got {str(value)[:40]!r}.")
    return number


def accelerate_config(name: str) -> Path:
    """Path of an accelerate configuration: a file, or a name of those in `configs/accelerate`."""
    try:
        return _find_config(name, "accelerate", ".yaml")
    except ValueError as error:
        raise SystemExit(f"sampo train: `--accelerate_config` {error}") from None


def deepspeed_config(name: str) -> str:
    """Path of a DeepSpeed configuration: a file, or a name of those in `configs/deepspeed`."""
    try:
        return str(_find_config(name, "deepspeed", ".json"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _find_config(name: str, kind: str, suffix: str) -> Path:
    if os.path.isfile(name):
        return Path(name)
    known = {path.stem: path for path in sorted((packaged("configs") / kind).glob(f"*{suffix}"))}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"must be a file or one of {list(known)}, got {name!r}.{hint}")
    return known[name]


def _refuse_fsdp_without_devices(config: dict, rest: list[str]) -> None:
    """On the CPU accelerate silently replaces FSDP by DDP; the trainer raises too, but in each process."""
    import torch

    if config.get("distributed_type") == "FSDP" and (asks_for_cpu(rest) or not torch.accelerator.is_available()):
        raise SystemExit(
            "sampo train: FSDP must have a GPU for each process, got a run on the CPU, where accelerate would train "
            "with DDP instead. Use `--accelerate_config cpu_zero3`, which shards on the CPU too, or `cpu_ddp`."
        )


def refuse_engine_that_cannot_run(options: dict[str, str], rest: list[str]) -> None:
    """Find issues before processes are started, each of which would fail separately.

    Args:
        options: The launcher's options.
        rest: Those of the training, as `launch_command` leaves them.
    """
    import torch

    if "accelerate_config" not in options:
        several = _number("num_processes", options.get("num_processes", 1)) > 1
        if several and not asks_for_cpu(rest) and not torch.accelerator.is_available():
            raise SystemExit(
                f"sampo train: `--num_processes` must be at most the number of GPUs, got {options['num_processes']} "
                f"on a machine without one that torch {torch.__version__} can use. To try a run on the CPU, use "
                "`--accelerate_config cpu_ddp`."
            )
        return
    engine = _read_config(accelerate_config(options["accelerate_config"])).get("distributed_type")
    on_cpu = asks_for_cpu(rest)
    if engine in ("DEEPSPEED", "MULTI_GPU") and not on_cpu and not torch.accelerator.is_available():
        cpu = "cpu_zero1, cpu_zero2 or cpu_zero3" if engine == "DEEPSPEED" else "cpu_ddp"
        raise SystemExit(
            f"sampo train: `--accelerate_config` of type {engine} must have a GPU for each process, got a machine "
            f"without one that torch {torch.__version__} can use. To try a run on the CPU, use {cpu}."
        )
    if engine == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise SystemExit("sampo train: ZeRO needs DeepSpeed: `pip install 'sampo-dpo[deepspeed]'`.")


def asks_for_cpu(rest: Sequence[str], default: bool = False) -> bool:
    """Whether the options choose the CPU. The last `--use_cpu` takes effect; without one, `default` does."""
    asks = default
    for i, word in enumerate(rest):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__use_cpu":
            value = value or next(iter(rest[i + 1 : i + 2]), "")
            asks = value.lower() not in ("false", "no", "f", "n", "0")
    return asks


def _refuse_lone_machine(machines: int, config: dict, options: dict[str, str]) -> None:
    """Without these options each machine would act as the first one, and wait for the others."""
    missing = [f"`--{name}`" for name in ("main_process_ip", "machine_rank") if name not in options]
    if machines > 1 and missing and not config.get("main_process_ip"):  # the user's own file may set both
        raise SystemExit(
            f"sampo train: a run on {machines} machines needs {' and '.join(missing)}. Start the same command on "
            "each, with the address of machine 0 and the machine's own number."
        )


def _would_launch() -> bool:
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return os.path.isfile(default_config_file) or torch.cuda.device_count() > 1
