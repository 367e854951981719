"""`sampo memory MODEL --gpus 8`: memory per GPU of a training run with each engine, computed and not measured."""

import argparse

from ..training.memory import (
    ENGINES,
    MEMORY_METHODS,
    MEMORY_REFERENCES,
    QLORA_ENGINES,
    SHAPES,
    gpu_bytes,
    machine_bytes,
    read_shape,
)


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo memory",
        allow_abbrev=False,
        description="Memory per GPU of a training run with each engine, computed from the configuration of the model. "
        "No weights are read and nothing is measured. docs/scale.md has the formula and what it leaves out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"folder, config.json or hub id, or one of {', '.join(SHAPES)}",
    )
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), help="engines to compute; default: all")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs that share the work")
    parser.add_argument("--batch_size", type=int, default=1, metavar="N", help="pairs of one micro-batch on one GPU")
    parser.add_argument("--max_length", type=int, default=2048, metavar="N", help="tokens of prompt and completion")
    parser.add_argument(
        "--method", choices=MEMORY_METHODS, default="full", help="all weights, LoRA, or LoRA on 4-bit weights"
    )
    parser.add_argument("--lora_r", type=int, default=16, metavar="N", help="rank of the adapter on all linear layers")
    parser.add_argument(
        "--reference",
        choices=MEMORY_REFERENCES,
        default="live",
        help="a model in memory, or its log-probs from a cache",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Compute and show a table, a row per engine."""
    from ..io.tables import Table
    from .shown import say, show

    for name in ("gpus", "batch_size", "max_length", "lora_r"):
        if getattr(args, name) < 1:
            raise SystemExit(f"sampo memory: error: `{name}` must be at least 1, got {getattr(args, name)}.")
    engines = args.engine or (QLORA_ENGINES if args.method == "qlora" else list(ENGINES))
    tokens = 2 * args.batch_size * args.max_length
    try:
        shape = read_shape(args.model)
        computed = {
            engine: gpu_bytes(
                shape,
                engine,
                args.method,
                reference=args.reference,
                gpus=args.gpus,
                tokens=tokens,
                lora_r=args.lora_r,
            )
            for engine in engines
        }
    except ValueError as error:
        raise SystemExit(f"sampo memory: error: {error}") from None
    parts = [part for part in next(iter(computed.values())) if any(sizes[part] for sizes in computed.values())]
    table = Table("GB per GPU, computed and not measured", ["engine", *parts, "total"])
    for engine, sizes in computed.items():
        table.add(engine, *(_gigabytes(sizes[part]) for part in parts), _gigabytes(sum(sizes.values())))
    show(table)
    trained = {
        "full": f"all parameters, {args.reference} reference",
        "lora": f"LoRA of rank {args.lora_r}",
        "qlora": f"QLoRA of rank {args.lora_r}",
    }
    batch = f"{args.batch_size} pair{'s' if args.batch_size > 1 else ''}"
    say(
        "",
        f"{shape.model}, {shape.parameters / 1e9:.2f}B parameters: {trained[args.method]}, {args.gpus} "
        f"GPU{'s' if args.gpus > 1 else ''} (1 with `single`), {batch} on each, with two "
        f"responses of {args.max_length:,} tokens: {tokens:,} tokens with padding.",
        "Not counted: what CUDA and NCCL take (1 to 2 GB), fragmentation. docs/scale.md has the formula.",
    )
    if "zero3_offload" in computed:
        size = machine_bytes(shape, args.method, reference=args.reference, lora_r=args.lora_r)
        say(f"`zero3_offload` also takes {_gigabytes(size)} GB of main memory, over all machines together.")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size else ""
