"""What `sampo diagnose` computes, against a plain loop over rows, closed forms, and the trainer's own metrics."""

import itertools
import json
import math
import random
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_up_scores import made_up
from oracles import dataset_budget, row_key, transport_weights
from peft import LoraConfig, get_peft_model
from scipy import stats
from tiny import make_model, make_pairs, make_tokenizer, save_model, training_options, with_weights

from sampo import SamPOConfig, SamPOTrainer, cli, load_preferences
from sampo.commands import lazy_model
from sampo.data.end_tokens import most_common_end_token
from sampo.data.token_ids import hash_token_ids
from sampo.data.tokenize import tokenize_pairs
from sampo.diagnostics.findings import CLASSES, Finding, PairScores, findings, groups, read_scores
from sampo.diagnostics.pair_scores import DIAGNOSED_METHODS, ScoreKey, cached_reference, diagnosed_name, score_pairs
from sampo.io import records as results
from sampo.methods import find_method
from sampo.reference_cache.key import RefKey
from sampo.reference_cache.store import RefCache
from sampo.scoring.scorer import ModelScorer
from sampo.weighting import EVAL_EPOCH, draw_keys

SEED, GAMMA, MAX_LENGTH = 5, 0.9, 40
METHODS = {name: method for name, method in DIAGNOSED_METHODS.items() if method.weighting != "column"}
TOTALS, TAIL = [300, 410], 0.3
EOS, IM_END = 1, 3


def raw_pairs(n=13, conversational=True, **options):
    """Pairs of all orders of lengths; some are cut at `MAX_LENGTH`."""
    return make_pairs(n, conversational=conversational, max_len=30, **options)


def key_of(data, **changes):
    known = {
        "policy": {"weights": "none"},
        "reference": None,
        "data": "none",
        "weights": None,
        "max_length": MAX_LENGTH,
        "truncation_mode": "keep_start",
        "end_ids": [EOS, IM_END],
        "end_id": most_common_end_token(data, [EOS, IM_END]),
        "seed": SEED,
        "gamma": GAMMA,
        "tail_weight": TAIL,
        "token_totals": TOTALS,
    }
    return ScoreKey(**{**known, **changes})


def ref_cache(folder, data):
    fields_ = {"weights": "w", "config": "c", "compute_dtype": "float32", "attention": "sdpa"}
    about = {"max_length": MAX_LENGTH, "truncation_mode": "keep_start", "storage_dtype": "float32"}
    return RefCache(Path(folder), RefKey(**fields_, data=hash_token_ids(data), **about), len(data))


def computed(folder, data, policy, reference=None, *, pair_stream="true", rows_per_shard=5, batch_size=3, **changes):
    """Shards of tiny models."""
    if reference is not None:
        cache = ref_cache(folder, data)
        data = cached_reference(
            data, cache, lambda: ModelScorer(reference, pair_stream=pair_stream), {}, pad_id=0, batch_size=batch_size
        )
    return score_pairs(
        data,
        Path(folder) / "pairs",
        key_of(data, **changes),
        lambda: ModelScorer(policy, pair_stream=pair_stream),
        pad_id=0,
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
    )


def table_of(paths):
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def data():
    return tokenize_pairs(raw_pairs(), make_tokenizer(), max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory):
    return computed(tmp_path_factory.mktemp("scores"), data, make_model(seed=1), make_model(seed=0))


# --- the reference: one row at a time, in plain torch and plain Python


def naive_logps(model, prompt, completion, shift=0.0, shifted=IM_END):
    """log π of each completion token in double precision, with the end logit shifted at every position."""
    ids = (prompt + completion)[:MAX_LENGTH]
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids])).logits[0]
    logits[:, shifted] += shift
    logps = logits.log_softmax(dim=1)
    return [logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]


