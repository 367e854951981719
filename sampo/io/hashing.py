"""SHA-256 of files and of JSON values: the keys, checksums and fingerprints that other files keep.

Recorded runs, caches and judged answers hold these digests, so what is hashed, and how, must stay as it is.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEAL = "sha256_of_the_rest"
HASHED_SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of each file that is hashed by samples


@dataclass(frozen=True)
class Content:
    """What a file must hold: its size in bytes, and the SHA-256 of it."""

    size: int
    sha256: str


# --- files -----------------------------------------------------------------------------------------------------------


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(files: Iterable[tuple[str, Path]], separator: str = " ") -> str:
    """SHA-256 over names and contents of files, in the given order.

    Args:
        files: (name, path) of each file.
        separator: what stands between a name and the digest of the content in the text that is hashed.
    """
    total = hashlib.sha256()
    for name, path in files:
        total.update(f"{name}{separator}{hash_file(path)}\n".encode())
    return total.hexdigest()


def hash_file_samples(paths: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and 64 evenly spaced samples of 64 KiB of each file.

    Training changes some of the samples, and reading all weights would take minutes. The digest guards against
    mistakes, not against malice.
    """
    total = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(HASHED_SAMPLES):
                file.seek(max(size - SAMPLE_BYTES, 0) * sample // (HASHED_SAMPLES - 1))
                total.update(file.read(SAMPLE_BYTES))
    return total.hexdigest()


def hash_content(content: bytes) -> Content:
    """Size and checksum of a file that is in memory."""
    return Content(len(content), hashlib.sha256(content).hexdigest())


def hash_contents(folder: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, Content]:
    """Sizes and checksums of files below a folder.

    Args:
        folder: where they are.
        names: paths relative to the folder.
        sync: sync each file to the disk first.
    """

    def content(name: str) -> Content:
        with (folder / name).open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Content(file.tell(), digest)

    names = list(names)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter's lock
        return dict(zip(names, pool.map(content, names), strict=True))


def find_changed_file(folder: Path, expected: dict[str, Content]) -> str | None:
    """Describe the first file that is not as it was written; None if all are."""
    for name, content in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != content.size:
            return f"{name} has {size:,} bytes in place of {content.size:,}"
    found = hash_contents(folder, expected)
    wrong = [name for name, content in expected.items() if found[name] != content]
    return f"the content of {wrong[0]} is not what was written" if wrong else None


# --- JSON values -----------------------------------------------------------------------------------------------------


def hash_json(value: Any, *, default: Callable[[Any], Any] | None = None) -> str:
    """SHA-256 of a value as JSON, 64 hex digits; the order of the keys of an object does not matter.

    Args:
        value: what `json.dumps` takes.
        default: replaces values that JSON does not know, as in `json.dumps`.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()


def seal(content: dict[str, Any]) -> str:
    """A JSON object with the checksum of all its other entries, for a manifest of other files."""
    return json.dumps({**content, SEAL: _checksum(content)}, indent=1) + "\n"


def unseal(content: dict[str, Any]) -> dict[str, Any]:
    """The entries of a sealed object without the checksum.

    Raises:
        ValueError: the entries are not those that were written.
    """
    rest = {name: value for name, value in content.items() if name != SEAL}
    if content.get(SEAL) != _checksum(rest):
        raise ValueError(f"its entries must have the checksum in `{SEAL}`, got others: it was damaged or edited")
    return rest


def _checksum(content: dict[str, Any]) -> str:
    return hash_json(json.loads(json.dumps(content)))  # numbers as keys, tuples: as they are read back
