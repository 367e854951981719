"""`token_budget: dataset`: which totals a run takes, and that a resumed run takes the same."""

import pytest
from tiny import PLAIN, make_pairs, save_model, training_options

from sampo import SamPOConfig, SamPOTrainer
from sampo.checkpointing.resume import ResumeRefusedError


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def make_trainer(model, output_dir, *, data=None, eval_dataset=None, **options):
    args = SamPOConfig(**training_options(output_dir, **PLAIN | options))
    return SamPOTrainer(model, args=args, train_dataset=data or make_pairs(32), eval_dataset=eval_dataset)


def losses(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_streamed_data_need_the_totals_of_a_budget_and_train_as_the_same_data_with_them(model_folder, tmp_path):
    pairs = make_pairs(16, longer="rejected")
    options = {"token_budget": "dataset", "data_seed": 0, "train_sampling_strategy": "sequential"}
    counted = make_trainer(model_folder, tmp_path, data=pairs, **options)
    totals = list(counted.weigher.token_totals)
    assert totals[0] < totals[1]
    stream = pairs.to_iterable_dataset()
    with pytest.raises(ValueError, match="`token_totals` must be given for `token_budget: dataset`"):
        make_trainer(model_folder, tmp_path, data=stream, **options)
    streamed = make_trainer(model_folder, tmp_path, data=stream, token_totals=totals, **options)
    assert losses(streamed) == losses(counted)


def test_the_totals_are_those_after_truncation_and_evaluation_takes_the_training_datas(model_folder, tmp_path, caplog):
    train, held_out = make_pairs(16, longer="rejected", max_len=25), make_pairs(9, longer="chosen", seed=1)
    options = {"data": train, "eval_dataset": held_out, "max_length": 16, "token_budget": "dataset"}
    with caplog.at_level("INFO"):
        trainer = make_trainer(model_folder, tmp_path, **options)
    kept = [
        sum(min(len(row[side]), 16 - len(row["prompt_ids"])) for row in trainer.train_dataset)
        for side in ("chosen_ids", "rejected_ids")
    ]
    assert sum(len(row["rejected_ids"]) for row in trainer.train_dataset) > kept[1] > kept[0]
    said = f"of {kept[0]:,} chosen and {kept[1]:,} rejected tokens, each chosen response keeps the share 1 and each "
    assert len([line for line in caplog.messages if f"{said}rejected one {kept[0] / kept[1]:.4g}" in line]) == 1
    selected = trainer.evaluate()["eval_length/selected"]
    tokens = [
        [min(len(row[side]), 16 - len(row["prompt_ids"])) for row in trainer.eval_dataset]
        for side in ("chosen_ids", "rejected_ids")
    ]
    share = (sum(tokens[0]) + sum(tokens[1]) * kept[0] / kept[1]) / sum(map(sum, tokens))
    # each rejected response is rounded by at most one token
    assert selected == pytest.approx(share, abs=len(held_out) / sum(map(sum, tokens)))
    assert selected < 0.99


@pytest.mark.parametrize("change", [{"token_budget": "pair"}, {"token_totals": [10, 20]}], ids=str)
def test_a_run_with_another_budget_is_not_resumed(model_folder, tmp_path, change):
    options = {"token_budget": "dataset", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(model_folder, tmp_path, **options)
    log = losses(whole)
    resumed = make_trainer(model_folder, tmp_path / "again", **options)
    assert losses(resumed, resume=str(tmp_path / "checkpoint-2")) == log
    other = make_trainer(model_folder, tmp_path / "other", **options | change)
    with pytest.raises(ResumeRefusedError, match=next(iter(change))):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
