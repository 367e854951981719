"""Steps in full micro-batches: the loss, gradients and log of plain accumulation; and the compact head."""

import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig
from streams import collate
from tiny import make_pairs, make_tokenizer, save_model, training_options
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sampo import SamPOConfig, SamPOTrainer
from sampo.config_checks import BATCH_LOSSES, LOSS_TYPES
from sampo.scoring.packing import lay_out
from sampo.training import micro_batch_trainer
from sampo.training.batch import Draw, Scored
from sampo.training.micro_batches import Step, by_pair, by_row, deal_groups, group_pairs, pair_tokens, widen_table
from sampo.training.token_budget import largest_that_fits, probe

sizes = st.integers(1, 14)
shapes_of_pairs = st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def make_trainer(model, tmp_path, data=None, **options):
    kwargs = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    return SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(tmp_path, **options)),
        train_dataset=make_pairs(48) if data is None else data,
        processing_class=make_tokenizer(),
        **kwargs,
    )


# --- which pairs go together ----------------------------------------------------------------------------------------


def one_pair(batch, i):
    """As a batch without padding."""
    rows = [i, i + len(batch["input_ids"]) // 2]
    length = int(batch["attention_mask"][rows].sum(dim=1).max())
    return {name: value[rows, :length] for name, value in batch.items()}


@given(shapes=shapes_of_pairs, seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_the_tokens_of_a_pair_are_those_that_the_stream_lays_out_for_it(shapes, seed):
    batch = collate(shapes, seed, max_length=18, mode=random.Random(seed).choice(["keep_start", "keep_end"]))
    for i, (streamed, longest) in enumerate(pair_tokens(batch).tolist()):
        alone = one_pair(batch, i)
        laid = lay_out(alone["input_ids"], alone["attention_mask"], alone["completion_mask"])
        assert streamed == laid.input_ids.numel()
        assert longest == alone["input_ids"].size(1)


def test_a_prompt_that_only_begins_like_the_other_is_not_shared():
    rows = [{"prompt_ids": [5, 0], "chosen_ids": [7], "rejected_ids": [8]}]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    assert pair_tokens(batch)[0, 0] == 3  # 5 | 0 | 0, and each last token predicts nothing
    batch["completion_mask"][1, 1] = 1  # the rejected row's prompt is 5, and padding looks like the token 0
    assert pair_tokens(batch)[0, 0] == 4


def cost_of(group, tokens, padded):
    """By hand: all rows at the length of the longest, or the sum."""
    if padded:
        return sum(2 * max(tokens[j][1] for j in group) for _ in group)
    return sum(tokens[i][0] for i in group)


@given(
    tokens=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=9),
    limit=st.integers(1, 200),
    padded=st.booleans(),
    processes=st.integers(1, 4),
)
def test_every_pair_is_in_one_group_and_no_group_of_several_is_over_the_limit(tokens, limit, padded, processes):
    streamed, longest = [s for s, _ in tokens], [n for _, n in tokens]
    groups = group_pairs(streamed, longest, limit, padded=padded, processes=processes)
    assert sorted(i for group in groups for i in group) == list(range(len(tokens)))
    assert all(groups)
    assert len(groups) % processes == 0 or len(groups) == len(tokens)
    for group in groups:
        assert len(group) == 1 or cost_of(group, tokens, padded) <= limit
    dealt = deal_groups(groups, [cost_of(group, tokens, padded) for group in groups], processes)
    assert sorted(group for each in dealt for group in each if group) == sorted(groups)
    assert {len(each) for each in dealt} == {-(-len(groups) // processes)}
    assert all(all(each[:-1]) for each in dealt)  # only the last forward of a process may be empty


@given(tokens=st.lists(st.integers(1, 50), min_size=4, max_size=20), processes=st.integers(1, 4))
def test_the_tokens_of_processes_differ_by_a_pair_at_the_most_where_the_limit_leaves_room(tokens, processes):
    groups = group_pairs(tokens, tokens, sum(tokens), padded=False, processes=processes)
    totals = [sum(tokens[i] for i in group) for group in groups]
    assert len(groups) == processes
    assert max(totals) - min(totals) <= max(tokens)


def partitions(items):
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


@given(
    tokens=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=6),
    limit=st.integers(1, 200),
    padded=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_groups_are_as_few_as_can_be_or_for_streams_one_more(tokens, limit, padded):
    def fits(groups):
        return all(len(group) == 1 or cost_of(group, tokens, padded) <= limit for group in groups)

    fewest = min(len(groups) for groups in partitions(list(range(len(tokens)))) if fits(groups))
    groups = group_pairs([s for s, _ in tokens], [n for _, n in tokens], limit, padded=padded)
    assert fewest <= len(groups) <= fewest + (not padded)


def test_groups_are_few_and_of_like_size():
    streamed = [50, 10, 10, 10, 30, 20, 40, 30]
    groups = group_pairs(streamed, streamed, 100, padded=False)
    assert len(groups) == 2  # 200 tokens
    assert sorted(sum(streamed[i] for i in group) for group in groups) == [100, 100]
    longest = [100, 10, 10, 10, 10, 10, 10, 10]
    assert sorted(map(len, group_pairs(longest, longest, 200, padded=True))) == [1, 7]
    sizes = [3, 3, 2, 2, 2]  # the next largest to the smallest group would need three
    assert sorted(sorted(sizes[i] for i in group) for group in group_pairs(sizes, sizes, 6, padded=False)) == [
        [2, 2, 2],
        [3, 3],
    ]
    assert len(group_pairs([10, 5, 5], [10, 5, 5], 99, padded=True, processes=3)) == 3  # two would be as cheap


def test_processes_get_like_tokens_at_each_forward_and_in_total():
    groups = [[0], [1], [2], [3], [4], [5]]
    dealt = deal_groups(groups, [60, 50, 40, 30, 20, 10], 2)
    assert dealt == [[[0], [3], [4]], [[1], [2], [5]]]  # 60, 30, 20 and 50, 40, 10
    assert deal_groups([[0], [1], [2]], [3, 2, 1], 2) == [[[0], []], [[1], [2]]]


def test_rows_by_pair_and_back_are_the_rows():
    rows = {
        "both": torch.rand(6, 5),
        "numbers": torch.rand(6),
        "pairs": torch.rand(3),
        "flags": torch.rand(6, 4) > 0.5,
    }
    table = by_pair(rows, 3)
    assert torch.equal(table["both"][1], rows["both"][[1, 4]])
    assert table["pairs"].shape == (3, 1)
    back = by_row(widen_table(widen_table(table, 2), -2))
    assert all(torch.equal(back[name], rows[name]) for name in rows)
    assert widen_table(table, 2)["flags"].shape == (3, 2, 6)


# --- runs -----------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LOSSES = [{"loss_type": name, "label_smoothing": 0.1} for name in sorted(LOSS_TYPES - BATCH_LOSSES)]
RUNS = [
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    {"token_weighting": "all", "loss_type": ["sigmoid", "sft"]},
    {"token_weighting": "all", "ld_alpha": 0.4},
    {"token_weighting": "top_k", "log_length_pressure": True},
    {"token_weighting": "otpo", "log_length_pressure": True},
    {"mask_samples": 3, "length_penalty": "learned", "gradient_accumulation_steps": 2},
    {"use_weighting": True, "log_token_statistics": False},
    {"balance_end_token": True, "precompute_ref_log_probs": True, "log_length_pressure": True},
    {"token_budget": "dataset", "length_penalty": "learned", "loss_type": ["sigmoid", "sft"]},
    {"peft_config": LORA, "gradient_checkpointing": True},
    {"mask_sharing": "independent", "max_length": 14},
    {"bf16": True},
]


def log_of(trainer):
    steps = []
    trainer.train()
    for entry in trainer.state.log_history:
        steps.append({name: value for name, value in entry.items() if "runtime" not in name and "per_sec" not in name})
    return steps


def watch_forwards(trainer):
    """Fills with (step, number of tokens) of each forward of the policy that is back-propagated."""
    seen = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            seen.append((trainer.state.global_step, kwargs["input_ids"].numel())) if torch.is_grad_enabled() else None
        ),
        with_kwargs=True,
    )
    return seen


# 22 pairs in batches of 3: the last batch of an epoch has one pair, and its step has two batches instead of three.
ACCUMULATED = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 4}


