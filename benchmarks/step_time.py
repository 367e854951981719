"""What a training step costs: TRL's DPOTrainer, the authors' SamPO loss and SamPOTrainer on the same batches.

    python benchmarks/step_time.py --model FOLDER --data PAIRS.jsonl.gz --batch 8      # minutes on a CPU
    python benchmarks/step_time.py --config qwen2.5-0.5b --shape ultrafeedback         # random weights and words
    python benchmarks/step_time.py --tiny                                              # seconds, proves nothing
    python benchmarks/step_time.py --sweep …                                           # how the cost grows
    python benchmarks/step_time.py --profile …                                         # where the time goes

A step here is the forward and backward pass of policy and, where it is live, of the reference; the optimiser's step is
the same for all and excluded. One process times all sides, which take turns within each repeat. Before that, each side
runs one pass in a process of its own (`--no_memory` leaves this out), which gives

- peak memory: CPU: the largest resident set during the pass, with the models, Python and its libraries; GPU: the
  largest sum of what the allocator has handed out;
- added memory: that minus what was resident before the pass, with the models loaded and the reference cached;
- tokens through the backbone (ids that enter the embedding) and through the LM head (rows multiplied by its weight),
  of policy and reference together, as they were counted.

Records are appended to `measurements/step_time.jsonl` one by one; an interrupted run continues with the same command
killed, as long as settings and commit are the same. `python docs/build.py` makes the tables from them.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tqdm import tqdm

from sampo.io import records as results

HERE = Path(__file__).resolve().parent
TINY = {"config": "tiny", "dtype": "float32", "batch": 4, "batches": 2, "max_length": 256, "threads": 1}
SWEPT_SIDES = ["TRL", "TRL, compact head", "SamPO, stream"]
PROFILED_SIDES = ["TRL", "TRL, compact head", "SamPO, stream"]


class Log:
    """Writes records as they come, and knows what has been written by this commit."""

    def __init__(self, args):
        from workload import label_of

        self.path = args.out
        self.config = {
            **label_of(args),
            "device": device_name(),
            **({"purpose": args.purpose} if args.purpose else {}),
        }
        self.about = {"command": args.command, "seed": args.seed, **results.provenance(), "commit": args.commit}
        comparable = args.commit and not args.commit.endswith("-dirty") and not args.fresh
        self.done = {(r.name, r.key) for r in results.read(self.path) if comparable and r.commit == args.commit}

    def is_of_this_run(self, record) -> bool:
        """Whether the record has this run's settings and commit."""
        return record.commit == self.about["commit"] and self.config.items() <= record.config.items()

    def has(self, name: str, **config) -> bool:
        return (name, results.config_key(self.config | config)) in self.done

    def write(self, name: str, value: float, n: int = 1, **config) -> None:
        record = results.Record(name=name, value=value, n=n, config=self.config | config, **self.about)
        results.append(self.path, [record])


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.machine()
    if (cpus := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores (CPU)"


def command_of(args, parser, script: str = "step_time") -> str:
    """The command line, with a variable for each folder of this machine."""
    words = ["python", f"benchmarks/{script}.py"]
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if name == "out" or value == default:
            continue
        if name in ("model", "data"):
            words += [f"--{name}", f'"$FOLDER/{Path(value).name}"']
        elif value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}", *(shlex.quote(str(v)) for v in (value if isinstance(value, list) else [value]))]
    return " ".join(words)


# --- what runs in processes of their own -------------------------------------------------------------------------


def prepare(args, scratch: str):
    """One workload, in a process that stays quiet."""
    import datasets
    import torch
    import transformers
    from workload import make_workload

    torch.set_num_threads(args.threads)
    os.environ["SAMPO_CACHE"] = scratch  # no cached reference of an earlier run, and none for a later one
    warnings.filterwarnings("ignore", category=FutureWarning)  # names that TRL and transformers still use
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return make_workload(args, scratch)


