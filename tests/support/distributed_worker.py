"""One process of a launch in tests/support/processes.py: trains, and writes what it saw as JSON, one file a rank.

One launch can hold several runs, for the start of the processes takes longer than the tiny runs do.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("NO_SHIM") is None:
    import fsdp_shim  # noqa: F401, before anything of accelerate

import torch
from datasets import concatenate_datasets, load_from_disk
from safetensors.torch import save_file
from tiny import PLAIN, make_pairs, training_options
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from sampo import SamPOConfig, SamPOTrainer
from sampo.reference_cache import store as ref_logps
from sampo.scoring import packing, ways


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=json.loads, required=True, help="name: settings of `train`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seen = {name: train(args.model, args.out / name, **settings) for name, settings in args.runs.items()}
    (args.out / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))


def train(
    model,
    out,
    *,
    batch,
    options,
    pairs=24,
    unequal=False,
    lora=False,
    save=False,
    resume=None,
    fail=None,
    disk=None,
    no_shard_on=None,
    grouped=False,
) -> dict:
    """One run.

    Args:
        model: folder of the model.
        out: its output folder.
        batch: pairs a process and micro-batch.
        options: of `SamPOConfig`.
        pairs: to train on.
        unequal: a third of the pairs has rows that are many times longer.
        lora: train an adapter.
        save: save the model at the end, and beside it the weights as they were gathered here, parameter by parameter.
        resume: a checkpoint.
        fail: (rank, step) that raises.
        disk: folder of the training data, instead of pairs in memory.
        no_shard_on: a rank that cannot write its shard of the reference cache.
        grouped: rows are grouped by length, as for a model that cannot be packed.
    """
    sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "max_steps": 6}
    options = PLAIN | sizes | options
    if options.get("precompute_ref_log_probs"):
        options = {"ref_cache_dir": str(out / "references")} | options  # no other run's
    if no_shard_on == int(os.environ.get("RANK", "0")):
        ref_logps.write_atomic = lambda path, content: Path("/no/such/folder/file").write_bytes(content)
    ways.why_not = (lambda _: "it is a test") if grouped else packing.why_not
    trainer = SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(out, **options)),
        train_dataset=load_from_disk(disk) if disk else make_data(pairs, unequal),
        eval_dataset=make_pairs(11, seed=5),  # the last batch is uneven
        peft_config=adapter() if lora else None,
    )
    if grouped:
        trainer.run_state.way = ways.GROUPED  # or the timing could take the plain forward
    subsets, dtypes = watch(trainer)
    forwards = watch_forwards(trainer)
    if fail is not None:
        trainer.add_callback(Fail(*fail))
    trainer.train(resume_from_checkpoint=resume)
    evaluated = trainer.evaluate()
    weights = gathered_weights(trainer)
    if save:
        trainer.save_model(str(out))
        if trainer.accelerator.is_main_process:
            save_file(weights, out / "gathered.safetensors")
    seen = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "log": trainer.state.log_history,
        "eval": evaluated,
        "theta": trainer.run_state.theta.value,
        "subsets": sorted(subsets),
        "forwards": forwards,
        "processes": trainer.accelerator.num_processes,
        "engine": trainer.accelerator.distributed_type.value,
        "stage": getattr(getattr(trainer.accelerator.state, "deepspeed_plugin", None), "zero_stage", None),
        "streams": trainer.passes.packed,
        "way": trainer.run_state.way,
        "adam_bytes": adam_bytes(trainer),
        "reference_groups": sum(isinstance(m, FSDPModule) for m in trainer.ref_model.modules())
        if trainer.ref_model is not None
        else 0,
        "dtypes": sorted(dtypes),
        "computed": [filled.computed for filled in trainer.ref_caches],
        "kind": type(trainer.model_wrapped).__name__,
        "checksum": sum(weight.double().abs().sum().item() for weight in weights.values()),
    }
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        print(f"{out.name}: done", flush=True)
    return seen


def make_data(pairs, unequal):
    if not unequal:
        return make_pairs(pairs)
    short, long = make_pairs(2 * pairs // 3, max_len=4), make_pairs(pairs // 3, min_len=40, max_len=60)
    return concatenate_datasets([short, long])


def adapter():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def watch(trainer) -> tuple[list, set]:
    """Fills with (step, row, kept places) of all training rows, and with the types of the log-probs."""
    subsets: list = []
    dtypes: set = set()
    weigh, make_draws = trainer.weigher.weigh, trainer.weigher.make_draws

    def watched(batch, **known):
        draws = weigh(batch, **known)
        if trainer.model.training:
            for policy, _ in draws:
                for row, real, kept in zip(
                    batch.inputs["input_ids"], batch.inputs["attention_mask"], policy, strict=True
                ):
                    length = int(real.sum())
                    subsets.append([trainer.state.global_step, row[:length].tolist(), kept[: length - 1].tolist()])
        return draws

    def typed(batch, logps, *more):
        dtypes.add(str(logps.dtype))
        return make_draws(batch, logps, *more)

    trainer.weigher.weigh, trainer.weigher.make_draws = watched, typed
    return subsets, dtypes


def watch_forwards(trainer) -> list:
    """Fills with (step, tokens) of each forward pass of the policy that is back-propagated."""
    seen: list = []

    def see(module, args, kwargs):
        if torch.is_grad_enabled():
            seen.append([trainer.state.global_step, kwargs["input_ids"].numel()])

    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    backbone = (unwrapped.get_base_model() if hasattr(unwrapped, "peft_config") else unwrapped).base_model
    backbone.register_forward_pre_hook(see, with_kwargs=True)
    return seen


def adam_bytes(trainer) -> int:
    """Of the moments that this rank keeps."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    local = [value.to_local() if hasattr(value, "to_local") else value for value in moments]
    return sum(value.numel() * value.element_size() for value in local)


def gathered_weights(trainer) -> dict[str, torch.Tensor]:
    """Every parameter whole, on every rank, without the code that saves models."""
    weights = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if hasattr(parameter, "ds_id"):  # ZeRO-3
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        else:
            whole = parameter.detach()
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole.clone()  # FSDP2
        weights[name] = whole.contiguous()
    return weights


class Fail(TrainerCallback):
    """Raises on one rank at one step."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_step_end(self, args, state, control, **kwargs):
        if int(os.environ.get("RANK", "0")) == self.rank and state.global_step == self.step:
            raise RuntimeError(f"raised on purpose by rank {self.rank}")


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a rank that leaves while another works can be aborted at its exit
        torch.distributed.destroy_process_group()
    # FSDP2's mesh keeps gloo groups until Python ends, whose threads then abort one launch in some hundreds
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
