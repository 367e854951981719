"""How often the models run: one pass of policy and reference for each step, whatever is asked of them."""

import pytest
from tiny import PLAIN, make_pairs, make_tokenizer, save_model, training_options
from transformers import AutoModelForCausalLM

from sampo import SamPOConfig, SamPOTrainer
from sampo.reference_cache import store

STEPS = 3  # of `training_options`
BALANCED = {"balance_end_token": True}
PRESSURE = {"log_length_pressure": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def counting(folder, calls):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    return model


def run(folder, tmp_path, **options):
    """Passes of policy and of reference: before the training, in it, and in an evaluation of two batches."""
    policy, reference = [], []
    options = PLAIN | options
    cached = options.get("precompute_ref_log_probs", False)
    trainer = SamPOTrainer(
        model=counting(folder, policy),
        ref_model=None if cached else counting(folder, reference),
        args=SamPOConfig(
            **training_options(tmp_path, max_steps=STEPS, ref_cache_dir=str(tmp_path / "cache"), **options)
        ),
        train_dataset=make_pairs(12),
        eval_dataset=make_pairs(8, seed=5),
        processing_class=make_tokenizer(),
    )
    counts = []
    for work in (lambda: None, trainer.train, trainer.evaluate):
        work()
        counts.append((len(policy), len(reference)))
        policy.clear()
        reference.clear()
    return counts


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        BALANCED,
        PRESSURE,
        {**BALANCED, **PRESSURE},
        {"token_weighting": "top_k", **BALANCED, **PRESSURE},
        {"token_weighting": "all", **PRESSURE},
        {"mask_samples": 3, **PRESSURE},
        {"mask_sharing": "independent", **PRESSURE},
    ],
    ids=str,
)
def test_a_step_is_one_pass_of_policy_and_reference(folder, tmp_path, options, stream):
    compared = 2 if stream == "true" else 0  # the first batch, both ways, by each model
    before, training, evaluation = run(folder, tmp_path, pair_stream=stream, **options)
    assert before == (0, 0)
    assert training == (STEPS + compared, STEPS + compared)
    assert evaluation == (2, 2)


@pytest.mark.parametrize("options", [{}, BALANCED, PRESSURE, {**BALANCED, **PRESSURE}], ids=str)
def test_a_cache_is_filled_by_one_pass_over_the_data_and_spares_the_reference(folder, tmp_path, options):
    before, training, evaluation = run(folder, tmp_path, precompute_ref_log_probs=True, **options)
    assert before == (12 // 4 + 8 // 4, 0)  # the policy is the reference, and nothing was there to be compared
    assert training == (STEPS, 0)
    assert evaluation == (2, 0)


def test_a_cache_and_the_run_after_it_compare_the_first_batches_together(folder, tmp_path):
    """`auto` computes at most four batches both ways, whichever phase they are in."""
    before, training, evaluation = run(folder, tmp_path, precompute_ref_log_probs=True, pair_stream="auto")
    plain = 12 // 4 + 8 // 4, STEPS, 2
    compared = [passes - expected for (passes, _), expected in zip((before, training, evaluation), plain, strict=True)]
    assert 2 * 2 <= compared[0] <= 2 * 4  # the first warms up
    assert compared[1:] == [0, 0]


def test_an_end_token_cache_beside_a_complete_one_is_filled_alone(folder, tmp_path):
    run(folder, tmp_path, precompute_ref_log_probs=True)
    before, _, _ = run(folder, tmp_path, precompute_ref_log_probs=True, ref_cache_check=0, **BALANCED)
    assert before == (12 // 4 + 8 // 4, 0)
    before, _, _ = run(folder, tmp_path, precompute_ref_log_probs=True, ref_cache_check=0, **BALANCED)
    assert before == (0, 0)


def test_only_the_missing_shards_of_each_cache_are_computed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROWS_PER_SHARD", 4)
    options = {"precompute_ref_log_probs": True, "ref_cache_check": 0, **BALANCED}
    run(folder, tmp_path, **options)
    own, end = sorted(
        (tmp_path / "cache").glob("*/shard-00002.arrow"),  # of the training data alone
        key=lambda path: '"tokens"' not in (path.parent / "manifest.json").read_text().split('"targets"')[1][:12],
    )
    own.unlink()
    end.with_name("shard-00001.arrow").unlink()
    written, write = [], store.RefCache.write

    def watched(cache, shard, *sides):
        written.append((cache.key.targets == "tokens", shard.number))
        return write(cache, shard, *sides)

    monkeypatch.setattr(store.RefCache, "write", watched)
    before, _, _ = run(folder, tmp_path, **options)
    assert sorted(written) == [(False, 1), (True, 2)]
    assert before == (2, 0)
