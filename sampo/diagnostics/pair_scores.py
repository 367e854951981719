"""Scores of each preference pair by a policy and a reference: forward passes, and their results on disk.

One forward pass gives two numbers for each completion token: log π of the actual token, and log π of the end
token at its position. With the reference's log-probs (`sampo.reference_cache`, computed once for all policies) they
give every weighting's scores and length pressure at once. The rows of a policy lie in Parquet shards, and a manifest
names what each must hold: a killed run continues with the shards that it does not name, and a shard whose bytes
are others is refused, never read. What is made of them is in `sampo.diagnostics.findings`.

The pairs are tokenised and cut as in training, by TRL itself: `sampo.data.tokenize.tokenize_pairs`, and
`DataCollatorForPreference` (pinned by tests/diagnostics/test_diagnostics.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..data.token_ids import ID_COLUMNS
from ..data.weight_columns import GIVEN_TOKEN_WEIGHTS, TOKEN_WEIGHT_COLUMNS, WeightCollator
from ..io.files import remove_left_overs, write_atomic
from ..io.hashing import Content, find_changed_file, hash_content, hash_json, seal, unseal
from ..io.progress import Progress
from ..io.schemas import WrongFile, named, parse_json, typed
from ..reference_cache.fill import ScoreRows, Sides, alike, fill, split_rows
from ..reference_cache.store import CACHED_REF_LOGPS, CHOSEN_REF_LOGPS, REJECTED_REF_LOGPS, RefCache, RefCollator
from ..scoring.scorer import ModelScorer
from ..weighting import (
    EVAL_EPOCH,
    WEIGHTINGS,
    draw_keys,
    draw_row_keys,
    fingerprints,
    last_end_tokens,
    length_pressure,
    sequence_logps,
    token_weights,
)

SCORE_SCHEMA = 2
SCORE_MANIFEST = "manifest.json"
SCORE_ROWS_PER_SHARD = 512  # what a killed run loses at most


class DiagnosedMethod(NamedTuple):
    """A weighting with its options."""

    weighting: str
    sampled_sides: str = "both"
    token_budget: str = "pair"
    keep_end_token: bool = False

    @property
    def name(self) -> str:
        """As in `sampo+rejected+end`: what differs from the default, in the order of the fields."""
        parts = {
            "+rejected": self.sampled_sides == "rejected",
            "+dataset": self.token_budget == "dataset",
            "+end": self.keep_end_token,
        }
        return self.weighting + "".join(part for part, differs in parts.items() if differs)


DIAGNOSED_METHODS: dict[str, DiagnosedMethod] = {
    method.name: method
    for name, weighting in WEIGHTINGS.items()
    for sides in ("both", "rejected")[: 1 + weighting.downsamples]
    for budget in ("pair", "dataset")[: 1 + weighting.downsamples]
    for keeps in (False, True)[: 1 + weighting.can_keep_end]
    for method in [DiagnosedMethod(name, sides, budget, keeps)]
}


def diagnosed_name(options: Mapping[str, Any]) -> str | None:
    """The row of `DIAGNOSED_METHODS` with the token weights of a method before training; None if there is none.

    Args:
        options: of `SamPOConfig`. With `balance_end_token` the pressure is 0 by construction, and the methods of other
            trainers have no token weights, so there is no row.
    """
    if {"ld_alpha", "trainer"} & options.keys() or options.get("balance_end_token"):
        return None
    more = {name: options[name] for name in DiagnosedMethod._fields if name in options}
    name = DiagnosedMethod(options["token_weighting"], **more).name
    return name if name in DIAGNOSED_METHODS else None


@dataclass(frozen=True, kw_only=True)
class ScoreKey:
    """What the rows of one policy depend on.

    Attributes:
        policy: fields of the key that a model fills (`sampo.reference_cache.key.identity_of_model`).
        reference: digest of the reference's cache; None without a reference.
        data: hash of the token ids.
        weights: hash of the data's token weights; None without.
        max_length: tokens of prompt and response together, or None.
        truncation_mode: which end is cut.
        end_ids: tokens that end a response.
        end_id: the one whose logit is shifted.
        seed: of the subsets.
        gamma: factor of `decay`.
        tail_weight: α of `ld`.
        token_totals: ΣT_w and ΣT_l for `token_budget: dataset`.
        other_ends: fingerprints of rows whose end tokens all end other turns (`rows_with_other_ends`).
        schema: version of this list and of the columns.
    """

    policy: dict[str, str]
    reference: str | None
    data: str
    weights: str | None
    max_length: int | None
    truncation_mode: str
    end_ids: list[int]
    end_id: int
    seed: int
    gamma: float
    tail_weight: float
    token_totals: list[int]
    other_ends: list[int] = field(default_factory=list)
    schema: int = SCORE_SCHEMA

    @property
    def digest(self) -> str:
        """24 hex digits over all fields."""
        known = {name: value for name, value in asdict(self).items() if name != "other_ends" or value}
        return hash_json(known)[:24]


@dataclass(frozen=True)
class ScoreManifest:
    """The manifest of a policy's folder: the key as a dictionary, and the content of each finished shard."""

    key: dict[str, Any]
    shards: dict[str, Content]


