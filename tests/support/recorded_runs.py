"""Twelve short training runs whose every number is recorded: what a change of the code must not change.

Run by test_recorded_runs.py as a process of its own, by torchrun for the last one. It uses the public interface alone,
so that it needs no change when the code inside moves. `python tests/support/recorded_runs.py --record` writes the
record anew; do that only when a change of numbers is meant, and say so in the changelog.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from processes import environment
from tiny import PLAIN, make_pairs, save_model, training_options

from sampo import SamPOConfig, SamPOTrainer

RECORD = Path(__file__).with_name("recorded") / "runs.json"
TIMES = ("runtime", "per_second", "flos")  # in the names of what depends on the machine's load
OURS = {"sampled_sides": "rejected", "length_penalty": "learned", "balance_end_token": True}

# name: options of `SamPOConfig`; what is none of them is read by `train`
RUNS = {
    "all": {"token_weighting": "all"},
    "sampo": {"token_weighting": "sampo", "num_train_epochs": 2, "max_steps": -1},
    "sampo, packed": {"token_weighting": "sampo", "pair_stream": "true"},
    "expected, packed, accumulated": {
        **{"token_weighting": "expected", "keep_end_token": True, "pair_stream": "true"},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    },
    "mean_rescaled, hinge": {"token_weighting": "mean_rescaled", "loss_type": ["hinge"]},
    "top_k, micro-batches": {"token_weighting": "top_k", "max_tokens_per_forward": 40, "pair_stream": "true"},
    "prefix, cached": {"token_weighting": "prefix", "precompute_ref_log_probs": True},
    "decay, LoRA": {"token_weighting": "decay", "lora": True},
    "sampo, two losses, three subsets": {
        **{"token_weighting": "sampo", "mask_samples": 3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        "log_length_pressure": True,
    },
    "ours": {**OURS, "log_length_pressure": True},
    "ours, cached, packed, resumed": {
        **{**OURS, "precompute_ref_log_probs": True, "pair_stream": "true"},
        **{"save_strategy": "steps", "save_steps": 2, "resume": 2},
    },
    "two processes": {**OURS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "processes": 2},
}


def train(model: str, folder: Path, options: dict) -> dict:
    """One run: each line of its log, its evaluation, and a hash of the trained parameters."""
    options = dict(options)
    options.pop("processes", None)
    lora, resume = options.pop("lora", False), options.pop("resume", None)
    trainer = _trainer(model, folder, options, lora)
    trainer.train()
    if resume is not None:  # from the middle, which must end where the whole run ended
        trainer = _trainer(model, folder, options, lora)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}"))
    evaluated = trainer.evaluate()
    log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry and "eval_loss" not in entry]
    digest = hashlib.sha256()
    for name, parameter in sorted(trainer.accelerator.unwrap_model(trainer.model).named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return {
        "log": [_numbers(entry) for entry in log],
        "evaluation": _numbers(evaluated),
        "weights": digest.hexdigest(),
    }


def _trainer(model: str, folder: Path, options: dict, lora: bool) -> SamPOTrainer:
    defaults = {**PLAIN, "max_steps": 4, "ref_cache_dir": str(folder / "references"), "eval_strategy": "no"}
    if not options.get("precompute_ref_log_probs"):
        defaults.pop("ref_cache_dir")
    return SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(folder, **defaults | options)),
        train_dataset=make_pairs(24),
        eval_dataset=make_pairs(11, seed=5),  # the last batch is uneven
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0) if lora else None,
    )


def _numbers(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}


def machine() -> dict[str, str]:
    """What the last bits of a sum depend on."""
    cpu = Path("/proc/cpuinfo")  # two models of one capability take sums in other orders
    lines = cpu.read_text().split("\n\n")[0].splitlines() if cpu.exists() else []
    model = [line.partition(":")[2].strip() for line in lines if line.startswith(("cpu family", "model", "stepping"))]
    return {
        "torch": torch.__version__,
        "processor": " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *model]),
    }


def run_all(folder: Path) -> dict[str, dict]:
    """All runs, as the record has them."""
    model = save_model(folder / "model")
    found: dict[str, dict] = {}
    for processes in (1, 2):
        names = [name for name, options in RUNS.items() if options.get("processes", 1) == processes]
        out = folder / f"{processes}.json"
        words = [str(Path(__file__)), "--model", model, "--folder", str(folder), "--out", str(out), "--runs", *names]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        found |= json.loads(out.read_text())
    return {name: found[name] for name in RUNS}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", nargs="+")
    args = parser.parse_args()
    if args.record:
        with tempfile.TemporaryDirectory() as folder:
            RECORD.parent.mkdir(exist_ok=True)
            record = {"machine": machine(), "runs": run_all(Path(folder))}
            RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        return
    torch.set_num_threads(1)
    disable_progress_bar()
    found = {name: train(args.model, args.folder / name.replace(" ", "-"), RUNS[name]) for name in args.runs}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        args.out.write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
