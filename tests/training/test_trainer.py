"""`SamPOTrainer` against TRL's `DPOTrainer`, and against losses computed token by token from the model's logits."""

import json
import logging
import math
from pathlib import Path

import oracles
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import PLAIN, make_model, make_pairs, make_tokenizer, save_model, training_options, with_weights
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer

from sampo import SamPOConfig, SamPOTrainer
from sampo.config_checks import LOSS_TYPES
from sampo.data.end_tokens import end_token_ids
from sampo.training.run_state import RunState
from sampo.weighting import WEIGHTINGS, draw_keys, token_weights

LN2 = math.log(2)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TIMES = ("runtime", "per_second")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def make_trainer(model, output_dir, *, data=None, eval_data=None, trainer=SamPOTrainer, config=SamPOConfig, **options):
    kwargs = {name: options.pop(name) for name in ("ref_model", "peft_config", "processing_class") if name in options}
    options = (PLAIN if config is SamPOConfig else {}) | options
    data = make_pairs(32) if data is None else data
    return trainer(
        model=model,
        args=config(**training_options(output_dir, **options)),
        train_dataset=with_weights(data) if options.get("token_weighting") == "column" else data,
        eval_dataset=eval_data,
        **kwargs,
    )


def history(trainer, resume=None) -> list[dict]:
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.log_history


def losses(log) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


# --- TRL's own behaviour ---------------------------------------------------------------------------------------------

PARITY = [{"loss_type": name} for name in sorted(LOSS_TYPES)] + [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "loss_type": "ipo"},
    {"ld_alpha": 0.5},
    {"use_weighting": True},
    {"precompute_ref_log_probs": True},
    {"precompute_ref_log_probs": True, "ld_alpha": 0.3},
    {"max_length": 14},
    {"gradient_accumulation_steps": 2},
    {"gradient_checkpointing": True},
]


@pytest.mark.parametrize("options", PARITY, ids=str)
def test_with_all_tokens_it_is_trls_trainer_to_the_bit(model_folder, tmp_path, options):
    options = {"label_smoothing": 0.1, "eval_strategy": "steps", "eval_steps": 2, **options}
    logs = []
    for trainer, config in ((DPOTrainer, DPOConfig), (SamPOTrainer, SamPOConfig)):
        extra = {"token_weighting": "all"} if config is SamPOConfig else {}
        made = make_trainer(
            model_folder,
            tmp_path,
            eval_data=make_pairs(10, seed=5),
            trainer=trainer,
            config=config,
            **options,
            **extra,
        )
        logs.append(history(made))
    theirs, ours = logs
    assert len(theirs) == len(ours)
    compared = 0
    for their_entry, our_entry in zip(theirs, ours, strict=True):
        for name, value in their_entry.items():
            if not name.endswith(TIMES):
                if "precompute_ref_log_probs" in options:  # TRL's sums and our tokens come from other batches
                    if name.endswith("accuracies") and abs(their_entry[name.replace("accuracies", "margins")]) < 1e-6:
                        continue  # the sign of what is rounding
                    value = pytest.approx(value, rel=1e-5, abs=1e-6)
                assert our_entry[name] == value, name
                compared += 1
    assert compared > 60


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_is_trls_ld_alpha(tmp_path, alpha):
    logs = []
    for trainer, config, options in (
        (DPOTrainer, DPOConfig, {"ld_alpha": alpha}),
        (SamPOTrainer, SamPOConfig, {"token_weighting": "ld", "ld_tail_weight": alpha}),
    ):
        made = make_trainer(
            make_model(seed=2),
            tmp_path,
            ref_model=make_model(seed=1),
            processing_class=make_tokenizer(),
            eval_data=make_pairs(10, seed=5),
            trainer=trainer,
            config=config,
            eval_strategy="steps",
            eval_steps=2,
            **options,
        )
        logs.append(history(made))
    compared = 0
    for theirs, ours in zip(*logs, strict=True):
        for name in theirs:
            if name.endswith(("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm")):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name  # float32 sums
                compared += 1
    assert compared > 15


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_trls_documented_uses_run_with_the_class_swapped(model_folder, tmp_path, conversational, peft):
    """Standard and conversational data, PEFT, a list of losses, a dict of evaluation sets, evaluate() on new data."""
    data = make_pairs(16, conversational=conversational)
    trainer = SamPOTrainer(
        model_folder,
        None,
        SamPOConfig(**training_options(tmp_path, loss_type=["sigmoid", "sft"], eval_strategy="epoch", max_steps=4)),
        None,
        data,
        {"a": make_pairs(6, seed=1, conversational=conversational), "b": make_pairs(5, seed=2)}
        if not conversational
        else {"a": make_pairs(6, seed=1, conversational=True)},
        peft_config=LoraConfig(**LORA) if peft else None,
    )
    log = history(trainer)
    assert any("eval_a_length/chosen" in entry for entry in log)
    fresh = trainer.evaluate(make_pairs(5, seed=3, conversational=conversational))
    assert fresh["eval_length/chosen"] > 0
    trainer.save_model(tmp_path / "saved")
    kind = PeftModel if peft else AutoModelForCausalLM
    if peft:
        kind.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "saved")
    else:
        kind.from_pretrained(tmp_path / "saved")


