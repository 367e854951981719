"""Find and read the outputs of the other commands in a folder, by their names and contents.

No file is trusted. A file that is broken, or has other contents than its name implies, is listed with the reason and
omitted; the others are read. No pickle is opened, no link to a folder is followed, and all sizes are bounded.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..checkpointing.files import MANIFEST, RunRecord, TrainerState, read_manifest
from ..evaluation.answers.answers import ANSWER_NAMES, PROMPT_NAMES, Answer, read_answers
from ..evaluation.results import judged
from ..evaluation.results.judge_checks import ENDING, PREFIX, read_checks
from ..io import records as results
from ..io.records import Record
from ..io.schemas import parse_json, typed

MAX_FILES = 20_000  # in total
MAX_DEPTH = 8  # folders below the first
MAX_BYTES = 256 * 2**20  # of a file that is read as text
FIRST_LINE = 16 * 2**20  # bytes in which the first line of a JSONL file must end
RUN_SETTINGS = (  # shown of a training run
    *("token_weighting", "sampled_sides", "token_budget", "keep_end_token", "balance_end_token", "length_penalty"),
    *("dpop_lambda", "tdpo", "loss_type", "beta", "learning_rate", "max_length", "seed"),
)
# as `sampo.training.model_card` writes it
_CARD = re.compile(
    r"^This model is a fine-tuned version of [\[`](?P<model>[^\]`]+)[\]`].*"
    r"^## Method$\s+Trained with sampo\. Method: (?P<method>[^\n]+)\.$.*"
    r"^## Data$\s+(?P<data>[^;\n]+)",
    re.MULTILINE | re.DOTALL,
)
MAX_CARD = 2**18  # bytes
# control characters and halves of surrogate pairs
_UNFIT = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# what reading a file of any content may raise; a `KeyboardInterrupt` or a lack of memory does not mean a broken file
BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, RuntimeError)


@dataclass(frozen=True)
class Problem:
    """A file that was omitted, completely or in part, and the reason."""

    file: str
    reason: str


@dataclass(frozen=True)
class Audited:
    """An audit: its records, the file with the numbers of each pair, and its description of the data."""

    file: str
    records: list[Record]
    pairs: Path | None
    about: dict[str, Any]


@dataclass(frozen=True)
class TrainingRun:
    """The log of a training run, its last step, and the settings and versions that a checkpoint of it names.

    `card` has `model`, `method` and `data` as the model card describes them, or nothing.
    """

    file: str
    name: str
    date: str
    step: int
    log: list[dict[str, Any]]
    settings: dict[str, str]
    versions: dict[str, str]
    card: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerSet:
    """A file of answers."""

    file: str
    name: str
    date: str
    sha256: str
    answers: list[Answer]


@dataclass(frozen=True)
class JudgedRun:
    """A run of `sampo judge`: its judgements, its result as one row, and its records."""

    file: str
    run: judged.Judged
    row: dict[str, Any]
    sentence: str
    records: list[Record]


@dataclass(frozen=True)
class Compared:
    """What `sampo compare` wrote."""

    file: str
    systems: list[dict[str, Any]]
    duels: list[dict[str, Any]]
    records: list[Record]


@dataclass(frozen=True)
class RecordFile:
    """A file of records: of `sampo diagnose`, of the lab, of a sweep, of benchmarks, or of something else."""

    file: str
    folder: Path
    records: list[Record]


@dataclass
class Found:
    """Everything that was found below a folder.

    `unused` are files that belong to none of the commands, or whose contents another file has too.
    """

    audits: list[Audited] = field(default_factory=list)
    runs: list[TrainingRun] = field(default_factory=list)
    answers: list[AnswerSet] = field(default_factory=list)
    judged: list[JudgedRun] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    agreements: list[RecordFile] = field(default_factory=list)
    diagnoses: list[RecordFile] = field(default_factory=list)
    labs: list[RecordFile] = field(default_factory=list)
    sweeps: list[RecordFile] = field(default_factory=list)
    benchmarks: list[RecordFile] = field(default_factory=list)
    others: list[RecordFile] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect(folder: Path) -> Found:
    """Read all files below a folder.

    Raises:
        NotADirectoryError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"`{folder}` must be a folder with outputs of sampo's commands, and is none.")
    found = Found()
    files = dict.fromkeys(_walk(folder, found))
    claimed: set[Path] = set()  # files that are read together with another one
    for path in files:
        claimed |= {other for other in _companions(path) if other in files}
    for path in files:
        if path in claimed:
            continue
        try:
            if not _read_file(path, folder, found):
                found.unused.append(_name(path, folder))
        except BROKEN as error:
            found.problems.append(Problem(_name(path, folder), reason(error)))
    found.runs = _last_of_each(found.runs)
    return found