@pytest.mark.parametrize(
    ("options", "stream"),
    [(o, "true") for o in LOSSES] + [(o, stream) for o in RUNS for stream in ("true", "false")],
    ids=lambda value: str({**value, "peft_config": "LoRA"} if "peft_config" in value else value),
)
def test_a_run_in_full_micro_batches_has_the_log_of_plain_accumulation(model_folder, tmp_path, options, stream):
    logs, weights = [], []
    for limit in (None, 90):
        trainer = make_trainer(
            model_folder,
            tmp_path,
            make_pairs(22),
            pair_stream=stream,
            max_tokens_per_forward=limit,
            include_num_input_tokens_seen="non_padding",
            **{**ACCUMULATED, **options},
        )
        seen = watch_forwards(trainer)
        logs.append(log_of(trainer))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert max(tokens for _, tokens in seen) <= 90
    coarse = 2e-2 if options.get("bf16") else 2e-4  # rounding of sums in another order, and Adam's own of 1e-8
    for plain, filled in zip(*logs, strict=True):
        of_margins = {"length_gap/correlation", "length_gap/slope"}  # rounding decides while all margins are 0
        assert plain.keys() - of_margins == filled.keys() - of_margins
        for name, value in plain.items():
            rounded = options.get("bf16") or options.get("precompute_ref_log_probs")
            if name not in of_margins and not (rounded and "accuracies" in name):
                assert filled[name] == pytest.approx(value, rel=coarse, abs=coarse), name
    if not options.get("bf16"):  # there Adam makes a whole step of a gradient that is rounding
        assert (weights[0] - weights[1]).abs().max() < 1e-4


