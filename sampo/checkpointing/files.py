"""Checkpoints that are whole or absent: written aside, synced, renamed; with a manifest that tells whole from half.

A checkpoint is written into `_saving/checkpoint-N` below the output folder. When all processes have written, each file
is synced to the disk, its size and sha256 go into `sampo_manifest.json`, and a rename makes it `checkpoint-N`. Only
then older checkpoints are removed, again by a rename first. So a run may be killed at any moment: what is called
`checkpoint-N` is whole, unless something else has damaged it, and then the manifest tells. The manifest has a checksum
of its own: one that was damaged makes no whole checkpoint, whatever it says.

`checkpoint-N` may be a symbolic link to a folder. A run goes on from it; what is replaced or removed is the link.

Nothing here knows of models or trainers, and nothing but the standard library is needed.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..io.files import disk_is_full, sync, write_whole
from ..io.hashing import Content, find_changed_file, hash_contents, seal, unseal
from ..io.schemas import named, parse_json, typed

MANIFEST = "sampo_manifest.json"
STAGING = "_saving"  # transformers leaves what begins with "_" out of what it pushes to the hub
FORMAT = 2  # 1 had no checksum of the manifest itself
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = "it was still being written when its run ended"


class CheckpointNotSavedError(OSError):
    """A checkpoint could not be written; the former ones are untouched."""


@dataclass(frozen=True)
class RunRecord:
    """What tells one run from another (`fingerprint.identity`); `length` is `max_steps` and `num_train_epochs`."""

    must: dict[str, Any] = field(default_factory=dict)
    rounding: dict[str, Any] = field(default_factory=dict)
    length: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        format: of the manifest.
        resumable: whether the state of the training is there, not the model alone.
        run: that wrote it.
        files: what each file must hold.
    """

    format: int
    resumable: bool
    run: RunRecord
    files: dict[str, Content]


@dataclass(frozen=True)
class TrainerState:
    """What we read of transformers' `trainer_state.json`."""

    log_history: list[dict[str, Any]]
    global_step: int


@dataclass
class FoundCheckpoint:
    """Outcome of the search for a checkpoint to go on from.

    Attributes:
        path: the newest whole checkpoint, or None.
        skipped: newer ones that are not whole, and why.
    """

    path: Path | None = None
    skipped: dict[Path, str] = field(default_factory=dict)

    def describe_skipped(self) -> str:
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


def find_complete_checkpoint(
    output_dir: str | Path, find_value_issue: Callable[[Path], str | None] = lambda _: None
) -> FoundCheckpoint:
    """The checkpoint with the highest step whose manifest is there and whose files are as it says.

    Reads every file of the checkpoint that it returns. Changes nothing; see `finish_interrupted` for what a killed
    process may have left.

    Args:
        output_dir: of the run.
        find_value_issue: asked about a checkpoint whose files are whole; what it has against one makes it skipped.
    """
    found = FoundCheckpoint(
        skipped=dict.fromkeys(reversed(numbered_checkpoints(Path(output_dir) / STAGING)), _UNFINISHED)
    )
    for folder in reversed(numbered_checkpoints(output_dir)):
        fault = find_checkpoint_issue(folder) or find_value_issue(folder)
        if fault is None:
            found.path = folder
            return found
        found.skipped[folder] = fault
    return found


def find_checkpoint_issue(folder: str | Path) -> str | None:
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
    if not manifest.resumable:
        return "it was saved with `save_only_model` and has no optimizer state"
    return find_changed_file(folder, manifest.files)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        WrongFile: it is no manifest of a format that we know, or was damaged.
    """
    path = Path(folder) / MANIFEST
    with named(path):
        content = typed(dict[str, Any], parse_json(path.read_bytes()))
        if content.get("format") not in (1, FORMAT):
            raise ValueError(f"`format` must be 1 or {FORMAT}, got {str(content.get('format'))[:40]}")
        if content["format"] == FORMAT:
            content = unseal(content)
        return typed(Manifest, content, complete=True)


def write_manifest(folder: str | Path, run: RunRecord, *, resumable: bool = True) -> None:
    """Sync all files of a folder to the disk and list them with their sizes and checksums.

    Args:
        folder: The checkpoint, to which nobody writes any more.
        run: What tells this run from another, as JSON.
        resumable: Whether the state of the training is there, not the model alone.
    """
    folder = Path(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = hash_contents(folder, (name for name in names if name != MANIFEST), sync=True)
    write_whole(folder / MANIFEST, seal(asdict(Manifest(FORMAT, resumable, run, files))))
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(path)


def publish(staged: Path, target: Path) -> None:
    """Give a whole checkpoint its name. One that already has this name makes room.

    A process killed between the two renames leaves the staged one whole, and `finish_interrupted` goes on.
    """
    if os.path.lexists(target):
        remove(target)
    os.rename(staged, target)
    sync(target.parent)
    sync(staged.parent)


def finish_interrupted(output_dir: str | Path) -> None:
    """Publish what a killed process had written whole but not renamed."""
    for staged in numbered_checkpoints(Path(output_dir) / STAGING):
        target = Path(output_dir) / staged.name
        if find_checkpoint_issue(staged) is None and not (target.exists() and find_checkpoint_issue(target) is None):
            publish(staged, target)


def clear_staging(output_dir: str | Path) -> None:
    """Remove what is half written, and what is half removed. Of a link in its place, the link."""
    staging = Path(output_dir) / STAGING
    if staging.is_symlink():
        staging.unlink(missing_ok=True)
    shutil.rmtree(staging, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint: first its name, in one step, then its files. Of a link, the link."""
    bin_ = checkpoint.parent / STAGING
    bin_.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix="removed-", dir=bin_))
    os.rename(checkpoint, aside / checkpoint.name)  # whatever has this name
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


def find_output_folder_issue(output_dir: str | Path) -> str | None:
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
    links = [path.name for path in folder.iterdir() if path.is_symlink() and not path.is_dir()]
    links = [name for name in links if not _NAME.fullmatch(name)]  # those are replaced
    if links:  # transformers and TRL write through them
        return (
            f"`output_dir` must have no links to files, got {links} in {folder}: what they point to would be "
            "overwritten. Remove them, or choose another folder."
        )
    return None


@contextlib.contextmanager
def wrap_save_errors(checkpoint: Path) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is written: remove what is half written, and say what is left.

    Raises:
        CheckpointNotSavedError: with the cause.
    """
    try:
        yield
    except Exception as error:  # a full disk is an OSError in Python, a RuntimeError in torch, another in safetensors
        folder = checkpoint.parent
        full = disk_is_full(error) or _has_no_room(folder)
        clear_staging(folder)
        whole = [path.name for path in numbered_checkpoints(folder) if (path / MANIFEST).exists()]
        left = f"{', '.join(whole)} in {folder} stay as they are" if whole else "There is no earlier one"
        room = f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are free now)" if full and folder.is_dir() else ""
        advice = "Make room, and go on" if full else "Once the cause is gone, go on"
        raise CheckpointNotSavedError(
            f"{checkpoint.name} must be written whole, got {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            f"{room}. {left}. {advice} with `resume_from_checkpoint: true`."
        ) from error


def _has_no_room(folder: Path) -> bool:
    """Whether a trial says that the disk is full; torch's own errors do not say why a file could not be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False