def test_streamed_data_train_and_a_learned_penalty_then_needs_its_scale(model_folder, tmp_path):
    stream = make_pairs(16).to_iterable_dataset()
    log = history(
        make_trainer(model_folder, tmp_path, data=stream, length_penalty="learned", length_penalty_scale=10.0)
    )
    assert len(losses(log)) == 3
    with pytest.raises(ValueError, match="`length_penalty_scale` must be given"):
        make_trainer(model_folder, tmp_path, data=stream, length_penalty="learned")


def test_compute_metrics_still_gets_the_logits(model_folder, tmp_path):
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"seen": 1.0}

    trainer = SamPOTrainer(
        model=model_folder,
        args=SamPOConfig(**training_options(tmp_path)),
        train_dataset=make_pairs(8),
        eval_dataset=make_pairs(4, seed=1),
        compute_metrics=compute_metrics,
    )
    with pytest.warns(FutureWarning, match="return_outputs"):
        assert trainer.evaluate()["eval_seen"] == 1.0
    assert shapes[0][-1] == 69


# --- the loss, from logits -------------------------------------------------------------------------------------------


def token_logps(model, row) -> list[float]:
    ids = torch.tensor([row])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[:, 0].tolist()


def end_probs(model, row, end_id) -> list[float]:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0, :-1].double().softmax(-1)[:, end_id].tolist()


def oracle_scores(
    policy,
    reference,
    pair,
    *,
    name,
    seed,
    epoch,
    end_ids,
    keep_end=False,
    sides="both",
    gamma=1.0,
    k=0,
    balance=False,
    totals=None,
):
    """(S_w, S_l) of one pair, and the log-probs of the chosen tokens, from the equations."""
    result, chosen_logps = [], None
    n_prompt = len(pair["prompt_ids"])
    given = {side: pair.get(side.replace("ids", "weights")) for side in ("chosen_ids", "rejected_ids")}
    if name == "otpo":
        with torch.no_grad():
            states = [
                policy.model(torch.tensor([pair["prompt_ids"] + pair[side]])).last_hidden_state[0, n_prompt - 1 : -1]
                for side in given
            ]
        given = dict(zip(given, oracles.transport_weights(*(each.tolist() for each in states)), strict=True))
    for side, rival in (("chosen_ids", "rejected_ids"), ("rejected_ids", "chosen_ids")):
        row, own = pair["prompt_ids"] + pair[side], len(pair[side])
        logps, ref = (token_logps(m, row)[n_prompt - 1 :] for m in (policy, reference))
        ends = [i for i, token in enumerate(pair[side]) if token in end_ids]
        budget = None
        if totals is not None:
            both = totals if side == "chosen_ids" else totals[::-1]
            budget = oracles.dataset_budget(name, own, *both, oracles.row_key(row, seed, epoch, k))
        w = oracles.weights(
            name,
            own,
            len(pair[rival]),
            keys=oracles.row_keys(row, seed, epoch, k)[n_prompt:],
            log_ratios=[a - b for a, b in zip(logps, ref, strict=True)],
            end=ends[-1] if keep_end and ends else None,
            whole=sides == "rejected" and side == "chosen_ids",
            gamma=gamma,
            budget=budget,
            given=given[side],
        )
        if balance and ends:
            at = ends[-1]
            p = end_probs(reference, row, pair[side][at])[n_prompt - 1 :]
            w[at] = sum(w[t] * p[t] for t in range(own) if t != at) / max(1 - p[at], 0.01)
        result.append(sum(x * (a - b) for x, a, b in zip(w, logps, ref, strict=True)))
        chosen_logps = chosen_logps or logps
    return *result, chosen_logps


def sigmoid_loss(logit):
    return math.log1p(math.exp(-logit))


ORACLE_CASES = [
    {"token_weighting": name, "sampled_sides": sides, "keep_end_token": keep}
    for name, method in WEIGHTINGS.items()
    for sides in (("both", "rejected") if method.downsamples else ("both",))
    for keep in ((False, True) if method.can_keep_end else (False,))
] + [
    {"token_weighting": "sampo", "length_penalty": 0.05},
    {"token_weighting": "mean", "length_penalty": 0.05},
    *({"token_weighting": name, "dpop_lambda": 2.0} for name in WEIGHTINGS),
    {"token_weighting": "sampo", "dpop_lambda": 2.0, "length_penalty": 0.05, "mask_samples": 3},
    {"token_weighting": "expected", "dpop_lambda": 2.0, "balance_end_token": True},
    {"token_weighting": "sampo", "mask_samples": 5},
    {"token_weighting": "sampo", "loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 0.3]},
    {"token_weighting": "expected", "loss_type": ["sft"]},
    *({"token_weighting": name, "balance_end_token": True} for name in WEIGHTINGS),
    *(
        {"token_weighting": name, "token_budget": "dataset", "sampled_sides": sides}
        for name, method in WEIGHTINGS.items()
        if method.downsamples
        for sides in ("both", "rejected")
    ),
    {"token_weighting": "sampo", "token_budget": "dataset", "token_totals": [50, 30], "mask_samples": 3},
    {"token_weighting": "expected", "token_budget": "dataset", "keep_end_token": True, "length_penalty": 0.05},
    {"token_weighting": "sampo", "token_budget": "dataset", "balance_end_token": True, "sampled_sides": "rejected"},
    {"token_weighting": "sampo", "balance_end_token": True, "sampled_sides": "rejected", "length_penalty": 0.05},
    {"token_weighting": "sampo", "balance_end_token": True, "mask_samples": 3},
    {"token_weighting": "all", "balance_end_token": True, "loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 0.3]},
]


def test_otpo_has_the_same_losses_whatever_the_forward(tmp_path):
    logs = []
    for way in ("false", "true"):
        options = {"token_weighting": "otpo", "pair_stream": way, "processing_class": make_tokenizer()}
        trainer = make_trainer(make_model(seed=2), tmp_path, ref_model=make_model(seed=1), **options)
        logs.append(losses(history(trainer)))
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)


def test_otpo_is_refused_where_the_hidden_states_are_not_seen(model_folder, tmp_path):
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="`token_weighting: otpo` needs the hidden states of the policy"):
        make_trainer(model_folder, tmp_path, token_weighting="otpo", peft_config=peft)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda c: ",".join(str(v) for v in c.values()))
