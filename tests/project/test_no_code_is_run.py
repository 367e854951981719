"""Models, data, configurations and checkpoints that try to run code when they are loaded. None of them may.

Each payload makes a folder; that it would, where it is let, is shown first.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from payload import Payload
from resume_worker import make_run
from tiny import make_pairs, save_model

from sampo import load_preferences
from sampo.checkpointing.files import read_manifest, write_manifest
from sampo.checkpointing.resume import ResumeRefusedError
from sampo.commands import train


@pytest.fixture
def marker(tmp_path):
    """The folder that code would make; nobody may have made it at the end."""
    place = tmp_path / "code-was-run"
    yield place
    assert not place.exists()


@pytest.fixture
def model(tmp_path):
    return Path(save_model(tmp_path / "model"))


def words(tmp_path, model, **options):
    data = tmp_path / "pairs.jsonl"
    make_pairs(8, conversational=True).to_json(data)
    options = {"model_name_or_path": model, "dataset_name": data, "output_dir": tmp_path / "out"} | options
    options |= {"use_cpu": "true", "bf16": "false", "max_steps": "1", "save_strategy": "no"}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_the_payloads_run_code_where_they_are_let(tmp_path):
    torch.save({"a": Payload(tmp_path / "1")}, tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False)
    yaml.unsafe_load(f"!!python/object/apply:os.mkdir ['{tmp_path / '2'}']")
    pickle.loads(pickle.dumps(Payload(tmp_path / "3")))
    assert all((tmp_path / name).is_dir() for name in "123")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights(tmp_path, model, marker, name, capsys):
    folder = model
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    else:
        folder = tmp_path / "adapter"
        folder.mkdir()
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model)}))
    torch.save({"lm_head.weight": Payload(marker)}, folder / name)
    assert train.start(words(tmp_path, folder)) == 2
    said = capsys.readouterr().err
    assert said.count("sampo train: error: ") == 1
    assert name == "adapter_model.bin" or "that would run code when it is loaded" in said


def test_the_code_of_a_model(tmp_path, model, marker, capsys):
    (model / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Model: pass\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Model", "AutoModelForCausalLM": "code.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    assert train.start(words(tmp_path, model)) == 2
    assert "trust_remote_code" in capsys.readouterr().err


def test_the_code_of_a_tokenizer(tmp_path, model, marker):
    (model / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass T: pass\n")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    train.start(words(tmp_path, model))  # it may find the plain tokenizer beside


@pytest.mark.parametrize(
    "text",
    ["seed: !!python/object/apply:os.mkdir ['{}']", "seed: !!python/object/new:os.mkdir ['{}']"],
)
def test_tags_of_a_configuration(tmp_path, model, marker, text, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(text.format(marker))
    with pytest.raises(SystemExit):
        train.start([*words(tmp_path, model), "--config", str(config)])
    assert "must be valid YAML" in capsys.readouterr().err


def test_a_chat_template(tmp_path, model, marker, capsys):
    template = f"{{{{ cycler.__init__.__globals__.os.mkdir('{marker}') }}}}"
    template += "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert train.start(words(tmp_path, model, chat_template=template)) == 2
    assert "The chat template must not access Python" in capsys.readouterr().err


def test_data_that_come_with_a_script_or_as_a_pickle(tmp_path, model, marker, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    (folder / "pairs.pkl").write_bytes(pickle.dumps([Payload(marker)]))
    with pytest.raises(FileNotFoundError, match="must hold files that end in"):
        load_preferences(folder)
    with pytest.raises(ValueError, match="must end in"):
        load_preferences(folder / "pairs.pkl")
    assert train.start(words(tmp_path, model, dataset_name=folder)) == 2
    assert train.start(words(tmp_path, model, dataset_name=folder / "data.py")) == 2
    (folder / "pairs.jsonl").write_bytes(pickle.dumps([Payload(marker)]))
    assert train.start(words(tmp_path, model, dataset_name=folder)) == 2
    assert capsys.readouterr().err.count("sampo train: error: ") == 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a run of two steps after the first."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_run(save_model(folder / "model"), folder / "out", max_steps=2)
    trainer.train()
    return folder / "out" / "checkpoint-1"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_the_files_of_a_checkpoint(tmp_path, checkpoint, marker, name):
    """Whoever can replace a file can write a manifest that fits."""
    forged = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-1"))
    if name == "pytorch_model.bin":
        (forged / "model.safetensors").unlink()
    torch.save({"state": Payload(marker)}, forged / name)
    write_manifest(forged, read_manifest(checkpoint).run)
    trainer = make_run(str(checkpoint.parents[1] / "model"), tmp_path / "out", max_steps=2)
    with pytest.raises(ResumeRefusedError, match="that would run code when it is loaded"):
        trainer.train(resume_from_checkpoint=str(forged))


def test_the_rest_of_a_checkpoint_is_not_unpickled(tmp_path, checkpoint, marker):
    forged = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-1"))
    torch.save(Payload(marker), forged / "training_args.bin")
    write_manifest(forged, read_manifest(checkpoint).run)
    make_run(str(checkpoint.parents[1] / "model"), tmp_path / "out", max_steps=2).train(str(forged))
