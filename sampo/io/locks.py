"""One process at a time in a folder, and processes that end with the one that started them.

`alone_in` locks a file in the folder. The kernel releases it when its owner ends, however that ends. The file names
the owner: host, process id, start of the process, command. Three cases:

1. Another process of this machine has the lock: wait for some seconds, then raise an error with the owner's name.
2. No process has it, and the file names an owner on this machine: that process was killed. Take the lock over.
3. The file names an owner on another machine, or the file system has no locks, so the kernel cannot know: a running
   owner touches its file every few seconds. If that happens while we watch, raise; else take over, with a warning.

"This machine" is one boot of one kernel, not a host name: two containers on a machine share its locks, and a restarted
container has another name.
"""

import contextlib
import ctypes
import errno
import json
import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .files import NO_LINK, mark_of, remove_left_overs
from .schemas import parse_json, typed

try:
    import fcntl
except ImportError:  # Windows: only the third case is left there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = "_sampo.lock"  # transformers leaves what begins with "_" out of what it pushes to the hub
PATIENCE = 30.0  # seconds to wait for an owner that is stopping: it saves a checkpoint first
BEAT = 5.0  # seconds after which a running owner touches its file again
LAUNCHER = "SAMPO_LAUNCHER"  # environment variable: process id of the launcher that `sampo train` has become
SILENCE = 4 * BEAT  # seconds without a touch after which an owner on another machine counts as ended


class FolderInUseError(OSError):
    """Another process works in the folder; the text names it, and what to do."""


@dataclass(frozen=True)
class Owner:
    """Who has a lock.

    Attributes:
        host: its name.
        machine: the boot of its kernel.
        pid: number of the process.
        started: when, in seconds since 1970.
        command: what it runs.
    """

    host: str
    machine: str
    pid: int
    started: int
    command: str

    @classmethod
    def me(cls) -> "Owner":
        """This process."""
        words = [os.path.basename(word) for word in sys.argv[:1]]
        words += [word for word in sys.argv[1:2] if not word.startswith("-")]  # options may hold a key
        return cls(socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()), " ".join(words)[:80])

    def describe(self) -> str:
        """Describe the owner in an error message."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host} ({self.command}, since {since})"


@contextlib.contextmanager
def alone_in(folder: Path, name: str = LOCK) -> Iterator[int]:
    """Lock a folder for this process, and create it; within a thread a second block joins the first.

    Args:
        folder: whose files are written.
        name: of the lock file, if not the entire folder is locked.

    Yields:
        The descriptor that has the lock. A child process that inherits it has it too, as long as it lives.

    Raises:
        FolderInUseError: another process works in it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / name
    held = _held.get(path)
    if held is not None and held.thread == threading.get_ident():
        yield held.descriptor
        return
    lock = LockFile(path)
    lock.take()
    _held[path] = lock
    try:
        if name == LOCK:
            remove_left_overs(folder)
        yield lock.descriptor
    finally:
        if _held.get(path) is lock:
            del _held[path]
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):  # a command that fails leaves no empty folder
                folder.rmdir()


@contextlib.contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Lock one output, a file or a folder, in a folder that others may use.

    Raises:
        FolderInUseError: another process writes it.
    """
    mark = mark_of(path)
    with alone_in(path.parent, f".sampo-{mark}.lock"):
        remove_left_overs(path.parent, path)
        yield


def wait_for_lock(descriptor: int) -> None:
    """Lock an open file as soon as other processes have closed it; return at once where there are no locks."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


