"""A batch cut into pieces: the same loss, gradients and log, with the memory of one piece; and the compact head."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig
from streams import collate
from tiny import make_pairs, make_tokenizer, save_model, training_options
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sampo import SamPOConfig, SamPOTrainer
from sampo.config_checks import BATCH_LOSSES, LOSS_TYPES
from sampo.scoring.packing import lay_out
from sampo.training.micro_batches import group_pairs, pair_tokens, put_pairs, take_pairs

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


# --- which pairs go together -----------------------------------------------------------------------------------------


@given(shapes=shapes_of_pairs, seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_the_tokens_of_a_pair_are_those_that_the_stream_lays_out_for_it(shapes, seed):
    batch = collate(shapes, seed, max_length=18, mode=random.Random(seed).choice(["keep_start", "keep_end"]))
    streamed, longest = pair_tokens(batch)
    for i in range(len(shapes)):
        alone = take_pairs(batch, [i])
        laid = lay_out(alone["input_ids"], alone["attention_mask"], alone["completion_mask"])
        assert streamed[i] == laid.input_ids.numel()
        assert longest[i] == alone["attention_mask"].sum(dim=1).max()
        assert alone["input_ids"].size(1) == longest[i]


def test_a_prompt_that_only_begins_like_the_other_is_not_shared():
    rows = [{"prompt_ids": [5, 0], "chosen_ids": [7], "rejected_ids": [8]}]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    assert pair_tokens(batch)[0] == [3]  # 5 | 0 | 0, and each last token predicts nothing
    batch["completion_mask"][1, 1] = 1  # the rejected row's prompt is 5, and padding looks like the token 0
    assert pair_tokens(batch)[0] == [4]


@given(
    tokens=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=9),
    limit=st.integers(1, 200),
    padded=st.booleans(),
    at_least=st.integers(1, 12),
)
def test_every_pair_is_in_one_group_and_no_group_of_several_is_over_the_limit(tokens, limit, padded, at_least):
    streamed, longest = [s for s, _ in tokens], [n for _, n in tokens]
    groups = group_pairs(streamed, longest, limit, padded=padded, at_least=at_least)
    assert sorted(i for group in groups for i in group) == list(range(len(tokens)))
    assert len(groups) >= min(at_least, len(tokens))
    for group in groups:
        cost = 2 * len(group) * max(longest[i] for i in group) if padded else sum(streamed[i] for i in group)
        assert len(group) == 1 or cost <= limit


def test_groups_are_few_and_of_like_size():
    streamed = [50, 10, 10, 10, 30, 20, 40, 30]
    groups = group_pairs(streamed, streamed, 100, padded=False)
    assert len(groups) == 2  # 200 tokens
    assert sorted(sum(streamed[i] for i in group) for group in groups) == [100, 100]


def test_pieces_put_back_are_the_batch():
    batch = collate([(3, 4, 5), (2, 9, 1), (6, 2, 2)])
    rows = torch.rand(batch["input_ids"].shape) * batch["attention_mask"]
    for name, whole in {"rows": rows, "places": rows[:, 1:], "numbers": torch.rand(6), "pairs": torch.rand(3)}.items():
        back = torch.zeros_like(whole)
        for group in ([2, 0], [1]):
            taken = take_pairs({**batch, "it": whole}, group)
            assert name != "places" or taken["it"].size(1) == taken["input_ids"].size(1) - 1
            put_pairs(back, group, taken["it"], n_pairs=3)
        assert torch.equal(back, whole), name


# --- runs ------------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LOSSES = [{"loss_type": name, "label_smoothing": 0.1} for name in sorted(LOSS_TYPES - BATCH_LOSSES)]
RUNS = [
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    {"token_weighting": "all", "loss_type": ["sigmoid", "sft"]},
    {"token_weighting": "all", "ld_alpha": 0.4},
    {"token_weighting": "top_k", "log_length_pressure": True},
    {"mask_samples": 3, "length_penalty": "learned", "gradient_accumulation_steps": 2},
    {"use_weighting": True, "log_token_statistics": False},
    {"balance_end_token": True, "precompute_ref_log_probs": True, "log_length_pressure": True},
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


@pytest.mark.parametrize(
    ("options", "stream"),
    [(o, "true") for o in LOSSES] + [(o, stream) for o in RUNS for stream in ("true", "false")],
    ids=lambda value: str({**value, "peft_config": "LoRA"} if "peft_config" in value else value),
)
def test_a_run_in_pieces_has_the_log_of_a_run_without(model_folder, tmp_path, options, stream):
    seen = []
    logs, weights = [], []
    for limit in (None, 90):
        trainer = make_trainer(
            model_folder,
            tmp_path,
            pair_stream=stream,
            max_tokens_per_forward=limit,
            per_device_train_batch_size=6,
            max_steps=3,
            **options,
        )
        trainer.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()) if torch.is_grad_enabled() else None,
            with_kwargs=True,
        )
        logs.append(log_of(trainer))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
        largest = max(seen)
        seen.clear()
    assert largest <= 90
    coarse = 2e-2 if options.get("bf16") else 2e-4  # rounding of sums in another order, and Adam's own of 1e-8
    for whole, pieces in zip(*logs, strict=True):
        of_margins = {"length_gap/correlation", "length_gap/slope"}  # rounding decides while all margins are 0
        assert whole.keys() - of_margins == pieces.keys() - of_margins
        for name, value in whole.items():
            rounded = options.get("bf16") or options.get("precompute_ref_log_probs")
            if name not in of_margins and not (rounded and "accuracies" in name):
                assert pieces[name] == pytest.approx(value, rel=coarse, abs=coarse), name
    if not options.get("bf16"):  # there Adam makes a whole step of a gradient that is rounding
        assert (weights[0] - weights[1]).abs().max() < 1e-4


def test_the_gradients_of_the_pieces_add_up_to_those_of_the_batch(model_folder, tmp_path):
    gradients = []
    for limit in (None, 60):
        trainer = make_trainer(
            model_folder, tmp_path, max_tokens_per_forward=limit, per_device_train_batch_size=8, loss_type="ipo"
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.training_step(trainer.model, batch)
        gradients.append([loss, *(p.grad for p in trainer.model.parameters())])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


def test_a_piece_is_back_propagated_before_the_next_is_computed(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_tokens_per_forward=90, per_device_train_batch_size=8)
    order = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda *_: order.append("forward") if torch.is_grad_enabled() else None
    )
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda *args, **kwargs: (order.append("backward"), backward(*args, **kwargs))[1]
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert len(order) >= 6
    assert order == ["forward", "backward"] * (len(order) // 2)


def test_the_loss_of_trl_runs_once_for_each_micro_batch(model_folder, tmp_path, monkeypatch):
    trainer = make_trainer(model_folder, tmp_path, max_tokens_per_forward=90, per_device_train_batch_size=8)
    batch = next(iter(trainer.get_train_dataloader()))
    trl_loss, rows = DPOTrainer._compute_loss, []

    def counted(view, model, inputs, return_outputs):
        rows.append(len(inputs["input_ids"]))
        return trl_loss(view, model, inputs, return_outputs)

    monkeypatch.setattr(DPOTrainer, "_compute_loss", counted)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch)
    n_micro_batches = len(trainer.micro_batch_groups(batch))
    assert n_micro_batches >= 3
    assert len(rows) == n_micro_batches
    assert rows[-1] == 16  # the last one computes loss and metrics of all pairs


@pytest.mark.parametrize("loss", sorted(BATCH_LOSSES))
def test_losses_that_compare_the_pairs_of_a_batch_are_refused(tmp_path, loss):
    with pytest.raises(ValueError, match="needs losses that are means over the pairs"):
        SamPOConfig(**training_options(tmp_path, loss_type=loss, max_tokens_per_forward=100))


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


# --- the head --------------------------------------------------------------------------------------------------------


def projected(trainer, monkeypatch):
    """Number of positions of each call of the LM head, by way of TRL's function."""
    import trl.trainer.utils

    seen = []
    function = trl.trainer.utils._ChunkedLogProbFunction

    class Watched:
        @staticmethod
        def apply(hidden, *rest):
            seen.append((hidden.numel() // hidden.size(-1), rest[-1]))
            return function.apply(hidden, *rest)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Watched)
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
            trainer = make_trainer(model_folder, tmp_path, log_token_statistics=on)
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
        log_of(make_trainer(model_folder, tmp_path, log_token_statistics=on, peft_config=LORA)) for on in (True, False)
    )
    assert [e["loss"] for e in a if "loss" in e] == [e["loss"] for e in b if "loss" in e]
