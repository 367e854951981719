"""Weights from the data: alignment with the tokens, the loss of weighted pairs, and errors that name the row."""

import json
import math

import pytest
import torch
from datasets import Dataset
from tiny import PLAIN, make_model, make_pairs, make_tokenizer, save_model, training_options, with_weights

from sampo import SamPOConfig, SamPOTrainer, load_preferences
from sampo.checkpointing.resume import ResumeRefusedError
from sampo.data.weight_columns import GIVEN_PAIR_WEIGHTS, GIVEN_TOKEN_WEIGHTS, TOKEN_WEIGHT_COLUMNS

PAIR = {"pair_weight_column": "pair_weight"}
COLUMN = {"token_weighting": "column"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def make_trainer(output_dir, data, *, model=None, **options):
    """A policy that is not its reference, or a model of two equal copies."""
    models = (make_model(seed=2), make_model(seed=1)) if model is None else (model, None)
    args = SamPOConfig(**training_options(output_dir, **PLAIN | options))
    return SamPOTrainer(*models, args, None, data, processing_class=make_tokenizer())


def losses(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows_of(trainer, n):
    return [trainer.train_dataset[i] for i in range(n)]


def loss_and_gradients(trainer, rows):
    """Of a batch of the rows: loss, gradients of the policy, and of θ."""
    trainer.model.zero_grad()
    trainer.run_state.theta.gradients.clear()
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return loss.item(), gradients, list(trainer.run_state.theta.gradients)


@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_weights_stay_with_their_tokens_when_a_response_is_cut(tmp_path, mode, conversational):
    pairs = with_weights(make_pairs(12, max_len=20, conversational=conversational))
    ids = make_trainer(tmp_path, pairs, max_length=None).train_dataset
    for column in TOKEN_WEIGHT_COLUMNS:  # each weight tells its token
        known = [[token / 100 for token in row] for row in ids[column.replace("weights", "ids")]]
        pairs = pairs.remove_columns(column).add_column(column, known)
    trainer = make_trainer(tmp_path, pairs, max_length=12 + 8 * conversational, truncation_mode=mode, **COLUMN)
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    batch = trainer.data_collator(rows)
    mask = batch["completion_mask"][:, 1:]
    assert mask.sum() < sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    torch.testing.assert_close(batch[GIVEN_TOKEN_WEIGHTS], batch["input_ids"][:, 1:] / 100 * mask)
    policy, _ = trainer.prepare_batch(batch).weights[0]
    torch.testing.assert_close(policy, batch["input_ids"][:, 1:] / 100 * mask)


LOSSES = [
    {},
    {"token_weighting": "all"},
    {"token_weighting": "all", "loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    {"loss_type": ["ipo", "apo_zero", "sft"], "loss_weights": [0.5, 0.2, 0.3]},
    {"use_weighting": True},
    {"mask_samples": 2, "length_penalty": "learned", "length_penalty_scale": 5.0, "length_penalty_start": 0.1},
    {**COLUMN, "length_penalty": 0.1},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_the_loss_is_the_mean_of_the_weighted_losses_of_single_pairs(tmp_path, options):
    trainer = make_trainer(tmp_path, with_weights(make_pairs(5)), **PAIR, **options)
    rows = rows_of(trainer, 5)
    got = loss_and_gradients(trainer, rows)
    assert len({round(row["pair_weight"], 3) for row in rows}) == 5
    sft = dict(zip(trainer.args.loss_type, trainer.args.loss_weights or [1.0], strict=False)).get("sft", 0.0)
    loss, gradients, theta = 0.0, 0.0, 0.0
    chosen = sum(len(row["chosen_ids"]) for row in rows)
    for row in rows:
        # a pair of weight 1; `sft` is a mean over tokens and not over pairs, so it is taken apart
        alone = [loss_and_gradients(trainer, [row | {"pair_weight": 1.0}])]
        if sft:
            whole, trainer.objective.sft_weight = trainer.objective.sft_weight, 0.0
            alone.append(loss_and_gradients(trainer, [row | {"pair_weight": 1.0}]))
            trainer.objective.sft_weight = whole
        preference, weight = alone[-1], row["pair_weight"]
        loss += weight * preference[0] / 5
        gradients = gradients + weight * preference[1] / 5
        theta += weight * sum(preference[2]) / 5
        if sft:
            share = weight * len(row["chosen_ids"]) / chosen
            loss += share * (alone[0][0] - preference[0])
            gradients = gradients + share * (alone[0][1] - preference[1])
    assert got[0] == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(got[1], gradients, rtol=1e-4, atol=1e-5)  # float32, of losses up to 30
    if options.get("length_penalty") == "learned":
        assert sum(got[2]) == pytest.approx(theta, rel=1e-4)
        assert abs(theta) > 1e-3


def test_weights_of_1_change_no_bit_and_a_pair_of_weight_0_has_no_part(tmp_path):
    data = with_weights(make_pairs(12)).remove_columns("pair_weight")
    ones = data.add_column("pair_weight", [1] * 12)
    assert losses(make_trainer(tmp_path, ones, **PAIR)) == losses(make_trainer(tmp_path, data))
    trainer = make_trainer(tmp_path, ones, **PAIR)
    rows = rows_of(trainer, 4)
    without = loss_and_gradients(trainer, rows[:3])
    found = loss_and_gradients(trainer, [*rows[:3], rows[3] | {"pair_weight": 0}])
    assert found[0] == pytest.approx(without[0] * 3 / 4, rel=1e-5)
    torch.testing.assert_close(found[1], without[1] * 3 / 4, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [COLUMN, {"loss_type": ["sigmoid", "sft"], "length_penalty": "learned"}], ids=str)
def test_micro_batches_and_the_stream_have_the_losses_of_plain_batches(tmp_path, options):
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 4}
    data = with_weights(make_pairs(22))
    logs = []
    for layout in ({}, {"pair_stream": "true"}, {"pair_stream": "true", "max_tokens_per_forward": 60}):
        logs.append(losses(make_trainer(tmp_path, data, **PAIR, **options, **sizes, **layout)))
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)
    assert logs[2] == pytest.approx(logs[0], abs=1e-5)


def replaced(data, column, row, value):
    values = data[column][:]
    values[row] = value
    return data.remove_columns(column).add_column(column, values)


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        (
            "chosen_weights",
            [1.0],
            r"`chosen_weights` must have one weight for each .* rows \[3\] \(row 3: 1 weig",
        ),
        (
            "rejected_weights",
            None,
            r"another number in 1 of 8 pairs .* first at rows \[3\] \(row 3: 0 w",
        ),
        ("pair_weight", -1.0, r"`pair_weight` must have finite numbers .* 1 of 8 .* rows \[3\] \(row 3: -1.0\)"),
        ("pair_weight", math.inf, r"row 3: inf"),
        ("pair_weight", None, r"row 3: nan"),
    ],
)
def test_a_wrong_weight_is_named_with_its_row_before_training(tmp_path, column, value, sentence):
    data = replaced(with_weights(make_pairs(8)), column, 3, value)
    with pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path, data, **PAIR, **COLUMN)