def naive_weights(method, lengths, side, ends, keys, ratios, row_keys):
    """Weights of one side, by the words of the table of methods."""
    n, least, name = lengths[side], min(lengths), method.weighting
    thinned = not (method.sampled_sides == "rejected" and side == 0)
    if method.token_budget == "dataset":
        least = dataset_budget(name, n, TOTALS[side], TOTALS[1 - side], row_keys[side])
    budget = least if thinned else n
    end = ends[side] if method.keep_end_token else None

    def first(order):
        ranked = sorted(range(n), key=lambda t: (t != end, order[t], t))[:budget]
        return [float(t in ranked) for t in range(n)]

    if name == "all":
        return [1.0] * n
    if name == "sampo":
        return first(keys[side])
    if name == "top_k":
        return first([-r for r in ratios[side]])
    if name == "prefix":
        return [float(t < budget) for t in range(n)]
    if name == "ld":
        return [1.0 if t < budget else TAIL for t in range(n)]
    if name == "expected":
        if end is None:
            return [budget / n] * n
        return [1.0 if t == end else (budget - 1) / (n - 1) for t in range(n)]
    if name == "mean":
        return [1 / n] * n
    if name == "mean_rescaled":
        return [sum(lengths) / 2 / n] * n
    return [GAMMA**t for t in range(n)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def naive_pair(policy, reference, row):
    """What the row of a pair should say."""
    prompt, sides = row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]
    sides = [side[: MAX_LENGTH - len(prompt)] for side in sides]
    own, ref = ([naive_logps(model, prompt, side) for side in sides] for model in (policy, reference))
    h = 1e-3
    up, down = ([naive_logps(policy, prompt, side, shift) for side in sides] for shift in (h, -h))
    slopes = [[(a - b) / (2 * h) for a, b in zip(*both, strict=True)] for both in zip(up, down, strict=True)]
    ratios = [[a - b for a, b in zip(*both, strict=True)] for both in zip(own, ref, strict=True)]
    lengths = [len(side) for side in sides]
    ends = [max((t for t, token in enumerate(side) if token in (EOS, IM_END)), default=None) for side in sides]
    keys = []
    for side in sides:
        ids = torch.tensor([prompt + side])
        drawn = draw_keys(ids, torch.ones_like(ids), seed=SEED, epoch=EVAL_EPOCH)[0].tolist()
        keys.append(drawn[len(prompt) - 1 :])
    row_keys = [row_key(prompt + side, SEED, EVAL_EPOCH) for side in sides]
    found = {"chosen_tokens": lengths[0], "rejected_tokens": lengths[1]}
    for i, side in enumerate(("chosen", "rejected")):
        found[f"{side}_end_place"] = -1 if ends[i] is None else ends[i]
        found[f"{side}_policy_logps"], found[f"{side}_ref_logps"] = sum(own[i]), sum(ref[i])
        found[f"{side}_log_ratio"], found[f"{side}_token_log_ratios"] = sum(ratios[i]), ratios[i]
    with torch.no_grad():
        outputs = [policy.double().model(torch.tensor([prompt + side])).last_hidden_state[0] for side in sides]
    plan = transport_weights(*(states[len(prompt) - 1 : -1].tolist() for states in outputs))
    for name, method in METHODS.items():
        weights = plan
        if name != "otpo":
            weights = [naive_weights(method, lengths, side, ends, keys, ratios, row_keys) for side in (0, 1)]
        found[f"pressure/{name}"] = dot(weights[0], slopes[0]) - dot(weights[1], slopes[1])
        for i, side in enumerate(("chosen", "rejected")):
            found[f"{side}_score/{name}"] = dot(weights[i], ratios[i])
    return found


