"""TRL's trainer with the per-token cache (`sampo.reference_cache.store`) in place of its precomputed sums.

TRL has one place where it precomputes, `_precompute_ref_logps`: it is called for each data set at the end of
`__init__`, and by `evaluate` for a new one. Here it fills the caches where something is missing, compares some rows
with the live model, and returns the data set with the cached columns.

What is relied on in TRL, beside the list in `sampo.trainer`:

1. `DPOTrainer._precompute_ref_logps(dataset, name, batch_size)` is all that precomputes, and runs when policy and
   reference are ready to score; with `precompute_ref_log_probs` and without a `ref_model`, none is kept.
2. `_set_signature_columns_if_needed` lists the columns that reach the collator.
3. `_precompute_engine` is where TRL keeps the policy as an inference engine of DeepSpeed.
"""

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import tqdm
from datasets import Dataset
from trl import DPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from ..config import SamPOConfig
from ..data.token_ids import ID_COLUMNS, hash_token_ids
from ..io.progress import Progress
from ..logs import get_logger
from ..models.load import create_model
from .fill import ScoreRows, Sides, fill, on_main, split_rows, title
from .key import OWN_TOKENS, RefKey, identity_of_files, identity_of_model
from .store import (
    CHOSEN_REF_LOGPS,
    END,
    REJECTED_REF_LOGPS,
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
    """One cache of a data set: how many rows were computed now, and the seconds that the data set's caches took."""

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
    passes: Any  # its `reference_logps` scores a batch by the reference
    _signature_columns: Any

    rebuild_ref_cache = False  # `sampo cache --rebuild`

    def __init__(self, model: Any, ref_model: Any, args: SamPOConfig, *rest: Any, **kwargs: Any):
        self._ref_path: str | None = None
        self.ref_identity: dict[str, Any] | None = None  # the fields of the key that the reference fills
        self.ref_caches: list[Filled] = []
        if isinstance(ref_model, str):
            if args.precompute_ref_log_probs and not _uses_fsdp(args):
                self._ref_path, ref_model = ref_model, None
            else:
                ref_model = _load(ref_model, args)
        super().__init__(model, ref_model, args, *rest, **kwargs)
        if args.precompute_ref_log_probs:
            self.data_collator = RefCollator(self.data_collator, args.ref_cache_dtype)

    @property
    def cached_targets(self) -> list[str]:
        """A cache for each: the completion's own tokens, and a description of others."""
        return [OWN_TOKENS]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *TOKENS[:2], *END[:2]]))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not isinstance(dataset, Dataset):  # TRL explains why not
            return super()._precompute_ref_logps(dataset, name, batch_size)
        started = time.monotonic()
        dataset = without_ref_logps(dataset)
        root = cache_root(self.args.ref_cache_dir)
        caches = [RefCache(root, self._ref_key(dataset, targets), len(dataset)) for targets in self.cached_targets]
        for cache in caches if self.rebuild_ref_cache else ():
            on_main(cache.remove)
        about = {"data": name, "model": self._reference_name(), "output_dir": str(self.args.output_dir)}
        with self._progress(name) as progress:
            computed = fill(caches, dataset, self._scoring_rows, about, batch_size=batch_size, progress=progress)
        seconds = time.monotonic() - started
        for cache in caches:
            dataset = self._attach(dataset, cache, computed[cache.key.targets], name, seconds)
        self._check_rows(
            dataset, set(range(len(dataset))) - _rows_of(computed[OWN_TOKENS]), caches[0], name, batch_size
        )
        return dataset

    def _attach(self, dataset: Dataset, cache: RefCache, computed: list[Shard], name: str, seconds: float) -> Dataset:
        rows, name = len(_rows_of(computed)), title(name, cache.key.targets)
        self.ref_caches.append(Filled(name, cache, rows, seconds))
        logger.info(
            f"reference log-probs of the {name} data: {len(dataset) - rows:,} of {len(dataset):,} rows from the cache "
            f"{cache.folder}, {rows:,} computed."
        )
        with self.args.main_process_first(local=False, desc="joining the reference log-probs"):
            return cache.attach(dataset)

    @contextmanager
    def _progress(self, name: str) -> Iterator[Progress]:
        bar: Any = None

        def advance(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                text = f"Computing reference log probs for {name} dataset"
                bar = tqdm(total=total, desc=text, disable=self.args.disable_tqdm or None)
            bar.update(done - bar.n)

        try:
            yield advance
        finally:
            if bar is not None:
                bar.close()

    # --- the key -------------------------------------------------------------------------------------------------

    def _ref_key(self, dataset: Dataset, targets: str) -> RefKey:
        if self.ref_identity is None:
            self.ref_identity = self._identify_reference()
        return RefKey(
            **self.ref_identity,
            data=on_main(lambda: hash_token_ids(dataset)),
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
            found = on_main(lambda: identity_of_files(str(self._ref_path), settings, arithmetic))
            if found is not None:
                return found
        with self._reference_at_hand():
            identity = identity_of_model(self.accelerator.unwrap_model(self.reference), arithmetic)
        return on_main(lambda: identity)

    # --- the reference ---------------------------------------------------------------------------------------------

    @property
    def reference(self) -> Any:
        """The model that scores as the reference; not by `or`, for a compiled module has no truth value."""
        return self.model if self.ref_model is None else self.ref_model

    def _reference_name(self) -> str:
        config = self.accelerator.unwrap_model(self.reference).config
        return self._ref_path or str(getattr(config, "_name_or_path", ""))

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
            self.passes.forget(reference)

    @contextmanager
    def _scoring_rows(self) -> Iterator[ScoreRows]:
        """What scores rows by the reference, in evaluation mode."""
        with self._reference_at_hand():
            reference, training = self.reference, self.model.training
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
                yield partial(self._score_rows, reference)
            finally:
                self.model.train(training)

    @property
    def _policy_is_not_ready(self) -> bool:
        """DeepSpeed and FSDP place and gather the policy's weights only when training begins."""
        return (self.is_deepspeed_enabled or self.is_fsdp_enabled) and self.model_wrapped is self.model

    @torch.no_grad()
    def _score_rows(
        self, reference: Any, rows: list[dict[str, Any]], targets: Sequence[str]
    ) -> dict[str, list[Sides]]:
        inputs = self._prepare_inputs(self.data_collator(rows))
        mask = inputs["completion_mask"][:, 1:].bool()
        found = self.passes.reference_logps(reference, inputs, targets)
        return {each: split_rows(logps, mask) for each, logps in found.items()}

    # --- comparing -------------------------------------------------------------------------------------------------

    def _check_rows(self, joined: Dataset, candidates: set[int], cache: RefCache, name: str, batch_size: int) -> None:
        """Some rows that were computed by an earlier run against the live model, if there is one."""
        numbers = sorted(candidates)
        numbers = random.Random(self.args.seed).sample(numbers, min(self.args.ref_cache_check, len(numbers)))
        if not numbers or self._ref_path is not None or (self.ref_model is None and self._policy_is_not_ready):
            return
        ids, excess = joined.select_columns(list(ID_COLUMNS)).with_format(None), []
        rounding = STORAGE[self.args.ref_cache_dtype][1]
        with self._scoring_rows() as score:
            for i in range(0, len(numbers), batch_size):
                part = numbers[i : i + batch_size]
                live = score([ids[row] for row in part], [OWN_TOKENS])[OWN_TOKENS]
                for row, sides_now in zip(part, live, strict=True):
                    sides = (joined[row][column] for column in (CHOSEN_REF_LOGPS, REJECTED_REF_LOGPS))
                    stored = torch.cat([decode(side, cache.key.storage_dtype) for side in sides])
                    now = torch.cat(sides_now)
                    excess.append(((now - stored).abs() - rounding * now.abs()).mean().item())
        excess = self.accelerator.gather(torch.tensor([excess], device=self.accelerator.device)).amax(dim=0).tolist()
        limit = 1e-3 if cache.key.compute_dtype == "float32" else 0.1  # rounding is 1e-5, and some hundredths in bf16
        wrong = {row: round(size, 4) for row, size in zip(numbers, excess, strict=True) if not size <= limit}
        if wrong:
            raise RefCacheError(
                f"The cached reference log-probs of {len(numbers)} rows of the {name} data must be those of the live "
                f"model, got a mean difference of {wrong} nats a token (row: difference; {limit} is rounding). "
                "Something changed that the key does not cover, such as the code of the model or a library. Run "
                f"`sampo cache --rebuild`, or delete {cache.folder}. `ref_cache_check: 0` compares nothing."
            )
        logger.info(f"{len(numbers)} rows compared with the live model: they agree to {max(excess):.1g} nats a token.")


def _rows_of(shards: list[Shard]) -> set[int]:
    return {row for shard in shards for row in range(shard.start, shard.stop)}


def _uses_fsdp(args: SamPOConfig) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _load(path: str | Path, args: SamPOConfig) -> Any:
    """A reference from its path, with the settings of the policy's loading, as TRL loads a copy of the policy."""
    settings = _loading(args)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None  # a map of its own would place one model over all processes' devices
    settings.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model(str(path), option="ref_model", **settings)


def _loading(args: SamPOConfig) -> dict[str, Any]:
    return dict(cast("dict[str, Any]", args.model_init_kwargs or {}))  # text only before the config parses it