def test_the_loss_is_that_of_a_loop_over_tokens(model_folder, tmp_path, case, training):
    reference, policy = make_model(seed=1), make_model(seed=2)
    balance = case.get("balance_end_token", False)
    trainer = make_trainer(
        policy,
        tmp_path,
        ref_model=reference,
        processing_class=make_tokenizer(),
        data=make_pairs(6, conversational=case.get("keep_end_token", False) or balance),
        decay_gamma=0.9,
        **case,
    )
    rows = [trainer.train_dataset[i] for i in range(6)]
    totals = None
    if case.get("token_budget") == "dataset":
        counted = [sum(len(row[side]) for row in rows) for side in ("chosen_ids", "rejected_ids")]
        totals = case.get("token_totals", counted)
        assert totals[0] != totals[1]
    for row in rows[::2] if balance else ():  # not all responses end in the same way
        row["rejected_ids"] = [1 if token == 3 else token for token in row["rejected_ids"]]
    batch = trainer.data_collator(rows)
    trainer.model.train(training)
    loss = trainer.compute_loss(trainer.model, batch).item()

    weights = dict(zip(trainer.args.loss_type, trainer.args.loss_weights or [1.0, 1.0], strict=False))
    expected, all_chosen = 0.0, []
    draws = trainer.args.mask_samples
    for pair in rows:
        for k in range(draws):
            chosen, rejected, chosen_logps = oracle_scores(
                policy,
                reference,
                pair,
                name=case["token_weighting"],
                seed=7,
                epoch=0 if training else -1,
                end_ids={1, 3},
                keep_end=case.get("keep_end_token", balance),
                balance=balance,
                sides=case.get("sampled_sides", "both"),
                gamma=0.9,
                k=k,
                totals=totals,
            )
            fallen = max(0.0, -chosen)
            logit = 0.1 * (chosen - case.get("dpop_lambda", 0.0) * fallen - rejected)
            logit += case.get("length_penalty", 0.0) * (len(pair["chosen_ids"]) - len(pair["rejected_ids"]))
            expected += weights.get("sigmoid", 0.0) * sigmoid_loss(logit) / draws / len(rows)
        all_chosen += chosen_logps
    expected -= weights.get("sft", 0.0) * sum(all_chosen) / len(all_chosen)
    assert loss == pytest.approx(expected, abs=2e-5)  # fp32 sums of some twenty terms


def test_ipo_divides_by_the_number_of_counted_tokens(model_folder, tmp_path):
    reference, policy = make_model(seed=1), make_model(seed=2)
    trainer = make_trainer(
        policy, tmp_path, ref_model=reference, processing_class=make_tokenizer(), data=make_pairs(6), loss_type="ipo"
    )
    rows = [trainer.train_dataset[i] for i in range(6)]
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)).item()
    expected = 0.0
    for pair in rows:
        chosen, rejected, _ = oracle_scores(policy, reference, pair, name="sampo", seed=7, epoch=0, end_ids=set())
        shorter = min(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        expected += ((chosen - rejected) / shorter - 1 / (2 * 0.1)) ** 2 / len(rows)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
def test_a_row_that_begins_within_the_completion_counts_only_tokens_that_are_predicted(tmp_path):
    """`keep_end` can cut the whole prompt; then the first token of a row is of the completion, without a log-prob."""
    reference, policy = make_model(seed=1), make_model(seed=2)
    trainer = make_trainer(
        policy,
        tmp_path,
        ref_model=reference,
        processing_class=make_tokenizer(),
        data=make_pairs(6, min_len=8),
        loss_type="ipo",
        truncation_mode="keep_end",
        max_length=6,
    )
    rows = [trainer.train_dataset[i] for i in range(6)]
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)).item()
    expected = 0.0
    for pair in rows:
        sums = []
        for side in ("chosen_ids", "rejected_ids"):
            row = (pair["prompt_ids"] + pair[side])[-6:]
            assert len(pair[side]) > 6
            sums.append(sum(a - b for a, b in zip(token_logps(policy, row), token_logps(reference, row), strict=True)))
        expected += ((sums[0] - sums[1]) / 5 - 1 / (2 * 0.1)) ** 2 / len(rows)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert trainer.length_recorder.sums["train"].metrics()["length/chosen"] == 5


