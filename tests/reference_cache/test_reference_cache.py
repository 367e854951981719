"""The per-token reference cache: what its key sees, that cached and live runs agree, and what becomes of damage."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import PLAIN, make_model, make_pairs, make_tokenizer, save_model, training_options, with_weights
from transformers import AutoModelForCausalLM

from sampo import SamPOConfig, SamPOTrainer
from sampo.commands import cache as command
from sampo.commands import train
from sampo.data.token_ids import hash_token_ids
from sampo.io.hashing import SEAL, seal, unseal
from sampo.reference_cache import store as ref_logps
from sampo.reference_cache import trainer as cached_reference
from sampo.reference_cache.key import RefKey, hash_config, hash_model_files, hash_weights, identity_of_model
from sampo.reference_cache.store import (
    CHOSEN_REF_LOGPS,
    END,
    REJECTED_REF_LOGPS,
    STORAGE,
    RefCache,
    RefCacheError,
    RefCollator,
    decode,
)
from sampo.scoring.interface import install
from sampo.training.description import describe_reference
from sampo.weighting import WEIGHTINGS

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def make_trainer(model, root, *, data=None, eval_data=None, **options):
    """A run that takes its reference from a cache below `root`, or, with None, from a live model."""
    names = ("ref_model", "peft_config", "processing_class", "data_collator")
    kwargs = {name: options.pop(name) for name in names if name in options}
    if root is not None:
        options = {"precompute_ref_log_probs": True, "ref_cache_dir": str(root)} | options
    folder = options.pop("output_dir", Path(os.environ["SAMPO_CACHE"]) / "runs")
    return SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(folder, **PLAIN | options)),
        train_dataset=make_pairs(20) if data is None else data,
        eval_dataset=eval_data,
        **kwargs,
    )


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def counted(model):
    """The model, and the list to which each of its forward passes appends."""
    calls = []
    model.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    return model, calls


def cache_of(trainer) -> RefCache:
    return trainer.ref_caches[0].cache


def key_of(trainer) -> RefKey:
    return cache_of(trainer).key


def columns(trainer) -> list[list[float]]:
    rows = trainer.train_dataset
    return [row[name] for row in rows for name in (CHOSEN_REF_LOGPS, REJECTED_REF_LOGPS)]


def token_logps(model, row) -> list[float]:
    ids = torch.tensor([row])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[:, 0].tolist()


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
@pytest.mark.parametrize(
    "options", [{}, {"max_length": 14}, {"max_length": 6, "truncation_mode": "keep_end"}, {"pair_stream": "true"}]
)
def test_the_cache_holds_one_log_prob_per_completion_token_that_survives_truncation(root, options):
    """Against softmax over the logits of single rows; `keep_end` also cuts whole prompts."""
    reference = make_model(seed=1)
    trainer = make_trainer(
        make_model(seed=2), root, ref_model=reference, processing_class=make_tokenizer(), ref_cache_check=0, **options
    )
    limit, seen = options.get("max_length", 10**6), 0
    for row in trainer.train_dataset:
        for name, column in (("chosen_ids", CHOSEN_REF_LOGPS), ("rejected_ids", REJECTED_REF_LOGPS)):
            ids = row["prompt_ids"] + row[name]
            is_completion = [0] * len(row["prompt_ids"]) + [1] * len(row[name])
            cut = slice(-limit, None) if "truncation_mode" in options else slice(limit)
            ids, is_completion = ids[cut], is_completion[cut]
            expected = [x for x, c in zip(token_logps(reference, ids), is_completion[1:], strict=True) if c]
            assert row[column] == pytest.approx(expected, abs=2e-5)
            seen += len(expected)
    assert seen > 100


@pytest.mark.parametrize(
    ("end_id", "options"), [(1, {"max_length": 14}), (3, {"pair_stream": "true"}), (3, {"max_length": 25})]
)
def test_the_cache_holds_the_end_tokens_log_prob_at_each_place_of_a_row_that_ends(root, end_id, options):
    """Of EOS, or of what ends a turn in the template. What is kept of a row that was cut nobody asks."""
    reference = make_model(seed=1)
    trainer = make_trainer(
        make_model(seed=2),
        root,
        data=make_pairs(20, conversational=end_id == 3),
        ref_model=reference,
        processing_class=make_tokenizer(),
        balance_end_token=True,
        **options,
    )
    assert [filled.computed for filled in trainer.ref_caches] == [20, 20]
    whole = 0
    for row in trainer.train_dataset:
        for name, column in (("chosen_ids", END.chosen), ("rejected_ids", END.rejected)):
            ids = (row["prompt_ids"] + row[name])[: options.get("max_length")]
            n_kept = len(ids) - len(row["prompt_ids"])
            assert len(row[column]) == n_kept
            if end_id in ids[-n_kept:]:
                with torch.no_grad():
                    logps = reference(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)[:, end_id]
                assert row[column] == pytest.approx(logps[-n_kept:].tolist(), abs=2e-5)
                whole += 1
    assert whole == 40 if "max_length" not in options else 5 < whole < 40


def test_the_end_tokens_log_probs_are_added_to_a_cache_that_has_the_others(model_folder, root):
    make_trainer(model_folder, root)
    model, calls = counted(load(model_folder))
    options = {"processing_class": make_tokenizer(), "balance_end_token": True, "ref_cache_check": 0}
    trainer = make_trainer(model, root, **options)
    assert [(filled.name, filled.computed) for filled in trainer.ref_caches] == [
        ("train", 0),
        ("train (end token 1 or 3)", 20),
    ]
    assert len(calls) == 5
    again = make_trainer(model_folder, root, balance_end_token=True)
    assert [filled.computed for filled in again.ref_caches] == [0, 0]
    assert END.chosen not in make_trainer(model_folder, root).train_dataset.column_names


RUNS = [{"token_weighting": name} for name in WEIGHTINGS] + [
    *({"token_weighting": name, "balance_end_token": True} for name in ("all", "sampo", "top_k")),
    {"balance_end_token": True, "mask_samples": 2, "peft_config": LoraConfig(**LORA), "pair_stream": "auto"},
    {"balance_end_token": True, "max_length": 14, "log_length_pressure": True},
    {"token_weighting": "all", "ld_alpha": 0.3},
    {"mask_sharing": "independent"},
    {"token_budget": "dataset", "balance_end_token": True, "length_penalty": "learned", "pair_stream": "true"},
    {"mask_samples": 3, "loss_type": ["sigmoid", "sft"]},
    {"keep_end_token": True, "sampled_sides": "rejected", "length_penalty": "learned"},
    {"token_weighting": "top_k", "pair_stream": "true"},
    {"pair_stream": "auto", "gradient_checkpointing": True},
    {"max_length": 14, "gradient_accumulation_steps": 2},
    {"peft_config": LoraConfig(**LORA)},
    {"peft_config": LoraConfig(**LORA), "pair_stream": "auto"},
]


@pytest.mark.parametrize("options", RUNS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items())[:60])
def test_cached_and_live_runs_have_the_same_losses_and_metrics(model_folder, root, options):
    logs = []
    data, held_out = make_pairs(20), make_pairs(7, seed=5)
    if options.get("token_weighting") == "column":
        data, held_out = with_weights(data), with_weights(held_out)
    for place in (None, root):
        trainer = make_trainer(model_folder, place, data=data, eval_data=held_out, **options)
        trainer.train()
        logs.append([*trainer.state.log_history[:3], trainer.evaluate()])
    assert trainer.ref_model is None
    compared = 0
    for live, cached in zip(*logs, strict=True):
        for name, value in live.items():
            if "runtime" in name or "per_second" in name or name.endswith(("/slope", "/correlation", "/accuracies")):
                continue  # slopes and signs of margins near 0 are rounding
            tolerance = 1e-6 if "loss" in name else 1e-4
            assert cached[name] == pytest.approx(value, rel=1e-5, abs=tolerance), name
            compared += 1
    assert compared > 60


def references(kind, folder):
    if kind == "instance":
        return {"model": load(folder), "ref_model": make_model(seed=3), "processing_class": make_tokenizer()}
    if kind == "prompt tuning":
        return {"model": folder, "peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    base = get_peft_model(load(folder), LoraConfig(**LORA, init_lora_weights=False))
    return {"model": base, "processing_class": make_tokenizer()}  # an adapter that does something, and its "ref" copy


@pytest.mark.parametrize("kind", ["instance", "prompt tuning", "ref adapter"])
def test_every_kind_of_reference_is_cached_as_it_is_used(model_folder, root, kind):
    logs = []
    for place in (None, root, root):
        torch.manual_seed(5)  # of the adapter
        setup = references(kind, model_folder)
        trainer = make_trainer(setup.pop("model"), place, **setup)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert trainer.ref_caches[0].computed == 0
    assert logs[1] == pytest.approx(logs[0], abs=1e-6)
    assert logs[2] == pytest.approx(logs[0], abs=1e-6)


def test_a_reference_given_as_a_path_is_that_model_and_is_not_loaded_from_a_complete_cache(
    model_folder, root, tmp_path, monkeypatch
):
    path = save_model(tmp_path / "other", seed=4)
    runs = [
        make_trainer(model_folder, None, ref_model=load(path)),
        make_trainer(model_folder, None, ref_model=path),
        make_trainer(model_folder, root, ref_model=path),
    ]
    assert runs[2].ref_model is None
    monkeypatch.delattr(cached_reference, "create_model")  # loading it would fail
    runs.append(make_trainer(model_folder, root, ref_model=path))
    losses = []
    for trainer in runs:
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-6)
    assert losses[0][0] != pytest.approx(0.6931, abs=1e-3)  # it is not the policy
    assert "log-probs of the `ref_model` that was passed, one per token" in describe_reference(runs[3])


def test_a_second_run_makes_no_reference_forward_pass(model_folder, root):
    for check, passes in ((0, 5 + 2), (0, 0), (8, 2 + 2)):  # 20 and 5 rows in batches of 4
        model, calls = counted(load(model_folder))
        make_trainer(
            model,
            root,
            processing_class=make_tokenizer(),
            ref_cache_check=check,
            eval_data=make_pairs(5, seed=1),
        )
        assert len(calls) == passes


def test_evaluation_sets_are_cached_each_and_new_ones_when_they_come(model_folder, root):
    trainer = make_trainer(
        model_folder,
        root,
        peft_config=LoraConfig(**LORA),
        eval_data={"a": make_pairs(6, seed=1), "b": make_pairs(5, seed=2)},
        eval_strategy="epoch",
    )
    assert [(f.name, f.computed) for f in trainer.ref_caches] == [("train", 20), ("a", 6), ("b", 5)]
    trainer.train()
    assert any("eval_b_loss" in entry for entry in trainer.state.log_history)
    new = trainer.evaluate(make_pairs(4, seed=3))
    again = trainer.evaluate({"x": make_pairs(4, seed=3), "y": make_pairs(6, seed=1)})
    assert [f.computed for f in trainer.ref_caches[3:]] == [4, 0, 0]
    assert again["eval_x_loss"] == new["eval_loss"]
    live = make_trainer(model_folder, None, peft_config=LoraConfig(**LORA))
    live.train()
    assert live.evaluate(make_pairs(4, seed=3))["eval_loss"] == pytest.approx(new["eval_loss"], abs=1e-6)


def test_data_in_memory_and_on_disk_share_a_cache(model_folder, root, tmp_path):
    make_pairs(20).save_to_disk(tmp_path / "data")
    losses = []
    for data in (make_pairs(20), load_from_disk(tmp_path / "data")):
        trainer = make_trainer(model_folder, root, data=data, dataloader_num_workers=1)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert trainer.ref_caches[0].computed == 0
    assert losses[0] == losses[1]


def test_rows_that_the_trainer_drops_do_not_shift_the_others(model_folder, root):
    """A prompt that fills `max_length` is filtered out, which leaves an index mapping in the data set."""
    data = Dataset.from_list(
        [{"prompt": "w1 " * 30, "chosen": "w2 ", "rejected": "w3 "}, *make_pairs(9, max_len=6).to_list()]
    )
    trainer = make_trainer(model_folder, root, data=data, max_length=20)
    assert len(trainer.train_dataset) == 9
    # and `datasets` has not put copies of its own beside the shards
    assert [path.name for path in sorted(cache_of(trainer).folder.iterdir())] == ["manifest.json", "shard-00000.arrow"]
    for row in trainer.train_dataset:
        assert len(row[CHOSEN_REF_LOGPS]) == len(row["chosen_ids"])
        expected = token_logps(trainer.model, row["prompt_ids"] + row["chosen_ids"])[-len(row["chosen_ids"]) :]
        assert row[CHOSEN_REF_LOGPS] == pytest.approx(expected, abs=2e-5)


def test_streamed_data_cannot_be_precomputed_as_in_trl(model_folder, root):
    with pytest.raises(ValueError, match="is not supported with IterableDataset"):
        make_trainer(model_folder, root, data=make_pairs(8).to_iterable_dataset())


# --- the collator ----------------------------------------------------------------------------------------------------


def example(prompt, chosen, rejected, **logps):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **logps}


def test_a_batch_has_its_numbers_where_trl_counts_completion_tokens(model_folder):
    collate = RefCollator(make_trainer(model_folder, None).data_collator, "float32")
    batch = collate(
        [
            example([1, 2], [3, 4], [5], **{CHOSEN_REF_LOGPS: [-1.0, -2.0], REJECTED_REF_LOGPS: [-3.0]}),
            example([1, 2, 3], [4], [5, 6], **{CHOSEN_REF_LOGPS: [-4.0], REJECTED_REF_LOGPS: [-5.0, -6.0]}),
        ]
    )
    expected = [[0, -1, -2, 0], [0, 0, -4, 0], [0, -3, 0, 0], [0, 0, -5, -6]]
    assert batch["ref_logps"].tolist() == expected
    assert torch.equal(batch["ref_logps"] != 0, batch["completion_mask"][:, 1:].bool())
    assert "ref_logps" not in collate([example([1], [2], [3])])


def test_a_collator_that_cuts_otherwise_is_noticed(model_folder):
    collate = RefCollator(make_trainer(model_folder, None, max_length=3).data_collator, "float32")
    with pytest.raises(RefCacheError, match="must have as many completion tokens as the cache"):
        collate([example([1, 2], [3, 4], [5], **{CHOSEN_REF_LOGPS: [-1.0, -2.0], REJECTED_REF_LOGPS: [-3.0]})])


# --- the key ---------------------------------------------------------------------------------------------------------


def changed_model(**overrides):
    return {"model": make_model(**overrides), "processing_class": make_tokenizer()}


def other_token():
    rows = make_pairs(20).to_list()
    rows[11]["rejected"] = rows[11]["rejected"] + "w9 "
    return Dataset.from_list(rows)


BASE = {"max_length": 64}
# field of the key -> a change that moves this field and no other
CHANGES = {
    "weights": lambda: changed_model(seed=9),
    "config": lambda: changed_model(rms_norm_eps=1e-3),
    "compute_dtype": lambda: {"bf16": True},
    "attention": lambda: {"model_init_kwargs": {"attn_implementation": "eager"}},
    "data": lambda: {"data": other_token()},
    "max_length": lambda: {"max_length": 63},
    "truncation_mode": lambda: {"truncation_mode": "keep_end"},
    "storage_dtype": lambda: {"ref_cache_dtype": "float16"},
    "targets": lambda: {"balance_end_token": True},
}


@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
@pytest.mark.parametrize("field", list(CHANGES))
def test_each_field_of_the_key_sees_what_it_is_for_and_nothing_else(model_folder, root, field):
    first = make_trainer(model_folder, root, **BASE)
    options = BASE | CHANGES[field]()
    second = make_trainer(options.pop("model", model_folder), root, **options)
    new = second.ref_caches[-1]
    one, two = asdict(key_of(first)), asdict(new.cache.key)
    assert {name for name in one if one[name] != two[name]} == {field}
    assert key_of(first).digest != new.cache.key.digest
    assert new.computed == 20


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_packing_does_not_change_the_key(own):
    model = make_model()
    model.set_attn_implementation(own)
    before = identity_of_model(model)
    install(model)
    assert identity_of_model(model) == before
    assert before["attention"] == own


def test_every_field_of_the_key_has_a_test_and_a_part_in_the_digest():
    key = RefKey(**{f.name: 1 for f in fields(RefKey)})
    digests = {replace(key, **{f.name: 2}).digest for f in fields(RefKey)} | {key.digest}
    assert len(digests) == len(fields(RefKey)) + 1
    assert set(CHANGES) == {f.name for f in fields(RefKey)} - {"schema"}


def test_a_row_that_moves_is_other_data():
    data = Dataset.from_list([example([1, 2], [3], [4]), example([1], [2, 3], [4])])
    assert hash_token_ids(data) != hash_token_ids(data.select([1, 0]))
    # the same numbers with the border between two rows elsewhere
    moved = Dataset.from_list([example([1, 2, 1], [3], [4]), example([], [2, 3], [4])])
    assert hash_token_ids(data) != hash_token_ids(moved)
    assert hash_token_ids(data) == hash_token_ids(data.select([1, 0]).select([1, 0]).add_column("other", [1, 2]))


SAME = [
    {"per_device_train_batch_size": 2, "seed": 99, "learning_rate": 1.0},
    {"token_weighting": "mean", "beta": 0.5},
    {"pair_stream": "true"},
    {"precompute_ref_batch_size": 7},
    {"gradient_checkpointing": True},
    {"peft_config": LoraConfig(**LORA), "seed": 5},
    {"peft_config": LoraConfig(**LORA | {"modules_to_save": ["embed_tokens"]}), "seed": 6},
]


@pytest.mark.parametrize("options", SAME, ids=lambda o: ",".join(o))
def test_what_changes_no_reference_log_prob_finds_the_same_cache(model_folder, root, options):
    """An adapter that is switched off leaves its base: LoRA and full runs share a cache."""
    make_trainer(model_folder, root)
    second = make_trainer(model_folder, root, output_dir=root / "elsewhere", **options)
    assert second.ref_caches[0].computed == 0


def test_a_ref_adapter_is_part_of_the_weights_and_its_scale_of_the_config(model_folder):
    def hashes(seed, **changes):
        torch.manual_seed(seed)
        peft = get_peft_model(load(model_folder), LoraConfig(**LORA | changes, init_lora_weights=False))
        peft.add_adapter("ref", peft.peft_config["default"])
        for name, parameter in peft.named_parameters():
            if ".default." in name:
                peft.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
        return hash_weights(peft), hash_config(peft)

    one, same, other, scaled = hashes(1), hashes(1), hashes(2), hashes(1, lora_alpha=16)
    assert one == same
    assert (one[0] != other[0], one[1] == other[1]) == (True, True)
    assert (one[0] == scaled[0], one[1] != scaled[1]) == (True, True)
    assert one[0] != hash_weights(load(model_folder))


def test_the_files_of_a_model_are_hashed_where_they_are_all_of_it(model_folder, tmp_path):
    copy = tmp_path / "copy"
    load(model_folder).save_pretrained(copy)
    assert hash_model_files(copy) == hash_model_files(model_folder)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert hash_model_files(copy) != hash_model_files(model_folder)
    (copy / "adapter_config.json").write_text("{}")
    assert hash_model_files(copy) is None
    assert hash_model_files(tmp_path / "nothing") is None


def test_the_cache_lies_where_it_is_asked_for_or_in_the_users_folder(monkeypatch, tmp_path):
    assert ref_logps.cache_root("here") == Path("here")
    monkeypatch.setenv("SAMPO_CACHE", str(tmp_path))
    assert ref_logps.cache_root(None) == tmp_path / "ref_logps"
    monkeypatch.delenv("SAMPO_CACHE")
    assert ref_logps.cache_root(None) == Path.home() / ".cache" / "sampo" / "ref_logps"


# --- types on disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(STORAGE))
def test_a_stored_number_is_off_by_no_more_than_its_bound(tmp_path, kind):
    generator = torch.Generator().manual_seed(0)
    rows = [-torch.empty(50).exponential_(generator=generator) * 10 ** (i - 4) for i in range(8)]  # up to 10^5 nats
    rows = [row.clamp(min=-65000) for row in rows] + [torch.zeros(3), torch.zeros(0)]
    key = RefKey(**{f.name: 1 for f in fields(RefKey)} | {"storage_dtype": kind, "targets": "tokens"})
    cache = RefCache(tmp_path, key, len(rows))
    (shard,) = cache.begin({})
    cache.record([cache.write(shard, rows, rows[::-1])])
    data = cache.attach(Dataset.from_dict({"n": list(range(len(rows)))}))
    bound, worst = STORAGE[kind][1], 0.0
    for stored, row in zip(data[CHOSEN_REF_LOGPS], rows, strict=True):
        error = (decode(stored, kind) - row).abs()
        assert (error <= bound * row.abs() + (2**-25 if kind == "float16" else 0.0)).all()  # below 2^-14: subnormal
        worst = max(worst, *(error / row.abs().clamp(min=1e-3)).tolist(), 0.0) if len(row) else worst
    assert worst == 0 if kind == "float32" else worst > bound / 2  # the bound is not far off
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    n_bytes, tokens = cache.size()
    assert tokens == 2 * 403
    assert n_bytes < tokens * sizes[kind] + 2000


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_run_from_a_rounded_cache_stays_within_the_bound(model_folder, root, kind):
    """|Δ loss| <= beta/2 · bound · Σ|log π_ref| of a pair, at the step where both policies are the same."""
    losses, bounds = [], []
    for name in ("float32", kind):
        trainer = make_trainer(model_folder, root, ref_cache_dtype=name, token_weighting="all", max_steps=1)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(20)])
        losses.append(trainer.compute_loss(trainer.model, batch).item())
        bounds.append(batch["ref_logps"].abs().sum().item() / 20 * STORAGE[kind][1] * 0.1 / 2)
    assert 0 < abs(losses[0] - losses[1]) <= bounds[0] * 1.01
    # and the rows of a rounded cache agree with the live model
    assert make_trainer(model_folder, root, ref_cache_dtype=kind).ref_caches[0].computed == 0


def test_a_log_prob_that_is_not_finite_or_too_large_for_its_type_is_refused_with_its_row(tmp_path):
    for kind, value in (("float32", float("nan")), ("float32", -float("inf")), ("float16", -70000.0)):
        cache = RefCache(tmp_path, RefKey(**{f.name: 1 for f in fields(RefKey)} | {"storage_dtype": kind}), 3)
        (shard,) = cache.begin({})
        with pytest.raises(RefCacheError, match=f"must be finite in {kind}, got .* in row 2"):
            cache.write(shard, [torch.zeros(2), torch.zeros(0), torch.tensor([-1.0, value])], [torch.zeros(1)] * 3)


# --- killed builds and damage ----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from tiny import make_pairs, training_options, with_weights
from sampo import SamPOConfig, SamPOTrainer
from sampo.reference_cache import store

store.ROWS_PER_SHARD = 4
done = []
original = store.{function}

def counted(*args):
    done.append(1)
    if len(done) > {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

store.{function} = counted
options = training_options({out!r}, precompute_ref_log_probs=True, ref_cache_dir={root!r}, pair_stream="false")
SamPOTrainer(model={model!r}, args=SamPOConfig(**options), train_dataset=make_pairs(20))
"""


