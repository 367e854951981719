"""TRL's trainer with the per-token cache (`sampo.reference_cache.store`) in the place of its precomputed sums.

TRL has one place where it precomputes, `_precompute_ref_logps`: it is called for each data set at the end of
`__init__`, and by `evaluate` for a new one. Here it fills the cache where something is missing, compares some rows
with the live model, and returns the data set with the cached columns. Several processes fill a cache together, in
rounds: in each, every process computes one shard, all with the same number of forward passes (sharded models need
that), and then the first process names the finished shards in the manifest. What fails on one process ends all.

What is relied on in TRL, beside the list in `sampo.trainer`:

1. `DPOTrainer._precompute_ref_logps(dataset, name, batch_size)` is all that precomputes, and runs when policy and
   reference are ready to score; with `precompute_ref_log_probs` and without a `ref_model`, none is kept.
2. `_set_signature_columns_if_needed` lists the columns that reach the collator.
3. `_precompute_engine` is where TRL keeps the policy as an inference engine of DeepSpeed.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from ..config import SamPOConfig
from ..data.token_ids import ID_COLUMNS, hash_token_ids
from ..logs import get_logger
from ..models.load import create_model
from .key import OWN_TOKENS, RefKey, identity_of_files, identity_of_model
from .store import (
    CHOSEN,
    END,
    REJECTED,
    STORAGE,
    TOKENS,
    RefCache,
    RefCacheError,
    RefCollator,
    Shard,
    cache_root,
    decode,
    without_ref_logps,
)

logger = get_logger(__name__)


class Filled(NamedTuple):
    """What became of one cache of a data set: how many rows were computed now, and the seconds that took."""

    name: str
    cache: RefCache
    computed: int
    seconds: float


class CachedReferenceTrainer(DPOTrainer):
    """`DPOTrainer` whose `precompute_ref_log_probs` keeps one number per token on disk.

    `ref_model` may also be the path of a model, which is then loaded only where it is needed (with FSDP, where it must
    be sharded in time, at once).
    """

    args: SamPOConfig
    model: Any
    _signature_columns: Any

    _rebuild_ref_cache = False  # `sampo cache --rebuild`

    def __init__(self, model, ref_model, args: SamPOConfig, *rest, **kwargs):
        self._ref_path: str | None = None
        self._ref_identity: dict[str, Any] | None = None  # the fields of the key that the reference fills
        self.ref_caches: list[Filled] = []
        if isinstance(ref_model, str):
            if args.precompute_ref_log_probs and not _uses_fsdp(args):
                self._ref_path, ref_model = ref_model, None
            else:
                ref_model = _load(ref_model, args)
        super().__init__(model, ref_model, args, *rest, **kwargs)
        if args.precompute_ref_log_probs:
            self.data_collator = RefCollator(self.data_collator, args.ref_cache_dtype)

    def _reference_logps(self, reference, inputs: dict[str, Any], of_end: bool) -> Tensor:
        """`(2B, L − 1)` log π_ref of all completion tokens of a collated batch; zero or anything elsewhere.

        Of each row's end token in their places, if `of_end`.
        """
        raise NotImplementedError

    @property
    def _cached_targets(self) -> list[str]:
        """A cache for each: the completion's own tokens, and the end token in the trainer's words."""
        return [OWN_TOKENS]

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *TOKENS[:2], *END[:2]]))

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        if not isinstance(dataset, Dataset):  # TRL says why not
            return super()._precompute_ref_logps(dataset, name, batch_size)
        dataset = without_ref_logps(dataset)
        for targets in self._cached_targets:
            dataset = self._with_cache(dataset, targets, name, batch_size)
        return dataset

    def _with_cache(self, dataset: Dataset, targets: str, name: str, batch_size: int) -> Dataset:
        started = time.monotonic()
        key = self._ref_key(dataset, targets)
        cache = RefCache(cache_root(self.args.ref_cache_dir), key, len(dataset))
        name += "" if targets == OWN_TOKENS else f" ({targets})"
        if self._rebuild_ref_cache:
            self._on_main(cache.remove)
        computed = self._fill(cache, dataset, name, batch_size)
        rows = sum(shard.stop - shard.start for shard in computed)
        self.ref_caches.append(Filled(name, cache, rows, time.monotonic() - started))
        logger.info(
            f"reference log-probs of the {name} data: {len(dataset) - rows:,} of {len(dataset):,} rows from the cache "
            f"{cache.folder}, {rows:,} computed."
        )
        with self.args.main_process_first(local=False, desc="joining the reference log-probs"):
            joined = cache.attach(dataset)
        if targets == OWN_TOKENS:
            self._check_rows(joined, set(range(len(dataset))) - _rows_of(computed), cache, name, batch_size)
        return joined

    # --- the key -------------------------------------------------------------------------------------------------

    def _ref_key(self, dataset: Dataset, targets: str) -> RefKey:
        if self._ref_identity is None:
            self._ref_identity = self._identify_reference()
        return RefKey(
            **self._ref_identity,
            data=self._on_main(lambda: hash_token_ids(dataset)),
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            storage_dtype=self.args.ref_cache_dtype,
            targets=targets,
        )

    def _identify_reference(self) -> dict[str, Any]:
        """The fields of the key that the reference fills, the same on all processes."""
        arithmetic = self.accelerator.mixed_precision
        if self._ref_path is not None:
            settings = {"dtype": "float32", "attn_implementation": None, **_loading(self.args)}
            found = self._on_main(lambda: identity_of_files(str(self._ref_path), settings, arithmetic))
            if found is not None:
                return found
        with self._reference_at_hand():
            identity = identity_of_model(self.accelerator.unwrap_model(self._reference), arithmetic)
        return self._on_main(lambda: identity)

    # --- the reference ---------------------------------------------------------------------------------------------

    @property
    def _reference(self) -> Any:
        """The model that scores as the reference; not by `or`, for a compiled module has no truth value."""
        return self.model if self.ref_model is None else self.ref_model

    @contextmanager
    def _reference_at_hand(self) -> Iterator[None]:
        """A reference that was given as a path is `self.ref_model` for this while."""
        if self._ref_path is None or self.ref_model is not None:
            yield
            return
        reference = _load(self._ref_path, self.args)
        add_fused_lm_head(reference)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        try:
            yield
        finally:
            self.ref_model = None

    @contextmanager
    def _scoring(self) -> Iterator[Any]:
        """The model that scores as the reference, in evaluation mode."""
        with self._reference_at_hand():
            reference, training = self._reference, self.model.training
            if self.ref_model is None and self._policy_is_not_ready:
                if self.is_fsdp_enabled:
                    raise RefCacheError(
                        "Under FSDP the policy cannot score before training begins, so the reference log-probs must "
                        "be in the cache, got one with missing rows. Fill it on one process: `sampo cache --config "
                        "FILE`."
                    )
                if self._precompute_engine is None:
                    self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
                reference = self._precompute_engine
            self.model.eval()
            try:
                yield reference
            finally:
                self.model.train(training)

    @property
    def _policy_is_not_ready(self) -> bool:
        """DeepSpeed and FSDP place and gather the policy's weights only when training begins."""
        return (self.is_deepspeed_enabled or self.is_fsdp_enabled) and self.model_wrapped is self.model

    @torch.no_grad()
    def _score_rows(self, reference, dataset: Dataset, rows: list[int], targets: str) -> tuple[list[Tensor], ...]:
        """Per-token log-probs of chosen and of rejected, each `(T,)` float32 on the CPU."""
        inputs = self._prepare_inputs(self.data_collator([dataset[row] for row in rows]))
        mask = inputs["completion_mask"][:, 1:].bool()
        logps = self._reference_logps(reference, inputs, of_end=targets != OWN_TOKENS).float()
        each = [row[kept].cpu() for row, kept in zip(logps, mask, strict=True)]
        return each[: len(rows)], each[len(rows) :]

    # --- filling ---------------------------------------------------------------------------------------------------

    def _fill(self, cache: RefCache, dataset: Dataset, name: str, batch_size: int) -> list[Shard]:
        """Compute what is missing; returns the shards that were."""
        missing = self._on_main(cache.missing)
        if missing == []:
            return []
        if not self._on_main(cache.lock):
            logger.warning(f"Another run fills {cache.folder}; waiting for it.")
            while not self._on_main(cache.lock):
                pass
        try:
            about = {"data": name, "model": self._reference_name(), "output_dir": str(self.args.output_dir)}
            missing = self._on_main(lambda: cache.begin(about, self.accelerator.num_processes))
            self._refuse_unshared_folder(cache)
            if missing:
                with self._scoring() as reference:
                    self._fill_in_rounds(cache, dataset, missing, name, batch_size, reference)
            return missing
        finally:
            if self.accelerator.is_main_process:
                cache.unlock()

    def _fill_in_rounds(self, cache, dataset, missing: list[Shard], name: str, batch_size: int, reference) -> None:
        ids = dataset.select_columns(list(ID_COLUMNS)).with_format(None)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        bar = tqdm(
            total=sum(shard.stop - shard.start for shard in missing),
            desc=f"Computing reference log probs for {name} dataset",
            disable=self.args.disable_tqdm or None,
        )
        for first in range(0, len(missing), world):
            turn = missing[first : first + world]
            mine = turn[rank] if rank < len(turn) else None
            n_batches = max(-(-(shard.stop - shard.start) // batch_size) for shard in turn)

            def work(mine=mine, n_batches=n_batches, turn=turn):
                scored = self._score_shard(reference, ids, mine or turn[0], batch_size, n_batches, cache.key.targets)
                return [cache.write(mine, *scored)] if mine else []

            written = self._together(work)
            self._on_main(partial(cache.record, written))
            bar.update(sum(shard.stop - shard.start for shard in turn))
        bar.close()

    def _score_shard(self, reference, ids: Dataset, shard: Shard, batch_size: int, n_batches: int, targets: str):
        """Rows of like length together; the last batch is repeated until there are `n_batches`."""
        lengths = {row: sum(map(len, ids[row].values())) for row in range(shard.start, shard.stop)}
        rows = sorted(lengths, key=lengths.__getitem__, reverse=True)
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for batch in batches + batches[-1:] * (n_batches - len(batches)):
            scored = self._score_rows(reference, ids, batch, targets)
            found.update(zip(batch, zip(*scored, strict=True), strict=True))
        chosen, rejected = zip(*(found[row] for row in range(shard.start, shard.stop)), strict=True)
        return list(chosen), list(rejected)

    def _refuse_unshared_folder(self, cache: RefCache) -> None:
        def look() -> list:
            for _ in range(30):  # a network file system may take its time
                if cache.manifest_path.exists():
                    return []
                time.sleep(1)
            raise RefCacheError(f"`ref_cache_dir` must be a folder of all machines, got {cache.folder.parent}.")

        self._together(look)

    def _reference_name(self) -> str:
        reference = self._reference
        return self._ref_path or str(getattr(self.accelerator.unwrap_model(reference).config, "_name_or_path", ""))

    # --- comparing -------------------------------------------------------------------------------------------------

    def _check_rows(self, joined: Dataset, candidates: set[int], cache: RefCache, name: str, batch_size: int) -> None:
        """Some rows that were computed by an earlier run against the live model, if there is one."""
        rows = sorted(candidates)
        rows = random.Random(self.args.seed).sample(rows, min(self.args.ref_cache_check, len(rows)))
        if not rows or self._ref_path is not None or (self.ref_model is None and self._policy_is_not_ready):
            return
        ids, excess = joined.select_columns(list(ID_COLUMNS)).with_format(None), []
        rounding = STORAGE[self.args.ref_cache_dtype][1]
        with self._scoring() as reference:
            for i in range(0, len(rows), batch_size):
                part = rows[i : i + batch_size]
                live = self._score_rows(reference, ids, part, OWN_TOKENS)
                for row, *sides_now in zip(part, *live, strict=True):
                    sides = (joined[row][column] for column in (CHOSEN, REJECTED))
                    stored = torch.cat([decode(side, cache.key.storage_dtype) for side in sides])
                    now = torch.cat(sides_now)
                    excess.append(((now - stored).abs() - rounding * now.abs()).mean().item())
        excess = self.accelerator.gather(torch.tensor([excess], device=self.accelerator.device)).amax(dim=0).tolist()
        limit = 1e-3 if cache.key.compute_dtype == "float32" else 0.1  # rounding is 1e-5, and some hundredths in bf16
        wrong = {row: round(size, 4) for row, size in zip(rows, excess, strict=True) if not size <= limit}
        if wrong:
            raise RefCacheError(
                f"The cached reference log-probs of {len(rows)} rows of the {name} data must be those of the live "
                f"model, got a mean difference of {wrong} nats a token (row: difference; {limit} is rounding). "
                "Something has changed that the key does not see, the code of the model or a library, say. Run "
                f"`sampo cache --rebuild`, or delete {cache.folder}. `ref_cache_check: 0` compares nothing."
            )
        logger.info(f"{len(rows)} rows compared with the live model: they agree to {max(excess):.1g} nats a token.")

    # --- several processes -----------------------------------------------------------------------------------------

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What the first process finds, on all processes; what it raises, too."""
        said: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                said[0] = work()
            except (OSError, RefCacheError) as error:
                said[1] = error
        broadcast_object_list(said)
        if said[1] is not None:
            raise said[1]
        return said[0]

    def _together(self, work: Callable[[], list]) -> list:
        """The lists of all processes as one. What fails on one ends all of them."""
        own, fault = [], None
        try:
            own = work()
        except Exception as error:
            if self.accelerator.num_processes == 1:
                raise
            fault = error
        outcomes = gather_object([(self.accelerator.process_index, own, None if fault is None else repr(fault))])
        if fault is not None:
            raise fault
        failed = {rank: text for rank, _, text in outcomes if text is not None}
        if failed:
            raise RuntimeError(f"Filling the reference cache failed on other processes: {failed}.")
        return [entry for _, each, _ in outcomes for entry in each]


def _rows_of(shards: list[Shard]) -> set[int]:
    return {row for shard in shards for row in range(shard.start, shard.stop)}


def _uses_fsdp(args: SamPOConfig) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _load(path: str | Path, args: SamPOConfig):
    """A reference from its path, with the settings of the policy's loading, as TRL loads a copy of the policy."""
    settings = _loading(args)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None  # a map of its own would place one model over all processes' devices
    settings.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model(str(path), option="ref_model", **settings)


def _loading(args: SamPOConfig) -> dict[str, Any]:
    return dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # a text only on the command line
