"""Atomic writes: a file under its name is complete, or unchanged.

A file is written under a random name in the same folder, synced to the disk and renamed. The temporary file is created
anew (`O_EXCL`, `O_NOFOLLOW`), so a link that somebody has put in the folder is never written through. At the target, a
symbolic link itself is replaced, never the file that it points to. Files that grow (`open_to_append`) cannot be
replaced; a link in their place is an error.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_FULL = re.compile(
    rf"No space left|Disk quota exceeded|\b(?:os error|Errno) (?:{errno.ENOSPC}|{errno.EDQUOT})\b", re.IGNORECASE
)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically. Text becomes UTF-8; the folder is created."""
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, *, append: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends without an error, and is removed otherwise.

    A regular file that is replaced hands its permissions on; a new one has those of the umask.

    Args:
        path: the name.
        append: writes go to the end (`O_APPEND`), also those of a duplicate that outlives the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _temporary(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK | (os.O_APPEND if append else 0)
    descriptor = os.open(aside, flags, 0o666)
    try:
        with open(descriptor, "w+b") as file:
            yield file
            file.flush()
            with contextlib.suppress(OSError):  # there is none yet, or another user owns it
                before = path.lstat().st_mode
                if stat.S_ISREG(before):
                    os.fchmod(file.fileno(), stat.S_IMODE(before) & 0o777)
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the name `path` when the block ends without an error, and is removed otherwise.

    At `path` there may be nothing or an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _temporary(path)
    os.mkdir(aside)
    try:
        yield aside
        for each in [*aside.rglob("*"), aside]:  # on the disk before the folder gets its name
            sync(each)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync(path.parent)


def open_to_append(path: Path) -> Any:
    """A file that grows, unbuffered, to read from and to append to. Its folder is made.

    Raises:
        OSError: it is a symbolic link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(
            errno.ELOOP, f"`{path}` must be a file to append to, got a symbolic link. Name the file that it points to"
        ) from None
    return open(descriptor, "ab+", buffering=0)  # else what failed to be written is tried again


def remove_left_overs(folder: Path, of: Path | None = None) -> None:
    """Remove temporary files of killed writers: of all files, if the caller has locked the folder, or of one."""
    for path in folder.glob(f".sampo-{'*' if of is None else mark_of(of)}-*.part"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system syncs folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error means that the disk or the user's quota is full. Some libraries give it in the text only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def mark_of(path: Path) -> str:
    """Eight hex digits of a file's name, which may itself be as long as a name can be."""
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]


def _temporary(path: Path) -> Path:
    return path.with_name(f".sampo-{mark_of(path)}-{secrets.token_hex(8)}.part")
