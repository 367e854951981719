"""What a process does that a launcher has started beside others: print an error once, and end in order."""

import os
import sys
import time

from ..io.locks import LAUNCHER

STOPPED_AT_ONCE = 130  # the exit status of a process that Ctrl-C has ended
SECONDS_FOR_THE_FIRST = 20.0  # in which a launcher ends the other processes after the first one has failed


def become_launcher(launcher: list[str], module: str, words: list[str]) -> None:
    """Replace this process by a launcher of a module; does not return.

    Args:
        launcher: as `launch_command` makes it.
        module: that each process runs.
        words: its arguments.
    """
    # DeepSpeed looks for `ninja` there, and does not find that of an environment that is not activated
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    os.environ[LAUNCHER] = str(os.getpid())
    sys.stdout.flush()
    os.execv(launcher[0], [*launcher, "-m", module, *words])


def is_one_of_several() -> bool:
    """Whether a launcher has started other processes beside this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is the first of them, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_first() -> None:
    """Before an error is printed, wait in other processes: the launcher ends them if the first one failed too."""
    if not is_first():
        time.sleep(SECONDS_FOR_THE_FIRST)


def print_error(program: str, error: BaseException) -> None:
    """Print the error once."""
    wait_for_first()
    rank = "" if is_first() else f" (process {os.environ['RANK']})"
    print(f"{program}: error: {error}{rank}", file=sys.stderr, flush=True)


def end_process_group(*, wait: bool) -> None:
    """End the threads of the process group before Python ends: one that ends later can abort the process (SIGABRT).

    Args:
        wait: whether the collectives that have begun may end. Those of a process that was stopped at once may not.
    """
    from torch import distributed  # after the help texts and the parser, which do without torch

    if not distributed.is_initialized():
        return
    if wait:
        distributed.destroy_process_group()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STOPPED_AT_ONCE)