def test_every_column_is_what_a_plain_loop_over_rows_says(data, shards):
    policy, reference = make_model(seed=1), make_model(seed=0)
    rows = table_of(shards)
    assert [row["row"] for row in rows] == list(range(len(data)))
    cut = longer = shorter = 0
    for row, example in zip(rows, data, strict=True):
        expected = naive_pair(policy, reference, example)
        assert set(row) == set(expected) | {"row", "prompt"}
        for name, value in expected.items():
            # float32 against float64; sums of 40 tokens of some 10 nats
            assert row[name] == pytest.approx(value, abs=2e-4, rel=1e-4), name
        cut += row["chosen_end_place"] < 0
        longer += row["chosen_tokens"] > row["rejected_tokens"]
        shorter += row["chosen_tokens"] < row["rejected_tokens"]
    assert min(cut, longer, shorter) >= 1
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_the_plain_forward_and_other_batches_say_the_same_as_the_stream(data, shards, tmp_path):
    other = computed(
        tmp_path,
        data,
        make_model(seed=1),
        make_model(seed=0),
        pair_stream="false",
        rows_per_shard=100,
        batch_size=7,
    )
    assert (len(shards), len(other)) == (3, 1)
    for ours, theirs in zip(table_of(shards), table_of(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, abs=2e-4), name


def test_without_a_reference_the_pressure_is_that_before_training(data, shards, tmp_path):
    alone = table_of(computed(tmp_path, data, make_model(seed=1)))
    assert not [name for name in alone[0] if "ref_logps" in name or "ratio" in name or "score" in name]
    itself = table_of(computed(tmp_path / "same", data, make_model(seed=1), make_model(seed=1)))
    for row, same, with_other in zip(alone, itself, table_of(shards), strict=True):
        assert all(same[f"chosen_score/{name}"] == pytest.approx(0, abs=1e-3) for name in METHODS)
        for name, method in METHODS.items():
            if method.weighting != "top_k":  # it looks at the reference
                assert row[f"pressure/{name}"] == pytest.approx(with_other[f"pressure/{name}"], abs=1e-5)
        # all log-ratios are 0, and of equals the earlier are taken
        assert row["pressure/top_k"] == pytest.approx(row["pressure/prefix"], abs=1e-9)


def test_with_a_constant_end_probability_the_pressure_has_a_closed_form(tmp_path):
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    p = 1 / 69
    data = tokenize_pairs(raw_pairs(20, seed=3), make_tokenizer(), max_length=None)
    for row in table_of(computed(tmp_path, data, model, max_length=None)):
        w, l = row["chosen_tokens"], row["rejected_tokens"]
        assert row["pressure/all"] == pytest.approx(-p * (w - l), abs=1e-5)
        # both sides keep T_m tokens' p; the longer one keeps its end with a probability of T_m / T
        assert row["pressure/expected"] == pytest.approx(min(w, l) / w - min(w, l) / l, abs=1e-5)
        assert row["pressure/expected+end"] == pytest.approx(0, abs=1e-5)
        assert row["pressure/sampo+end"] == pytest.approx(0, abs=1e-5)
        assert row["pressure/mean"] == pytest.approx(1 / w - 1 / l, abs=1e-5)
        # a newline stands after the end token: a prefix that is shorter by more than that lacks it
        assert row["pressure/prefix"] == pytest.approx(float(l > w + 1) - float(w > l + 1), abs=1e-5)
        rejected = 1 - p * w - min(w, l) / l * (1 - p * l)
        assert row["pressure/expected+rejected"] == pytest.approx(rejected, abs=1e-5)


def test_the_numbers_are_those_that_the_trainer_logs(tmp_path):
    """Tokenisation, truncation, subsets and pressure, for a subset, a fraction, and a choice by log-ratio."""
    policy, reference, pairs = make_model(seed=1), make_model(seed=0), raw_pairs(16, seed=8)
    prepared = tokenize_pairs(pairs, make_tokenizer(), max_length=MAX_LENGTH)
    totals = [3, 2]
    shards = computed(tmp_path, prepared, make_model(seed=1), make_model(seed=0), seed=7, token_totals=totals)
    found = findings(read_scores(shards), beta=0.1)
    for name in ("sampo+rejected+end", "expected", "top_k", "sampo+dataset"):
        method = DIAGNOSED_METHODS[name]
        args = SamPOConfig(
            **training_options(tmp_path / "out", max_length=MAX_LENGTH, beta=0.1),
            token_weighting=method.weighting,
            sampled_sides=method.sampled_sides,
            token_budget=method.token_budget,
            token_totals=totals if method.token_budget == "dataset" else None,
            keep_end_token=method.keep_end_token,
            log_length_pressure=True,
        )
        trainer = SamPOTrainer(policy, reference, args, None, pairs, pairs, processing_class=make_tokenizer())
        logged = trainer.evaluate()

        def value(quantity, method=name, **labels):
            return one(found, quantity, method=method, **labels).value

        assert value("pressure", group="all") == pytest.approx(logged["eval_length_gap/pressure"], abs=1e-5)
        assert value("margin_correlation") == pytest.approx(logged["eval_length_gap/correlation"], abs=1e-4)
        for group in ("longer", "shorter"):
            accuracy = logged[f"eval_accuracies/chosen_{group}"]
            assert value("accuracy", group=f"chosen {group}") == pytest.approx(accuracy)
            accuracy = logged[f"eval_dpo/accuracies/chosen_{group}"]
            assert value("accuracy", "all", group=f"chosen {group}") == pytest.approx(accuracy)


def test_the_end_token_is_the_one_that_ends_most_responses():
    chat = tokenize_pairs(raw_pairs(6), make_tokenizer(), max_length=None)
    text = tokenize_pairs(raw_pairs(6, conversational=False), make_tokenizer(chat=False), max_length=None)
    assert most_common_end_token(chat, [EOS, IM_END]) == IM_END
    assert most_common_end_token(text, [EOS, IM_END]) == EOS
    nothing = chat.map(lambda row: {"chosen_ids": [9, 9], "rejected_ids": [8]})
    assert most_common_end_token(nothing, [EOS, IM_END]) == EOS


def test_a_response_without_tokens_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}w1 {% endif %}{% endfor %}"
    with pytest.raises(ValueError, match=r"at least one token, got 3 pairs without, first at rows \[0, 1, 2\]"):
        tokenize_pairs(raw_pairs(3), tokenizer, max_length=None)


def test_an_adapter_is_scored_with_its_weights(data, tmp_path):
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(make_model(), settings).eval()
    merged = get_peft_model(make_model(), settings)
    merged.load_state_dict(adapted.state_dict())
    merged = merged.merge_and_unload().eval()
    ours, theirs = (table_of(computed(tmp_path / str(i), data, m)) for i, m in enumerate((adapted, merged)))
    plain = table_of(computed(tmp_path / "plain", data, make_model()))
    assert max(abs(a["pressure/all"] - b["pressure/all"]) for a, b in zip(ours, plain, strict=True)) > 1e-2
    for a, b in zip(ours, theirs, strict=True):
        assert a["chosen_policy_logps"] == pytest.approx(b["chosen_policy_logps"], abs=1e-3)
        assert a["pressure/sampo"] == pytest.approx(b["pressure/sampo"], abs=1e-4)