def test_weights_of_another_kind_or_none_and_negative_token_weights_are_errors(tmp_path):
    data = with_weights(make_pairs(8))
    row = data["chosen_weights"][5]
    with pytest.raises(ValueError, match=r"`chosen_weights` must have finite .* \[5\] \(row 5: -0.5\)"):
        make_trainer(tmp_path, replaced(data, "chosen_weights", 5, [*row[:-1], -0.5]), **COLUMN)
    with pytest.raises(ValueError, match=r"must have the columns of weights \['chosen_weights', 'rejected_weights'\]"):
        make_trainer(tmp_path, make_pairs(8), **COLUMN)
    with pytest.raises(ValueError, match="`label` of the train data must hold numbers, got string"):
        make_trainer(tmp_path, data.add_column("label", ["a"] * 8), pair_weight_column="label")
    with pytest.raises(ValueError, match="`pair_weight_column` needs losses that are means over the pairs"):
        make_trainer(tmp_path, data, **PAIR, loss_type="aot")
    with pytest.raises(ValueError, match="no meaning for the fractional weights of `token_weighting: column`"):
        make_trainer(tmp_path, data, **COLUMN, loss_type="ipo")


def test_streamed_weights_train_alike_and_are_checked_batch_by_batch(tmp_path):
    data = with_weights(make_pairs(16))
    options = {**PAIR, **COLUMN, "train_sampling_strategy": "sequential"}
    stream = losses(make_trainer(tmp_path, data.to_iterable_dataset(), **options))
    assert stream == losses(make_trainer(tmp_path, data, **options))
    wrong = replaced(data, "rejected_weights", 2, [0.5]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`rejected_weights` must have one finite weight .* got 1: \[0.5\]"):
        losses(make_trainer(tmp_path, wrong, **options))


def test_columns_that_no_option_names_are_not_read(tmp_path):
    batch = make_trainer(tmp_path, with_weights(make_pairs(6)))
    assert not {GIVEN_TOKEN_WEIGHTS, GIVEN_PAIR_WEIGHTS} & batch.data_collator(rows_of(batch, 3)).keys()


def test_a_run_on_other_weights_is_not_resumed(model_folder, tmp_path):
    data = with_weights(make_pairs(16))
    options = {**PAIR, **COLUMN, "model": model_folder, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    log = losses(make_trainer(tmp_path, data, **options))
    checkpoint = str(tmp_path / "checkpoint-2")
    assert losses(make_trainer(tmp_path / "again", data, **options), checkpoint) == log
    other = make_trainer(tmp_path / "other", replaced(data, "pair_weight", 0, 9.0), **options)
    with pytest.raises(ResumeRefusedError, match="the weights in the training data"):
        other.train(resume_from_checkpoint=checkpoint)


def test_files_keep_their_columns_of_weights(tmp_path):
    data = with_weights(make_pairs(6))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    loaded = load_preferences(str(path))
    assert isinstance(loaded, Dataset)
    for name in (*TOKEN_WEIGHT_COLUMNS, "pair_weight"):
        assert loaded[name][:] == data[name][:]
