"""Starts the commands of a sweep as Slurm jobs through `submitit` (extra `slurm`); its local executor is the test."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from .plan import RefusedSweep, Sweep
from .processes import Starter, open_log


class SubmittedJob:
    """A job of `submitit` with the interface of a process.

    Args:
        job: that was submitted.
    """

    def __init__(self, job: Any):
        self._job = job

    def poll(self) -> int | None:
        """The exit status of the command; 1 where the job itself has failed."""
        if not self._job.done():
            return None
        return 1 if self._job.exception() is not None else int(self._job.result())

    def terminate(self) -> None:
        """Cancel the job; Slurm sends SIGTERM first."""
        self._job.cancel()


def run_in_job(arguments: Sequence[str], log: str, environment: dict[str, str]) -> int:
    """Run a command in a job, with its output in the log of the sweep; returns its exit status."""
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(
            arguments, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}, check=False
        )
    return done.returncode


def slurm_starter(sweep: Sweep, parameters: dict[str, str], cluster: str | None = None) -> Starter:
    """Submits each command as a job; all nodes must see the folder of the sweep.

    Args:
        sweep: the folder and the definition.
        parameters: of submitit's executor, such as `slurm_partition` and `timeout_min`.
        cluster: `slurm`, or `local` for processes of this machine; None: what submitit finds.

    Raises:
        RefusedSweep: submitit is not installed, or does not take the parameters.
    """
    try:
        import submitit
    except ImportError:
        raise RefusedSweep("`launcher: slurm` needs submitit: `pip install 'sampo-dpo[slurm]'`.") from None
    executor = submitit.AutoExecutor(folder=sweep.folder / "logs" / "submitit", cluster=cluster)
    try:
        executor.update_parameters(**{name: _number_or_text(value) for name, value in parameters.items()})
    except (NameError, TypeError, ValueError) as error:
        raise RefusedSweep(f"`slurm` must be parameters of submitit's executor, got {parameters}: {error}") from None

    def start(command: Sequence[str], name: str, environment: dict[str, str]) -> SubmittedJob:
        open_log(sweep, command, name).close()
        arguments = [sys.executable, "-m", "sampo.cli", *command[1:]]
        return SubmittedJob(executor.submit(run_in_job, arguments, str(sweep.log(name)), environment))

    return start


def _number_or_text(value: str) -> int | str:
    return int(value) if value.isdecimal() else value
