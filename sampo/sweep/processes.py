"""How the commands of a sweep are started on this machine: with a log each, and their share of the devices."""

import os
import subprocess
from collections.abc import Callable, Sequence
from typing import IO, Protocol

from ..io.children import start_child
from .plan import Sweep


class Started(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to stop."""
        ...


Starter = Callable[[Sequence[str], str, dict[str, str]], Started]  # command, name of its log, environment


def local_starter(sweep: Sweep, lock: int) -> Starter:
    """Starts processes on this machine, which hold the sweep's lock as long as they live."""

    def start(command: Sequence[str], name: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with open_log(sweep, command, name) as log:
            return start_child(
                command,
                lock,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )

    return start


def open_log(sweep: Sweep, command: Sequence[str], name: str) -> IO[str]:
    """The log of a command, with the command as its first line."""
    path = sweep.log(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    file.write(f"$ {' '.join(command)}\n")
    file.flush()
    return file


def divide_devices(jobs: int, devices: Sequence[str], cpus: int) -> list[dict[str, str]]:
    """The environment of each job: its GPUs, or on the CPU its share of the threads.

    Args:
        jobs: their number.
        devices: ids of the GPUs, as CUDA_VISIBLE_DEVICES takes them.
        cpus: number of processor cores.
    """
    if devices:
        each = len(devices) // jobs
        return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[job * each : (job + 1) * each])} for job in range(jobs)]
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(jobs)]
    return [{"OMP_NUM_THREADS": str(max(1, cpus // jobs))} for _ in range(jobs)]
