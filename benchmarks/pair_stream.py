"""Pairs per second of a training step's forward and backward pass: TRL's DPOTrainer against SamPOTrainer.

    python benchmarks/pair_stream.py --model FOLDER --data PAIRS.jsonl.gz     # minutes
    python benchmarks/pair_stream.py --tiny                                    # ten seconds, proves nothing

All variants see the same batches in the same run, one after the other within each repeat. Appends records to
`benchmarks/records.jsonl`; `python docs/build.py` makes the table of RESULTS.md from them.
"""

import argparse
import gc
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from sampo import results

HERE = Path(__file__).resolve().parent
VARIANTS = {
    "TRL DPOTrainer": None,
    "DPO, plain forward": {"token_weighting": "all", "pair_stream": "false"},
    "DPO, pair stream": {"token_weighting": "all", "pair_stream": "true"},
    "SamPO, plain forward": {"token_weighting": "sampo", "pair_stream": "false"},
    "SamPO, pair stream": {"token_weighting": "sampo", "pair_stream": "true"},
}


def make_trainer(variant, args, data, scratch):
    from trl import DPOConfig, DPOTrainer

    from sampo import SamPOConfig, SamPOTrainer

    options = {
        "output_dir": scratch,
        "per_device_train_batch_size": args.batch,
        "max_length": args.max_length,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": args.dtype},
    }
    if VARIANTS[variant] is None:
        return DPOTrainer(model=args.model, args=DPOConfig(**options), train_dataset=data)
    return SamPOTrainer(model=args.model, args=SamPOConfig(**options, **VARIANTS[variant]), train_dataset=data)


def seconds_of_a_pass(trainer, batches) -> float:
    """Forward and backward over all batches."""
    began = time.perf_counter()
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
        loss.backward()
        trainer.model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def tiny_inputs(scratch):
    sys.path.insert(0, str(HERE.parent / "tests"))
    from tiny import make_pairs, save_model

    return save_model(Path(scratch) / "model"), make_pairs(32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local folder or hub id")
    parser.add_argument("--data", help="preference pairs, as `load_preferences` takes them")
    parser.add_argument("--tiny", action="store_true", help="a model of 20,000 parameters on random words")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="pairs a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "records.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        run(args, scratch)


def run(args, scratch) -> None:
    from sampo import load_preferences

    if args.tiny:
        args.model, data = tiny_inputs(scratch)
    else:
        data = load_preferences(args.data, on_bad_rows="drop").shuffle(seed=0)
    data = data.select(range(min(len(data), 2 * args.batch * args.batches)))  # some are dropped for their length
    trainers = {name: make_trainer(name, args, data, scratch) for name in VARIANTS}
    rows = next(iter(trainers.values())).train_dataset
    collate = next(iter(trainers.values())).data_collator
    batches = [
        collate([rows[i * args.batch + j] for j in range(args.batch)]) for i in range(args.batches)
    ]  # the same for all
    padded = sum(batch["input_ids"].numel() for batch in batches)
    print(f"{args.batches} batches of {args.batch} pairs, {padded:,} padded tokens, {args.threads} thread(s)")
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for trainer in trainers.values():  # warm-up, and the comparison of the first batch
        trainer.model.train()
        seconds_of_a_pass(trainer, batches[:1])
    for _ in range(args.repeats):
        for name, trainer in trainers.items():
            gc.collect()
            times[name].append(seconds_of_a_pass(trainer, batches))
    n_pairs = args.batch * args.batches
    config = {"benchmark": "pair_stream", "model": Path(args.model).name, "dtype": args.dtype, "batch": args.batch}
    config |= {"batches": args.batches, "max_length": args.max_length, "threads": args.threads}
    config["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shown = shlex.join(["python", "benchmarks/pair_stream.py", *(["--tiny"] if args.tiny else ["--model", "…"])])
    about = {"command": shown, **results.provenance()}
    base = statistics.median(times["TRL DPOTrainer"])
    records = []
    for name, seconds in times.items():
        speeds = sorted(n_pairs / s for s in seconds)
        median = statistics.median(speeds)
        print(
            f"{name:22} {median:7.2f} pairs/s ({speeds[0]:.2f} to {speeds[-1]:.2f}), {base * median / n_pairs:.1f} x"
        )
        for which, value in {"": median, "_lowest": speeds[0], "_highest": speeds[-1]}.items():
            settings = {**config, "variant": name}
            records.append(
                results.Record(name=f"pairs_per_second{which}", value=value, n=args.repeats, config=settings, **about)
            )
    if not args.tiny:
        results.append(args.out, records)


if __name__ == "__main__":
    main()