def reason(error: Exception) -> str:
    """The reason in one line, for a reader."""
    text = " ".join(str(error).split())
    return plain(f"{type(error).__name__}: {text}" if not isinstance(error, ValueError | OSError) else text)[:500]


def plain(value: Any) -> Any:
    """The same value without characters that a page in UTF-8 cannot hold; nested values too."""
    if isinstance(value, str):
        return _UNFIT.sub("�", value)
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value


# --- walking ---------------------------------------------------------------------------------------------------------


def _walk(folder: Path, found: Found) -> Iterator[Path]:
    """Regular files, those of a folder in the order of their names; hidden files are omitted."""
    seen = 0
    for directory, folders, names in os.walk(folder):
        deep = len(Path(directory).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if deep >= MAX_DEPTH and folders:
            found.notes.append(f"Folders more than {MAX_DEPTH} below the first were not looked into.")
            folders.clear()
        for name in sorted(name for name in names if not name.startswith(".")):
            seen += 1
            if seen > MAX_FILES:
                found.notes.append(f"Only the first {MAX_FILES:,} files were looked at.")
                return
            path = Path(directory) / name
            if path.suffix != ".html" and path.is_file():  # an earlier page is no reason for another one
                yield path


def _name(path: Path, folder: Path) -> str:
    return plain(path.relative_to(folder).as_posix())


def _companions(path: Path) -> list[Path]:
    """Files that are read together with a file, and not on their own."""
    if path.name == "audit.json":
        return [path.with_name("records.jsonl"), path.with_name("pairs.parquet")]
    if path.name.endswith(".summary.json"):
        stem = path.name.removesuffix(".summary.json")
        return [path.with_name(stem + e) for e in (".jsonl", ".control.jsonl", ".records.jsonl", ".csv")]
    if path.name.endswith(ENDING):
        return [path.with_name(f"{path.name.removesuffix(ENDING)}.jsonl")]
    if path.name.endswith(".records.jsonl"):
        stem = path.name.removesuffix(".records.jsonl")
        return [path.with_name(f"{stem}{ending}") for ending in (".csv", ".json")]
    return []


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_file(path: Path, folder: Path, found: Found) -> bool:
    """Read one file into what was found; False if it belongs to no command."""
    for fits, read in FILE_READERS:
        if fits(path):
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise ValueError(f"it must be at most {MAX_BYTES:,} bytes to be read, got {size:,}")
            return read(path, folder, found)
    return False


def _json(path: Path) -> Any:
    return plain(parse_json(path.read_bytes()))


def _require_keys(value: Any, *keys: str) -> dict[str, Any]:
    found = typed(dict[str, Any], value)
    if missing := sorted(set(keys) - set(found)):
        raise ValueError(f"it must be a JSON object with {missing}")
    return found


@dataclass(frozen=True)
class _Names:
    """The names in a row of a result."""

    system: str | None = None
    baseline: str | None = None
    judge: str | None = None


def _check_names(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a result, after checking that its names are texts."""
    typed(_Names, row, ignore_unknown=True)
    return row


def _records(path: Path) -> list[Record]:
    return [Record(**plain(asdict(record))) for record in results.read(path)]


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()


def _read_audit(path: Path, folder: Path, found: Found) -> bool:
    about = _require_keys(_json(path), "data", "splits", "conclusion")
    records = _records(path.with_name("records.jsonl"))
    if not records:
        raise ValueError("it must lie beside the `records.jsonl` of the same audit, and there are no records")
    pairs = path.with_name("pairs.parquet")
    name = _name(path.parent, folder)
    found.audits.append(Audited(name, records, pairs if pairs.is_file() else None, about))
    return True


def _read_training(path: Path, folder: Path, found: Found) -> bool:
    state = typed(TrainerState, _json(path), ignore_unknown=True)
    run_folder = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    inside = run_folder == folder or folder in run_folder.parents
    name = _name(run_folder, folder) if inside and run_folder != folder else run_folder.resolve().name
    manifest = path.with_name(MANIFEST)
    about = _run_settings(read_manifest(path.parent).run) if manifest.is_file() else ({}, {})
    found.runs.append(
        TrainingRun(
            _name(path, folder),
            plain(name),
            _date(path),
            state.global_step,
            state.log_history,
            *about,
            card=read_card(path.with_name("README.md")),
        )
    )
    return True


def read_card(path: Path) -> dict[str, str]:
    """What the card of a model says it was trained from, how and on what; nothing if it is not a card of sampo."""
    if not path.is_file() or path.stat().st_size > MAX_CARD:
        return {}
    found = _CARD.search(plain(path.read_text(encoding="utf-8", errors="replace")))
    return {} if found is None else {name: text for name, text in found.groupdict().items() if text}


def _run_settings(run: RunRecord) -> tuple[dict[str, str], dict[str, str]]:
    """Settings and versions that a checkpoint was written with."""
    must, rounding = plain(run.must), plain(run.rounding)
    some = {name: must[f"`{name}`"] for name in RUN_SETTINGS if must.get(f"`{name}`") is not None}
    settings = {k: " + ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in some.items()}
    start = "the version of "
    return settings, {k.removeprefix(start): str(v) for k, v in rounding.items() if k.startswith(start)}


def _last_of_each(runs: list[TrainingRun]) -> list[TrainingRun]:
    """The longest log of each run, among its own and those of its checkpoints."""
    last: dict[str, TrainingRun] = {}
    for run in sorted(runs, key=lambda run: run.step):
        known = last.get(run.name)
        if known and not run.settings:  # only checkpoints name them
            run = replace(run, settings=known.settings, versions=known.versions)
        last[run.name] = run
    return [last[name] for name in sorted(last)]


def _read_judged(path: Path, folder: Path, found: Found) -> bool:
    about = _require_keys(_json(path), "result", "sentence", "system", "baseline")
    stem = path.name.removesuffix(".summary.json")
    candidates = [path.with_name(name) for name in (f"{stem}.jsonl", stem)]
    run = judged.read_judged(next((file for file in candidates if file.is_file()), candidates[0]))
    records = _records(path.with_name(f"{stem}.records.jsonl"))
    row = _check_names(_require_keys(about["result"], "system", "baseline", "judge", "win_rate"))
    found.judged.append(JudgedRun(_name(path, folder), run, row, str(about["sentence"]), records))
    return True


def _read_comparison(path: Path, folder: Path, found: Found) -> bool:
    """`OUT.records.jsonl` and `OUT.json`; without the second file, other records."""
    table = path.with_name(f"{path.name.removesuffix('.records.jsonl')}.json")
    records = _records(path)
    if not table.is_file():
        return _sort_records(path, folder, records, found)
    about = _require_keys(_json(table), "systems", "duels", "command")
    for name in ("systems", "duels"):
        if not isinstance(about[name], list) or not all(isinstance(row, dict) for row in about[name]):
            raise ValueError(f"{table.name} must have a list of rows in `{name}`")
    about["systems"] = [_check_names(_require_keys(row, "system")) for row in about["systems"]]
    found.compared.append(Compared(_name(table, folder), about["systems"], about["duels"], records))
    return True


def _read_jsonl(path: Path, folder: Path, found: Found) -> bool:
    """A JSONL file, by its first row: records or answers."""
    with path.open("rb") as file:
        line = file.readline(FIRST_LINE)
    if not line.strip():
        return False
    try:
        first = parse_json(line)
    except ValueError as error:
        raise ValueError(f"its first line: {error}") from None
    if not isinstance(first, dict):
        return False
    if {"schema", "name", "value", "config"} <= set(first):
        return _sort_records(path, folder, _records(path), found)
    if {"prompt_id", "order", "preference"} <= set(first):
        raise ValueError("judgements must lie beside the `.summary.json` of their run, and there is none")
    if not any(name in first for name in PROMPT_NAMES) or not any(name in first for name in ANSWER_NAMES):
        return False
    about = _name(path, folder), plain(path.stem), _date(path), judged.content_hash(path)
    found.answers.append(AnswerSet(*about, read_answers(path)))
    return True


def _sort_records(path: Path, folder: Path, records: list[Record], found: Found) -> bool:
    """Sort records by their kind; one file may hold several kinds."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(_kind(record), []).append(record)
    if "agreements" in kinds:
        read_checks(kinds["agreements"], path.name)  # raises for records that are none
    for kind, some in kinds.items():
        getattr(found, kind).append(RecordFile(_name(path, folder), path.parent, some))
    return True


def _kind(record: Record) -> str:
    if record.name.startswith("diagnose/"):
        return "diagnoses"
    if record.name.startswith(PREFIX):
        return "agreements"
    if (experiment := record.config.get("experiment")) in ("lab", "sweep"):
        return f"{experiment}s"
    return "benchmarks" if "benchmark" in record.config else "others"


FILE_READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path, Path, Found], bool]], ...] = (
    (lambda path: path.name == "audit.json", _read_audit),
    (lambda path: path.name == "trainer_state.json", _read_training),
    (lambda path: path.name.endswith(".summary.json"), _read_judged),
    (lambda path: path.name.endswith(".records.jsonl"), _read_comparison),
    (lambda path: path.suffix == ".jsonl", _read_jsonl),
)
