"""A number as a record: the value, its interval, and everything that is needed to reproduce it.

Records are stored in a JSON Lines file, one number per line. Tables, figures and sentences are made from them, so that
no figure is shown without its settings and its command. A file of measurements is appended to and never rewritten;
records that are computed from another file, such as judgements, are written with it.
"""

import gzip
import json
import math
import subprocess
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from .files import open_to_append
from .hashing import hash_json
from .locks import wait_for_lock
from .schemas import WrongFile, named, parse_json, typed
from .versions import versions

RECORD_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number.

    `value` is None where the quantity has no defined value (such as a correlation with a constant); `interval` are the
    95 % bounds and `n` the number of observations that both rest on. `config` holds every setting the value depends
    on, and `key` is its hash.
    """

    name: str
    value: float | None
    n: int
    config: dict[str, Any]
    interval: tuple[float, float] | None = None
    seed: int | None = None
    command: str = ""
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    schema: int = RECORD_SCHEMA

    def __post_init__(self) -> None:
        if self.schema != RECORD_SCHEMA:
            raise ValueError(f"`schema` must be {RECORD_SCHEMA}, got {self.schema}")
        numbers = [x for x in (self.value, *(self.interval or ())) if x is not None]
        if not all(math.isfinite(x) for x in numbers):
            raise ValueError(f"A record's `value` and `interval` must be finite, got {numbers} for {self.name!r}.")
        if self.interval is not None:
            object.__setattr__(self, "interval", tuple(self.interval))

    @property
    def key(self) -> str:
        """Hash of the settings: equal settings, equal key."""
        return config_key(self.config)


def config_key(config: Mapping[str, Any]) -> str:
    """Sixteen hex digits that depend on the settings and not on their order."""
    return hash_json(config)[:16]


def provenance() -> dict[str, Any]:
    """Commit, versions and time, as keyword arguments of `Record`."""
    return {"commit": commit(), "versions": versions(), "created": datetime.now(UTC).isoformat(timespec="seconds")}


@cache
def commit() -> str | None:
    """The commit of this source tree, with `-dirty` where it was changed; None for an installed package."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a wheel inside somebody else's repository is not this one
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def lines(records: Iterable[Record]) -> str:
    """Records as they stand in a file, one to a line."""
    return "".join(json.dumps(asdict(record), sort_keys=True, allow_nan=False) + "\n" for record in records)


def append(path: Path, records: Iterable[Record]) -> None:
    """Append records in one write. An unfinished last line is removed first.

    Processes that append to one file wait for each other, so that none removes a line that another is
    writing.
    """
    with open_to_append(path) as file:
        wait_for_lock(file.fileno())
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
        rest = lines(records).encode()
        while rest:
            rest = rest[file.write(rest) :]


def read(path: Path) -> list[Record]:
    """All records of a file, oldest first; none where there is no file. An unfinished last line is ignored.

    A name that ends in `.gz` is that of a compressed file, which is for reading alone.
    """
    if not path.exists():
        return []
    records = []
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error) as error:  # a damaged header is an OSError
        raise WrongFile(f"{path} must be a complete gzip file, got: {error}. Restore it.") from None
    *finished, _unfinished = content.split(b"\n")
    for number, line in enumerate(finished, 1):
        with named(path, "Restore or delete it, or write to another folder", line=number):
            records.append(typed(Record, parse_json(line, finite=True), complete=True))
    return records