def test_training_pushes_only_the_counted_tokens_through_the_head(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, data=make_pairs(8, longer="chosen"))
    labels = []
    original = trainer.model.forward

    def forward(**kwargs):
        labels.append(kwargs["shift_labels"])
        return original(**kwargs)

    trainer.model.forward = forward
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.compute_loss(trainer.model.train(), batch)
    rejected = sum(len(trainer.train_dataset[i]["rejected_ids"]) for i in range(8))
    assert labels[0].shape == (1, 2 * rejected)


# --- the reference ---------------------------------------------------------------------------------------------------


def references(kind, folder):
    if kind == "copy":
        return {"model": folder}
    if kind == "separate":
        model = AutoModelForCausalLM.from_pretrained
        return {"model": model(folder), "ref_model": model(folder), "processing_class": make_tokenizer()}
    if kind == "adapter disabled":
        return {"model": folder, "peft_config": LoraConfig(**LORA)}
    base = AutoModelForCausalLM.from_pretrained(folder)
    peft = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False))  # an adapter that does something
    return {"model": peft, "processing_class": make_tokenizer()}


KINDS = {
    "copy": "a copy of the initial policy",
    "separate": "the `ref_model` that was passed",
    "adapter disabled": "the base model, with the adapter disabled",
    "ref adapter": 'a copy of the adapter as it was passed (adapter "ref")',
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_policy_equal_to_reference_gives_ln_2_and_zero_margins(model_folder, tmp_path, caplog, kind, name):
    with caplog.at_level(logging.INFO, logger="sampo"):
        setup = references(kind, model_folder)
        log = history(make_trainer(setup.pop("model"), tmp_path, token_weighting=name, **setup))
    first = log[0]
    assert first["loss"] == pytest.approx(LN2, abs=1e-7)
    assert first["rewards/margins"] == 0
    assert losses(log)[-1] != pytest.approx(LN2, abs=1e-5)  # and then it learns
    assert f"reference: {KINDS[kind]}" in caplog.text
    assert "The first loss is" not in caplog.text


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_balanced_end_token_leaves_no_pressure_at_the_start_whatever_the_reference(
    model_folder, tmp_path, kind, stream
):
    pressures = {}
    for balance in (True, False):
        setup = references(kind, model_folder)
        log = history(
            make_trainer(
                setup.pop("model"),
                tmp_path / str(balance),
                data=make_pairs(32, conversational=True),
                balance_end_token=balance,
                log_length_pressure=True,
                pair_stream=stream,
                **setup,
            )
        )
        assert log[0]["loss"] == pytest.approx(LN2, abs=1e-7)
        assert losses(log)[-1] != pytest.approx(LN2, abs=1e-5)
        pressures[balance] = log[0]["length_gap/pressure"]
    assert pressures[True] == pytest.approx(0, abs=1e-6)
    assert abs(pressures[False]) > 1e-3


def test_a_balanced_end_token_is_asked_of_the_reference_and_not_of_the_policy_in_evaluation_too(tmp_path):
    options = {"ref_model": make_model(seed=1), "processing_class": make_tokenizer(), "balance_end_token": True}
    data = make_pairs(6, conversational=True)
    found = [
        make_trainer(make_model(seed=2), tmp_path, data=data, eval_data=data, pair_stream=stream, **options).evaluate()
        for stream in ("true", "false")
    ]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], abs=1e-5)


def test_independent_subsets_start_with_the_spread_of_the_formula(model_folder, tmp_path, caplog):
    """sd of the logit = beta * sqrt(2 T_m (1 - T_m/T)) * sd(token log-prob), for tokens drawn from one response."""
    data = make_pairs(200, longer="chosen", min_len=4, max_len=30)
    trainer = make_trainer(model_folder, tmp_path, data=data, mask_sharing="independent")
    assert "repeats the authors' released code" in caplog.text
    rows = [trainer.train_dataset[i] for i in range(200)]
    logits, variances = [], []
    for i in range(0, 200, 20):
        part = rows[i : i + 20]
        trainer.model.train()
        trainer.compute_loss(trainer.model, trainer.data_collator(part))
    sums = trainer.length_recorder.sums["train"].columns
    for pair in rows:
        own, rival, n_prompt = len(pair["chosen_ids"]), len(pair["rejected_ids"]), len(pair["prompt_ids"])
        logps = torch.tensor(token_logps(trainer.ref_model, pair["prompt_ids"] + pair["chosen_ids"])[n_prompt - 1 :])
        variances.append(0.1**2 * 2 * rival * (1 - rival / own) * logps.var(unbiased=True).item())
    expected = sum(variances) / len(variances)
    measured = sums["margin^2"] / sums["n"]
    assert measured == pytest.approx(expected, rel=0.35)  # 200 squares of near-normal numbers: 10 % standard error
    assert not logits
    log = history(make_trainer(model_folder, tmp_path, mask_sharing="independent", per_device_train_batch_size=16))
    assert abs(log[0]["loss"] - LN2) > 1e-3