def score_pairs(
    dataset: Dataset,
    folder: Path,
    key: ScoreKey,
    scorer: Callable[[], ModelScorer],
    *,
    pad_id: int,
    ref_dtype: str = "float32",
    batch_size: int = 8,
    rows_per_shard: int = SCORE_ROWS_PER_SHARD,
    progress: Progress | None = None,
) -> list[Path]:
    """Compute the shards of a policy that are not there yet; returns all of them, in the order of the rows.

    Args:
        dataset: tokenised, with the columns of the reference's cache if there is one.
        folder: of this policy; its name should hold the key's digest.
        key: what the rows depend on.
        scorer: makes the policy's; not called if nothing is missing.
        pad_id: of the tokenizer.
        ref_dtype: type of the reference's log-probs on disk.
        batch_size: pairs at a time.
        rows_per_shard: pairs in a file.
        progress: called with (done, of) in pairs.

    Raises:
        WrongFile: the manifest is damaged, or a shard is not what it names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_left_overs(folder)
    known = read_score_shards(folder, key)
    starts = range(0, len(dataset), rows_per_shard)
    paths = [folder / f"rows-{start:07d}-{min(start + rows_per_shard, len(dataset)):07d}.parquet" for start in starts]
    weights = () if key.weights is None else TOKEN_WEIGHT_COLUMNS
    read = (*ID_COLUMNS, CHOSEN_REF_LOGPS, REJECTED_REF_LOGPS, *weights)
    rows = dataset.select_columns([name for name in dataset.column_names if name in read]).with_format(None)
    cut = DataCollatorForPreference(pad_id, key.max_length, key.truncation_mode)
    collate = WeightCollator(RefCollator(cut, ref_dtype), weights, key.truncation_mode)
    score_tokens: ModelScorer | None = None
    for start, path in zip(starts, paths, strict=True):
        stop = min(start + rows_per_shard, len(dataset))
        if path.name not in known:
            score_tokens = score_tokens or scorer()
            parts = []
            for batch in alike(rows, range(start, stop), batch_size):
                inputs = collate([rows[row] for row in batch])
                parts.append(_columns(batch, inputs, score_tokens, key))
            known[path.name] = _write_shard(path, parts)
            write_score_manifest(folder, key, known)
        if progress is not None:
            progress(stop, len(dataset))
    return paths


def read_score_shards(folder: Path, key: ScoreKey) -> dict[str, Content]:
    """The finished shards of a policy, after their files were compared with the manifest."""
    path, again = folder / SCORE_MANIFEST, f"Delete {folder}, and it is computed again"
    try:
        with named(path, again):
            manifest = typed(ScoreManifest, unseal(typed(dict[str, Any], parse_json(path.read_bytes()))))
            if manifest.key != asdict(key):
                raise ValueError("its `key` must be that of this run, got another one")
    except FileNotFoundError:
        write_score_manifest(folder, key, {})
        return {}
    known = {name: content for name, content in manifest.shards.items() if (folder / name).exists()}
    for name, content in known.items():
        if issue := find_changed_file(folder, {name: content}):
            raise WrongFile(f"{folder / name} must be as it was written, and {issue}. Delete it, and run again.")
    return known


def write_score_manifest(folder: Path, key: ScoreKey, shards: dict[str, Content]) -> None:
    """Record the finished shards of a policy."""
    write_atomic(folder / SCORE_MANIFEST, seal(asdict(ScoreManifest(asdict(key), shards))))


def _columns(rows: list[int], inputs: dict[str, Tensor], scorer: ModelScorer, key: ScoreKey) -> dict[str, Any]:
    """One entry per pair in each column of docs/diagnose.md."""
    ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
    targets = ids[:, 1:]
    end_targets = torch.full_like(targets, key.end_id)
    scored, states = scorer.score(inputs, targets, end_targets, keep_states=True)
    logps, end_logps = (each.double().cpu() for each in scored)
    is_end = mask & (targets == key.end_id)
    ends = last_end_tokens(ids, mask, torch.tensor(key.end_ids))
    if key.other_ends:
        ends &= ~torch.isin(fingerprints(ids, inputs["attention_mask"]), torch.tensor(key.other_ends))[:, None]
    places = torch.where(ends.any(dim=1), ((mask.cumsum(dim=1) - 1) * ends).sum(dim=1), -1)
    prompts = inputs["attention_mask"] * (1 - inputs["completion_mask"])
    n_pairs = len(rows)
    columns: dict[str, Any] = {"row": np.array(rows), "prompt": fingerprints(ids, prompts)[:n_pairs].numpy()}
    columns |= _sides("tokens", mask.sum(dim=1)) | _sides("end_place", places)
    columns |= _sides("policy_logps", (logps * mask).sum(dim=1))
    log_ratios = torch.zeros_like(logps)
    if CACHED_REF_LOGPS in inputs:
        ref_logps = inputs[CACHED_REF_LOGPS].double()
        log_ratios = (logps - ref_logps) * mask
        columns |= _sides("ref_logps", ref_logps.sum(dim=1)) | _sides("log_ratio", log_ratios.sum(dim=1))
        each = [row[kept].float().numpy() for row, kept in zip(log_ratios, mask, strict=True)]
        columns |= {"chosen_token_log_ratios": each[:n_pairs], "rejected_token_log_ratios": each[n_pairs:]}
    keys, row_keys = (
        draw(ids, inputs["attention_mask"], seed=key.seed, epoch=EVAL_EPOCH) for draw in (draw_keys, draw_row_keys)
    )
    chosen_total, rejected_total = key.token_totals
    for name, method in DIAGNOSED_METHODS.items():
        if WEIGHTINGS[method.weighting].from_data and GIVEN_TOKEN_WEIGHTS not in inputs:
            continue
        weights = token_weights(
            method.weighting,
            mask,
            end=ends,
            keys=keys,
            row_keys=row_keys,
            log_ratios=log_ratios,
            sampled_sides=method.sampled_sides,
            token_totals=(chosen_total, rejected_total) if method.token_budget == "dataset" else None,
            keep_end_token=method.keep_end_token,
            gamma=key.gamma,
            tail_weight=key.tail_weight,
            given=inputs.get(GIVEN_TOKEN_WEIGHTS),
            states=None if states is None else states.float().cpu(),
        ).double()
        columns[f"pressure/{name}"] = length_pressure(weights, is_end, end_logps.exp()).numpy()
        if CACHED_REF_LOGPS in inputs:
            columns |= _sides(f"score/{name}", sequence_logps(log_ratios, weights))
    return columns


def _sides(name: str, values: Tensor) -> dict[str, np.ndarray]:
    chosen, rejected = values.chunk(2)
    return {f"chosen_{name}": chosen.numpy(), f"rejected_{name}": rejected.numpy()}


def _write_shard(path: Path, parts: list[dict[str, Any]]) -> Content:
    order = np.argsort(np.concatenate([part["row"] for part in parts]))
    columns = {}
    for name in parts[0]:
        values = [value for part in parts for value in part[name]]
        columns[name] = pa.array([values[i] for i in order])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    content = sink.getvalue().to_pybytes()
    write_atomic(path, content)
    return hash_content(content)


def cached_reference(
    dataset: Dataset,
    cache: RefCache,
    scorer: Callable[[], ModelScorer],
    about: dict[str, str],
    *,
    pad_id: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Dataset:
    """The tokenised data set with the reference's log-probs beside it, computed where the cache lacks them.

    Args:
        dataset: tokenised.
        cache: of the reference; a training run with the same reference, data and truncation fills and reads the same.
        scorer: makes the reference's; not called if nothing is missing.
        about: for people who look into the manifest.
        pad_id: of the tokenizer.
        batch_size: pairs at a time.
        progress: called with (done, of) in pairs.

    Raises:
        RefCacheError: the cache is damaged.
    """
    collate = DataCollatorForPreference(pad_id, cache.key.max_length, cache.key.truncation_mode)

    @contextmanager
    def scoring() -> Iterator[ScoreRows]:
        score_tokens = scorer()

        def score_rows(rows: list[dict[str, Any]], targets: Sequence[str]) -> dict[str, list[Sides]]:
            inputs = collate(rows)
            (logps,) = score_tokens(inputs)
            return {each: split_rows(logps.cpu(), inputs["completion_mask"][:, 1:].bool()) for each in targets}

        yield score_rows

    fill([cache], dataset, scoring, about, batch_size=batch_size, progress=progress)
    return cache.attach(dataset)
