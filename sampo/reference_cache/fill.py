"""Filling per-token caches of the reference: one loop, for training on any number of processes and for `diagnose`.

Processes fill a cache together, in rounds: in each, every process computes one shard, all with the same number of
forward passes (sharded models need that), and then the first process names the finished shards in the manifest. An
error on one process ends all. Caches of other targets of the same rows are filled by the same forward passes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor

from ..data.token_ids import ID_COLUMNS
from ..io.progress import Progress
from ..logs import get_logger
from .key import OWN_TOKENS
from .store import RefCache, RefCacheError, Shard

logger = get_logger(__name__)

Sides = tuple[Tensor, Tensor]  # of a pair, log-probs of the chosen and of the rejected response, each `(T,)`
# Rows with their token ids, and which targets -> for each target what it gives of each row, float32 on the CPU
ScoreRows = Callable[[list[dict[str, Any]], Sequence[str]], dict[str, list[Sides]]]


class Part(NamedTuple):
    """Rows to compute, and the caches that lack them."""

    shard: Shard
    caches: tuple[RefCache, ...]


def fill(
    caches: Sequence[RefCache],
    dataset: Dataset,
    scoring: Callable[[], AbstractContextManager[ScoreRows]],
    about: dict[str, str],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, list[Shard]]:
    """Compute what is missing in one or several caches of the same rows.

    Args:
        caches: each of other targets.
        dataset: tokenised.
        scoring: gives what scores rows; not entered if nothing is missing.
        about: the fields of `store.About`, for people who look into the manifest.
        batch_size: pairs at a time.
        progress: called with (done, of) in pairs.

    Returns:
        The shards that were computed, by the targets of their cache.

    Raises:
        RefCacheError: a cache is damaged, or its folder is not shared by all machines.
    """
    open_ones = [cache for cache in caches if on_main(cache.missing) != []]
    computed: dict[str, list[Shard]] = {cache.key.targets: [] for cache in caches}
    if not open_ones:
        return computed
    with ExitStack() as stack:
        for cache in open_ones:
            stack.enter_context(_alone(cache))
            missing = on_main(partial(cache.begin, about, PartialState().num_processes))
            _refuse_unshared_folder(cache)
            computed[cache.key.targets] = missing
        parts = _parts(open_ones, computed)
        if parts:
            score = stack.enter_context(scoring())
            _fill_in_rounds(parts, dataset, score, batch_size, progress)
    return computed


def _parts(caches: Sequence[RefCache], missing: dict[str, list[Shard]]) -> list[Part]:
    """Shards of the same rows together, so that their rows are computed once."""
    shards = dict.fromkeys(shard for cache in caches for shard in missing[cache.key.targets])
    return [Part(shard, tuple(c for c in caches if shard in missing[c.key.targets])) for shard in shards]


@contextmanager
def _alone(cache: RefCache) -> Iterator[None]:
    """The first process holds the lock of a cache."""
    if not on_main(cache.lock):
        logger.warning(f"Another run fills {cache.folder}; waiting for it.")
        while not on_main(cache.lock):
            pass
    try:
        yield
    finally:
        if PartialState().is_main_process:
            cache.unlock()


def _fill_in_rounds(
    parts: list[Part], dataset: Dataset, score: ScoreRows, batch_size: int, progress: Progress | None
) -> None:
    rows = dataset.select_columns(list(ID_COLUMNS)).with_format(None)
    world, rank, done = PartialState().num_processes, PartialState().process_index, 0
    total = sum(shard.stop - shard.start for shard, _ in parts)
    for first in range(0, len(parts), world):
        turn = parts[first : first + world]
        mine = turn[rank] if rank < len(turn) else None
        n_batches = max(-(-(shard.stop - shard.start) // batch_size) for shard, _ in turn)

        def work(mine: Part | None = mine, n_batches: int = n_batches, turn: list[Part] = turn) -> list:
            shard, caches = mine or turn[0]
            targets = [cache.key.targets for cache in caches]
            found = _score_shard(score, rows, shard, targets, batch_size, n_batches)
            if mine is None:
                return []
            return [
                (c.key.targets, c.write(shard, *map(list, zip(*found[c.key.targets], strict=True)))) for c in caches
            ]

        written = together(work)
        for cache in dict.fromkeys(cache for _, caches in turn for cache in caches):
            on_main(partial(cache.record, [entry for targets, entry in written if targets == cache.key.targets]))
        done += sum(shard.stop - shard.start for shard, _ in turn)
        if progress is not None:
            progress(done, total)


def _score_shard(
    score: ScoreRows, rows: Dataset, shard: Shard, targets: Sequence[str], batch_size: int, n_batches: int
) -> dict[str, list[Sides]]:
    """Rows of like length together; the last batch is repeated until there are `n_batches`."""
    batches = list(alike(rows, range(shard.start, shard.stop), batch_size))
    found: dict[str, dict[int, Sides]] = {each: {} for each in targets}
    for batch in batches + batches[-1:] * (n_batches - len(batches)):
        for each, sides in score([rows[row] for row in batch], targets).items():
            found[each].update(zip(batch, sides, strict=True))
    return {each: [by_row[row] for row in range(shard.start, shard.stop)] for each, by_row in found.items()}


def alike(rows: Dataset, numbers: range, batch_size: int) -> Iterator[list[int]]:
    """Batches of row numbers, rows of like length together."""
    lengths = {row: sum(len(rows[row][name]) for name in ID_COLUMNS) for row in numbers}
    order = sorted(lengths, key=lengths.__getitem__, reverse=True)
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def split_rows(logps: Tensor, mask: Tensor) -> list[Sides]:
    """Of each pair the log-probs at its completion tokens.

    Args:
        logps: `(2B, N)` nats, chosen rows first.
        mask: `(2B, N)` bool, completion tokens.
    """
    each = [row[kept].float().cpu() for row, kept in zip(logps, mask, strict=True)]
    n_pairs = len(each) // 2
    return list(zip(each[:n_pairs], each[n_pairs:], strict=True))


def title(name: str, targets: str) -> str:
    """A data set and the targets of a cache, for people."""
    return name if targets == OWN_TOKENS else f"{name} ({targets})"


def _refuse_unshared_folder(cache: RefCache) -> None:
    def look() -> list:
        for _ in range(30):  # a network file system may take its time
            if cache.manifest_path.exists():
                return []
            time.sleep(1)
        raise RefCacheError(f"`ref_cache_dir` must be a folder of all machines, got {cache.folder.parent}.")

    together(look)


# --- several processes -----------------------------------------------------------------------------------------------


def on_main(work: Callable[[], Any]) -> Any:
    """What the first process finds, on all processes; what it raises, too."""
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = work()
        except (OSError, RefCacheError) as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def together(work: Callable[[], list]) -> list:
    """The lists of all processes as one. An error on one ends all of them."""
    own, error = [], None
    try:
        own = work()
    except Exception as raised:
        if PartialState().num_processes == 1:
            raise
        error = raised
    outcomes = gather_object([(PartialState().process_index, own, None if error is None else repr(error))])
    if error is not None:
        raise error
    failed = {rank: text for rank, _, text in outcomes if text is not None}
    if failed:
        raise RuntimeError(f"Filling the reference cache failed on other processes: {failed}.")
    return [entry for _, each, _ in outcomes for entry in each]