# --- going on after a kill

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
sys.path.insert(0, {here!r})
from test_diagnostics import *
data = tokenize_pairs(raw_pairs(), make_tokenizer(), max_length=MAX_LENGTH)
import sampo.{module} as module
write = module.{write}
def dying(path, content):
    if {last!r} in str(path):
        path.with_name(".sampo-0-0.part").write_bytes(bytes(content)[:99])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
module.{write} = dying
computed({folder!r}, data, make_model(seed=1), make_model(seed=0))
"""


def test_a_killed_run_goes_on_with_the_shards_that_are_missing(data, shards, tmp_path):
    code = KILLED.format(
        tests=str(Path(__file__).parents[1] / "support"),
        here=str(Path(__file__).parent),
        module="diagnostics.pair_scores",
        write="write_atomic",
        last="rows-0000010",
        folder=str(tmp_path),
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs").glob("rows-*")}
    assert len(there) == 2
    batches = []

    class Counting(ModelScorer):
        def score(self, inputs, *targets, **options):
            batches.append(len(inputs["input_ids"]) // 2)
            return super().score(inputs, *targets, **options)

    with_reference = cached_reference(data, ref_cache(tmp_path, data), refuse_to_load, {}, pad_id=0)
    again = score_pairs(
        with_reference,
        tmp_path / "pairs",
        key_of(data),
        lambda: Counting(make_model(seed=1), pair_stream="true"),
        pad_id=0,
        batch_size=3,
        rows_per_shard=5,
    )
    assert batches == [3]
    assert all(path.stat().st_mtime_ns == when for path, when in there.items())
    assert table_of(again) == table_of(shards)
    assert not list((tmp_path / "pairs").glob(".*"))


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "the manifest"])
def test_a_shard_that_is_not_as_it_was_written_is_refused_and_its_deletion_is_the_fix(data, tmp_path, damage):
    def scored():
        return score_pairs(
            data,
            tmp_path,
            key_of(data),
            lambda: ModelScorer(make_model(seed=1), pair_stream="true"),
            pad_id=0,
            rows_per_shard=5,
        )

    before = table_of(scored())
    shard = tmp_path / "rows-0000005-0000010.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "cut off":
        del content[-1:]
    else:
        content[len(content) // 2] ^= 4
    if damage == "the manifest":
        (tmp_path / "manifest.json").write_text(
            (tmp_path / "manifest.json").read_text().replace('"size": ', '"size": 1')
        )
        with pytest.raises(
            ValueError, match=r"manifest.json: its entries must have the checksum .*Delete .*computed again"
        ):
            scored()
        return
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows-0000005-0000010.parquet must be as it was written, and .*Delete it"):
        scored()
    shard.unlink()
    assert table_of(scored()) == before


def refuse_to_load():
    raise AssertionError("nothing was missing")


def test_every_field_of_the_key_changes_its_digest(data):
    key = key_of(data)
    changed = {
        "policy": {"weights": "other"},
        "reference": "digest",
        "data": "other",
        "weights": "other",
        "max_length": None,
        "truncation_mode": "keep_end",
        "end_ids": [1],
        "end_id": 9,
        "seed": 6,
        "gamma": 0.5,
        "tail_weight": 0.4,
        "token_totals": [410, 300],
        "other_ends": [7],
        "schema": 99,
    }
    assert set(changed) == {field.name for field in fields(key)}
    digests = {replace(key, **{name: value}).digest for name, value in changed.items()}
    assert len(digests | {key.digest}) == len(changed) + 1


def test_a_damaged_shard_is_named(shards, tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(shards[0].read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"rows.parquet must be a Parquet file"):
        read_scores([path])


# --- statistics


def one(found: list[Finding], quantity: str, **labels):
    (estimate,) = [f.estimate for f in found if f.quantity == quantity and labels.items() <= f.labels.items()]
    return estimate


def test_slopes_and_correlations_are_those_of_textbooks():
    scores, quality = made_up()
    found = findings(scores, beta=0.3, quality=quality, seed=1)
    x, y = scores.tokens.ravel(), 0.3 * scores.log_ratio.ravel()
    fit = stats.linregress(x, y)
    assert one(found, "reward_slope").value == pytest.approx(100 * fit.slope)
    assert one(found, "reward_r2").value == pytest.approx(fit.rvalue**2)
    d, m = scores.tokens[0] - scores.tokens[1], scores.margins["all"]
    r = np.corrcoef(d, m)[0, 1]
    assert one(found, "margin_correlation").value == pytest.approx(r)
    assert one(found, "margin_r2").value == pytest.approx(r**2)
    design = np.stack([np.ones_like(quality), quality], axis=1)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (d.astype(float), m)]
    assert one(found, "margin_partial").value == pytest.approx(np.corrcoef(*left)[0, 1])
    assert one(found, "margin_partial").value < r - 0.1


@pytest.mark.parametrize("per_prompt", [1, 4])
def test_bootstrap_intervals_are_those_of_drawing_prompts_one_by_one(per_prompt):
    scores, quality = made_up(120, seed=2, per_prompt=per_prompt)
    found = findings(scores, beta=1.0, quality=quality, resamples=4000, seed=3)
    rng, drawn = random.Random(4), {"reward_slope": [], "margin_correlation": []}
    members = [np.flatnonzero(scores.prompts == p) for p in range(120 // per_prompt)]
    for _ in range(1500):
        rows = np.concatenate([members[rng.randrange(len(members))] for _ in members])
        tokens, ratio = scores.tokens[:, rows], scores.log_ratio[:, rows]
        drawn["reward_slope"].append(100 * np.polyfit(tokens.ravel(), ratio.ravel(), 1)[0])
        drawn["margin_correlation"].append(np.corrcoef(tokens[0] - tokens[1], ratio[0] - ratio[1])[0, 1])
    for quantity, values in drawn.items():
        estimate = one(found, quantity)
        sd = np.std(values)
        # bounds of 1,500 draws are off by some 5 % of an sd
        assert estimate.interval == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.25 * sd)
        assert estimate.se == pytest.approx(sd, rel=0.15)
        assert estimate.n == 120 // per_prompt


def test_groups_accuracies_and_pressures_are_those_of_plain_loops():
    scores, _ = made_up(150, seed=5)
    kinds = np.array([f"k{i % 3}" for i in range(150)])
    found = findings(scores, beta=1.0, by={"source": kinds})
    rows = list(zip(*scores.tokens, scores.margins["all"], scores.pressure["all"], kinds, strict=True))
    chosen = {
        "all": rows,
        "chosen longer": [r for r in rows if r[0] > r[1]],
        "chosen shorter": [r for r in rows if r[0] < r[1]],
        "matched length": [r for r in rows if abs(r[0] - r[1]) <= 0.1 * max(r[0], r[1])],
        "source: k1": [r for r in rows if r[4] == "k1"],
    }
    for group, inside in chosen.items():
        assert inside
        if "source" not in group:
            accuracy = one(found, "accuracy", group=group)
            assert accuracy.value == pytest.approx(sum(r[2] > 0 for r in inside) / len(inside))
            assert accuracy.n == len(inside)
        if "matched" not in group:
            pressure = one(found, "pressure", group=group)
            values = [r[3] for r in inside]
            assert pressure.value == pytest.approx(sum(values) / len(values))
            assert pressure.se == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))
    assert "equal length" not in groups(replace(scores, tokens=np.array([[1, 2], [2, 1]])), {})


def test_a_margin_of_zero_counts_half():
    scores, _ = made_up(4)
    scores = replace(scores, margins={"all": np.array([0.0, 0.0, 1.0, -1.0])})
    assert one(findings(scores, beta=1.0), "accuracy", group="all").value == 0.5


def test_pairs_of_one_prompt_count_as_one_observation():
    scores, _ = made_up(40, seed=6)
    often = PairScores(
        **{
            field.name: {k: np.repeat(v, 9) for k, v in value.items()}
            if isinstance(value := getattr(scores, field.name), dict)
            else np.repeat(value, 9, axis=0 if field.name == "prompts" else 1)
            for field in fields(scores)
        }
    )
    once, nine = (findings(each, beta=1.0, seed=7) for each in (scores, often))
    for a, b in zip(once, nine, strict=True):
        if a.quantity != "reward":  # its bins are of as many responses
            assert (a.quantity, a.labels) == (b.quantity, b.labels)
            assert b.estimate.n == a.estimate.n
            assert b.estimate.interval == pytest.approx(a.estimate.interval, abs=1e-9)


def test_the_curve_partitions_the_responses():
    scores, _ = made_up(97, seed=8)
    curve = [f for f in findings(scores, beta=0.5) if f.quantity == "reward"]
    borders = [(f.labels["from"], f.labels["to"]) for f in curve]
    assert len(curve) == 10
    assert all(a[1] < b[0] for a, b in itertools.pairwise(borders))
    tokens, reward = scores.tokens.ravel(), 0.5 * scores.log_ratio.ravel()
    prompts = np.tile(scores.prompts, 2)
    n_seen = 0
    for finding, (low, high) in zip(curve, borders, strict=True):
        inside = (tokens >= low) & (tokens <= high)
        n_seen += inside.sum()
        of_prompts = [reward[inside & (prompts == p)].mean() for p in set(prompts[inside])]
        assert finding.estimate.value == pytest.approx(np.mean(of_prompts))
        assert finding.labels["tokens"] == pytest.approx(tokens[inside].mean())
    assert n_seen == len(tokens)


def test_log_ratios_by_place_and_class_are_those_of_plain_loops(shards):
    found = findings(read_scores(shards), beta=1.0, resamples=100)
    for side in ("chosen", "rejected"):
        places, kinds = {}, {}
        for row in table_of(shards):
            end = row[f"{side}_end_place"]
            for t, ratio in enumerate(row[f"{side}_token_log_ratios"]):
                k = 0
                while 2 ** (k + 1) - 1 <= t:
                    k += 1
                places.setdefault(2**k - 1, []).append((row["row"], ratio))
                kind = "end" if t == end else "after" if 0 <= end < t else "first" if t == 0 else "inner"
                kinds.setdefault(kind, []).append((row["row"], ratio))
        assert set(kinds) == set(CLASSES)
        for quantity, label, values in (("log_ratio_at", "from", places), ("log_ratio_of", "class", kinds)):
            wanted = [f for f in found if f.quantity == quantity and f.labels["side"] == side]
            assert {f.labels[label] for f in wanted} == set(values)
            for finding in wanted:
                tokens = values[finding.labels[label]]
                assert finding.estimate.value == pytest.approx(np.mean([r for _, r in tokens]), abs=1e-6)
                assert finding.estimate.n == len({row for row, _ in tokens})


def test_the_standard_error_of_a_mean_over_tokens_is_that_of_the_jackknife_over_prompts():
    scores, _ = made_up(300, seed=9)
    estimate = one(findings(scores, beta=1.0, resamples=100), "log_ratio_at", side="chosen", **{"from": 1})
    sums, counts = scores.place_sums[0, :, 1], scores.place_counts[0, :, 1]
    without = [(sums.sum() - s) / (counts.sum() - c) for s, c in zip(sums, counts, strict=True)]
    assert estimate.se == pytest.approx(math.sqrt((299 / 300) * np.sum((without - np.mean(without)) ** 2)), rel=0.02)


def test_what_does_not_vary_has_no_correlation():
    scores, _ = made_up(30)
    alike = replace(scores, margins={"all": np.full(30, 0.1)}, log_ratio=np.full((2, 30), 0.1))
    found = findings(alike, beta=0.7, resamples=100)
    for quantity in ("margin_correlation", "margin_r2", "reward_r2"):
        assert one(found, quantity).value is None
    assert one(found, "reward_slope").value == pytest.approx(0, abs=1e-12)
    same_length = replace(scores, tokens=np.full((2, 30), 7))
    assert one(findings(same_length, beta=1.0, resamples=100), "reward_slope").value is None


# --- the command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a reference, two policies and an adapter; pairs with a source and qualities."""
    home = tmp_path_factory.mktemp("world")
    for name, seed in (("ref", 0), ("a", 1), ("b", 2)):
        save_model(home / name, seed=seed)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    base = make_model()
    base.name_or_path = base.config._name_or_path = str(home / "ref")
    get_peft_model(base, settings).save_pretrained(home / "adapter")
    pairs = raw_pairs(24, seed=2)
    pairs = pairs.add_column("source", ["x", "y"] * 12).add_column("q", [float(i % 5) for i in range(24)])
    pairs.add_column("p", [i % 3 for i in range(24)]).to_json(home / "pairs.jsonl")
    return home


