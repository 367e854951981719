"""`sampo bench MODEL`: the paper's five benchmarks by lm-evaluation-harness, with the shots that were really used."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TASKS = ("gsm8k", "ifeval", "piqa", "mmlu", "truthfulqa")  # those of evaluation.harness, which needs numpy


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo bench",
        allow_abbrev=False,
        description="Run the benchmarks of the SamPO paper with lm-evaluation-harness. A benchmark that has its "
        "record in OUT is not run again.",
    )
    parser.add_argument("model", help="folder or hub id of a model or an adapter")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK", help=", ".join(TASKS)
    )
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"), help="records, added to as tasks are done")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="local JSONL instead of the hub: docs/bench.md")
    parser.add_argument("--limit", type=int, help="only so many prompts of each task: to try it out")
    parser.add_argument("--num_fewshot", type=int, help="examples in the prompt, instead of the paper's")
    parser.add_argument("--apply_chat_template", action="store_true", help="put prompts into the chat template")
    parser.add_argument("--seed", type=int, default=1234, help="of the draw of examples (1234, the harness's own)")
    parser.add_argument("--adapter", help="folder or hub id of an adapter for the model")
    parser.add_argument("--revision", help="of the model on the hub")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at a time (8)")
    parser.add_argument("--device", help="the first accelerator, else the CPU")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    return parser


def main(args: argparse.Namespace) -> None:
    """Run what has no record yet, and show all."""
    try:
        found = _run_all(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"sampo bench: error: {error}") from None
    _show_scores(args, found)


def _run_all(args: argparse.Namespace) -> list[Any]:
    """The record of each score."""
    from ..evaluation import harness
    from ..io import records as results
    from ..io.command_line import format_arguments

    for name, least in {"limit": 1, "num_fewshot": 0, "batch_size": 1}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    harness.require()
    harness.quiet()
    lm, model, template = _load(args)
    common = {"shots": args.num_fewshot, "limit": args.limit, "data": args.data}
    configs = {
        name: harness.settings(name, model=model, chat=template, **common) for name in dict.fromkeys(args.tasks)
    }
    found = []
    for name, config in configs.items():
        record = harness.done(results.read(args.out), config, args.seed)
        if record is None:
            outcome = harness.run(name, lm, chat=args.apply_chat_template, seed=args.seed, **common)
            made = harness.records_of(outcome, config, seed=args.seed, command=format_arguments(make_parser(), args))
            results.append(args.out, made)
            record = made[-1]
            print(f"{name}: done{f'. Note: {outcome.note}' if outcome.note else ''}", flush=True)
        else:
            print(f"{name}: its record is in {args.out}", flush=True)
        found.append(record)
    return found


def _load(args: argparse.Namespace) -> tuple[Any, Mapping[str, Any], str | None]:
    """(the harness's model, what its numbers depend on, hash of the chat template if one is used)."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    from ..evaluation.texts import Texts
    from ..models.inference import default_device, load_causal
    from ..models.load import load_tokenizer

    transformers.utils.logging.disable_progress_bar()
    source = {"adapter": args.adapter, "revision": args.revision}
    loaded = load_causal(args.model, device=args.device or default_device(), dtype=args.dtype, **source)
    tokenizer = load_tokenizer(args.model, **source)
    model: Any = loaded.model
    about = {
        "model": args.model if args.adapter is None else args.adapter,
        "weights": loaded.weights,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    template = Texts(tokenizer, "chat").template_hash if args.apply_chat_template else None
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size), about, template


def _show_scores(args: argparse.Namespace, found: Sequence[Any]) -> None:
    from ..evaluation.harness import BENCHMARKS
    from ..io.tables import Table
    from .shown import say, show

    heads = ("benchmark", "metric", "%", "95 % interval", "prompts", "shots used", "asked for")
    table = Table(str(args.model), heads, keys=2)
    for record in found:
        low, high = (100 * bound for bound in record.interval)
        table.add(
            record.config["benchmark"],
            BENCHMARKS[record.config["benchmark"]].title,
            f"{100 * record.value:.1f}",
            f"{low:.1f}–{high:.1f}",
            f"{record.n:,}",
            *(str(record.config[name]) for name in ("shots_used", "shots_asked")),
        )
    show(table)
    if args.limit is not None:
        say(f"Only {args.limit} prompts of each task: this is a trial, not a result.")
    other = [one.config["benchmark"] for one in found if one.config["shots_used"] != one.config["shots_asked"]]
    if other:
        say(f"{', '.join(other)}: the harness fixes the number of shots, and did not use those asked for.")
    print(f"Written: {args.out}")