def build(work, names: list[str], *, say: bool = True) -> dict:
    import torch
    from accelerate import Accelerator
    from sides import SIDES, NotAvailable

    built = {}
    for name in names:
        try:
            built[name] = SIDES[name](work)
        except NotAvailable as reason:
            if say:
                tqdm.write(f"skipped: {name}, for {reason}")
    Accelerator(cpu=not torch.cuda.is_available())  # a config that was refused has reset it for all trainers
    return built


def warm_up(side) -> None:
    """A pass over one pair on CPU, where no shape is compiled for; over everything on GPU."""
    import torch

    side.activate()
    if torch.cuda.is_available():
        run_pass(side)
        return
    first = side.batches[0]
    n_rows = len(first["input_ids"])  # 2B; what has B rows is a column of the data set
    selected = {n_rows: [0, n_rows // 2], n_rows // 2: [0]}
    step(side, {name: value[selected[len(value)]] for name, value in first.items()})


def run_pass(side) -> float:
    """Forward and backward over all batches; returns the mean loss."""
    return sum(step(side, dict(batch)) for batch in side.batches) / len(side.batches)


def step(side, batch: dict) -> float:
    loss = side.step(batch)
    side.policy.zero_grad()
    return loss.item()  # waits for the device


def time_sides(args) -> None:
    """Seconds of a pass of each side, in turns."""
    log = Log(args)
    missing = {
        name: [i for i in range(args.repeats) if not log.has("seconds", side=name, repeat=i)] for name in args.sides
    }
    names = [name for name in args.sides if missing[name]]
    if not names:
        return
    with tempfile.TemporaryDirectory() as scratch:
        sides = build(prepare(args, scratch), names)
        for side in tqdm(sides.values(), desc="warm-up", leave=False):
            warm_up(side)
        gc.freeze()  # or each collection below looks through all that was imported
        turns = [(i, name) for i in range(args.repeats) for name in (sides if i % 2 == 0 else reversed(sides))]
        for i, name in (bar := tqdm([(i, name) for i, name in turns if i in missing[name]])):
            bar.set_description(f"repeat {i}: {name}")
            sides[name].activate()
            gc.collect()
            began = time.perf_counter()
            run_pass(sides[name])
            log.write("seconds", time.perf_counter() - began, args.batch * args.batches, side=name, repeat=i)


def probe(args, name: str) -> None:
    """Memory and tokens of one pass of one side."""
    from counting import Counter, peak_memory, useful_flops

    log = Log(args)
    if log.has("useful_flops", side=name):  # the last that is written below
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = prepare(args, scratch)
        counter = Counter([work.policy, work.reference])
        sides = build(work, [name], say=False)
        if not sides:
            return
        side = sides[name]
        work.reference = None  # now only a side that needs it keeps it
        warm_up(side)
        with peak_memory() as memory, counter:
            loss = run_pass(side)
        n = args.batch * args.batches
        log.write("loss", loss, n, side=name)
        log.write("peak_memory_gib", memory.peak, n, side=name)
        log.write("added_memory_gib", memory.peak - memory.before, n, side=name)
        log.write("backbone_tokens", counter.backbone, n, side=name)
        log.write("head_tokens", counter.head, n, side=name)
        log.write("useful_flops", useful_flops(side, counter), n, side=name)


def profile_side(args, name: str) -> None:
    """Shares of a pass of one side by groups of operations; in a process of its own, for it takes much memory."""
    from profiling import profile_pass

    log = Log(args)
    if log.has("profiled_seconds", side=name):
        return
    with tempfile.TemporaryDirectory() as scratch:
        for side in build(prepare(args, scratch), [name]).values():
            warm_up(side)
            groups, table = profile_pass(side, run_pass)
            print(f"\n{name}\n{table}")
            for group, seconds in groups.items():
                log.write("group_seconds", seconds, side=name, group=group)
            log.write("profiled_seconds", sum(groups.values()), side=name)


def start(args) -> None:
    """Print what is measured; record the peak of the device where TRL knows it: what utilisation is a share of."""
    import torch
    from trl.trainer.utils import get_peak_flops

    log = Log(args)
    versions = ", ".join(f"{name} {version}" for name, version in log.about["versions"].items())
    warm = "one pass" if torch.cuda.is_available() else "one pair"
    print(", ".join(f"{name}: {value}" for name, value in log.config.items()))
    print(f"{versions}; commit {args.commit}; warm-up: {warm}; {args.repeats} repeat(s)", flush=True)
    peak = get_peak_flops(torch.cuda.get_device_name(), args.dtype) if torch.cuda.is_available() else None
    if peak and not log.has("peak_flops"):
        log.write("peak_flops", peak)


def report(args) -> None:
    """Print the table of this run from its records."""
    import tables

    log = Log(args)
    for run in tables.runs(results.read(args.out)):
        if run.setting == log.config and run.sides:
            print("\n".join(["", *tables.sides_table(run), ""]))


# --- what is run -------------------------------------------------------------------------------------------------


def in_process(context, function, *arguments) -> None:
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        killed = " (killed, perhaps for want of memory)" if process.exitcode == -9 else ""
        sys.exit(f"{function.__name__} must succeed, got exit code {process.exitcode}{killed}; its output is above.")


def measure(context, args) -> None:
    in_process(context, start, args)
    if not args.no_memory:
        for name in tqdm(args.sides, desc="memory and tokens"):
            in_process(context, probe, args, name)
    in_process(context, time_sides, args)
    in_process(context, report, args)


def sweep_of(args) -> list:
    """Runs like `args`, but for what is varied."""
    import torch

    varied = [
        ("length difference", {"shape": f"128:{chosen}:{rejected}", "data": None, "batch": min(args.batch, 4)})
        for chosen, rejected in ((128, 128), (192, 64), (240, 16))
    ]
    varied += [("batch", {"batch": batch}) for batch in (1, 2, 4, 8, 16) if batch <= args.batch]
    if torch.cuda.is_available():
        varied += [("model", {"config": name, "model": None, "data": None}) for name in ("qwen2.5-0.5b", "llama-3-8b")]
    return [argparse.Namespace(**{**vars(args), **more, "purpose": name}) for name, more in varied]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local folder; without one, `--config`")
    parser.add_argument("--config", default="qwen2.5-0.5b", help="random weights in the shape of a known model")
    parser.add_argument("--data", help="preference pairs, as `load_preferences` takes them; needs `--model`")
    parser.add_argument("--shape", default="hh", help="hh, ultrafeedback, tldr, or prompt:chosen:rejected tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="pairs a batch")
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=1024, help="TRL's own default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", nargs="+", help="some of the sides only")
    parser.add_argument("--tiny", action="store_true", help=f"{TINY}")
    parser.add_argument("--sweep", action="store_true", help="length difference, batch and, on GPU, model")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no_memory", action="store_true", help="do not run each side in a process of its own")
    parser.add_argument("--fresh", action="store_true", help="measure again what is recorded")
    parser.add_argument("--out", type=Path, default=HERE.parent / "measurements" / "step_time.jsonl")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.data and not args.model:
        sys.exit("`--data` needs `--model`, whose tokenizer reads it, got none. Leave it out for random words.")
    if args.data and args.shape != "hh":
        sys.exit(f"`--data` has its own lengths, got `--shape {args.shape}` beside it. Leave one of them out.")
    # the commit is asked for once: somebody may commit documents while this runs
    args.command, args.commit, args.purpose = command_of(args, make_parser()), results.commit(), None
    args.benchmark = "step_time"
    if args.tiny:
        vars(args).update(TINY)
    # a fork of a server that has imported everything and computed nothing: quick, and alike for all
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sampo.trainer", "trl.trainer.dpo_trainer", "datasets"])
    from sides import SIDES

    usual = PROFILED_SIDES if args.profile else SWEPT_SIDES if args.sweep else list(SIDES)
    args.sides = args.sides or usual
    if not set(args.sides) <= SIDES.keys():
        sys.exit(f"`--sides` must be among {list(SIDES)}, got {args.sides}.")
    if args.profile:
        args.purpose = "profile"
        for name in args.sides:
            in_process(context, profile_side, args, name)
    elif args.sweep:
        args.no_memory = True
        for run in sweep_of(args):
            measure(context, run)
    else:
        measure(context, args)


if __name__ == "__main__":
    main()
