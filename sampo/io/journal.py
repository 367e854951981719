"""A JSON Lines file that only grows, and that loses no written row if the process is killed.

Each row is on the disk (fsync) before `append` returns. An unfinished last line of an interrupted writer is removed
when the file is opened again; a complete line that only lacks its newline is kept.
"""

import io
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .files import open_to_append, remove_left_overs, replacing, sync
from .schemas import parse_json

logger = logging.getLogger(__name__)


class Journal:
    """The open file; `rows` are those that were there, and those appended since. One process at a time.

    Raises:
        ValueError: a line in the middle of the file is no JSON object.
        BlockingIOError: another process has it open.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file = open_to_append(self.path)
        try:
            _lock_file(self._file.fileno(), self.path)
            remove_left_overs(self.path.parent, self.path)
            self._file.seek(0)
            content = self._file.read()
            self.rows, self._end = _parse(content, self.path)
            if self._end < len(content):
                logger.warning("%s: removed an unfinished last line of %d bytes", path, len(content) - self._end)
                self._file.truncate(self._end)
            elif content and not content.endswith(b"\n"):
                self._write(b"\n")
            sync(self.path.parent)  # a new file has a name only when its folder is on the disk
        except BaseException:
            self._file.close()
            raise

    def append(self, *rows: dict[str, Any]) -> None:
        """Add rows; they are on the disk when this returns. May be called from several threads."""
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)  # ASCII: surrogates are escaped too
        with self._lock:
            self._write(lines.encode("ascii"))
            self.rows.extend(rows)

    def rewrite(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replace all rows atomically: the file has the old rows or the new ones."""
        rows = list(rows)
        content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode("ascii")
        with self._lock:
            with replacing(self.path, append=True) as new:
                new.write(content)
                new.flush()
                file = open(os.dup(new.fileno()), "ab+", buffering=0)  # noqa: SIM115, it stays open
                _lock_file(file.fileno(), self.path)
            self._file.close()
            self._file, self._end, self.rows = file, len(content), rows

    def _write(self, content: bytes) -> None:
        try:
            _write_all(self._file, content)
        except OSError:
            self._file.truncate(self._end)  # a full disk must not leave part of a line before the next one
            raise
        self._end += len(content)

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that another process may be writing; an unfinished last line is ignored, with a warning."""
    return list(each_row(path))


def each_row(path: str | Path) -> Iterator[dict[str, Any]]:
    """The same, with one row at a time in memory."""
    with Path(path).open("rb") as file:
        for line, row in _rows_of(file, Path(path)):
            if row is None:
                logger.warning("%s: ignored an unfinished last line of %d bytes", path, len(line))
            else:
                yield row


def _parse(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows, and how many bytes hold them."""
    lines = list(_rows_of(io.BytesIO(content), path))
    rows = [row for _, row in lines if row is not None]
    return rows, len(content) - (len(lines[-1][0]) if len(rows) < len(lines) else 0)


def _rows_of(file: Iterable[bytes], path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its row; None for a last line that is unfinished."""
    for number, line in enumerate(file, 1):
        row = _parse_object(line)
        if row is None and line.endswith(b"\n"):
            raise ValueError(
                f"{path}, line {number} must be a JSON object, got {line[:-1][:60]!r}. Restore it, or delete the line."
            )
        yield line, row


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _write_all(file: io.FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def _lock_file(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: a second writer is not detected there
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError):
            return  # a file system without locks
        raise BlockingIOError(
            f"{path} must be written by one process at a time, got a second one. Wait for the first, or name another "
            "file."
        ) from None
