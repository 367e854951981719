"""Start `sampo …` as a process of its own that ends with its parent, for commands that run other commands."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# In the child, before anything else happens in it.
_IN_THE_CHILD = (
    "import sys; from sampo.io.locks import end_with_parent; end_with_parent(int(sys.argv.pop(1))); "
    "from sampo.cli import main; sys.exit(main(sys.argv[1:]))"
)


def start_child(command: Sequence[str], lock: int, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command of sampo.

    Args:
        command: `sampo`, the command and its arguments.
        lock: descriptor of a lock, which the child holds as long as it lives.
        options: of `subprocess.Popen`.
    """
    arguments = [sys.executable, "-c", _IN_THE_CHILD, str(os.getpid()), *command[1:]]
    return subprocess.Popen(arguments, pass_fds=[lock], **options)
