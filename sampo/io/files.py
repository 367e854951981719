"""Atomic writes, and checksums that tell a file as it was written from a damaged one.

A file is written under a random name in the same folder, synced to the disk and renamed: it is there whole or not at
all. The temporary file is created anew (`O_EXCL`, `O_NOFOLLOW`), so nothing that somebody has laid in the folder is
written through. What lies at the target is replaced: of a symbolic link the link, never the file that it points to.
Files that grow (`open_to_append`) cannot be replaced; a link in their place is refused.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SEAL = "sha256_of_the_rest"
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_FULL = re.compile(
    rf"No space left|Disk quota exceeded|\b(?:os error|Errno) (?:{errno.ENOSPC}|{errno.EDQUOT})\b", re.IGNORECASE
)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically. Text becomes UTF-8; the folder is made."""
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, *, append: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends without an error, and is removed otherwise.

    A regular file that is replaced hands its permissions on; a new one has those of the umask.

    Args:
        path: the name.
        append: whatever is written goes to the end (`O_APPEND`), also by a duplicate that outlives the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _temporary(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK | (os.O_APPEND if append else 0)
    descriptor = os.open(aside, flags, 0o666)
    try:
        with open(descriptor, "w+b") as file:
            yield file
            file.flush()
            with contextlib.suppress(OSError):  # there is none yet, or its owner is somebody else
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
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_LINK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(
            errno.ELOOP, f"`{path}` must be a file to append to, got a symbolic link. Name the file that it points to"
        ) from None
    return open(descriptor, "ab+", buffering=0)  # else what failed to be written is tried again


def remove_left_overs(folder: Path, of: Path | None = None) -> None:
    """Remove what killed writers have left: of all files, for somebody who is alone in the folder, or of one."""
    for path in folder.glob(f".sampo-{'*' if of is None else mark_of(of)}-*.part"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Put a file, or what a folder says of its files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system syncs folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full. Libraries may say it in words only."""
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


# --- checksums -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What a file must hold: its size in bytes, and the SHA-256 of it."""

    size: int
    sha256: str


def content_of(whole: bytes) -> Content:
    """Of a file that is in memory."""
    return Content(len(whole), hashlib.sha256(whole).hexdigest())


def contents(folder: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, Content]:
    """Sizes and checksums of files below a folder, put on the disk first if asked for."""

    def content(name: str) -> Content:
        with (folder / name).open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Content(file.tell(), digest)

    names = list(names)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter's lock
        return dict(zip(names, pool.map(content, names), strict=True))


def fault_of_contents(folder: Path, expected: dict[str, Content]) -> str | None:
    """The first file that is not as it was written, in words that follow "because"; None if all are."""
    for name, content in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != content.size:
            return f"{name} has {size:,} bytes in place of {content.size:,}"
    found = contents(folder, expected)
    wrong = [name for name, content in expected.items() if found[name] != content]
    return f"the content of {wrong[0]} is not what was written" if wrong else None


def sealed(content: dict[str, Any]) -> str:
    """A JSON object with the checksum of all its other entries, for a file that says what other files must be."""
    return json.dumps({**content, SEAL: _seal(content)}, indent=1) + "\n"


def unsealed(content: dict[str, Any]) -> dict[str, Any]:
    """The entries of such an object without the checksum.

    Raises:
        ValueError: they are not those that were written.
    """
    rest = {name: value for name, value in content.items() if name != SEAL}
    if content.get(SEAL) != _seal(rest):
        raise ValueError(f"its entries must have the checksum in `{SEAL}`, got others: it was damaged or edited")
    return rest


def _seal(content: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # numbers as keys, tuples: as they are read back
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