def one_step(trainer, n_batches):
    """Loss and gradients of the first step, and the batches, as the training loop asks for them."""
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), n_batches, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.training_step(trainer.model, batch) for batch in batches)
    return [loss, *(p.grad for p in trainer.model.parameters())], batches


@pytest.mark.parametrize("losses", [["ipo"], ["sigmoid", "sft"]])
@pytest.mark.parametrize("limit", [60, 10_000])
@pytest.mark.parametrize("stream", ["true", "false"])
def test_the_gradients_of_the_micro_batches_add_up_to_those_of_the_step(model_folder, tmp_path, losses, limit, stream):
    gradients = []
    options = {"per_device_train_batch_size": 3, "loss_type": losses, "pair_stream": stream}
    for each in (None, limit):  # batches of 3, 3 and 2 pairs, each a mean of its own
        trainer = make_trainer(model_folder, tmp_path, make_pairs(8), max_tokens_per_forward=each, **options)
        found, batches = one_step(trainer, 3)
        gradients.append(found)
    assert [len(batch["input_ids"]) for batch in batches] == [6, 6, 4]
    for plain, filled in zip(*gradients, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("limit", "forwards"), [(None, 8), (100_000, 1), (110, 2), (1, 8)])
def test_an_accumulation_of_single_pairs_runs_in_as_few_forwards_as_the_limit_allows(
    model_folder, tmp_path, limit, forwards
):
    trainer = make_trainer(
        model_folder,
        tmp_path,
        make_pairs(24, min_len=4, max_len=6),
        pair_stream="true",
        token_weighting="all",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        max_tokens_per_forward=limit,
        max_steps=3,
    )
    seen = watch_forwards(trainer)
    substeps = []

    class Substeps(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            substeps.append(state.global_step)

    trainer.add_callback(Substeps())
    trainer.train()
    assert [step for step, _ in seen] == [step for step in range(3) for _ in range(forwards)]
    assert substeps == [step for step in range(3) for _ in range(7)]
    if limit == 110:  # of like size
        assert all(abs(a[1] - b[1]) <= 7 for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_a_micro_batch_is_back_propagated_before_the_next_is_computed(model_folder, tmp_path):
    trainer = make_trainer(
        model_folder, tmp_path, pair_stream="false", max_tokens_per_forward=90, per_device_train_batch_size=8
    )
    order = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda *_: order.append("forward") if torch.is_grad_enabled() else None
    )
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda *args, **kwargs: (order.append("backward"), backward(*args, **kwargs))[1]
    one_step(trainer, 1)
    assert len(order) >= 6
    assert order == ["forward", "backward"] * (len(order) // 2)


def test_a_step_that_a_callback_stops_early_leaves_no_pairs_to_the_next(model_folder, tmp_path):
    """The next call of `train` begins with its own batches."""

    class StopAtSubstep(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 1

    options = {"gradient_accumulation_steps": 2, "max_tokens_per_forward": 500, "logging_steps": 1}
    trainer = make_trainer(model_folder, tmp_path, pair_stream="false", **options)
    callback = StopAtSubstep()
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 1
    assert all(p.grad is None for p in trainer.model.parameters())  # nothing is computed before the last batch
    trainer.remove_callback(callback)
    seen = []
    share = trainer.share_pairs
    trainer.share_pairs = lambda batches: seen.append([len(b["input_ids"]) // 2 for b in batches]) or share(batches)
    trainer.train()
    assert seen == [[4, 4]] * 3


@pytest.mark.parametrize("loss", sorted(BATCH_LOSSES))
def test_losses_that_compare_the_pairs_of_a_batch_are_refused(tmp_path, loss):
    with pytest.raises(ValueError, match="needs losses that are means over the pairs"):
        SamPOConfig(**training_options(tmp_path, loss_type=loss, max_tokens_per_forward=100))


# --- several processes -----------------------------------------------------------------------------------------------


class Processes:
    """Several processes as threads: `gather` of each waits for all, and they must call it in the same order."""

    def __init__(self, n):
        self.barrier, self.values = threading.Barrier(n, timeout=20), [None] * n

    def gather_of(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait()
            shapes = {(tuple(each.shape), each.dtype) for each in self.values}
            assert len(shapes) == 1, shapes
            found = torch.cat(self.values)
            self.barrier.wait()
            return found

        return gather

    def run(self, work):
        """The result of `work(rank, gather)` of each."""
        n = len(self.values)
        with ThreadPoolExecutor(n) as pool:
            return list(pool.map(lambda rank: work(rank, self.gather_of(rank)), range(n)))


def scores_of(inputs):
    """Numbers that tell rows and positions apart, as log-probs of a batch."""
    rows = inputs["input_ids"].float() * inputs["attention_mask"]
    sums = rows.sum(dim=1)
    draw = Draw(weights=rows[:, 1:] / 2, ref_sums=-sums, scores=sums)
    output = SimpleNamespace(
        entropy=rows[:, 1:] * 3, is_top1=rows[:, 1:] > 30, mean_logits=None, log_sum_sq_probs=None
    )
    return Scored(output, rows[:, 1:], inputs["ref"], [draw], sums.view(2, -1).sum(dim=0))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [[[2, 2], [2, 2]], [[3, 1], [1, 1], [2, 2]], [[2], [1]], [[1], [1], [1], [4]]])
def test_each_pair_is_computed_once_and_its_log_probs_return_to_its_batch(sizes, padded):
    rng, batches = random.Random(3), []
    for of_rank in sizes:
        batches.append([])
        for n_pairs in of_rank:
            batch = collate([[rng.randint(1, 20) for _ in range(3)] for _ in range(n_pairs)], rng.randint(0, 99))
            batches[-1].append({**batch, "ref": torch.rand(batch["input_ids"][:, 1:].shape)})

    def work(rank, gather):
        parts, weights = [], []
        options = {"padded": padded, "processes": len(sizes), "rank": rank, "gather": gather}
        step = Step(batches[rank], 120, **options)
        for part in step:
            n_pairs = len(part.inputs["input_ids"]) // 2
            parts += [part.inputs["input_ids"][[i, i + n_pairs]] for i in range(n_pairs) if part.pairs]
            weights += [
                part.pair_weights,
                part.token_weights * part.inputs["completion_mask"][:n_pairs, 1:].sum(dim=1),
            ]
            part.keep(scores_of(part.inputs))
        return len(list(step)), parts, sum(each.sum() for each in weights), step.scored_batches()

    done = Processes(len(sizes)).run(work)
    assert len({n_forwards for n_forwards, *_ in done}) == 1
    computed = [tuple(row[row > 0].tolist()) for _, parts, *_ in done for part in parts for row in part]
    given = [tuple(row[row > 0].tolist()) for each in batches for batch in each for row in batch["input_ids"]]
    assert sorted(computed) == sorted(given)
    n_batches = sum(map(len, sizes))
    assert sum(total for *_, total, _ in done) == pytest.approx(2 * n_batches)  # each batch has two means
    for (*_, found), own in zip(done, batches, strict=True):
        for scored, batch in zip(found, own, strict=True):
            expected = scores_of(batch).tensors()
            actual = scored.tensors()
            assert actual.keys() == expected.keys()
            for name in expected.keys() - {"ref_logps"}:
                assert torch.equal(actual[name], expected[name]), name
            real = batch["attention_mask"][:, 1:].bool()
            assert torch.equal(scored.ref_logps[real], batch["ref"][real])


# --- auto ------------------------------------------------------------------------------------------------------------


@given(room=st.integers(10, 5000), one=st.integers(1, 10), most=st.integers(1, 300))
def test_the_budget_is_the_largest_that_fits_to_one_pair_or_a_sixteenth(room, one, most):
    asked = []
    found = largest_that_fits(lambda tokens: asked.append(tokens) or tokens <= room, one, most)
    assert found % one == 0
    best = min(room // one, most) * one
    assert best - max(one, best / 16) <= found <= best
    assert max(asked) <= 2 * best + one  # never far more than fits
    assert len(asked) <= 2 + 2 * math.log2(most + 1)


def test_a_pair_that_does_not_fit_is_an_error_with_advice():
    with pytest.raises(RuntimeError, match=r"must fit the memory of the device, got out of memory at 64 tokens"):
        largest_that_fits(lambda tokens: False, 64, 8)


def test_the_probe_runs_out_of_memory_and_leaves_nothing_behind(model_folder, tmp_path):
    options = {"pair_stream": "true", "max_tokens_per_forward": "auto", "gradient_accumulation_steps": 8}
    noisy = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(model_folder, tmp_path, peft_config=noisy, disable_dropout=False, **options)
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset
    )
    seen = []

    def run_out(module, args, kwargs):
        seen.append(kwargs["input_ids"].numel())
        if seen[-1] > 500:
            raise torch.OutOfMemoryError

    hook = trainer.model.get_base_model().base_model.register_forward_pre_hook(run_out, with_kwargs=True)
    before = torch.get_rng_state()
    budget = probe(trainer)
    hook.remove()
    pairs = 500 // (2 * (longest - 1))
    assert 0.9 * 2 * longest * (pairs * 15 / 16 - 1) <= budget <= 0.9 * 2 * longest * pairs
    assert max(seen) > 500
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_is_found_once_said_and_kept_in_the_checkpoint(model_folder, tmp_path, monkeypatch, caplog):
    found = iter([120, 70])
    monkeypatch.setattr(micro_batch_trainer, "find_token_budget", lambda trainer: next(found))
    options = {"pair_stream": "true", "max_tokens_per_forward": "auto", "save_strategy": "steps", "save_steps": 1}
    options |= {"gradient_accumulation_steps": 3}
    whole = make_trainer(model_folder, tmp_path, **options)
    log = log_of(whole)
    resumed = make_trainer(model_folder, tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.tokens_per_forward == whole.tokens_per_forward == 120
    losses = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert losses == [entry["loss"] for entry in log if "loss" in entry]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    monkeypatch.undo()
    with caplog.at_level("INFO"):
        trainer = make_trainer(model_folder, tmp_path / "c", max_tokens_per_forward="auto", max_steps=1)
        trainer.train()
    assert trainer.tokens_per_forward == 4096
    assert caplog.text.count("max_tokens_per_forward: auto takes 4,096 tokens") == 1


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -3, 2.5, "many"])
def test_a_limit_that_is_no_count_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="`max_tokens_per_forward` must be a whole number of at least 1"):
        SamPOConfig(**training_options(tmp_path, max_tokens_per_forward=value))


def test_what_cannot_be_cut_at_pair_borders_is_refused(model_folder, tmp_path):
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="prompt-learning adapter"):
        make_trainer(model_folder, tmp_path, max_tokens_per_forward=100, peft_config=peft)
    config = MixtralConfig(
        vocab_size=69,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    folder = str(tmp_path / "experts")
    MixtralForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ValueError, match="mixture of experts"):
        make_trainer(folder, tmp_path, max_tokens_per_forward=100)


# --- the head -------------------------------------------------------------------------------------------------------


def projected(trainer, monkeypatch):
    """Number of positions and statistics of each call of the LM head, by TRL's function or that for the CPU."""
    import trl.trainer.utils

    from sampo.scoring import cpu_head

    seen = []

    def watched(function):
        class Watched:
            @staticmethod
            def apply(hidden, *rest):
                seen.append((hidden.numel() // hidden.size(-1), rest[-1]))
                return function.apply(hidden, *rest)

        return Watched

    for module, name in ((trl.trainer.utils, "_ChunkedLogProbFunction"), (cpu_head, "TokenLogProbs")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    trainer.train()
    return seen


@pytest.mark.parametrize("stream", ["true", "false"])
def test_only_counted_tokens_are_projected_by_policy_and_reference(model_folder, tmp_path, monkeypatch, stream):
    trainer = make_trainer(model_folder, tmp_path, pair_stream=stream, max_steps=3)
    seen = projected(trainer, monkeypatch)
    if stream == "true":
        seen = seen[2 * 2 :]  # the comparison of the first batch
    batches = [trainer.prepare_batch(batch) for batch in trainer.get_train_dataloader()][:3]
    trainer.run_state.epoch = 0
    for pairs, policy, reference in zip(batches, seen[::2], seen[1::2], strict=True):
        chosen, rejected = pairs.lengths.chunk(2)
        assert policy[0] == reference[0] == 2 * torch.minimum(chosen, rejected).sum()


def test_statistics_of_tokens_can_be_switched_off(model_folder, tmp_path, monkeypatch):
    names = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    logs = []
    for on in (True, False):
        with monkeypatch.context() as patch:
            trainer = make_trainer(model_folder, tmp_path, log_token_statistics=on, pair_stream="false")
            asked = {outputs for _, outputs in projected(trainer, patch)}
        assert ({"entropy", "mean_logits", "is_top1"} <= set().union(*asked)) is on
        logs.append(trainer.state.log_history[:3])
    for with_them, without in zip(*logs, strict=True):
        assert names <= with_them.keys()
        assert with_them.keys() - without.keys() == names
        assert without["loss"] == with_them["loss"]
        assert without["rewards/margins"] == with_them["rewards/margins"]


def test_without_statistics_an_adapter_still_trains(model_folder, tmp_path):
    a, b = (
        log_of(make_trainer(model_folder, tmp_path, log_token_statistics=on, peft_config=LORA, pair_stream="false"))
        for on in (True, False)
    )
    assert [e["loss"] for e in a if "loss" in e] == [e["loss"] for e in b if "loss" in e]
