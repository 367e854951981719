"""What the reference of an adapter is, a reference by its path, and merging."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import make_model, make_pairs, make_tokenizer, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sampo import cli
from sampo.commands import train
from sampo.training import merge as adapters

KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def save_adapter(folder, base, seed=1, tokenizer=True, **options):
    """An adapter that has learned something, as after SFT."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture
def words(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    make_pairs(16, conversational=True).to_json(pairs)
    return [
        *("--dataset_name", str(pairs), "--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false"),
        *("--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4"),
        *("--learning_rate", "1e-2", "--save_strategy", "no", "--token_weighting", "all"),
    ]


def log_of(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def adapter_weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def sequence_logp(model, tokenizer, row, side):
    """Log-prob of a completion, one row without padding."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    ids = tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


def mean_margin(pairs, policy, reference, *, beta=0.1):
    tokenizer, total = make_tokenizer(), 0.0
    for row in pairs:
        for side, sign in (("chosen", 1), ("rejected", -1)):
            ratio = sequence_logp(policy, tokenizer, row, side) - sequence_logp(reference, tokenizer, row, side)
            total += sign * ratio
    return beta * total / len(pairs)


# --- training on


def test_an_adapter_is_trained_on_with_a_copy_of_it_as_the_reference(adapter, words, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert train.start(["--model_name_or_path", adapter, *words]) == 0
    first = log_of(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0
    assert f"training continues with the adapter in {adapter}" in caplog.text
    assert 'reference: a copy of the adapter as it was passed (adapter "ref")' in caplog.text
    before, after = adapter_weights(adapter), adapter_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert any((before[name] - after[name]).abs().max() > 1e-3 for name in before)
    assert all(torch.equal(before[name], weight) for name, weight in adapter_weights(tmp_path / "out" / "ref").items())


def test_its_margins_are_against_the_adapter_and_not_against_the_base(adapter, base, words, tmp_path):
    """Of the second of two steps on all pairs, with the policy as it was saved after the first."""
    more = ["--per_device_train_batch_size", "16", "--save_strategy", "steps", "--save_steps", "1", "--beta", "0.1"]
    assert train.start(["--model_name_or_path", adapter, *words, *more]) == 0
    pairs = make_pairs(16, conversational=True)

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(base)
        return PeftModel.from_pretrained(model, folder).eval()

    policy, reference = load(tmp_path / "out" / "checkpoint-1"), load(adapter)
    expected = mean_margin(pairs, policy, reference)
    assert log_of(tmp_path / "out")[1]["rewards/margins"] == pytest.approx(expected, abs=1e-5)
    with policy.disable_adapter():  # a copy of the base
        against_base = mean_margin(pairs, reference, policy)
    assert abs(expected) > 1e-3
    assert abs(against_base) > 1e-2


def test_the_reference_is_the_first_adapter_after_a_resume_too(adapter, words, tmp_path):
    words = ["--model_name_or_path", adapter, *words, "--save_strategy", "steps", "--save_steps", "1"]
    words += ["--max_steps", "3", "--pair_stream", "false"]  # two runs of `auto` can find other forwards faster
    assert train.start(words) == 0
    whole = adapter_weights(tmp_path / "out")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    assert train.start([*words, "--resume_from_checkpoint", "true"]) == 0
    resumed = adapter_weights(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_adapter_is_as_it_is_and_without_a_tokenizer_takes_that_of_its_base(base, words, tmp_path, caplog):
    bare = save_adapter(tmp_path / "bare", base, tokenizer=False)
    assert train.start(["--model_name_or_path", bare, *words, "--max_steps", "1", "--lora_r", "7"]) == 0
    assert "['lora_r'] have no effect on an adapter" in caplog.text
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_second_adapter_on_the_first_is_refused(adapter, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.start(["--model_name_or_path", adapter, *words, "--use_peft"])
    assert "`use_peft` would put a second adapter beside the one in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_model_and_an_adapter_is_refused(adapter, base, words, tmp_path, capsys):
    both = tmp_path / "both"
    shutil.copytree(base, both)
    for file in Path(adapter).glob("adapter_*"):
        shutil.copy(file, both)
    with pytest.raises(SystemExit):
        train.start(["--model_name_or_path", str(both), *words])
    assert "must hold a model or an adapter" in capsys.readouterr().err


def test_an_adapter_that_names_no_base_is_refused(adapter, words, tmp_path, capsys):
    orphan = tmp_path / "orphan"
    shutil.copytree(adapter, orphan)
    config = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert train.start(["--model_name_or_path", str(orphan), *words]) == 2
    assert "must name its base model" in capsys.readouterr().err


# --- a reference by its path


@pytest.mark.parametrize("peft", [False, True])
def test_the_reference_can_be_another_model(base, words, tmp_path, caplog, peft):
    other = save_model(tmp_path / "other", seed=5)
    words = ["--model_name_or_path", base, "--ref_model_name_or_path", other, *words]
    words += ["--max_steps", "1", "--per_device_train_batch_size", "16", *(["--use_peft"] if peft else [])]
    with caplog.at_level(logging.INFO):
        assert train.start(words) == 0
    policy, reference = (AutoModelForCausalLM.from_pretrained(name) for name in (base, other))
    expected = mean_margin(make_pairs(16, conversational=True), policy, reference)
    assert log_of(tmp_path / "out")[0]["rewards/margins"] == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 0.01
    assert f"the reference model is {other}" in caplog.text


def test_the_model_itself_as_the_reference_is_no_other_model(base, words, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert train.start(["--model_name_or_path", base, "--ref_model_name_or_path", base + "/", *words]) == 0
    assert log_of(tmp_path / "out")[0]["rewards/margins"] == 0
    assert "reference: a copy of the initial policy" in caplog.text


def test_a_reference_with_another_vocabulary_is_refused_before_a_model_is_loaded(base, words, tmp_path, capsys):
    other = tmp_path / "other"
    make_model().save_pretrained(other)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    (other / "model.safetensors").write_bytes(b"")  # nothing may read it
    assert train.start(["--model_name_or_path", base, "--ref_model_name_or_path", str(other), *words]) == 2
    said = capsys.readouterr().err
    assert "must have the vocabulary of `model_name_or_path`" in said
    assert "1 differ, the first: 'new' is 69 there and none here" in said


def test_a_reference_with_too_few_embeddings_is_refused(base, words, tmp_path, capsys):
    other = save_model(tmp_path / "other", vocab_size=60)
    assert train.start(["--model_name_or_path", base, "--ref_model_name_or_path", other, *words]) == 2
    assert "with 60 rows of embeddings for token numbers up to 68" in capsys.readouterr().err


def test_an_adapter_as_the_reference_of_another_model_is_refused(base, adapter, words, capsys):
    with pytest.raises(SystemExit):
        train.start(["--model_name_or_path", base, "--ref_model_name_or_path", adapter, *words])
    assert "`ref_model_name_or_path` must be a complete model" in capsys.readouterr().err


# --- merging


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_says_what_adapter_and_base_say(kind, base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base, **KINDS[kind])
    report = adapters.merge(adapter, tmp_path / "merged")
    ids = torch.randint(0, 69, (4, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits.log_softmax(-1)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        adapted = adapted(ids).logits.log_softmax(-1)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits.log_softmax(-1)
    assert (merged - adapted).abs().max() < 1e-5
    assert (merged - plain).abs().max() > 0.05
    assert report.difference_max < 1e-5 < 0.01 < report.adapter_effect_max
    assert json.loads((tmp_path / "merged" / adapters.REPORT).read_text())["difference_max"] == report.difference_max
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_difference_is_that_of_the_weights_as_they_were_saved(adapter, base, tmp_path, caplog):
    report = adapters.merge(adapter, tmp_path / "merged", dtype="bfloat16", texts=["w1 w2 w3", "w9 w8 w7 w6 w5"])
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    tokenizer = make_tokenizer()
    difference = (
        adapters.token_logps(rounded, tokenizer, ["w1 w2 w3", "w9 w8 w7 w6 w5"])
        - adapters.token_logps(exact, tokenizer, ["w1 w2 w3", "w9 w8 w7 w6 w5"])
    ).abs()
    assert report.tokens == 2 + 4 + 63
    assert report.difference_max == pytest.approx(difference.max().item(), rel=1e-3)
    assert report.difference_mean == pytest.approx(difference.mean().item(), rel=1e-3)
    assert 1e-4 < report.difference_max < adapters.BOUNDS["bfloat16"]


def test_what_rounding_takes_from_a_weak_adapter_is_said(base, tmp_path, caplog):
    weak = save_adapter(tmp_path / "weak", base, lora_alpha=0.1)
    adapters.merge(weak, tmp_path / "merged", dtype="bfloat16")
    assert "% of what the adapter changes" in caplog.text
    caplog.clear()
    adapters.merge(weak, tmp_path / "exact", dtype="float32")
    assert not caplog.text


def test_token_logps_are_those_of_each_token_given_those_before():
    model, tokenizer = make_model(), make_tokenizer()
    found = adapters.token_logps(model, tokenizer, ["w1 w2 w3"])
    ids = tokenizer("w1 w2 w3")["input_ids"]
    with torch.no_grad():
        logps = [model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]].item() for i in (1, 2)]
    assert found[:2].tolist() == pytest.approx(logps, abs=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of the very thing
def test_a_merge_that_changes_what_the_model_says_is_refused_and_leaves_nothing(tmp_path):
    """An adapter on embeddings that are tied to the head: merged, it speaks in the head too."""
    tied = save_model(tmp_path / "tied", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", tied, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ArithmeticError, match="must give the log-probs of base and adapter together"):
        adapters.merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "tied"]


def test_a_folder_in_use_is_refused_and_an_empty_one_is_filled(adapter, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("mine")
    with pytest.raises(ValueError, match="must not exist or be an empty folder"):
        adapters.merge(adapter, used)
    assert (used / "file").read_text() == "mine"
    (used / "file").unlink()
    adapters.merge(adapter, used)
    assert not list(used.glob("model-0*"))
    assert not list(tmp_path.glob(".sampo*"))


def test_a_prefix_cannot_be_merged(base, tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match="of a kind that can be merged"):
        adapters.merge(str(tmp_path / "prefix"), tmp_path / "merged")


def test_the_command_merges_into_the_base_that_is_named(adapter, base, tmp_path, capsys):
    other = save_model(tmp_path / "other", seed=9)
    texts = tmp_path / "texts.txt"
    texts.write_text("w1 w2 w3\n\nw4 w5\n")
    words = ["merge", adapter, "--base", other, "--out", str(tmp_path / "merged"), "--texts", str(texts)]
    assert cli.main(words) == 0
    assert f"{2 + 1 + 63} tokens compared" in capsys.readouterr().out
    merged, plain = load_file(tmp_path / "merged" / "model.safetensors"), load_file(f"{other}/model.safetensors")
    assert torch.equal(merged["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], load_file(f"{base}/model.safetensors")["lm_head.weight"])
    with pytest.raises(SystemExit, match="must not exist or be an empty folder"):
        cli.main(words)


def test_quantised_weights_need_bitsandbytes_and_are_measured(adapter, tmp_path):
    words = ["merge", adapter, "--out", str(tmp_path / "merged"), "--load_in_4bit"]
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(SystemExit, match="need bitsandbytes"):
            cli.main(words)
        return
    assert cli.main(words) == 0
    report = json.loads((tmp_path / "merged" / adapters.REPORT).read_text())
    assert report["quantized"] == "4bit nf4"
    assert report["difference_max"] < report["bound"]
