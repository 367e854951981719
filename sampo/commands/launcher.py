"""Run `accelerate launch` and exit with the status of its processes, without a report of its own.

A signal is passed on to the processes, which save a checkpoint, and the launcher waits for them. accelerate and torch
would send the signal again after Ctrl-C, kill the processes 30 seconds after SIGTERM, and print several tracebacks for
an error that the first process has reported in one line.
"""

import logging
import signal
import subprocess
import sys
from typing import Any


def main(argv: list[str]) -> int:
    """Launch; returns the exit status of the process that has failed first, or 0."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    make_parser = run.get_args_parser
    run.get_args_parser = lambda: _with_other_signals(make_parser())  # accelerate has no option for this one
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _status(failure.exitcode, f"process {rank}")
    except subprocess.CalledProcessError as error:  # a launch of one process
        return _status(error.returncode, "the process")
    return 0


def _with_other_signals(parser: Any) -> Any:
    """Torch's options, with SIGTERM and Ctrl-C handled here."""
    parser.set_defaults(signals_to_handle="SIGHUP,SIGQUIT")
    return parser


def _pass_on(number: int, _frame: Any) -> None:
    """Pass a signal on to all started processes; after Ctrl-C in a terminal they count it once."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


def _status(code: int, who: str) -> int:
    """The status as a shell reports it; prints the signal that ended a process."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = " The system does so when memory runs out." if name == "SIGKILL" else ""
    print(f"sampo: error: {who} must exit by itself, got {name}.{hint}", file=sys.stderr)
    return 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