@pytest.mark.parametrize(
    ("function", "n", "finished"),
    [("RefCache.record", 2, 2), ("os.replace", 5, 2)],  # between a shard and the manifest; before a shard is renamed
)
def test_a_killed_build_goes_on_with_the_missing_shards_and_ends_as_one_that_was_not(
    model_folder, root, tmp_path, monkeypatch, function, n, finished
):
    code = KILLED.format(
        tests=str(Path(__file__).parents[1] / "support"),
        out=str(tmp_path),
        root=str(root),
        model=model_folder,
        function=function,
        n=n,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (manifest,) = root.glob("*/manifest.json")
    assert len(json.loads(manifest.read_text())["shards"]) == finished
    model, calls = counted(load(model_folder))
    resumed = make_trainer(model, root, processing_class=make_tokenizer(), ref_cache_check=0)
    assert resumed.ref_caches[0].computed == 20 - 4 * finished
    assert len(calls) == 5 - finished  # batches of 4
    assert not list(manifest.parent.glob(".*"))  # nothing of the killed build is left over
    monkeypatch.setattr(ref_logps, "ROWS_PER_SHARD", 4)
    whole = make_trainer(model_folder, tmp_path / "whole")
    assert columns(resumed) == columns(whole)
    assert [p.read_bytes() for p in sorted(manifest.parent.glob("*.arrow"))] == [
        p.read_bytes() for p in sorted(cache_of(whole).folder.glob("*.arrow"))
    ]


@pytest.fixture
def filled(model_folder, root, monkeypatch):
    """A cache of five shards, and a function that opens it again."""
    monkeypatch.setattr(ref_logps, "ROWS_PER_SHARD", 4)
    trainer = make_trainer(model_folder, root)
    return cache_of(trainer).folder, columns(trainer), lambda: make_trainer(model_folder, root)


def resealed(text):
    """As if the manifest had been written so."""
    return seal({name: value for name, value in json.loads(text).items() if name != SEAL})


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(path.with_name("shard-00000.arrow").read_bytes()),
    ],
    ids=["a flipped bit", "a truncated shard", "a shard of other rows"],
)
def test_a_shard_with_other_bytes_is_refused_and_its_deletion_is_the_fix(filled, damage):
    folder, before, again = filled
    shard = folder / "shard-00003.arrow"
    damage(shard)
    with pytest.raises(
        RefCacheError, match=r"shard-00003.arrow must be what its manifest names, and .*Delete .*shard-00003.arrow"
    ):
        again()
    shard.unlink()  # what the message says
    trainer = again()
    assert trainer.ref_caches[0].computed == 4
    assert columns(trainer) == before