def test_a_reference_that_is_not_the_policy_is_told_at_the_first_step(tmp_path, caplog):
    folder = save_model(tmp_path / "m")
    policy = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        policy.lm_head.weight[30:] += torch.randn_like(policy.lm_head.weight[30:])  # no longer what the folder holds
    history(make_trainer(policy, tmp_path, processing_class=make_tokenizer(), max_steps=1))
    assert "the implicit rewards are not 0" in caplog.text
    assert "ln 2 = 0.6931" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_noise_alpha": 50.0},
        {"neftune_noise_alpha": 50.0, "max_tokens_per_forward": 40},
        {"neftune_noise_alpha": 50.0, "precompute_ref_log_probs": True},
        {"neftune_noise_alpha": 50.0, "peft_config": LoraConfig(**LORA)},
        {"attention_dropout": 0.5},  # a functional one, which `disable_dropout` does not find
        {"disable_dropout": False, "peft_config": LoraConfig(**LORA, lora_dropout=0.5), "neftune_noise_alpha": 50.0},
        {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
        {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
        {"peft_config": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)},
        {"peft_config": IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])},
    ],
    ids=lambda options: ", ".join(f"{name} {getattr(value, 'peft_type', value)}" for name, value in options.items()),
)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT 0.21 with transformers 5.24
def test_noise_and_virtual_tokens_are_no_fault_of_the_reference(tmp_path, caplog, options):
    """The first loss is not ln 2, as the options imply, and the reference is what the configuration says."""
    settings = {name: options[name] for name in ("attention_dropout",) if name in options}
    folder = save_model(tmp_path / "m", **settings)
    options = {name: value for name, value in options.items() if name not in settings}
    with caplog.at_level(logging.INFO, logger="sampo"):
        trainer = make_trainer(folder, tmp_path, max_steps=1, beta=5.0, **options)
        log = history(trainer)
    assert "The reference is not the configured one" not in caplog.text
    warned = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert not [text for text in warned if "reference" in text]
    noisy = "neftune_noise_alpha" in options or settings
    assert ("because the policy has noise in training" in caplog.text) == bool(noisy)
    if noisy:
        assert losses(log)[0] != pytest.approx(LN2, abs=1e-3)
    assert trainer.model.training


def test_noise_does_not_hide_a_reference_that_is_not_the_policy(tmp_path, caplog):
    folder = save_model(tmp_path / "m")
    policy = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        policy.lm_head.weight[30:] += torch.randn_like(policy.lm_head.weight[30:])
    options = {"neftune_noise_alpha": 5.0, "max_tokens_per_forward": 40}
    history(make_trainer(policy, tmp_path, processing_class=make_tokenizer(), max_steps=1, **options))
    assert "The reference is not the configured one" in caplog.text


def test_an_adapter_that_changes_the_model_before_it_is_trained_is_told_as_such(model_folder, tmp_path, caplog):
    peft = LoraConfig(**LORA, init_lora_weights=False)
    history(make_trainer(model_folder, tmp_path, peft_config=peft, max_steps=1, beta=5.0))
    assert "The reference is the base model without the adapter, and the adapter changes it" in caplog.text
    assert "what the configuration says" not in caplog.text


# --- other models and options ----------------------------------------------------------------------------------------


def mixture_of_experts(folder) -> str:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=69, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path):
    folder = mixture_of_experts(tmp_path / "moe")
    theirs = history(make_trainer(folder, tmp_path, trainer=DPOTrainer, config=DPOConfig))
    ours = history(make_trainer(folder, tmp_path, token_weighting="all"))
    thinned = history(make_trainer(folder, tmp_path, mask_samples=2))
    assert [e["loss"] for e in theirs[:3]] == [e["loss"] for e in ours[:3]]
    assert theirs[0]["aux_loss"] == ours[0]["aux_loss"] == pytest.approx(thinned[0]["aux_loss"])
    assert thinned[0]["loss"] == pytest.approx(LN2 + 0.5 * thinned[0]["aux_loss"], abs=1e-6)


def test_prompt_tuning_whose_virtual_tokens_stand_before_the_row(model_folder, tmp_path):
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    logs = {}
    for name in ("all", "sampo"):
        trainer = make_trainer(
            model_folder, tmp_path, token_weighting=name, peft_config=peft, log_length_pressure=True
        )
        logs[name] = history(trainer)
    theirs = history(make_trainer(model_folder, tmp_path, trainer=DPOTrainer, config=DPOConfig, peft_config=peft))
    assert losses(theirs) == losses(logs["all"])
    # virtual tokens change the policy, so the first loss is not ln 2
    assert losses(logs["sampo"])[0] != losses(theirs)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"disable_dropout": False},
        {"truncation_mode": "keep_end", "max_length": 10},
        {"label_smoothing": 0.1, "loss_type": "robust", "length_penalty": "learned"},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence", "loss_type": "ipo"},
        {"gradient_checkpointing": True, "peft_config": LoraConfig(**LORA), "length_penalty": "learned"},
    ],
    ids=",".join,
)
@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
def test_the_options_of_trl_work_with_subsets(model_folder, tmp_path, options, caplog):
    log = history(make_trainer(model_folder, tmp_path, eval_data=make_pairs(6, seed=5), **options))
    assert all(math.isfinite(loss) for loss in losses(log))
    assert len(set(losses(log))) == 3
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert "The first loss is" not in caplog.text


