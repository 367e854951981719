"""What a training has left in its folder: whether it has finished, its metrics, and hashes of its weights and data."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpointing.files import TrainerState, numbered_checkpoints
from ..io.hashing import hash_files
from ..io.schemas import WrongFile, read_json
from ..models.checks import weight_files


def is_trained(folder: Path) -> bool:
    """Whether a training has finished: it writes its state last, after the model."""
    return read_or_none(folder / "trainer_state.json", TrainerState) is not None


def has_begun(folder: Path) -> bool:
    """Whether a training has written a checkpoint."""
    return is_trained(folder) or bool(numbered_checkpoints(folder))


def read_metrics(folder: Path, model: Path | None = None) -> dict[str, Any]:
    """The first and last line of a round's log, the last evaluation, and the report of the merge."""
    state = read_or_none(folder / "trainer_state.json", TrainerState) or TrainerState([], 0)
    log = [{name: value for name, value in entry.items() if _is_number(value)} for entry in state.log_history]
    trained = [entry for entry in log if "loss" in entry]
    evaluated = [entry for entry in log if "eval_loss" in entry]
    found: dict[str, Any] = {"steps": state.global_step}
    if trained:
        found |= {"first": trained[0], "last": trained[-1]}
    if evaluated:
        found["eval"] = evaluated[-1]
    merged = read_or_none(model / "sampo_merge.json", dict[str, Any]) if model is not None else None
    return found if merged is None else {**found, "merge": merged}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def hash_model(folder: str | Path) -> str:
    """SHA-256 of a folder's weights; empty where there is none."""
    return _hash_paths(weight_files(Path(folder)))


def hash_data(path: Path) -> str:
    """SHA-256 of a file, or of all files below a folder; empty where there is none."""
    return _hash_paths([path] if path.is_file() else (file for file in path.rglob("*") if file.is_file()))


def _hash_paths(paths: Iterable[Path]) -> str:
    found = sorted(paths)
    return hash_files([(path.name, path) for path in found], separator="\n") if found else ""


def read_or_none(path: Path, kind: Any) -> Any:
    """The content of a file; None if it is missing or damaged."""
    try:
        return read_json(path, kind, ignore_unknown=True)
    except (OSError, WrongFile):
        return None