def diagnose(world, *words, out, data="pairs.jsonl"):
    cache = ["--ref_cache_dir", str(world / "cache")]
    options = ["--data", str(world / data), "--out", str(out), "--use_cpu", "--max_length", str(MAX_LENGTH), *cache]
    return cli.main(["diagnose", *options, *words])


def test_several_checkpoints_on_one_page_and_nothing_is_computed_twice(world, tmp_path, capsys, monkeypatch):
    words = ["--policy", str(world / "a"), str(world / "b"), "--reference", str(world / "ref")]
    more = ["--by", "source", "--quality", "q", "p"]
    assert diagnose(world, *words, *more, out=tmp_path) == 0
    said = capsys.readouterr().out
    assert "source: x" in said
    assert "at equal quality" in said
    assert [line for line in said.splitlines() if line.startswith("b: by the length pressure")]
    records = results.read(tmp_path / "records.jsonl")
    shown = {record.config["policy"] for record in records}
    assert shown == {str(world / "a"), str(world / "b")}
    pressure = [r for r in records if r.name == "diagnose/pressure" and r.config["policy"] == str(world / "a")]
    assert {(r.config["method"], r.config["group"]) for r in pressure} >= {
        (method, group) for method in METHODS for group in ("all", "chosen longer", "source: y")
    }
    monkeypatch.setattr(lazy_model.LazyModel, "load", refuse_to_load)
    assert diagnose(world, *words, *more, out=tmp_path) == 0
    assert results.read(tmp_path / "records.jsonl") == records
    # the values of a column are not in the key: they need no forward pass
    assert diagnose(world, *words, "--by", "p", out=tmp_path) == 0
    assert "p: 2" in capsys.readouterr().out