@pytest.mark.parametrize("loss", sorted(LOSS_TYPES - {"sft"}))
def test_every_loss_with_subsets_equals_trls_loss_of_the_same_sums(model_folder, tmp_path, loss):
    """The same where nothing is thinned, another one where something is."""
    options = {"loss_type": loss, "label_smoothing": 0.1}
    equal = make_pairs(8, longer="equal")
    theirs = history(make_trainer(model_folder, tmp_path, data=equal, trainer=DPOTrainer, config=DPOConfig, **options))
    ours = history(make_trainer(model_folder, tmp_path, data=equal, **options))
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-6)
    uneven = make_pairs(8, longer="chosen")
    thinned, whole = (
        losses(history(make_trainer(model_folder, tmp_path, data=uneven, token_weighting=name, **options)))
        for name in ("sampo", "all")
    )
    assert thinned[1:] != pytest.approx(whole[1:], abs=1e-5)


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_of_length_are_those_of_the_whole_window_computed_pair_by_pair(model_folder, tmp_path):
    reference, policy = make_model(seed=1), make_model(seed=2)
    data = concatenate_datasets([make_pairs(10, seed=3), make_pairs(3, seed=4, longer="equal")])
    trainer = make_trainer(
        policy, tmp_path, ref_model=reference, processing_class=make_tokenizer(), data=data, eval_data=data
    )
    measured = trainer.evaluate()
    gaps, margins, plain, counted, tokens = [], [], [], 0, 0
    for pair in trainer.eval_dataset:
        gaps.append(len(pair["chosen_ids"]) - len(pair["rejected_ids"]))
        tokens += len(pair["chosen_ids"]) + len(pair["rejected_ids"])
        counted += 2 * min(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        for name, into in (("sampo", margins), ("all", plain)):
            chosen, rejected, _ = oracle_scores(policy, reference, pair, name=name, seed=7, epoch=-1, end_ids=set())
            into.append(0.1 * (chosen - rejected))
    assert measured["eval_length/selected"] == pytest.approx(counted / tokens)
    assert measured["eval_length/chosen_longer"] == pytest.approx(sum(g > 0 for g in gaps) / 13)
    for prefix, values in (("eval_", margins), ("eval_dpo/", plain)):
        r, slope = oracles.correlation_and_slope(gaps, values)
        assert measured[f"{prefix}length_gap/correlation"] == pytest.approx(r, abs=1e-4)
        assert measured[f"{prefix}length_gap/slope"] == pytest.approx(slope, abs=1e-5)
        for side, sign in (("longer", 1), ("shorter", -1)):
            of_side = [m > 0 for g, m in zip(gaps, values, strict=True) if g * sign > 0]
            assert measured[f"{prefix}accuracies/chosen_{side}"] == pytest.approx(sum(of_side) / len(of_side))


def test_evaluation_is_the_same_number_at_any_batch_size_and_time(model_folder, tmp_path):
    results = []
    for size in (1, 2, 4, 8):
        trainer = make_trainer(
            model_folder,
            tmp_path,
            eval_data=make_pairs(10, seed=3),
            per_device_eval_batch_size=size,
            log_length_pressure=True,
        )
        trainer.train()
        results += [trainer.evaluate(), trainer.evaluate()]
    names = [name for name in results[0] if "length" in name or "accuracies/chosen" in name]
    assert len(names) >= 11
    assert results[0] == results[1] | {n: v for n, v in results[0].items() if n.endswith(TIMES)}
    for other in results[1:]:
        for name in names:
            # margins carry the rounding of fp32 sums of 30 nats, 1e-6 or so, which depends on the padding
            bound = {"slope": 1e-6, "correlation": 1e-3, "pressure": 1e-5}.get(name.rsplit("/", 1)[-1], 0)
            assert other[name] == pytest.approx(results[0][name], rel=0, abs=bound or 1e-9), name


def test_subsets_are_drawn_anew_each_epoch(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, data=make_pairs(8), max_steps=-1, num_train_epochs=3)
    epochs = []
    original = trainer.prepare_batch

    def watched(inputs):
        batch = original(inputs)
        epochs.append(("train" if trainer.model.training else "eval", batch.epoch))
        return batch

    trainer.prepare_batch = watched
    trainer.train()
    trainer.evaluate(make_pairs(4, seed=9))
    assert epochs == [("train", 0)] * 2 + [("train", 1)] * 2 + [("train", 2)] * 2 + [("eval", -1)]


def test_the_pressure_in_the_log_is_the_derivative_of_the_margin(tmp_path):
    policy = make_model(seed=2)
    policy.lm_head.bias = torch.nn.Parameter(torch.zeros(69))
    trainer = make_trainer(
        policy,
        tmp_path,
        ref_model=make_model(seed=1),
        processing_class=make_tokenizer(),
        data=make_pairs(8, conversational=True),
        token_weighting="sampo",
        log_length_pressure=True,
    )
    end_id = 3  # <|im_end|>, followed by a newline token
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.model.eval()
    margins = {}
    with torch.no_grad():
        for shift in (-0.05, 0.0, 0.05):
            policy.lm_head.bias[end_id] = shift
            trainer.compute_loss(trainer.model, batch)
            metrics = trainer.length_recorder.sums["eval"].columns
            margins[shift] = metrics["margin"] / metrics["n"]
            pressure = metrics["pressure"] / metrics["n"]
            if shift == 0.0:
                at_zero = pressure
            trainer.length_recorder.take_metrics("eval")
    numerical = (margins[0.05] - margins[-0.05]) / 0.1 / 0.1  # of S, not of beta * S
    assert at_zero == pytest.approx(numerical, rel=2e-3)  # central difference in fp32
    assert abs(at_zero) > 0.01


def test_rewards_are_logged_without_the_length_penalty(tmp_path):
    logs = []
    for penalty in (0.0, 0.3):
        trainer = make_trainer(
            make_model(seed=2),
            tmp_path,
            ref_model=make_model(seed=1),
            processing_class=make_tokenizer(),
            length_penalty=penalty,
            max_steps=1,
        )
        logs.append(history(trainer)[0])
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert logs[0][f"rewards/{name}"] == pytest.approx(logs[1][f"rewards/{name}"], abs=1e-6)
    assert logs[0]["loss"] != pytest.approx(logs[1]["loss"], abs=1e-3)


def test_tokens_are_counted_once_whatever_the_number_of_subsets(model_folder, tmp_path):
    counts = [history(make_trainer(model_folder, tmp_path, mask_samples=k))[2]["num_tokens"] for k in (1, 4)]
    assert counts[0] == counts[1]


# --- the learned length penalty --------------------------------------------------------------------------------------


def test_the_gradient_of_theta_is_that_of_finite_differences(tmp_path):
    trainer = make_trainer(
        make_model(seed=2),
        tmp_path,
        ref_model=make_model(seed=1),
        processing_class=make_tokenizer(),
        length_penalty="learned",
        length_penalty_scale=5.0,
        mask_samples=2,
        loss_type=["sigmoid", "sft"],
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.model.train()

    def loss_at(theta):
        trainer.run_state.theta.set(theta)
        return trainer.compute_loss(trainer.model, batch).item()

    numerical = (loss_at(0.41) - loss_at(0.39)) / 0.02
    trainer.run_state.theta.gradients.clear()
    loss_at(0.4)
    (gradient,) = trainer.run_state.theta.gradients
    assert gradient == pytest.approx(numerical, abs=2e-4)
    assert abs(gradient) > 0.01


def length_pairs(n, slope, seed=0) -> Dataset:
    """Pairs of random words whose preference is drawn from the difference of token counts alone."""
    generator = torch.Generator().manual_seed(seed)
    pairs = make_pairs(n, seed=seed, max_len=20).to_list()
    for pair in pairs:
        gap = len(pair["chosen"].split()) - len(pair["rejected"].split())
        if torch.rand((), generator=generator) > torch.sigmoid(torch.tensor(slope * gap)):
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    return Dataset.from_list(pairs)


@pytest.mark.parametrize("slope", [0.1, -0.05])
def test_theta_finds_the_length_slope_of_the_annotators_while_the_policy_stays_put(model_folder, tmp_path, slope):
    trainer = make_trainer(
        model_folder,
        tmp_path,
        data=length_pairs(4000, slope),
        length_penalty="learned",
        length_penalty_scale=10.0,
        length_penalty_lr=0.05,
        learning_rate=1e-6,
        per_device_train_batch_size=64,
        max_steps=150,
        logging_steps=50,
    )
    log = history(trainer)
    gaps = torch.tensor([float(len(p["chosen_ids"]) - len(p["rejected_ids"])) for p in trainer.train_dataset])
    # the maximum-likelihood slope of these very pairs, by Newton's method on the logistic loss
    fitted = torch.zeros((), dtype=torch.float64)
    for _ in range(20):
        p = torch.sigmoid(fitted * gaps.double())
        fitted += ((1 - p) * gaps).sum() / (p * (1 - p) * gaps**2).sum()
    assert fitted.item() == pytest.approx(slope, abs=0.02)
    # the last steps see 64 pairs each: Adam at a constant rate wanders by some hundredths
    assert log[-2]["length_penalty/per_token"] == pytest.approx(fitted.item(), abs=0.02)
    assert abs(log[-2]["rewards/margins"]) < 0.01


def test_theta_takes_one_step_per_optimiser_step_with_the_mean_gradient_of_its_micro_batches(model_folder, tmp_path):
    options = {"length_penalty": "learned", "max_steps": 5, "data": make_pairs(48), "learning_rate": 1e-4}
    whole, parts = (
        history(make_trainer(model_folder, tmp_path, **sizes, **options))
        for sizes in (
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        )
    )
    thetas = [[entry["length_penalty/theta"] for entry in log if "loss" in entry] for log in (whole, parts)]
    assert thetas[0] == pytest.approx(thetas[1], abs=1e-5)
    assert len({round(theta, 4) for theta in thetas[0]}) == 5


def test_theta_and_the_scale_are_saved_and_a_resumed_run_is_the_uninterrupted_one(model_folder, tmp_path):
    options = {
        "length_penalty": "learned",
        "sampled_sides": "rejected",
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "data": make_pairs(20),  # 2.5 steps an epoch: both checkpoints lie within an epoch or at its border
    }
    whole = make_trainer(model_folder, tmp_path, **options)
    log = history(whole)
    for step in (3, 6):
        resumed = make_trainer(model_folder, tmp_path / "again", **options)
        again = history(resumed, resume=str(tmp_path / f"checkpoint-{step}"))
        assert losses(again) == losses(log)
        assert [e.get("length_penalty/theta") for e in again] == [e.get("length_penalty/theta") for e in log]
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"][
        "RunState"
    ]
    assert saved["attributes"]["adam"]["theta"] == log[5]["length_penalty/theta"]
    assert saved["attributes"]["adam"]["step"] == 6


def test_transformers_own_restoring_of_callbacks_keeps_theta_too(model_folder, tmp_path):
    options = {"length_penalty": "learned", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    log = history(make_trainer(model_folder, tmp_path, **options))
    resumed = make_trainer(model_folder, tmp_path / "b", restore_callback_states_from_checkpoint=True, **options)
    again = history(resumed, resume=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(log)
    assert sum(isinstance(c, RunState) for c in resumed.callback_handler.callbacks) == 1


def test_the_default_scale_is_the_root_mean_square_of_the_length_difference(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, length_penalty="learned", max_length=12)
    squares = []
    for pair in trainer.train_dataset:
        room = 12 - len(pair["prompt_ids"])
        squares.append((min(len(pair["chosen_ids"]), room) - min(len(pair["rejected_ids"]), room)) ** 2)
    assert trainer.length_penalty.scale == pytest.approx(math.sqrt(sum(squares) / len(squares)))


# --- what is said and refused ----------------------------------------------------------------------------------------


def test_truncation_is_counted_and_told(model_folder, tmp_path, caplog):
    words = [f"w{i}" for i in range(30)]

    def text(*numbers):
        return " ".join(words[i] for i in numbers) + " "

    data = Dataset.from_list(
        [
            {"prompt": text(0, 1), "chosen": text(2, 3), "rejected": text(4)},  # fits
            {"prompt": text(0, 1), "chosen": text(2, 3, 4, 5, 6), "rejected": text(4)},  # chosen cut
            {
                "prompt": text(0, 1),
                "chosen": text(5, 6, 7, 8, 9),
                "rejected": text(5, 6, 7, 8, 10),
            },  # identical when cut
            {"prompt": text(0, 1, 2, 3, 4, 5), "chosen": text(2), "rejected": text(4)},  # prompt fills max_length
        ]
    )
    with caplog.at_level(logging.INFO, logger="sampo"):
        trainer = make_trainer(model_folder, tmp_path, data=data, max_length=6)
    counts = trainer.token_counts["train"]
    assert (counts.pairs, counts.dropped, counts.cut_chosen, counts.cut_rejected, counts.identical) == (3, 1, 2, 1, 1)
    assert "1 dropped because the prompt alone fills it" in caplog.text
    assert "1 pairs identical after truncation" in caplog.text


def test_a_plain_dpo_config_is_refused_with_the_fix(model_folder, tmp_path):
    with pytest.raises(TypeError, match="must be a `SamPOConfig`, got `DPOConfig`"):
        make_trainer(model_folder, tmp_path, config=DPOConfig)


def test_bad_rows_are_refused_before_the_model_is_loaded(tmp_path):
    data = Dataset.from_list(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": " ", "rejected": "c"}]
    )
    with pytest.raises(ValueError, match="`chosen`"):
        make_trainer("no/such/model", tmp_path, data=data)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, data=make_pairs(8))
    with torch.no_grad():
        trainer.model.lm_head.weight[40] = math.nan
    with pytest.raises(
        FloatingPointError, match=r"at step 1 \(train\), in rows with the fingerprints \['[0-9a-f]{16}'"
    ):
        trainer.train()


def test_the_model_card_names_method_weighting_and_paper(model_folder, tmp_path):
    options = {"sampled_sides": "rejected", "length_penalty": "learned", "balance_end_token": True}
    trainer = make_trainer(model_folder, tmp_path, **options)
    trainer.create_model_card(model_name="x")
    card = (Path(tmp_path) / "README.md").read_text()
    for text in (
        "SamPO",
        "2406.10957",
        "`token_weighting: sampo`",
        "`sampled_sides: rejected`",
        "`length_penalty: learned`",
        "`balance_end_token: True`",
    ):
        assert text in card
    trainer = make_trainer(model_folder, tmp_path, token_weighting="all")
    trainer.create_model_card(model_name="x")
    assert "2305.18290" in (Path(tmp_path) / "README.md").read_text()


def test_end_tokens_are_eos_the_models_other_eos_and_the_templates_end_of_turn():
    model = make_model()
    assert end_token_ids(make_tokenizer(), model.generation_config) == [1, 3]
    assert end_token_ids(make_tokenizer(chat=False), model.generation_config) == [1]
    model.generation_config.eos_token_id = [5, 1]
    assert end_token_ids(make_tokenizer(chat=False), model.generation_config) == [1, 5]


def test_the_kept_end_token_of_conversational_data_is_the_end_of_the_turn(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, data=make_pairs(8, conversational=True), keep_end_token=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    pairs = trainer.weigher.find_completions(batch, 0)
    assert batch["input_ids"][:, 1:][pairs.end].tolist() == [3] * 16
    keys = draw_keys(batch["input_ids"], batch["attention_mask"], seed=7, epoch=0)
    kept = token_weights("sampo", pairs.mask, end=pairs.end, keys=keys, keep_end_token=True)
    assert (kept[pairs.end] == 1).all()
    assert torch.equal(trainer.weigher.weigh(pairs)[0][0], kept)