def test_a_shard_of_another_cache_is_refused(filled, tmp_path, model_folder):
    folder, _, again = filled
    other = make_trainer(make_model(seed=8), tmp_path / "other", processing_class=make_tokenizer())
    foreign = cache_of(other).folder / "shard-00001.arrow"
    (folder / "shard-00001.arrow").write_bytes(foreign.read_bytes())
    with pytest.raises(RefCacheError, match=r"shard-00001.arrow must be what its manifest names, and"):
        again()


def test_without_a_manifest_nothing_is_trusted_and_all_is_computed(filled):
    folder, before, again = filled
    for shard in folder.glob("*.arrow"):
        flip_a_bit(shard)
    (folder / "manifest.json").unlink()
    trainer = again()
    assert trainer.ref_caches[0].computed == 20
    assert columns(trainer) == before


def test_a_manifest_without_a_checksum_of_its_own_is_that_of_an_earlier_version(filled):
    folder, before, again = filled
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(unseal(json.loads(manifest.read_text()))))
    trainer = again()
    assert (trainer.ref_caches[0].computed, columns(trainer)) == (0, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "must be JSON in UTF-8, got"),
        (lambda text: "[]", "must be an object, got a list of 0"),
        (lambda text: text.replace('"schema": 1', '"schema": 0'), "must be a manifest of schema 1, got 0"),
        (lambda text: text.replace('"rows": 20', '"rows": 21'), "it was damaged or edited"),
        (lambda text: text.replace('"sha256_of_the_rest"', '"sha257_of_the_rest"'), "without other keys than"),
        (lambda text: resealed(text.replace('"max_length": 1024', '"max_length": 7')), "`max_length` differ"),
        (lambda text: resealed(text.replace('"rows": 20', '"rows": 21')), "`rows` differ"),
        (
            lambda text: resealed(text.replace('"rows_per_shard": 4', '"rows_per_shard": 0')),
            "must be at least 1, got 0",
        ),
        (lambda text: resealed(text.replace('"rows": 20', '"rows": "20"')), "`rows` must be a whole number, got '20'"),
    ],
)
def test_a_manifest_that_is_not_this_caches_is_refused_with_the_fix(filled, change, said):
    folder, _, again = filled
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    assert change(text) != text
    manifest.write_text(change(text))
    with pytest.raises(RefCacheError, match=f"{said}.*`sampo cache --rebuild`"):
        again()


