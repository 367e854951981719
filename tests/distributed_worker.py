"""One process of the runs in test_distributed.py: trains, and writes what it saw as JSON, one file a rank."""

import argparse
import json
import os
from pathlib import Path

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    import fsdp_shim  # noqa: F401, before anything of accelerate

import torch
from datasets import load_from_disk
from tiny import make_pairs, training_options

from sampo import SamPOConfig, SamPOTrainer, ref_logps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--resume")
    parser.add_argument("--disk", help="folder of the training data, instead of pairs in memory")
    parser.add_argument("--fail_on_rank", type=int, help="this rank cannot write its shard of the reference cache")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = {"per_device_train_batch_size": args.batch, "per_device_eval_batch_size": args.batch, "max_steps": 6}
    if args.fail_on_rank == int(os.environ.get("RANK", "0")):
        ref_logps._replace = lambda path, content: Path("/no/such/folder/file").write_bytes(content)
    trainer = SamPOTrainer(
        model=args.model,
        args=SamPOConfig(**training_options(args.out / "run", **options | args.options)),
        train_dataset=load_from_disk(args.disk) if args.disk else make_pairs(24),
        eval_dataset=make_pairs(11, seed=5),  # the last batch is uneven
    )
    subsets = []
    see = trainer._weigh

    def watched(pairs, draw, log_ratios=None):
        weights = see(pairs, draw, log_ratios)
        if trainer.model.training:
            for row, real, kept in zip(
                pairs.inputs["input_ids"], pairs.inputs["attention_mask"], weights[0], strict=True
            ):
                length = int(real.sum())
                subsets.append([trainer.state.global_step, row[:length].tolist(), kept[: length - 1].tolist()])
        return weights

    trainer._weigh = watched
    dtypes = set()
    make = trainer._make_draw

    def typed(weights, ref_weights, logps, *rest):
        dtypes.add(str(logps.dtype))
        return make(weights, ref_weights, logps, *rest)

    trainer._make_draw = typed
    trainer.train(resume_from_checkpoint=args.resume)
    evaluated = trainer.evaluate()
    seen = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "log": trainer.state.log_history,
        "eval": evaluated,
        "theta": trainer._run_state.theta,
        "subsets": sorted(subsets),
        "processes": trainer.accelerator.num_processes,
        "dtypes": sorted(dtypes),
        "computed": [filled.computed for filled in trainer.ref_caches],
        "kind": type(trainer.model_wrapped).__name__,
        "checksum": sum(
            p.double().abs().sum().item() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()
        ),
    }
    (args.out / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
