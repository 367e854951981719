"""What sampo/trainer.py relies on in TRL, one test a point: an upgrade of TRL fails here, with a name."""

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from families import make_model as make_family
from tiny import make_pairs, save_model, training_options
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from sampo.config_checks import LOSS_TYPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def trainer(folder, tmp_path):
    return DPOTrainer(
        model=folder, args=DPOConfig(**training_options(tmp_path, max_length=16)), train_dataset=make_pairs(8)
    )


@pytest.fixture
def model_and_data(tmp_path):
    options = {"precompute_ref_log_probs": True, "per_device_eval_batch_size": 2, "max_length": 16}
    return {
        "model": save_model(tmp_path / "model"),
        "args": DPOConfig(**training_options(tmp_path, **options)),
        "train_dataset": make_pairs(8),
        "eval_dataset": {"a": make_pairs(3, seed=1), "b": make_pairs(5, seed=2)},
    }


@pytest.fixture
def batch(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


class Recorder:
    """Stands where TRL expects a model; remembers its calls and returns given log-probs."""

    def __init__(self, model, change=lambda output: output):
        self.model, self.change, self.calls = model, change, []

    def __call__(self, **kwargs):
        self.calls.append(kwargs)
        return self.change(self.model(**kwargs))


def test_the_version_is_the_one_that_was_read():
    assert version("trl").startswith("1.16."), "read sampo/trainer.py's list against the new TRL, then change the pin"


def test_the_signatures_are_those_we_override_and_call():
    def names(method):
        return list(inspect.signature(method).parameters)

    assert names(DPOTrainer.__init__)[:7] == [
        "self", "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset",
    ]  # fmt: skip
    assert names(DPOTrainer._compute_loss) == ["self", "model", "inputs", "return_outputs"]
    assert names(DPOTrainer.compute_ref_log_probs) == ["self", "model", "inputs"]
    assert names(DPOTrainer._prepare_dataset) == ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert names(DPOTrainer._precompute_ref_logps) == ["self", "dataset", "name", "batch_size"]
    assert names(DPOTrainer._set_signature_columns_if_needed) == ["self"]
    assert names(DPOTrainer.log) == ["self", "logs", "start_time"]


def test_the_model_is_called_once_with_these_arguments_and_the_reference_not_at_all(trainer, batch):
    trainer.precompute_ref_logps = True
    trainer.ref_model = None  # would fail if it were called
    policy = Recorder(trainer.model)
    sums = {"ref_chosen_logps": torch.zeros(4), "ref_rejected_logps": torch.zeros(4)}
    trainer._compute_loss(policy, {**batch, **sums}, False)
    assert [set(call) for call in policy.calls] == [
        {"input_ids", "attention_mask", "use_cache", "labels", "fused_lm_head"}
    ]
    labels = policy.calls[0]["labels"]
    assert torch.equal(labels != -100, batch["completion_mask"].bool())


def test_unknown_inputs_are_passed_on_to_the_model(trainer, batch):
    trainer.precompute_ref_logps = True
    sums = {"ref_chosen_logps": torch.zeros(4), "ref_rejected_logps": torch.zeros(4)}
    policy = Recorder(lambda something_else, **kwargs: trainer.model(**kwargs))
    trainer._compute_loss(policy, {**batch, **sums, "something_else": torch.ones(4)}, False)
    assert "something_else" in policy.calls[0]


def test_the_loss_is_made_of_row_sums_of_the_returned_log_probs_and_of_the_given_reference_sums(trainer, batch):
    def plain(output):
        output.log_probs = torch.full_like(output.log_probs, 0.25)
        return output

    trainer.precompute_ref_logps = True
    n = batch["input_ids"].size(1) - 1
    sums = {"ref_chosen_logps": torch.full((4,), -1.0), "ref_rejected_logps": torch.full((4,), 2.0)}
    trainer.model.train()
    loss = trainer._compute_loss(Recorder(trainer.model, plain), {**batch, **sums}, False)
    assert trainer._metrics["train"]["logps/chosen"] == [pytest.approx(0.25 * n)]
    assert loss.item() == pytest.approx(torch.log1p(torch.exp(torch.tensor(-0.1 * 3.0))).item())
    assert trainer._metrics["train"]["rewards/margins"] == [pytest.approx(0.3)]


def test_metrics_are_lists_to_which_each_call_appends(trainer, batch):
    trainer.model.train()
    for _ in range(2):
        trainer._compute_loss(trainer.model, batch, False)
    lengths = {name: len(values) for name, values in trainer._metrics["train"].items()}
    assert lengths.pop("num_tokens") == 1
    assert set(lengths.values()) == {2}
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= set(lengths)
    assert trainer._total_train_tokens == 2 * batch["attention_mask"].sum().item()


def test_the_reference_function_calls_the_model_that_it_is_given_once_and_returns_its_sums(trainer, batch):
    reference = Recorder(trainer.ref_model)
    chosen, rejected = trainer.compute_ref_log_probs(reference, batch)
    assert len(reference.calls) == 1
    output = trainer.ref_model(**reference.calls[0])
    assert isinstance(output, FusedCausalLMOutput)
    assert torch.equal(torch.cat((chosen, rejected)), output.log_probs.sum(dim=1))


def test_per_token_log_probs_have_one_column_less_than_the_input_and_are_zero_without_a_label(trainer, batch):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    output = trainer.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
    )
    assert output.log_probs.shape == (8, batch["input_ids"].size(1) - 1)
    assert torch.equal(output.log_probs != 0, batch["completion_mask"][:, 1:].bool())