def test_a_model_that_the_key_cannot_tell_apart_is_noticed_by_the_comparison(model_folder, root):
    """A frequency of the rotary embedding is in no state dict and in no config."""

    def changed():
        model = load(model_folder)
        model.model.rotary_emb.inv_freq.mul_(1.5)
        return model

    make_trainer(model_folder, root)
    with pytest.raises(RefCacheError, match=r"of 8 rows of the train data must be .* difference of \{\d+: 0\.\d+"):
        make_trainer(changed(), root, processing_class=make_tokenizer())
    unchecked = make_trainer(changed(), root, processing_class=make_tokenizer(), ref_cache_check=0)
    assert unchecked.ref_caches[0].computed == 0


def test_the_comparison_is_of_rows_that_were_there_before(filled, model_folder, root):
    """With another model, the rows of a shard that it has just computed agree, and all others are named."""
    folder, _, _ = filled
    (folder / "shard-00003.arrow").unlink()
    model = load(model_folder)
    model.model.rotary_emb.inv_freq.mul_(1.5)
    with pytest.raises(RefCacheError, match="of 16 rows of the train data") as refused:
        make_trainer(model, root, processing_class=make_tokenizer(), ref_cache_check=20)
    named = {int(row) for row in re.findall(r"(\d+): \d", str(refused.value))}
    assert len(named) > 8
    assert named <= {*range(12), *range(16, 20)}


