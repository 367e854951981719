"""Atomic checkpoints: written in a staging folder, synced, renamed, with a manifest that detects damage.

A checkpoint is written into `_saving/checkpoint-N` below the output folder. When all processes have written, each file
is synced to the disk, its size and SHA-256 go into `sampo_manifest.json`, and a rename makes it `checkpoint-N`. Only
then older checkpoints are removed, again by a rename first. A run may be killed at any moment: a folder with the name
`checkpoint-N` is complete, and later damage is detected by the manifest. The manifest has its own checksum, so a
damaged manifest never makes a checkpoint complete.

`checkpoint-N` may be a symbolic link to a folder. A run resumes from it; what is replaced or removed is the link.

This module knows no models and no trainers, and needs only the standard library.
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

from ..io.files import disk_is_full, sync, write_atomic
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
    """What identifies a run (`fingerprint.identity`); `length` is `max_steps` and `num_train_epochs`."""

    must: dict[str, Any] = field(default_factory=dict)
    rounding: dict[str, Any] = field(default_factory=dict)
    length: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint.

    Attributes:
        format: of the manifest.
        resumable: whether the training state is saved, not only the model.
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
    """The result of the search for a checkpoint to resume from.

    Attributes:
        path: the newest complete checkpoint, or None.
        skipped: newer ones that are not complete, and why.
    """

    path: Path | None = None
    skipped: dict[Path, str] = field(default_factory=dict)

    def describe_skipped(self) -> str:
        """One sentence for each, with a space before it."""
        return "".join(f" {path.name} is skipped: {reason}." for path, reason in self.skipped.items())


def step_of(folder: Path) -> int:
    """The N of `checkpoint-N`, −1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-N` folders, the oldest step first, complete or not."""
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=step_of)


def find_complete_checkpoint(
    output_dir: str | Path, find_value_issue: Callable[[Path], str | None] = lambda _: None
) -> FoundCheckpoint:
    """The checkpoint with the highest step that has a manifest and the files that it lists.

    Reads every file of the checkpoint that it returns. Changes nothing; `finish_interrupted` handles what a
    killed process may have left.

    Args:
        output_dir: of the run.
        find_value_issue: called for a checkpoint with intact files; a description of an issue skips it.
    """
    found = FoundCheckpoint(
        skipped=dict.fromkeys(reversed(numbered_checkpoints(Path(output_dir) / STAGING)), _UNFINISHED)
    )
    for folder in reversed(numbered_checkpoints(output_dir)):
        issue = find_checkpoint_issue(folder) or find_value_issue(folder)
        if issue is None:
            found.path = folder
            return found
        found.skipped[folder] = issue
    return found


def find_checkpoint_issue(folder: str | Path) -> str | None:
    """Describe why a run cannot resume from this folder; None if it is a complete checkpoint."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it is incomplete, or was not written by sampo"
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
        folder: The checkpoint, when all writers have finished.
        run: What identifies this run, as JSON.
        resumable: Whether the training state is saved, not only the model.
    """
    folder = Path(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = hash_contents(folder, (name for name in names if name != MANIFEST), sync=True)
    write_atomic(folder / MANIFEST, seal(asdict(Manifest(FORMAT, resumable, run, files))))
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(path)


def publish(staged: Path, target: Path) -> None:
    """Give a complete checkpoint its name. A checkpoint that already has this name is removed.

    A process killed between the two renames leaves the staged one intact, and `finish_interrupted` continues.
    """
    if os.path.lexists(target):
        remove(target)
    os.rename(staged, target)
    sync(target.parent)
    sync(staged.parent)


def finish_interrupted(output_dir: str | Path) -> None:
    """Publish what a killed process had written completely but not renamed."""
    for staged in numbered_checkpoints(Path(output_dir) / STAGING):
        target = Path(output_dir) / staged.name
        if find_checkpoint_issue(staged) is None and not (target.exists() and find_checkpoint_issue(target) is None):
            publish(staged, target)


def clear_staging(output_dir: str | Path) -> None:
    """Remove unfinished checkpoints, and checkpoints whose removal was interrupted. Of a link, remove the link."""
    staging = Path(output_dir) / STAGING
    if staging.is_symlink():
        staging.unlink(missing_ok=True)
    shutil.rmtree(staging, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint: first its name, in one step, then its files. Of a link, the link."""
    bin_ = checkpoint.parent / STAGING
    bin_.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix="removed-", dir=bin_))
    os.rename(checkpoint, aside / checkpoint.name)  # a folder or a link
    shutil.rmtree(aside, ignore_errors=True)


def remove_older(newest: Path, limit: int | None, keep: str | None = None) -> list[Path]:
    """Remove the oldest checkpoints except `newest`, incomplete ones first, until `limit` are left.

    Args:
        newest: The checkpoint just written, which is complete and stays.
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


def find_output_folder_issue(output_dir: str | Path, *, create: bool = True) -> str | None:
    """Describe why nothing can be saved here, or None. Writes a file as a test.

    Args:
        output_dir: the folder.
        create: make it; otherwise the test is made in the folder above that exists.
    """
    folder = Path(output_dir)
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"a test")
    except OSError as error:
        return (
            f"`output_dir` must be a folder that can be written to, got {str(folder)!r}: {error.strerror}. Choose "
            "another one, or change who may write there."
        )
    links = [path.name for path in folder.glob("*") if path.is_symlink() and not path.is_dir()]
    links = [name for name in links if not _NAME.fullmatch(name)]  # those are replaced
    if links:  # transformers and TRL write through them
        return (
            f"`output_dir` must have no links to files, got {links} in {folder}: what they point to would be "
            "overwritten. Remove them, or choose another folder."
        )
    return None


@contextlib.contextmanager
def wrap_save_errors(checkpoint: Path) -> Iterator[None]:
    """Turn any error while a checkpoint is written into one: remove the unfinished files, and name what is left.

    Raises:
        CheckpointNotSavedError: with the cause.
    """
    try:
        yield
    except Exception as error:  # a full disk is an OSError in Python, a RuntimeError in torch, another in safetensors
        folder = checkpoint.parent
        full = disk_is_full(error) or _has_no_room(folder)
        clear_staging(folder)
        complete = [path.name for path in numbered_checkpoints(folder) if (path / MANIFEST).exists()]
        left = f"{', '.join(complete)} in {folder} are unchanged" if complete else "There is no earlier one"
        room = f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are free now)" if full and folder.is_dir() else ""
        advice = "Free some space, and resume" if full else "Fix the cause, and resume"
        raise CheckpointNotSavedError(
            f"{checkpoint.name} must be written completely, got {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}{room}. {left}. {advice} with `resume_from_checkpoint: true`."
        ) from error


def _has_no_room(folder: Path) -> bool:
    """Whether a test write shows that the disk is full; torch's own errors do not give the reason."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False