class LockFile:
    """A lock file, open."""

    def __init__(self, path: Path):
        self.path, self.descriptor, self.released = path, -1, threading.Event()
        self.thread = threading.get_ident()

    def take(self) -> None:
        """Wait for the lock, and take it.

        Raises:
            FolderInUseError: another process keeps it.
        """
        until, warned = time.monotonic() + PATIENCE, False
        while not self._try():
            owner = _owner_in(self.path)
            if time.monotonic() > until:
                raise self._in_use(owner)
            if not warned:
                logger.warning("%s is in use by %s; waiting for %g seconds.", self.path.parent, _name(owner), PATIENCE)
                warned = True
            time.sleep(0.1)
        self._write_owner()
        threading.Thread(target=self._beat, daemon=True, name="sampo-lock").start()

    def _try(self) -> bool:
        """Whether the lock is ours now."""
        try:
            is_new = self._open()
        except FileNotFoundError:  # its creator has just removed the folder
            return False
        locked = self._flock()
        owner = _owner_in(self.path)
        if locked is False or not self._has_name():
            self._close()
            return False
        foreign = owner is not None and owner.machine != _machine()
        if foreign or (locked is None and not is_new):
            if self._is_touched():
                self._close()
                raise self._in_use(owner)
            logger.warning(
                "%s was in use by %s, which no longer responds; continuing.", self.path.parent, _name(owner)
            )
            if locked is None:  # the process that creates the file again has the lock
                self.path.unlink(missing_ok=True)
                self._close()
                return self._try()
        elif owner is not None:
            logger.info("%s was in use by %s, which has ended.", self.path.parent, _name(owner))
        return True

    def _open(self) -> bool:
        """Open the file; whether it is a new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
        except FileExistsError:
            try:
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise FolderInUseError(f"The lock {self.path} must be a file, got a link. Remove it.") from None
            return False
        return True

    def _flock(self) -> bool | None:
        """Whether the kernel gives us the lock; None where it cannot know."""
        if fcntl is None:
            return None
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return None
        return True

    def _has_name(self) -> bool:
        """Whether the file is still there under its name: its last owner removes it."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _is_touched(self) -> bool:
        """Whether a running owner touches the file while we watch."""
        before, until = _touched(self.path), time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(SILENCE / 40)
            if _touched(self.path) != before:
                return True
        return False

    def _write_owner(self) -> None:
        content = json.dumps(asdict(Owner.me())).encode()
        with contextlib.suppress(OSError):  # a full disk: the lock holds without it
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, content, 0)

    def _beat(self) -> None:
        while not self.released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path, follow_symlinks=False)

    def _in_use(self, owner: Owner | None) -> FolderInUseError:
        elsewhere = owner is not None and owner.machine != _machine()
        advice = f", or remove {self.path} if that machine is gone" if elsewhere else ""
        return FolderInUseError(
            f"One process at a time can write into {self.path.parent}, got a second one while {_name(owner)} is "
            f"running. Wait for it or stop it{advice}; or choose another folder."
        )

    def release(self) -> None:
        """Remove the file and give the lock up."""
        self.released.set()
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                if self._has_name():
                    self.path.unlink()
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        os.close(self.descriptor)
        self.descriptor = -1


_held: dict[Path, LockFile] = {}


def _forget() -> None:
    """Close inherited locks in a forked process (a data loader's worker): they must not outlive the parent."""
    for lock in _held.values():
        if lock.descriptor >= 0:
            os.close(lock.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _owner_in(path: Path) -> Owner | None:
    try:
        return typed(Owner, parse_json(path.read_bytes()))
    except (OSError, ValueError):  # none, or one that is just being written
        return None


def _name(owner: Owner | None) -> str:
    return "another process" if owner is None else owner.describe()


def _touched(path: Path) -> int:
    """Time of the last touch. Opened anew each time: network file systems ask the server only then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return -1


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _start_of(pid: int) -> int:
    try:
        return int(os.stat(f"/proc/{pid}").st_mtime)
    except OSError:
        return int(time.time())


# --- processes -------------------------------------------------------------------------------------------------------


def end_with_parent(parent: int | None = None) -> None:
    """Let the kernel send this process SIGTERM when its parent ends, so that no orphan trains beside its successor.

    Args:
        parent: the process that started this one; exit if it has already ended. None: the current parent.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid() if parent is None else parent
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before
        sys.exit(128 + signal.SIGTERM)


def end_with_launcher() -> None:
    """Do the same in a process that a launcher has started; else do nothing."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None and not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return
    end_with_parent()
    if launcher is not None and not os.path.exists(f"/proc/{launcher}") and os.path.exists("/proc/self"):
        sys.exit(128 + signal.SIGTERM)  # it ended before this line was reached