def test_weights_of_the_data_are_diagnosed_where_the_data_have_them(tmp_path):
    pairs = with_weights(raw_pairs(8, seed=4))
    prepared = tokenize_pairs(pairs, make_tokenizer(), max_length=MAX_LENGTH)
    policy, reference = make_model(seed=1), make_model(seed=0)
    plain = table_of(computed(tmp_path / "plain", prepared, policy, reference))
    assert not [name for name in plain[0] if name.endswith("/column")]
    found = table_of(computed(tmp_path / "given", prepared, policy, reference, weights="w"))
    for row, without, example in zip(found, plain, prepared, strict=True):
        assert without.items() <= row.items()
        for side in ("chosen", "rejected"):
            weights = example[f"{side}_weights"][: row[f"{side}_tokens"]]
            expected = dot(weights, row[f"{side}_token_log_ratios"])
            assert row[f"{side}_score/column"] == pytest.approx(expected, abs=1e-4)
        assert "pressure/column" in row


def test_the_command_reads_weights_of_the_data_and_names_a_wrong_one(world, tmp_path):
    # the tokens of the data as they are loaded: one weight for each
    pairs = with_weights(load_preferences(str(world / "pairs.jsonl")))
    pairs.to_json(world / "weights.jsonl")
    assert diagnose(world, "--policy", str(world / "a"), out=tmp_path, data="weights.jsonl") == 0
    records = results.read(tmp_path / "records.jsonl")
    assert [r for r in records if (r.config["method"], r.config["group"]) == ("column", "all")]
    short = pairs["chosen_weights"][:]
    short[2] = short[2][:-1]
    pairs.remove_columns("chosen_weights").add_column("chosen_weights", short).to_json(world / "wrong.jsonl")
    with pytest.raises(SystemExit, match=r"sampo diagnose: error: `chosen_weights` must have one .* rows \[2\]"):
        diagnose(world, "--policy", str(world / "a"), out=tmp_path / "2", data="wrong.jsonl")