def test_the_head_calls_one_function_with_nine_arguments(trainer, batch, monkeypatch):
    arguments = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size"]
    arguments += ["final_logit_softcapping", "logit_scale", "outputs"]
    assert list(inspect.signature(trl_utils._ChunkedLogProbFunction.forward).parameters)[1:] == arguments
    calls = []

    class Watched:
        @staticmethod
        def apply(*args):
            calls.append(args)
            return function.apply(*args)

    function = trl_utils._ChunkedLogProbFunction
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Watched)
    trainer.model(input_ids=batch["input_ids"], labels=batch["input_ids"], fused_lm_head=True)
    ((_, weight, bias, _, temperature, _, softcap, scale, outputs),) = calls
    assert weight is trainer.model.get_output_embeddings().weight
    assert (bias, temperature, softcap, scale) == (None, 1.0, None, 1.0)
    assert "log_probs" in outputs


def test_the_auxiliary_loss_weighs_tokens_by_the_attention_mask():
    model = make_family("mixtral")
    ids = torch.randint(4, 60, (1, 7), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones(1, 7), {"shift_labels": ids, "fused_lm_head": True, "output_router_logits": True}

    def aux_loss(ids, mask):
        return model(input_ids=ids, attention_mask=mask, **labels | {"shift_labels": ids}).aux_loss

    mask[0, :4] = 2.0  # a causal model computes the same for these four whatever follows: two rows that share them
    expected = aux_loss(torch.cat((ids, ids)), torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3]))
    torch.testing.assert_close(aux_loss(ids, mask), expected)


def test_all_precomputing_goes_through_one_method_when_the_models_are_ready(model_and_data):
    """Once for each data set in `__init__`, with the prepared ids, and for a new one in `evaluate`."""
    seen = []

    class Watched(DPOTrainer):
        def _precompute_ref_logps(self, dataset, name, batch_size):
            ready = self.ref_model is None and self.accelerator is not None and not self.model.training
            seen.append((name, len(dataset), batch_size, ready, {"prompt_ids", "chosen_ids"} <= set(dataset[0])))
            return super()._precompute_ref_logps(dataset, name, batch_size)

    trainer = Watched(**model_and_data)
    assert seen == [("train", 8, 4, True, True), ("a", 3, 2, True, True), ("b", 5, 2, True, True)]
    trainer.evaluate(make_pairs(4, seed=3))
    assert seen[3:] == [("eval", 4, 2, True, True)]
    assert trainer._precompute_engine is None
    trainer._set_signature_columns_if_needed()
    assert "prompt_ids" in trainer._signature_columns


def test_the_losses_are_those_that_our_table_knows(trainer, batch):
    trainer.loss_types = ["no such loss"]
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trainer._compute_loss(trainer.model, batch, False)
    assert set(re.findall(r"'(\w+)'", str(error.value))) == LOSS_TYPES


def test_the_attributes_exist(trainer):
    for name in (
        "loss_types", "loss_weights", "beta", "ld_alpha", "aux_loss_enabled", "_tokenizer", "_total_train_tokens",
        "precompute_ref_logps", "ref_model", "_name", "_paper", "_tag_names",
    ):  # fmt: skip
        assert hasattr(trainer, name), name


def test_preparing_data_adds_ids_drops_full_prompts_and_the_collator_cuts(trainer):
    long = Dataset.from_list([{"prompt": "w1 " * 16, "chosen": "w2 ", "rejected": "w3 "}, *make_pairs(3).to_list()])
    prepared = trainer._prepare_dataset(long, trainer.processing_class, trainer.args, "eval")
    assert len(prepared) == 3
    assert {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(prepared.column_names)
    rows = [{"prompt_ids": [5] * 10, "chosen_ids": list(range(6, 16)), "rejected_ids": [7]}]
    assert trainer.data_collator(rows)["input_ids"].shape == (2, 16)
    assert trainer.data_collator(rows)["completion_mask"].sum(dim=1).tolist() == [6, 1]


def test_the_card_names_no_base_model_where_there_is_none_on_the_hub(trainer):
    trainer.create_model_card("name", None, None)
    text = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert "This model is a fine-tuned version of [None](https://huggingface.co/None)." in text
    assert 'model="None"' in text
    assert "\nlibrary_name: transformers\n" in text
    assert re.search(r"\n- Tokenizers: [\d.]+\n", text)


def test_the_loop_asks_for_all_batches_of_a_step_and_then_computes_each(folder, tmp_path):
    """What `sampo.training.micro_batch_trainer` relies on in transformers."""
    calls, losses = [], []

    class Watched(DPOTrainer):
        def get_batch_samples(self, *args, **kwargs):
            self.batches, n_items = super().get_batch_samples(*args, **kwargs)
            calls.append(("batches", len(self.batches), n_items))
            return self.batches, n_items

        def training_step(self, model, inputs, num_items_in_batch=None):
            (number,) = (i for i, batch in enumerate(self.batches) if batch is inputs)
            calls.append(("step", number, self.accelerator.sync_gradients))
            loss = super().training_step(model, inputs, num_items_in_batch)
            assert loss == losses[-1] / self.current_gradient_accumulation_steps
            assert self.current_gradient_accumulation_steps == len(self.batches)
            return loss

        def compute_loss(self, *args, **kwargs):
            losses.append(super().compute_loss(*args, **kwargs))
            return losses[-1]

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = DPOConfig(**training_options(tmp_path, max_steps=-1, num_train_epochs=1, **options))
    Watched(model=folder, args=args, train_dataset=make_pairs(10)).train()
    whole = [("batches", 2, None), ("step", 0, False), ("step", 1, True)]
    assert calls == [*whole, *whole, ("batches", 1, None), ("step", 0, True)]
