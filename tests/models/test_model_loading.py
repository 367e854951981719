"""Models that must not be used: weights that are not there, NaN, folders that are no model. In every command."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model, make_pairs, make_tokenizer, save_model
from transformers import LlamaForSequenceClassification

from sampo import cli
from sampo.commands import train
from sampo.commands.launch import refuse_engine_that_cannot_run
from sampo.models.load import ModelError, add_adapter, check_model, create_model, not_finite

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Path(save_model(tmp_path_factory.mktemp("models") / "whole"))


@pytest.fixture(scope="module")
def adapter(whole):
    folder = whole.parent / "adapter"
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(whole)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(whole):
    """Pairs, prompts, and answers of two systems."""
    folder = whole.parent / "files"
    folder.mkdir()
    make_pairs(8, conversational=True).to_json(folder / "pairs.jsonl")
    (folder / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": "w1", "answer": name, "stop": "eos"}) + "\n")
    return folder


def changed(folder: Path, to: Path, change, name="model.safetensors") -> Path:
    shutil.copytree(folder, to)
    weights = load_file(to / name)
    change(weights)
    save_file(weights, to / name, metadata={"format": "pt"})
    return to


BREAKS = {
    "missing": (lambda weights: weights.pop(WEIGHT), f"without {WEIGHT}"),
    "misshapen": (
        lambda weights: weights.update({WEIGHT: torch.ones(3, 2)}),
        f"{WEIGHT} of shape (3, 2) in place of (48, 32)",
    ),
    "nan": (lambda weights: weights[WEIGHT].fill_(torch.nan), f"NaN or infinity in {WEIGHT}"),
    "infinite": (lambda weights: weights[WEIGHT][0, 0].fill_(torch.inf), f"NaN or infinity in {WEIGHT}"),
}


def commands(model, files, out) -> dict[str, list[str]]:
    """A call of each command that opens a model."""
    pairs, prompts = str(files / "pairs.jsonl"), str(files / "prompts.jsonl")
    training = [
        "--dataset_name",
        pairs,
        "--output_dir",
        f"{out}/run",
        "--use_cpu",
        "--bf16",
        "false",
        "--max_steps",
        "1",
    ]
    answers = ["--system", f"{files}/a.jsonl", "--baseline", f"{files}/b.jsonl", "--out", f"{out}/judged.jsonl"]
    return {
        "train": ["--model_name_or_path", str(model), *training],
        "cache": ["--model_name_or_path", str(model), *training],
        "generate": [str(model), "--prompts", prompts, "--out", f"{out}/answers.jsonl"],
        "diagnose": ["--policy", str(model), "--data", pairs, "--out", f"{out}/diagnosed", "--use_cpu"],
        "judge": ["--judge", "implicit", "--model", str(model), "--ref_model", str(model), *answers],
        "bench": [str(model), "--out", f"{out}/bench.jsonl", "--tasks", "piqa"],
    }


def refusal(capsys, name: str, words: list[str]) -> str:
    """What a command says of a model that it refuses: one line, and no traceback."""
    try:
        status = cli.main([name, *words])
        said = capsys.readouterr().err
    except SystemExit as stop:
        status, said = stop.code, f"{capsys.readouterr().err}{stop.code}"
    assert status not in (0, None), name
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("kind", ["missing", "misshapen"])
@pytest.mark.parametrize("name", commands("m", Path("f"), "o"))
def test_every_command_names_the_weight_that_the_files_lack(tmp_path, whole, files, capsys, kind, name):
    change, text = BREAKS[kind]
    folder = changed(whole, tmp_path / kind, change)
    assert text in refusal(capsys, name, commands(folder, files, tmp_path)[name])


@pytest.mark.parametrize("kind", ["nan", "infinite"])
@pytest.mark.parametrize("name", ["generate", "diagnose", "judge", "bench"])
def test_weights_that_are_not_finite_answer_nothing(tmp_path, whole, files, capsys, kind, name):
    change, text = BREAKS[kind]
    folder = changed(whole, tmp_path / kind, change)
    assert text in refusal(capsys, name, commands(folder, files, tmp_path)[name])
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize("name", ["train", "generate", "diagnose", "judge"])
def test_a_parent_folder_names_the_models_in_it(tmp_path, whole, files, capsys, name):
    parent = tmp_path / "runs"
    for step in (9, 10):
        shutil.copytree(whole, parent / f"checkpoint-{step}")
    said = refusal(capsys, name, commands(parent, files, tmp_path)[name])
    assert "it holds no model itself; checkpoint-9, checkpoint-10 below it do. Name one of them." in said


@pytest.mark.parametrize("name", ["train", "generate", "diagnose", "judge", "bench"])
def test_a_typo_is_not_looked_up_on_the_hub(tmp_path, whole, files, capsys, name, monkeypatch):
    shutil.copytree(whole, tmp_path / "models" / "qwen-sampo")
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, name, commands("models/qwen-samo", files, tmp_path)[name])
    assert "there is no such folder. Did you mean 'models/qwen-sampo'?" in said


def test_a_tied_head_is_not_missing(tmp_path):
    folder = save_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(Path(folder) / "model.safetensors")
    check_model(folder)
    assert create_model(folder, dtype="float32").lm_head.weight.shape == (69, 32)


def test_a_weight_without_a_place_is_reported_and_left_aside(tmp_path, whole, caplog):
    folder = changed(whole, tmp_path / "more", lambda weights: weights.update({"model.spare": torch.ones(2)}))
    check_model(str(folder))
    assert "does not have, and that are not used: model.spare" in caplog.text


def test_an_adapter_must_have_all_of_its_weights_and_a_whole_base(tmp_path, whole, adapter, files, capsys):
    lost = []
    broken = changed(
        adapter, tmp_path / "broken", lambda weights: lost.append(weights.popitem()), name="adapter_model.safetensors"
    )
    assert "must hold all of its weights" in refusal(capsys, "generate", commands(broken, files, tmp_path)["generate"])
    base = changed(whole, tmp_path / "base", BREAKS["missing"][0])
    config = json.loads((adapter / "adapter_config.json").read_text())
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    for name in ("generate", "train", "diagnose"):
        assert f"without {WEIGHT}" in refusal(capsys, name, commands(moved, files, tmp_path / name)[name])
    assert f"without {WEIGHT}" in refusal(capsys, "merge", [str(moved), "--out", str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_a_base_of_another_vocabulary_and_folders_without_an_adapter(tmp_path, whole, adapter, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tokens")
    with_tokens = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    make_tokenizer().save_pretrained(with_tokens)
    small = save_model(tmp_path / "small", vocab_size=50)
    out = ["--out", str(tmp_path / "merged")]
    assert "must have the vocabulary" in refusal(capsys, "merge", [str(with_tokens), *out, "--base", small])
    other = save_model(tmp_path / "other")
    tokenizer = json.loads((Path(other) / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (Path(other) / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = refusal(capsys, "merge", [str(with_tokens), *out, "--base", other])
    assert "2 tokens of other numbers, the first: 'w1'" in said
    assert "which holds a complete model" in refusal(capsys, "merge", [str(whole), *out])
    assert "it holds no model itself" in refusal(capsys, "merge", [str(tmp_path), *out])
    assert not (tmp_path / "merged").exists()


def test_a_language_model_is_no_reward_model_without_a_head(tmp_path, whole, files, capsys):
    words = commands(whole, files, tmp_path)["judge"][4:]
    words = ["--judge", "reward", "--model", str(whole), *words[2:]]
    config = json.loads((whole / "config.json").read_text())
    plain = Path(shutil.copytree(whole, tmp_path / "plain"))
    (plain / "config.json").write_text(json.dumps(config | {"id2label": {"0": "r"}, "label2id": {"r": 0}}))
    words[words.index(str(whole))] = str(plain)
    assert "without score.weight" in refusal(capsys, "judge", words)
    reward = tmp_path / "reward"
    LlamaForSequenceClassification(make_model().config).save_pretrained(reward)


def test_weights_that_are_not_finite_are_found_in_every_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = {"good": torch.full((3,), 1e4, dtype=dtype), "nan": torch.tensor([0, torch.nan], dtype=dtype)}
        weights |= {"inf": torch.tensor([-torch.inf], dtype=dtype), "empty": torch.zeros(0, dtype=dtype)}
        assert not_finite(weights.items()) == ["nan", "inf"]
    assert not_finite([("whole numbers", torch.ones(2, dtype=torch.int64))]) == []


def test_the_code_of_a_model_is_refused_by_every_command_and_nobody_is_asked(tmp_path, whole, files, capsys):
    marker = tmp_path / "code-was-run"
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    (model / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Model: pass\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Model", "AutoModelForCausalLM": "code.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    for name, words in commands(model, files, tmp_path).items():
        assert "trust_remote_code" in refusal(capsys, name, words), name
    assert not marker.exists()


def test_weights_that_run_code_are_refused_by_every_command(tmp_path, whole, files, capsys):
    from payload import Payload

    marker = tmp_path / "code-was-run"
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    torch.save({WEIGHT: Payload(marker)}, model / "pytorch_model.bin")
    for name, words in commands(model, files, tmp_path).items():
        assert "would run code when it is loaded" in refusal(capsys, name, words), name
    assert not marker.exists()


def test_a_run_that_diverges_keeps_its_last_good_checkpoint_and_ends_in_a_sentence(tmp_path, whole, files, capsys):
    words = commands(whole, files, tmp_path)["train"]
    words = [word for word in words if word not in ("--max_steps", "1")]
    steady = [
        *words,
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--save_total_limit",
        "1",
        "--report_to",
        "none",
    ]
    steady += ["--lr_scheduler_type", "constant", "--max_grad_norm", "0", "--per_device_train_batch_size", "4"]
    assert train.start([*steady, "--max_steps", "1", "--learning_rate", "1e-3"]) == 0
    good = (tmp_path / "run" / "checkpoint-1" / "model.safetensors").read_bytes()
    capsys.readouterr()
    # weights of 1e38 overflow in the next product
    assert train.start([*steady, "--max_steps", "6", "--learning_rate", "1e38", "--resume", "auto"]) in (1, 2)
    said = capsys.readouterr().err
    if "`learning_rate` was" in said:  # a resumed run is the run that was: then a run of its own
        shutil.rmtree(tmp_path / "run")
        assert train.start([*steady, "--max_steps", "6", "--learning_rate", "1e38"]) == 1
        said = capsys.readouterr().err
        kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        for name in kept:
            weights = load_file(tmp_path / "run" / name / "model.safetensors")
            assert not_finite(weights.items()) == []
    else:
        assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").read_bytes() == good
    assert said.count("error: ") == 1
    assert "must be finite" in said
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_model_error_is_a_value_error():
    assert issubclass(ModelError, ValueError)


def test_what_can_be_known_is_said_before_processes_are_started(tmp_path, whole, files):
    """One sentence, of the launcher; the processes would each have said it."""
    broken = changed(whole, tmp_path / "broken", BREAKS["missing"][0])
    words = [*commands(broken, files, tmp_path)["train"], "--accelerate_config", "cpu_ddp"]
    done = subprocess.run([sys.executable, "-m", "sampo.cli", "train", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count(f"without {WEIGHT}") == 1
    words = [*commands(whole, files, tmp_path)["train"], "--accelerate_config", "zero3"]
    words.remove("--use_cpu")
    done = subprocess.run([sys.executable, "-m", "sampo.cli", "train", *words], capture_output=True, text=True)
    if not torch.accelerator.is_available():
        assert done.returncode != 0
        assert done.stderr.count("must have a GPU for each process") == 1
        assert "Traceback" not in done.stderr


def test_a_checkpoint_that_is_not_finite_is_skipped_for_an_older_one(tmp_path, whole, files, capsys, caplog):
    from sampo.checkpointing.files import read_manifest, write_manifest

    words = commands(whole, files, tmp_path)["train"]
    words[words.index("--max_steps") + 1] = "2"
    words += ["--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "4"]
    assert train.start(words) == 0
    last = tmp_path / "run" / "checkpoint-2"
    run = read_manifest(last).run
    weights = load_file(last / "model.safetensors")
    weights[WEIGHT][0, 0] = torch.nan
    save_file(weights, last / "model.safetensors", metadata={"format": "pt"})
    write_manifest(last, run)  # whole by its checksums
    assert train.start([*words, "--resume", "auto"]) == 0
    assert f"checkpoint-2 is skipped: {WEIGHT} in model.safetensors holds NaN or infinity" in caplog.text
    assert train.start([*words, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]) == 0


def test_the_class_checks_a_model_that_it_is_given_by_name(tmp_path, whole):
    from tiny import training_options

    from sampo import SamPOConfig, SamPOTrainer

    folder = changed(whole, tmp_path / "missing", BREAKS["missing"][0])
    args = SamPOConfig(**training_options(tmp_path / "out"))
    with pytest.raises(ModelError, match=f"without {WEIGHT}"):
        SamPOTrainer(str(folder), args=args, train_dataset=make_pairs(8))


def test_an_adapter_with_weights_that_have_no_place_is_refused(tmp_path, adapter, files, capsys):
    def add(weights):
        name = next(iter(weights))
        weights[name.replace("q_proj", "k_proj")] = weights[name].clone()

    broken = changed(adapter, tmp_path / "broken", add, name="adapter_model.safetensors")
    for name in ("generate", "train", "diagnose"):
        said = refusal(capsys, name, commands(broken, files, tmp_path / name)[name])
        assert "k_proj.lora_" in said
        assert "without a counterpart in the model" in said


def test_an_adapter_with_whole_embeddings_loads_with_equal_weights(tmp_path, adapter):
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    saved = get_peft_model(make_model(), settings)
    saved.save_pretrained(tmp_path / "adapter")
    found = add_adapter(make_model(), str(tmp_path / "adapter")).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in saved.state_dict().items())
    plain = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path / "with-embeddings", save_embedding_layers=True)
    add_adapter(make_model(), str(tmp_path / "with-embeddings"))


def test_an_adapter_without_a_tokenizer_has_the_vocabulary_of_the_base_that_it_names(tmp_path, adapter, capsys):
    other = save_model(tmp_path / "other")
    tokenizer = json.loads((Path(other) / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (Path(other) / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = refusal(capsys, "merge", [str(adapter), "--out", str(tmp_path / "merged"), "--base", other])
    assert "2 tokens of other numbers, the first: 'w1'" in said
    assert not (tmp_path / "merged").exists()


def test_the_code_of_a_tokenizer_is_refused_with_the_option_that_lets_it_run(tmp_path, whole, files, capsys):
    coded = Path(shutil.copytree(whole, tmp_path / "coded"))
    marker = tmp_path / "code-was-run"
    (coded / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass T: pass\n")
    settings = json.loads((coded / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (coded / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("generate", "diagnose"):
        assert "set `trust_remote_code`" in refusal(capsys, name, commands(coded, files, tmp_path / name)[name])
    assert not marker.exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_several_processes_without_a_gpu_are_refused_before_they_are_started():
    with pytest.raises(SystemExit, match="got 2 on a machine without one"):
        refuse_engine_that_cannot_run({"num_processes": "2"}, [])
    refuse_engine_that_cannot_run({"num_processes": "2"}, ["--use_cpu"])
    refuse_engine_that_cannot_run({"num_processes": "1"}, [])