def test_the_budget_of_a_data_set_is_that_of_the_pairs_or_of_the_totals_given(world, tmp_path):
    found = []
    for number, words in enumerate(([], ["--token_totals", "100", "60"])):
        assert diagnose(world, "--policy", str(world / "a"), *words, out=tmp_path / str(number)) == 0
        records = results.read(tmp_path / str(number) / "records.jsonl")
        (record,) = (r for r in records if (r.config["method"], r.config["group"]) == ("expected+dataset", "all"))
        found.append(record.value)
    rows = table_of(sorted(tmp_path.glob("0/pairs/a-*/*.parquet")))
    chosen, rejected = (sum(row[f"{side}_tokens"] for row in rows) for side in ("chosen", "rejected"))
    words = ["--token_totals", str(chosen), str(rejected)]
    assert diagnose(world, "--policy", str(world / "a"), *words, out=tmp_path / "0") == 0
    assert len(list((tmp_path / "0" / "pairs").iterdir())) == 1
    assert found[0] != pytest.approx(found[1], abs=1e-3)
    with pytest.raises(SystemExit, match=r"`token_totals` must be two whole numbers of at least 1, got \[0, 5\]"):
        diagnose(world, "--policy", str(world / "a"), "--token_totals", "0", "5", out=tmp_path / "2")


def test_a_record_holds_the_number_of_the_rows(world, tmp_path):
    assert diagnose(world, "--policy", str(world / "a"), out=tmp_path) == 0
    rows = table_of(sorted(tmp_path.glob("pairs/a-*/*.parquet")))
    records = results.read(tmp_path / "records.jsonl")
    assert {record.name for record in records} == {"diagnose/pressure"}
    for record in records:
        if record.config["group"] == "chosen shorter":
            values = [
                r[f"pressure/{record.config['method']}"] for r in rows if r["chosen_tokens"] < r["rejected_tokens"]
            ]
            assert record.value == pytest.approx(np.mean(values))
            assert record.n == len(values)
            assert "--policy" in record.command


def test_an_adapter_is_compared_with_its_base(world, tmp_path, capsys):
    assert diagnose(world, "--policy", str(world / "adapter"), out=tmp_path / "one") == 0
    assert "the base of the adapter" in capsys.readouterr().out
    named = ["--policy", str(world / "adapter"), "--reference", str(world / "ref")]
    assert diagnose(world, *named, out=tmp_path / "two") == 0
    rows = [table_of(sorted((tmp_path / name).glob("pairs/*/*.parquet"))) for name in ("one", "two")]
    assert rows[0] == rows[1]
    assert max(abs(row["chosen_log_ratio"]) for row in rows[0]) > 0.1


