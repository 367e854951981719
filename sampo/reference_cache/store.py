"""Per-token reference log-probs on disk: shards of rows, a manifest, and how a batch gets its numbers.

TRL's cache holds one sum per response, from which no subset of tokens can be taken; ours holds one number per
completion token that survives truncation: the token's own log-prob, or the end token's instead. A cache is a
folder, named by its key (`sampo.reference_cache.key`):

    <ref_cache_dir>/<digest>/manifest.json        the key, and file, size and SHA-256 of each finished shard
                             shard-00000.arrow    Arrow stream, one row per pair, memory-mapped when it is read
                             …

Only what the manifest names is trusted. A shard is written aside, synced and renamed, then the manifest likewise: a
build that is killed at any point continues with the missing shards. A shard whose bytes are not those that the
manifest names is refused, never read.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from torch import Tensor

from ..io.files import remove_left_overs, write_atomic
from ..io.hashing import SEAL, Content, find_changed_file, hash_content, seal, unseal
from ..io.schemas import WrongFile, named, parse_json, typed
from .key import KEY_SCHEMA, OWN_TOKENS, RefKey


class Names(NamedTuple):
    """Two columns of a data set, and what the collator makes of them: `(2B, L − 1)`."""

    chosen: str
    rejected: str
    batch: str


TOKENS = CHOSEN_REF_LOGPS, REJECTED_REF_LOGPS, CACHED_REF_LOGPS = Names(
    "ref_chosen_token_logps", "ref_rejected_token_logps", "ref_logps"
)
END = Names("ref_chosen_end_logps", "ref_rejected_end_logps", "ref_end_logps")  # `balance_end_token` needs them

WAIT_S = 10.0  # for another run to finish with a cache, in one try
ROWS_PER_SHARD = 512  # what a killed build loses at most, per process

# name -> (type on disk, largest relative rounding error). Arrow knows no bfloat16: its bits are kept as int16.
STORAGE: dict[str, tuple[pa.DataType, float]] = {
    "float32": (pa.float32(), 0.0),
    "float16": (pa.float16(), 2**-11),
    "bfloat16": (pa.int16(), 2**-8),
}
_FOLDER = re.compile(r"[0-9a-f]{24}")


class RefCacheError(ValueError):
    """A cache cannot be used; the text gives the reason and what to do."""


class Shard(NamedTuple):
    """Rows start:stop of the data set."""

    number: int
    start: int
    stop: int


def cache_root(folder: str | None) -> Path:
    """Where the caches lie: the folder that was asked for, or `ref_logps` in $SAMPO_CACHE or in ~/.cache/sampo."""
    if folder is not None:
        return Path(folder).expanduser()
    home = os.environ.get("SAMPO_CACHE")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "sampo") / "ref_logps"


class RefCache:
    """One cache. Of several processes the first one calls what changes the manifest, each writes its own shards.

    Attributes:
        folder: where it lies.
        key: what its numbers depend on.
        n_rows: rows of the data set.
        names: of its columns.
    """

    def __init__(self, root: Path, key: RefKey, n_rows: int):
        self.folder, self.key, self.n_rows = root / key.digest, key, n_rows
        self.names = TOKENS if key.targets == OWN_TOKENS else END
        self._lock = FileLock(root / f"{key.digest}.lock", timeout=WAIT_S)

    @property
    def manifest_path(self) -> Path:
        """The file that lists the trusted shards."""
        return self.folder / "manifest.json"

    def missing(self) -> list[Shard] | None:
        """Shards that are still to be computed, after the others were verified; None if nothing was begun.

        A shard that the manifest names and that is gone counts as missing.

        Raises:
            RefCacheError: the manifest cannot be read or is another cache's; a shard's bytes are not those it names.
        """
        manifest = self._read_manifest()
        if manifest is None:
            return None
        return [shard for shard in self._shards(manifest) if not self._verify(shard, manifest)]

    def begin(self, about: dict[str, str], processes: int = 1) -> list[Shard]:
        """Lay down the manifest if there is none; returns the shards to compute.

        Args:
            about: the fields of `About`, for people who look into the manifest.
            processes: that share the work; a small data set is cut into so many shards.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_left_overs(self.folder)
        if self._read_manifest() is None:
            created = datetime.now(UTC).isoformat(timespec="seconds")
            size = min(ROWS_PER_SHARD, max(1, -(-self.n_rows // processes)))
            key = self.key.as_dict()
            self._write_manifest(RefManifest(KEY_SCHEMA, key, self.n_rows, size, created, About(**about), {}))
        return self.missing() or []

    def write(self, shard: Shard, chosen: list[Tensor], rejected: list[Tensor]) -> dict[str, Any]:
        """Write one shard; returns what `record` needs to name it in the manifest.

        Args:
            shard: which.
            chosen: of each row `(T_w,)` nats, float32 on the CPU.
            rejected: of each row `(T_l,)`.

        Raises:
            RefCacheError: a number is not finite, or does not fit into the type on disk.
        """
        kind = self.key.storage_dtype
        columns = [_column(rows, kind, shard) for rows in (chosen, rejected)]
        table = pa.table(columns, names=list(self.names[:2]))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        data = sink.getvalue().to_pybytes()
        write_atomic(self._path(shard), data)
        tokens, content = sum(map(len, chosen)) + sum(map(len, rejected)), hash_content(data)
        return {"index": shard.number, "sha256": content.sha256, "bytes": content.size, "tokens": tokens}

    def record(self, written: list[dict[str, Any]]) -> None:
        """Name finished shards in the manifest."""
        manifest = self._read_manifest()
        if manifest is None:
            raise RefCacheError(f"{self.manifest_path} must stay while the cache is filled, got none. Start again.")
        for entry in written:
            manifest.shards[str(entry["index"])] = ShardEntry(**{k: v for k, v in entry.items() if k != "index"})
        self._write_manifest(manifest)

    def attach(self, dataset: Dataset) -> Dataset:
        """The data set with two more columns (`names`), memory-mapped from the shards.

        Raises:
            RefCacheError: a shard is missing.
        """
        if not self.n_rows:
            return dataset
        manifest = self._read_manifest()
        shards = self._shards(manifest) if manifest else []
        gone = [self._path(shard) for shard in shards if not self._path(shard).exists()]
        if manifest is None or gone:
            raise RefCacheError(
                f"All processes must see the cache {self.folder}, got one that does not. Set `ref_cache_dir` to a "
                "folder that all machines share."
            )
        logps = concatenate_datasets([Dataset.from_file(str(self._path(shard))) for shard in shards])
        dataset = without_ref_logps(dataset, [self.names])
        if dataset._indices is not None:  # else `datasets` would copy the shards with it
            dataset = dataset.flatten_indices()
        return concatenate_datasets([dataset, logps], axis=1)

    def size(self) -> tuple[int, int]:
        """(bytes, tokens) of all shards."""
        manifest = self._read_manifest()
        shards = manifest.shards.values() if manifest else ()
        return sum(shard.bytes for shard in shards), sum(shard.tokens for shard in shards)

    def remove(self) -> None:
        """Delete everything.

        Raises:
            RefCacheError: another run fills it.
        """
        remove_cache(self.folder)

    def lock(self) -> bool:
        """Try for some seconds to be the only run that fills this cache; the system releases it if we die."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            return False
        return True

    def unlock(self) -> None:
        """Let others fill it."""
        self._lock.release()

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"shard-{shard.number:05d}.arrow"

    def _shards(self, manifest: "RefManifest") -> list[Shard]:
        size = manifest.rows_per_shard
        starts = range(0, self.n_rows, size)
        return [Shard(i, start, min(start + size, self.n_rows)) for i, start in enumerate(starts)]

    def _read_manifest(self) -> "RefManifest | None":
        manifest = read_cache_manifest(self.manifest_path)
        if manifest is not None and (manifest.key != self.key.as_dict() or manifest.rows != self.n_rows):
            differing = [k for k, v in self.key.as_dict().items() if manifest.key.get(k) != v] or ["rows"]
            raise RefCacheError(
                f"{self.manifest_path} must be that of this run, got one of another cache (`{'`, `'.join(differing)}` "
                f"differ). {_fix(self.folder)}"
            )
        return manifest

    def _write_manifest(self, manifest: "RefManifest") -> None:
        write_atomic(self.manifest_path, seal(asdict(manifest)))

    def _verify(self, shard: Shard, manifest: "RefManifest") -> bool:
        """Whether the shard exists and is intact."""
        entry, path = manifest.shards.get(str(shard.number)), self._path(shard)
        if entry is None or not path.exists():
            return False
        if issue := find_changed_file(self.folder, {path.name: Content(entry.bytes, entry.sha256)}):
            raise RefCacheError(f"{path} must be what its manifest names, and {issue}. {_fix(path)}")
        return True


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard: what its file holds, and the number of log-probs in it."""

    sha256: str
    bytes: int
    tokens: int


@dataclass(frozen=True)
class About:
    """Of which data set a cache is, of which reference, and which run has begun it. Nothing depends on it."""

    data: str = ""
    model: str = ""
    output_dir: str = ""


@dataclass(frozen=True)
class RefManifest:
    """The manifest of a cache: its key, rows and trusted shards."""

    schema: int
    key: dict[str, Any]
    rows: int
    rows_per_shard: int
    created: str
    about: About
    shards: dict[str, ShardEntry]

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"`rows_per_shard` must be at least 1, got {self.rows_per_shard}")


def read_cache_manifest(path: Path) -> RefManifest | None:
    """The manifest at this place; None if there is none.

    Raises:
        RefCacheError: it is no manifest, or one of another schema.
    """
    if not path.exists():
        return None
    try:
        with named(path, _fix(path.parent).removesuffix(".")):
            content = typed(dict[str, Any], parse_json(path.read_bytes()))
            if content.get("schema") != KEY_SCHEMA:
                raise ValueError(
                    f"it must be a manifest of schema {KEY_SCHEMA}, got {str(content.get('schema'))[:20]}"
                )
            # caches of earlier versions have no checksum of the manifest, and the same content
            return typed(RefManifest, unseal(content) if SEAL in content else content, complete=True)
    except (OSError, WrongFile) as error:
        raise RefCacheError(str(error)) from None


def remove_cache(folder: Path) -> None:
    """Delete a cache and its lock.

    Raises:
        RefCacheError: a run fills it.
    """
    if not folder.parent.is_dir():
        return
    lock = Path(f"{folder}.lock")
    try:
        with FileLock(lock, timeout=WAIT_S):
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
    except Timeout:
        raise RefCacheError(f"A cache must not be deleted while a run fills it, got {folder}. Wait for it.") from None


def cache_folders(root: Path) -> list[Path]:
    """Folders of all caches below a root, by name."""
    return sorted(path for path in root.glob("*") if path.is_dir() and _FOLDER.fullmatch(path.name))


def without_ref_logps(dataset: Dataset, kinds: Sequence[Names] = (TOKENS, END)) -> Dataset:
    """The data set without columns of an earlier cache."""
    columns = [name for names in kinds for name in names[:2]]
    return dataset.remove_columns([name for name in columns if name in dataset.column_names])


def _fix(path: Path) -> str:
    return f"Delete {path}, and what is missing is computed again, or run `sampo cache --rebuild`."


def _column(rows: list[Tensor], kind: str, shard: Shard) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    values = torch.cat(rows) if rows else torch.zeros(0)
    stored = values if kind == "float32" else values.to(getattr(torch, kind))
    wrong = (~torch.isfinite(stored)).nonzero()
    if len(wrong):
        row = int(np.searchsorted(offsets, wrong[0].item(), side="right")) - 1
        raise RefCacheError(
            f"Reference log-probs must be finite in {kind}, got {values[wrong[0]].item()} in row {shard.start + row}. "
            "Look at that row, compute in bf16 or fp32 instead of fp16, or set `ref_cache_dtype: float32`."
        )
    if kind == "bfloat16":
        stored = stored.view(torch.int16)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(stored.numpy(), type=STORAGE[kind][0]))


def decode(values: list, kind: str) -> Tensor:
    """Numbers of a row as the data set gives them, as float32 nats."""
    if kind == "bfloat16":
        return torch.tensor(values, dtype=torch.int16).view(torch.bfloat16).float()
    return torch.tensor(values, dtype=torch.float32)


@dataclass
class RefCollator:
    """The trainer's collator, and `ref_logps` (and `ref_end_logps`) beside what it makes of a batch.

    Example, rows of two and of one completion token after prompts of two and three:

        completion_mask  0 0 1 1     ref_logps  0 a b
                         0 0 0 1                0 0 c

    Attributes:
        collate: what makes `(2B, L)` tensors of examples, chosen rows first.
        kind: type of the numbers on disk, a key of `STORAGE`.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    kind: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate; examples without reference columns pass as they are.

        Raises:
            RefCacheError: a row has another number of completion tokens than the cache.
        """
        kinds = [names for names in (TOKENS, END) if names.chosen in examples[0]]
        cached = {name for names in kinds for name in names[:2]}
        batch = self.collate([{k: v for k, v in e.items() if k not in cached} for e in examples])
        for names in kinds:
            batch[names.batch] = self._batch(examples, names, batch["completion_mask"][:, 1:].bool())
        return batch

    def _batch(self, examples: list[dict[str, Any]], names: Names, mask: Tensor) -> Tensor:
        """`(2B, L − 1)` of rows, at the completion tokens of `mask`."""
        rows = [decode(e[name], self.kind) for name in names[:2] for e in examples]
        counts, cached = mask.sum(dim=1).tolist(), [len(row) for row in rows]
        if counts != cached:
            raise RefCacheError(
                f"A batch must have as many completion tokens as the cache, got {counts} and {cached}. The data "
                "collator cuts rows differently from `max_length` and `truncation_mode`; use TRL's, or unset "
                "`precompute_ref_log_probs`."
            )
        return torch.zeros(mask.shape).masked_scatter(mask, torch.cat(rows))
