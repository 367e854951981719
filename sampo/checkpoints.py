"""Checkpoints that are whole or absent: written aside, synced, renamed; with a manifest that tells whole from half.

A checkpoint is written into `_saving/checkpoint-N` below the output folder. When all processes have written, each file
is synced to the disk, its size and sha256 go into `sampo_manifest.json`, and a rename makes it `checkpoint-N`. Only
then older checkpoints are removed, again by a rename first. So a run may be killed at any moment: what is called
`checkpoint-N` is whole, unless something else has damaged it, and then the manifest tells.

Nothing here knows of models or trainers, and nothing but the standard library is needed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .whole_files import sync, write_whole

MANIFEST = "sampo_manifest.json"
STAGING = "_saving"  # transformers leaves what begins with "_" out of what it pushes to the hub
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = "it was still being written when its run ended"


class CheckpointNotSavedError(OSError):
    """A checkpoint could not be written; the former ones are untouched."""


@dataclass
class Found:
    """Outcome of the search for a checkpoint to go on from.

    Attributes:
        path: the newest whole checkpoint, or None.
        skipped: newer ones that are not whole, and why.
    """

    path: Path | None = None
    skipped: dict[Path, str] = field(default_factory=dict)

    def skipped_in_words(self) -> str:
        """A sentence for each, with a blank before it."""
        return "".join(f" {path.name} is skipped: {reason}." for path, reason in self.skipped.items())


def step_of(folder: Path) -> int:
    """The N of `checkpoint-N`, −1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-N` folders, the oldest step first, whole or not."""
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=step_of)


def find_whole_checkpoint(output_dir: str | Path) -> Found:
    """The checkpoint with the highest step whose manifest is there and whose files are as it says.

    Reads every file of the checkpoint that it returns. Changes nothing; see `finish_interrupted` for what a killed
    process may have left.
    """
    found = Found(skipped=dict.fromkeys(reversed(numbered_checkpoints(Path(output_dir) / STAGING)), _UNFINISHED))
    for folder in reversed(numbered_checkpoints(output_dir)):
        fault = fault_of(folder)
        if fault is None:
            found.path = folder
            return found
        found.skipped[folder] = fault
    return found


def fault_of(folder: str | Path) -> str | None:
    """Why a run cannot go on from this folder, in words that follow "because", or None if it is a whole checkpoint."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it is half written, or was not written by sampo"
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if not manifest["resumable"]:
        return "it was saved with `save_only_model` and has no optimizer state"
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            return f"{name} has {size:,} bytes in place of {expected['size']:,}"
    digests = _sha256_of_files(folder, list(manifest["files"]))
    wrong = [name for name, digest in digests.items() if digest != manifest["files"][name]["sha256"]]
    return f"the content of {wrong[0]} is not what was written" if wrong else None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no manifest of a format that we know.
    """
    manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    keys = {"format", "resumable", "run", "files"}
    if not isinstance(manifest, dict) or not keys <= manifest.keys() or manifest["format"] != FORMAT:
        raise ValueError(f"it must be a JSON object of format {FORMAT} with {sorted(keys)}")
    return manifest


def write_manifest(folder: str | Path, run: dict[str, Any], *, resumable: bool = True) -> None:
    """Sync all files of a folder to the disk and list them with their sizes and checksums.

    Args:
        folder: The checkpoint, to which nobody writes any more.
        run: What tells this run from another, as JSON.
        resumable: Whether the state of the training is there, not the model alone.
    """
    folder = Path(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != MANIFEST]
    digests = _sha256_of_files(folder, names, sync=True)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": digests[name]} for name in names}
    manifest = {"format": FORMAT, "resumable": resumable, "run": run, "files": files}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(path)


def publish(staged: Path, target: Path) -> None:
    """Give a whole checkpoint its name. One that already has this name makes room.

    A process killed between the two renames leaves the staged one whole, and `finish_interrupted` goes on.
    """
    if target.exists():
        remove(target)
    os.rename(staged, target)
    sync(target.parent)
    sync(staged.parent)


def finish_interrupted(output_dir: str | Path) -> None:
    """Publish what a killed process had written whole but not renamed."""
    for staged in numbered_checkpoints(Path(output_dir) / STAGING):
        target = Path(output_dir) / staged.name
        if fault_of(staged) is None and not (target.exists() and fault_of(target) is None):
            publish(staged, target)


def clear_staging(output_dir: str | Path) -> None:
    """Remove what is half written, and what is half removed."""
    shutil.rmtree(Path(output_dir) / STAGING, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint: first its name, in one step, then its files."""
    bin_ = checkpoint.parent / STAGING
    bin_.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix="removed-", dir=bin_))
    os.rename(checkpoint, aside)  # onto an empty folder
    shutil.rmtree(aside, ignore_errors=True)


def remove_older(newest: Path, limit: int | None, keep: str | None = None) -> list[Path]:
    """Remove the oldest checkpoints beside `newest`, half ones first, until `limit` are left.

    Args:
        newest: The checkpoint just written, which is whole and stays.
        limit: transformers' `save_total_limit`; None or 0 for no limit.
        keep: The best checkpoint, which stays too.

    Returns:
        Those removed.
    """
    if not limit or limit <= 0:
        return []
    kept = {newest.resolve(), *([Path(keep).resolve()] if keep else [])}
    others = [path for path in numbered_checkpoints(newest.parent) if path.resolve() not in kept]
    others.sort(key=lambda path: (path / MANIFEST).exists())
    surplus = len(others) + len(kept) - max(limit, len(kept))
    removed = others[: max(surplus, 0)]
    for path in removed:
        remove(path)
    return removed


def fault_of_output_folder(output_dir: str | Path) -> str | None:
    """Why nothing can be saved here, as a sentence, or None. The folder is created, and a file written as a trial."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"a trial")
    except OSError as error:
        return (
            f"`output_dir` must be a folder that can be written to, got {str(folder)!r}: {error.strerror}. Choose "
            "another one, or change who may write there."
        )
    return None


@contextlib.contextmanager
def told_in_one_error(checkpoint: Path) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is written: remove what is half written, and say what is left.

    Raises:
        CheckpointNotSavedError: with the cause.
    """
    try:
        yield
    except Exception as error:  # a full disk is an OSError in Python, a RuntimeError in torch, another in safetensors
        folder = checkpoint.parent
        clear_staging(folder)
        whole = [path.name for path in numbered_checkpoints(folder) if (path / MANIFEST).exists()]
        left = f"{', '.join(whole)} in {folder} stay as they are" if whole else "There is no earlier one"
        room = f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are free now)" if folder.is_dir() else ""
        raise CheckpointNotSavedError(
            f"{checkpoint.name} must be written whole, got {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            f"{room}. {left}. Make room, and go on with `resume_from_checkpoint: true`."
        ) from error


def _sha256_of_files(folder: Path, names: list[str], *, sync: bool = False) -> dict[str, str]:
    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves the interpreter's lock
        return dict(zip(names, pool.map(digest, names), strict=True))