@pytest.mark.parametrize("given_as", ["start", "folder"])
def test_the_reference_cache_of_a_training_run_is_used(world, tmp_path, capsys, given_as):
    from datasets import load_dataset

    loading = {"revision": "main", "trust_remote_code": False, "attn_implementation": None, "dtype": "float32"}
    args = SamPOConfig(
        **training_options(tmp_path / "out", max_length=MAX_LENGTH),
        precompute_ref_log_probs=True,
        ref_cache_dir=str(tmp_path / "cache"),
        model_init_kwargs=loading,
    )
    pairs = load_dataset("json", data_files=str(world / "pairs.jsonl"), split="train")
    policy, reference = ("ref", None) if given_as == "start" else ("a", str(world / "ref"))
    tokenizer = make_tokenizer()
    SamPOTrainer(str(world / policy), reference, args, train_dataset=pairs, processing_class=tokenizer)
    caches = sorted((tmp_path / "cache").glob("*/*"))
    words = [
        "--policy",
        str(world / "b"),
        "--reference",
        str(world / "ref"),
        "--ref_cache_dir",
        str(tmp_path / "cache"),
    ]
    assert diagnose(world, *words, out=tmp_path / "found") == 0
    assert "all there" in capsys.readouterr().out
    assert sorted((tmp_path / "cache").glob("*/*")) == caches
    (found,) = (tmp_path / "found").glob("pairs/*/manifest.json")
    assert json.loads(found.read_text())["key"]["reference"] == caches[0].parent.name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "{w}/none", "{w}/nil"], ["`policy` must be a folder with a model", "none", "nil"]),
        (["--policy", "{w}/a", "--reference", "{w}/none"], ["`reference` must be a folder with a model"]),
        (["--policy", "{w}/a", "--by", "sauce"], ["`by` and `quality` must name columns of the data, got ['sauce']"]),
        (["--policy", "{w}/a", "--quality", "source"], ["`quality` must name columns of numbers, got `source`"]),
        (["--policy", "{w}/a", "--quality", "q", "p", "q"], ["`quality` must be one column or two"]),
        (
            ["--policy", "{w}/a", "{w}/a", "--beta", "0", "--resamples", "9", "--max_length", "1"],
            ["`beta` must be above 0", "`resamples` must be at least 100", "`max_length` must be", "named once each"],
        ),
        (["--policy", "{w}/a", "--reference", "{w}/other"], ["must have the vocabulary of"]),
        (["--policy", "{w}/small"], ["The tokenizer must be that of the model", "below 20"]),
        (["--policy", "{w}/a", "--data", "{w}/bad.jsonl"], ["1 of 2 pairs has an empty `chosen`, at rows [1]"]),
        (["--policy", "{w}/a", "--data", "{w}/nothing.jsonl"], ["nothing.jsonl"]),
        (["--policy", "{w}/plain"], ["chat_template"]),
    ],
)
def test_faults_are_said_before_the_first_forward_pass(world, tmp_path, words, said, monkeypatch):
    if not (world / "other").exists():
        save_model(world / "other")
        path = world / "other" / "tokenizer.json"
        path.write_text(path.read_text().replace("w59", "v59"))
        save_model(world / "small", vocab_size=20)
        save_model(world / "plain", chat=False)
        good = {name: [{"role": "user", "content": "w1"}] for name in ("prompt", "chosen", "rejected")}
        bad = {**good, "chosen": [{"role": "assistant", "content": ""}]}
        (world / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, bad)))
    monkeypatch.setattr(lazy_model.LazyModel, "load", refuse_to_load)
    with pytest.raises(SystemExit) as stop:
        diagnose(world, *(word.format(w=world) for word in words), out=tmp_path / "out")
    assert str(stop.value).startswith("sampo diagnose: error: ")
    assert all(each in str(stop.value) for each in said), stop.value
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_one_run_have_names_of_their_own(world, tmp_path, capsys):
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "checkpoint-3").symlink_to(world / ("a" if run == "one" else "b"))
    words = [str(tmp_path / run / "checkpoint-3") for run in ("one", "two")]
    assert diagnose(world, "--policy", *words, out=tmp_path / "out") == 0
    folders = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "out" / "pairs").iterdir())
    assert folders == ["one-checkpoint-3", "two-checkpoint-3"]
    assert "one-checkpoint-3: by the length pressure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("sampo", "sampo"),
        ("sampo_end", "sampo+end"),
        ("sampo_rejected_learned", "sampo+rejected"),
        ("rejected_learned_end", "sampo+rejected+end"),
        ("rejected_learned_dataset", "sampo+rejected+dataset"),
        ("otpo", "otpo"),
        ("dpop", "all"),
        ("tdpo2", "all"),
        ("ld_dpo", None),
        ("onesided", None),
    ],
)
def test_a_named_method_has_the_row_of_its_token_weights(method, row):
    assert diagnosed_name(find_method(method).options) == row
    assert row is None or row in DIAGNOSED_METHODS