def test_one_run_at_a_time_fills_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(ref_logps, "WAIT_S", 0.05)
    key = RefKey(**{f.name: 1 for f in fields(RefKey)})
    one, two = RefCache(tmp_path, key, 3), RefCache(tmp_path, key, 3)
    assert one.lock()
    assert not two.lock()
    one.unlock()
    assert two.lock()
    two.unlock()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def words(model_folder, root, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    make_pairs(24, conversational=True).to_json(pairs)
    return [
        *("--model_name_or_path", model_folder, "--dataset_name", str(pairs), "--output_dir", str(tmp_path / "out")),
        *("--use_cpu", "--bf16", "false", "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"),
        *("--per_device_train_batch_size", "4", "--ref_cache_dir", str(root), "--eval_strategy", "epoch"),
        *("--eval_fraction", "0.25"),
    ]


def test_the_command_fills_the_cache_and_training_then_computes_nothing(words, root, capsys, caplog):
    assert command.run(words) == 0
    said = capsys.readouterr().out
    (first, second) = (line for line in said.splitlines() if "computed now" in line)
    assert first.startswith("train: 20 pairs")
    assert second.startswith("eval: 4 pairs")
    assert str(root) in first
    assert train.start([*words, "--precompute_ref_log_probs", "--output_dir", str(root.parent / "other")]) == 0
    assert "20 of 20 rows from the cache" in caplog.text
    assert "4 of 4 rows from the cache" in caplog.text


def test_the_command_lists_deletes_and_builds_anew(words, root, capsys):
    command.run(words)
    capsys.readouterr()
    assert command.run(["--ls", "--ref_cache_dir", str(root)]) == 0
    listed = capsys.readouterr().out
    assert "2 caches" in listed
    assert listed.count("complete") == 2
    names = [path.name for path in ref_logps.cache_folders(root)]
    assert all(name in listed for name in names)

    shard = next(root.glob("*/shard-00000.arrow"))
    flip_a_bit(shard)
    assert command.run(words) == 2
    assert f"Delete {shard}" in capsys.readouterr().err
    assert command.run([*words, "--rebuild"]) == 0
    assert "20 pairs computed now" in capsys.readouterr().out

    assert command.run(["--rm", "nothing", "--ref_cache_dir", str(root)]) == 2
    assert "must name caches of `sampo cache --ls`" in capsys.readouterr().err
    assert command.run(["--rm", names[0], "--ref_cache_dir", str(root)]) == 0
    assert [path.name for path in ref_logps.cache_folders(root)] == names[1:]
    assert command.run(["--rm", "all", "--ref_cache_dir", str(root)]) == 0
    assert not ref_logps.cache_folders(root)
