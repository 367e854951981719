"""One training run that may be killed at any moment, and all that can be seen of it: for test_resume.py."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tiny import PLAIN, make_pairs, training_options

from sampo import SamPOConfig, SamPOTrainer

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TIMES = ("runtime", "per_second")
# Two and a half steps an epoch, a line of the log every second step, a checkpoint after each.
RUN = {
    "max_steps": 7,
    "gradient_accumulation_steps": 2,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "length_penalty": "learned",
    "sampled_sides": "rejected",
    **PLAIN,  # `auto` would time the first batches, and a run that was killed among them would time others
}


class Interrupted(Exception):
    """In the middle of a micro-batch."""


def make_run(
    model: Any,
    folder: Path,
    *,
    see: Callable[[dict], None] = lambda line: None,
    stop_at: int | None = None,
    lora: bool = False,
    pairs: int = 20,
    data_seed: int = 0,
    **options,
) -> SamPOTrainer:
    """A trainer that tells `see` of each of its micro-batches.

    Args:
        model: A model or the folder of one.
        folder: `output_dir`.
        see: Gets the step, the loss, and hashes of the rows and of the tokens that counted.
        stop_at: Number of micro-batches of this launch; in the next one, after the forward pass, it is interrupted.
        lora: Train an adapter, with dropout.
        pairs: Size of the data.
        data_seed: Of the data.
        **options: As of `SamPOConfig`.
    """
    trainer = SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(folder, **RUN | {"disable_dropout": not lora} | options)),
        train_dataset=make_pairs(pairs, seed=data_seed),
        eval_dataset=make_pairs(6, seed=5),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    compute, weigh = trainer._compute_loss, trainer.weigher.weigh
    counted, done = [], []

    def watched_weigh(*args, **kwargs):
        draws = weigh(*args, **kwargs)
        counted.extend(digest(policy) for policy, _ in draws)
        return draws

    def watched_loss(model, inputs, return_outputs):
        counted.clear()
        loss = compute(model, inputs, return_outputs)
        if trainer.model.training:
            if len(done) == stop_at:
                raise Interrupted
            done.append(None)
            rows = digest(inputs["input_ids"])
            see({"step": trainer.state.global_step, "loss": loss.item(), "rows": rows, "counted": list(counted)})
        return loss

    trainer._compute_loss, trainer.weigher.weigh = watched_loss, watched_weigh
    return trainer


def digest(tensor: torch.Tensor) -> str:
    """Equal for equal numbers alone."""
    return hashlib.sha256(tensor.detach().double().numpy().tobytes()).hexdigest()[:16]


def outcome(trainer) -> dict:
    """What an interrupted run must have in common with one that was not."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    log = [
        {name: value for name, value in line.items() if not name.endswith(TIMES)}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]
    return {
        "weights": {name: digest(tensor) for name, tensor in model.named_parameters()},
        "theta": trainer.run_state.theta.value,
        "log": log,
        "step": trainer.state.global_step,
    }


def launch(model: str, folder: str, number: int, rank: int, processes: int, port: int, options: dict) -> None:
    """One process of a run that goes on from wherever it was killed.

    What it sees goes to `trace.<number>.<rank>` in the folder, a line a micro-batch, what it says to `said.…`, and the
    end to `outcome.<rank>`.
    """
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with (place / f"said.{number}.{rank}").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    with (place / f"trace.{number}.{rank}").open("a", encoding="utf-8") as trace:
        trainer = make_run(
            model, place / "run", see=lambda line: print(json.dumps(line), file=trace, flush=True), **options
        )
        trainer.train(resume_from_checkpoint="auto")
    (place / f"outcome.{rank}").write_text(json.dumps(outcome(trainer)))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
