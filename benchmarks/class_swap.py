"""What a user gets who swaps the trainer's class: TRL's DPOTrainer and SamPOTrainer through `trainer.train()`.

    python benchmarks/class_swap.py --model FOLDER --data PAIRS.jsonl.gz      # an hour on a CPU
    python benchmarks/class_swap.py --shape 128:128:128                       # random weights and words
    python benchmarks/class_swap.py --tiny                                    # seconds, proves nothing

Every option of both trainers has its default, except batch size, number of steps, seed and output. Each side is a
process of its own, loads the model from its folder and trains on the same shuffled batches. The first steps, which
compare and time both ways of the forward pass, are a warm-up; the seconds of all later steps are summed, with data
loading, the optimiser's step and logging. Cached reference log-probs are computed before the training starts, and not
timed.

The *limit* is a plain loop without a trainer: the bare backbone over as many tokens as the batch has when each prompt
counts once, in rows of equal length, the LM head on as many tokens as SamPO selects, backward pass, clipping and the
optimiser's step; with a live reference also the forward pass of a second model. It has the same precision and gradient
checkpointing as the trainers.

Records are appended to `measurements/class_swap.jsonl`, one side after the other. An interrupted run continues with
the same command, as long as settings and commit are the same.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from step_time import Log, command_of, in_process
from tqdm import tqdm

from sampo.io import records as results

HERE = Path(__file__).resolve().parent
TINY = {
    "config": "tiny",
    "batch": 4,
    "steps": 20,
    "max_length": 256,
    "threads": 1,
    "warm_up": 5,
    "model": None,
    "data": None,
}


def prepare(args, scratch: str) -> SimpleNamespace:
    """Folder of the model, tokenizer and rows."""
    import datasets
    import torch
    import transformers
    from workload import drawn_lengths, load_model, rows_of_words, word_tokenizer

    from sampo import load_preferences

    torch.set_num_threads(args.threads)
    os.environ["SAMPO_CACHE"] = scratch  # no cached reference of an earlier run, and none for a later one
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    n_rows = args.batch * (args.warm_up + args.steps)
    if args.model:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        data = load_preferences(args.data, on_bad_rows="drop").shuffle(seed=args.seed)
        data = data.select(range(2 * n_rows))  # some have too long a prompt
        return SimpleNamespace(model=args.model, tokenizer=tokenizer, data=data, scratch=scratch)
    folder = f"{scratch}/model"
    model = load_model(args)
    model.save_pretrained(folder)
    n_words = min(1000, model.config.vocab_size - 3)
    data = rows_of_words(drawn_lengths(args, 2 * n_rows), n_words, args.seed)
    return SimpleNamespace(model=folder, tokenizer=word_tokenizer(n_words), data=data, scratch=scratch)


def options(work, args, **more) -> dict:
    import torch

    return {
        "output_dir": work.scratch,
        "per_device_train_batch_size": args.batch,
        "max_length": args.max_length,
        "max_steps": args.warm_up + args.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": args.seed,
        "use_cpu": not torch.cuda.is_available(),
        **more,
    }


def trl(work, args, *, compact: bool = False, **more):
    """TRL's trainer; `compact`: only labelled positions reach the LM head, as on devices with Triton."""
    from sides import with_compact_head
    from trl import DPOConfig, DPOTrainer

    class CompactHead(DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            kept, self.ref_model = self.ref_model, self.ref_model and partial(with_compact_head, self.ref_model)
            try:
                return super()._compute_loss(partial(with_compact_head, model), inputs, return_outputs)
            finally:
                self.ref_model = kept

    trainer_class = CompactHead if compact else DPOTrainer
    config = DPOConfig(**options(work, args, **more))
    return trainer_class(work.model, args=config, train_dataset=work.data, processing_class=work.tokenizer)


def ours(work, args, **more):
    """`SamPOTrainer`."""
    from sampo import SamPOConfig, SamPOTrainer

    config = SamPOConfig(**options(work, args, **more))
    return SamPOTrainer(work.model, args=config, train_dataset=work.data, processing_class=work.tokenizer)


CACHED = {"precompute_ref_log_probs": True}
SIDES: dict[str, Callable] = {
    "TRL": trl,
    "TRL, reference cached": partial(trl, **CACHED),
    "TRL, compact head": partial(trl, compact=True),
    "TRL, compact head, reference cached": partial(trl, compact=True, **CACHED),
    "DPO": partial(ours, token_weighting="all"),
    "SamPO, padded": partial(ours, pair_stream="false"),
    "SamPO": ours,
    "SamPO, reference cached": partial(ours, **CACHED),
}
LIMITS = {"limit": "SamPO", "limit, reference cached": "SamPO, reference cached"}  # of which side


def make_clock(warm_up: int):
    """A callback with the seconds of the steps after the warm-up."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began = seconds = 0.0

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            self.began = now if state.global_step == warm_up else self.began
            self.seconds = now - self.began

    return Clock()


def train(args, name: str, repeat: int) -> None:
    """Train with one side, and record seconds and memory."""
    from counting import peak_memory

    with tempfile.TemporaryDirectory() as scratch:
        trainer = SIDES[name](prepare(args, scratch), args)
        clock, log = make_clock(args.warm_up), Log(args)
        trainer.add_callback(clock)
        with peak_memory() as memory:
            done = trainer.train()
        if repeat == 0 and name in LIMITS.values():
            for step, (stream, selected) in enumerate(unique_tokens(trainer, args.warm_up)):
                log.write("unique_tokens", stream, side=name, repeat=step)
                log.write("selected_tokens", selected, side=name, repeat=step)
        log.write("peak_memory_gib", memory.peak, args.batch, side=name, repeat=repeat)
        log.write("loss", done.training_loss, side=name, repeat=repeat)
        log.write("seconds", clock.seconds, args.batch * args.steps, side=name, repeat=repeat)


def unique_tokens(trainer, warm_up: int) -> list[tuple[int, int]]:
    """Of each timed step, the tokens of its stream and those that are selected."""
    import transformers

    transformers.set_seed(trainer.args.seed)  # the order of `train`
    found = []
    for step, inputs in zip(range(trainer.args.max_steps), trainer.get_train_dataloader(), strict=False):
        batch = trainer.prepare_batch(inputs)
        if step >= warm_up:
            found.append((batch.stream.input_ids.numel(), int(batch.positions.sum())))
    return found


def time_limit(args, name: str, repeat: int) -> None:
    """The plain loop."""
    import torch
    from limit import limit_loss
    from transformers import AutoModelForCausalLM

    log, counts = Log(args), sizes_of(args, LIMITS[name])
    live = "cached" not in name
    with tempfile.TemporaryDirectory() as scratch:
        work = prepare(args, scratch)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        load = partial(AutoModelForCausalLM.from_pretrained, work.model, dtype=torch.float32)
        policy, reference = load().to(device), load().to(device).requires_grad_(False).eval() if live else None
        policy.gradient_checkpointing_enable()
        policy.train()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
        seconds = 0.0
        for step, (unique, selected) in enumerate(counts[: args.warm_up] + counts):
            began = time.perf_counter()
            with torch.autocast(device, torch.bfloat16):
                loss = limit_loss(policy, reference, unique=unique, selected=selected, n_rows=args.batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if step >= args.warm_up:
                seconds += time.perf_counter() - began
    log.write("seconds", seconds, args.batch * args.steps, side=name, repeat=repeat)


def sizes_of(args, side: str) -> list[tuple[int, int]]:
    """What `unique_tokens` recorded."""
    log = Log(args)
    found = [r for r in results.read(args.out) if log.is_of_this_run(r) and r.config.get("side") == side]
    by_name = {
        name: {r.config["repeat"]: int(r.value) for r in found if r.name == name}
        for name in ("unique_tokens", "selected_tokens")
    }
    return [(by_name["unique_tokens"][step], by_name["selected_tokens"][step]) for step in range(args.steps)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local folder; without one, `--config`")
    parser.add_argument("--config", default="smollm2-135m", help="random weights in the shape of a known model")
    parser.add_argument("--data", help="preference pairs, as `load_preferences` takes them; needs `--model`")
    parser.add_argument("--shape", default="hh", help="hh, ultrafeedback, tldr, or prompt:chosen:rejected tokens")
    parser.add_argument("--batch", type=int, default=8, help="pairs a batch")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warm_up", type=int, default=1, help="steps before them; small models are timed for four")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=1024, help="TRL's own default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", nargs="+", help="some of the sides only")
    parser.add_argument("--tiny", action="store_true", help=f"{TINY}")
    parser.add_argument("--fresh", action="store_true", help="measure again what is recorded")
    parser.add_argument("--out", type=Path, default=HERE.parent / "measurements" / "class_swap.jsonl")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if bool(args.data) != bool(args.model):
        sys.exit("`--data` and `--model` must be given together, got one of them. Leave both out for random words.")
    args.command = command_of(args, parser, "class_swap")
    args.commit, args.purpose, args.dtype, args.benchmark = results.commit(), None, "float32", "class_swap"
    args.batches = args.steps
    if args.tiny:
        vars(args).update(TINY, batches=TINY["steps"])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sampo.trainer", "trl.trainer.dpo_trainer", "datasets"])
    sides = args.sides or [*SIDES, *LIMITS]
    if unknown := set(sides) - {*SIDES, *LIMITS}:
        sys.exit(f"`--sides` must be among {[*SIDES, *LIMITS]}, got {sorted(unknown)}.")
    log = Log(args)
    print(", ".join(f"{name}: {value}" for name, value in log.config.items()), flush=True)
    for repeat in range(args.repeats):
        for name in (bar := tqdm(sides)):
            bar.set_description(f"repeat {repeat}: {name}")
            if not log.has("seconds", side=name, repeat=repeat):
                in_process(context, time_limit if name in LIMITS else train, args, name, repeat)
    import tables

    measured = [swap for swap in tables.swaps(results.read(args.out)) if swap.setting == log.config]
    print("\n".join(["", *tables.class_swap_table(measured[0])]))


if __name__ == "__main__":
    main()
