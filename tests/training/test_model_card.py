"""The card of a trained model, in the output folder, in checkpoints and wherever a model is saved."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from tiny import make_model, make_pairs, make_tokenizer, save_model, training_options
from trl import DPOTrainer

from sampo import SamPOConfig, SamPOTrainer, __version__
from sampo.report.collect import read_card

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "my-base")


def train(model, tmp_path, peft_config=None, **options):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1} | options
    trainer = SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(tmp_path / "out", **options)),
        train_dataset=make_pairs(16),
        eval_dataset=make_pairs(6, seed=1),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.evaluate()
    return trainer


@pytest.mark.parametrize("peft", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_each_saved_model_has_a_card_that_says_how_it_was_made(model_folder, tmp_path, peft):
    trainer = train(model_folder, tmp_path, peft, length_penalty="learned", learning_rate=3e-4, beta=0.2)
    trainer.dataset_name = str(tmp_path / "my-pairs.jsonl")
    (tmp_path / "my-pairs.jsonl").touch()
    trainer.save_model(str(tmp_path / "final"))
    checkpoint = (tmp_path / "out" / "checkpoint-2" / "README.md").read_text(encoding="utf-8")
    final = (tmp_path / "final" / "README.md").read_text(encoding="utf-8")
    for text in (checkpoint, final):
        assert "None](https://huggingface.co/None)" not in text
        assert "None" not in text
        assert "This model is a fine-tuned version of `my-base`." in text
        assert re.search(r"## Data\n\n(`my-pairs\.jsonl`: )?16 pairs, [\d.]+ chosen", text)
        for line in (
            "| `learning_rate` | 0.0003 |",
            "| `beta` | 0.2 |",
            "| `max_steps` | 2 |",
            "| pairs per step | 4 |",
        ):
            assert line in text
        assert f"- sampo: {__version__}" in text
        assert "| `length/chosen` |" in text
        assert "`length_penalty: learned`" in text
        assert ("| `lora_alpha` | 8 |" in text) == bool(peft)
        assert str(tmp_path) not in text  # nothing of this machine
    assert "`my-pairs.jsonl`: " in final
    read = read_card(tmp_path / "final" / "README.md")  # of `sampo report`
    assert read["model"] == "my-base"
    assert read["method"].startswith(
        "SamPO (`token_weighting: sampo`, arXiv 2406.10957, Eq. 10), `length_penalty: learned`"
    )
    assert re.fullmatch(
        r"`my-pairs\.jsonl`: 16 pairs, [\d.]+ chosen and [\d.]+ rejected tokens on average", read["data"]
    )
    logged = trainer.state.log_history[-1]["eval_length_gap/correlation"]
    assert f"| `eval_length_gap/correlation` | {logged:.4g} |" in final
    data = ModelCard.load(tmp_path / "final" / "README.md").data
    assert set(data.tags) >= {"dpo", "sampo", "trl"}
    assert data.library_name == ("peft" if peft else "transformers")
    manifest = json.loads(next((tmp_path / "out" / "checkpoint-2").glob("*manifest*.json")).read_text())
    assert "README.md" in str(manifest)


def test_with_all_tokens_the_tags_are_trls_on_the_model_too(model_folder, tmp_path):
    for weighting, tags in (("all", set(DPOTrainer._tag_names)), ("sampo", {*DPOTrainer._tag_names, "sampo"})):
        trainer = train(model_folder, tmp_path / weighting, token_weighting=weighting)
        assert set(trainer.model.model_tags) == tags
        card = ModelCard.load(tmp_path / weighting / "out" / "README.md")
        assert set(card.data.tags) == {"generated_from_trainer", *tags}


def test_a_model_from_memory_and_a_data_set_of_the_hub(tmp_path):
    model = make_model()
    reference = make_model()
    trainer = SamPOTrainer(
        model=model,
        ref_model=reference,
        args=SamPOConfig(**training_options(tmp_path / "out")),
        train_dataset=make_pairs(8),
        processing_class=make_tokenizer(),
    )
    trainer.create_model_card(model_name="x", dataset_name="someone/pairs")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "This model is fine-tuned from a model that was made in memory on the [someone/pairs](" in text
    assert ModelCard(text).data.datasets == "someone/pairs"
