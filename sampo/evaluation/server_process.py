"""A server that is started by a command of the user for as long as it is asked, such as `vllm serve {model}`.

So one GPU can generate, judge and train in turn, and each round of `sampo iterate --on_policy` is answered by its own
model.
"""

import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from .server_text import visible

logger = logging.getLogger(__name__)

MODEL = "{model}"
DEFAULT_PORTS = {"http": 80, "https": 443}
SECONDS_TO_START = 1800.0  # a large model from a network disk
SECONDS_TO_END = 60.0
_IN_THE_CHILD = (  # the signal at the parent's end outlives `exec`
    "import os, sys; from sampo.io.locks import end_with_parent; end_with_parent(int(sys.argv[1])); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


def _is_taken(url: str) -> bool:
    """Whether something takes connections there."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme]), timeout=10).close()
    except OSError:
        return False
    return True


class ServerProcess:
    """The process of a server.

    Args:
        command: Its command line, without a shell; `{model}` is replaced by the model.
        model: Name of the model.
        log: File to which its output is added.
        limit: Seconds within which it must answer.

    Raises:
        ValueError: the command is no command line.
    """

    def __init__(self, command: str, model: str, log: Path, limit: float = SECONDS_TO_START):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"`serve` must be a command line, got {command!r}: {error}.") from None
        if not words:
            raise ValueError(f"`serve` must be a command line, such as `vllm serve {MODEL} --port 8000`, got none.")
        self.command = [word.replace(MODEL, model) for word in words]
        self.log, self._limit = log, limit
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, url: str, answers: Callable[[], bool]) -> None:
        """Start it unless it runs, and wait until it answers.

        Call this in a thread that lives as long as the server is needed: the system ends the server with it.

        Args:
            url: Where it is asked, for messages.
            answers: Whether a server answers there.

        Raises:
            ValueError: a server answers there already, or this one ends or does not answer in time.
        """
        if self._process is not None:
            return
        if _is_taken(url):  # by a server that may have the model of another round
            raise ValueError(
                f"`serve` must start the server of `url`, got one that runs at {url} already. Stop it, or leave "
                "`serve` out to ask that one."
            )
        logger.info("starting %s; its output is in %s", shlex.join(self.command), self.log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _IN_THE_CHILD, str(os.getpid()), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, and we end it
            )
        while not answers():
            if self._process.poll() is not None:
                raise ValueError(f"`serve` must start a server at {url}, got one that ended. {self._last_lines()}")
            if time.monotonic() - began > self._limit:
                self.stop()
                raise ValueError(
                    f"`serve` must start a server that answers at {url} within {self._limit:g} s. {self._last_lines()}"
                )
            time.sleep(0.2)
        logger.info("%s answers after %.0f s", url, time.monotonic() - began)

    def stop(self) -> None:
        """End it, and all processes that it has started and that are still in its group."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(SECONDS_TO_END)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()

    def _last_lines(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        return f"{self.log} ends with: {visible(' | '.join(lines))}" if lines else f"{self.log} is empty."
