"""SmolLM2-135M-Instruct on human preference pairs, started as a user would start it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_model import hh_file, smollm2_folder

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder():
    return smollm2_folder()


def launch(recipe, folder, tmp_path, *more):
    """The command of the recipe's header, on the CPU, with a few pairs and steps; returns the log and the folder."""
    out = tmp_path / "out"
    recipe = f"recipes/smollm2-135m-instruct/{recipe}.yaml"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/single_gpu.yaml"),
        *("scripts/train_sampo.py", "--config", recipe, "--model_name_or_path", folder, "--use_cpu"),
        *("--dataset_name", hh_file(tmp_path / "pairs.jsonl", 16, max_chars=400), "--eval_strategy", "no"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_length", "192"),
        *("--logging_steps", "1", "--warmup_steps", "0", "--gradient_checkpointing", "false", "--save_strategy", "no"),
        *("--output_dir", str(out), *more),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry], out, done.stderr


def check_log(log, steps):
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in log)
    # after the first step policy and reference are two
    assert any(abs(entry["rewards/margins"]) > 1e-4 for entry in log[1:])
    for entry in log:
        assert entry["length/chosen"] > 2
        assert entry["length/rejected"] > 2
        assert 0 < entry["length/selected"] <= 1


def generate(model, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_the_converted_model_keeps_its_chat_template_and_its_end_token(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    text = tokenizer.apply_chat_template([{"role": "assistant", "content": "Yes."}], tokenize=False)
    assert text.endswith("<|im_start|>assistant\nYes.<|im_end|>\n")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id
    assert not getattr(model.config, "quantization_config", None)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert generate(model, tokenizer) == "The capital of France is Paris.<|im_end|>"


def test_a_lora_recipe_trains_and_its_adapter_loads_and_generates(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log, out, said = launch("sampo_lora", folder, tmp_path, "--max_steps", "4", "--learning_rate", "1e-3")
    check_log(log, steps=4)
    assert "adapter" in said
    assert "SamPO (`token_weighting: sampo`" in said

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, out)
    trained = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert len(trained) == 30 * 7  # every linear layer of the 30 blocks
    assert all(p.abs().sum() > 0 for p in trained.values())
    assert len(generate(model, AutoTokenizer.from_pretrained(out))) > 0


def test_a_full_recipe_trains_and_its_model_loads_and_generates(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = ["--max_steps", "3", "--learning_rate", "1e-4", "--dtype", "bfloat16"]
    log, out, said = launch("sampo_full", folder, tmp_path, *more)
    check_log(log, steps=3)
    assert "reference: a copy of the initial policy" in said
    assert "rounded away" in said  # bfloat16 for speed on the CPU; the recipe has float32

    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    after = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    changed = [not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(changed) > 200
    assert len(generate(after, AutoTokenizer.from_pretrained(out))) > 0


def test_the_pair_stream_gives_its_log_probs_and_gradients(folder, tmp_path):
    from sampo import SamPOConfig, SamPOTrainer, load_preferences

    data = load_preferences(hh_file(tmp_path / "pairs.jsonl", 4, max_chars=400))
    results = []
    for mode in ("false", "true"):
        settings = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "max_length": 256,
        }
        args = SamPOConfig(**settings, pair_stream=mode, gradient_checkpointing=False, token_weighting="all")
        trainer = SamPOTrainer(model=folder, args=args, train_dataset=data)
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        logps = trainer.passes.score(trainer.model.train(), trainer.prepare_batch(inputs)).logps
        logps.sum().backward()
        results.append((logps.detach(), {name: p.grad for name, p in trainer.model.named_parameters()}))
    (plain, theirs), (streamed, ours) = results
    torch.testing.assert_close(streamed, plain, atol=1e-4, rtol=0)
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in theirs.values()))
    assert math.sqrt(sum((theirs[n] - ours[n]).pow(2).sum().item() for n in theirs)) <= 1e-4 * norm
