"""The state file of a sweep: its definition, and the time and the errors of each run.

Whether a run is trained and evaluated is not read from there but from the files of the run itself, so a killed sweep
cannot claim what was not done.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..io.files import write_atomic
from ..io.hashing import seal, unseal
from ..io.schemas import WrongFile, named, parse_json, typed
from ..training.rounds import describe_changes
from .plan import Definition, RefusedSweep, Sweep

STATE_FILE = "sweep.json"


@dataclass
class RunProgress:
    """Time and error of a run; `seconds` of all attempts that were not killed together with the sweep."""

    seconds: float = 0.0
    attempts: int = 0
    error: str = ""


@dataclass
class SweepState:
    """The content of the state file.

    Attributes:
        definition: of the sweep.
        runs: by name.
        cached_by: the command that has filled the shared reference cache.
        cached_rows: pairs of that cache.
        cache_seconds: that it took.
    """

    definition: Definition
    runs: dict[str, RunProgress]
    cached_by: list[str] = field(default_factory=list)
    cached_rows: int = 0
    cache_seconds: float = 0.0


def restore_state(folder: Path, definition: Definition) -> SweepState:
    """The state in a folder, with the runs that the definition adds; or a new one.

    Raises:
        RefusedSweep: the folder belongs to another sweep, or has runs without a state file.
    """
    saved = read_state_file(folder)
    if saved is None:
        if (folder / "runs").exists():
            raise RefusedSweep(f"`out` must have no runs without {STATE_FILE}, got some in {folder}. Set another.")
        saved = SweepState(definition, {})
    judged = any(Sweep(folder, saved.definition).judgements(run.name).exists() for run in saved.definition.runs)
    changes = list(find_changes(saved.definition, definition, judged=judged))
    if changes:
        raise RefusedSweep(
            f"{folder / STATE_FILE} must be of the same sweep, got changes: {'; '.join(changes)}. Methods, seeds, "
            "values of the grid and a judge can be added, and a judge that has not judged yet can be changed; for "
            "other changes set another `out`."
        )
    runs = {run.name: saved.runs.get(run.name, RunProgress()) for run in definition.runs}
    return SweepState(definition, runs, saved.cached_by, saved.cached_rows, saved.cache_seconds)


def find_changes(old: Definition, new: Definition, *, judged: bool = True) -> Iterator[str]:
    """Describe what a new definition changes, except for what it adds, and for a judge that has judged nothing."""
    was, now = asdict(old), json.loads(json.dumps(asdict(new)))
    grows = ("methods", "seeds", "grid", *(("judge",) if not (old.judge and judged) else ()))
    yield from describe_changes(
        {name: value for name, value in was.items() if name not in grows},
        {name: value for name, value in now.items() if name not in grows},
    )
    if new.seeds < old.seeds:
        yield f"`seeds` was {old.seeds} and is {new.seeds}"
    for name, method in old.methods.items():
        if name not in new.methods:
            yield f"the method `{name}` is missing"
        elif asdict(new.methods[name]) != asdict(method):
            yield f"the method `{name}` was {method.options} and is {new.methods[name].options}"
    for option, values in old.grid.items():
        if gone := [f"{value:g}" for value in values if value not in new.grid[option]]:
            yield f"`{option}` {', '.join(gone)} is missing"


def write_state(folder: Path, state: SweepState) -> None:
    """Write the state file."""
    write_atomic(folder / STATE_FILE, seal(asdict(state)))


def read_state_file(folder: Path) -> SweepState | None:
    """Read the state file; None if there is none.

    Raises:
        RefusedSweep: it is damaged.
    """
    path = folder / STATE_FILE
    try:
        with named(path, "Restore it, or move the folder away"):
            return typed(SweepState, unseal(typed(dict[str, Any], parse_json(path.read_bytes()))))
    except FileNotFoundError:
        return None
    except (OSError, WrongFile) as error:
        raise RefusedSweep(str(error)) from None
