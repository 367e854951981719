"""What merging an adapter changes: `python benchmarks/merging.py --model FOLDER --out measurements/merging.jsonl`.

The adapters are drawn at random, not trained: what is measured is how rounding compares with an adapter of a given
effect. Quantised bases need bitsandbytes, and are omitted without it.
"""

import argparse
import importlib.util
import shlex
import sys
import tempfile
from pathlib import Path

KINDS = {"LoRA": {}, "DoRA": {"use_dora": True}}
SCALES = (0.003, 0.02)  # standard deviation of the adapter's second factor
DTYPES = ("float32", "float16", "bfloat16")
QUANTIZED = {"4bit nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8bit": {"load_in_8bit": True}}
NUMBERS = ("adapter_effect_mean", "difference_mean", "difference_max")


def main(argv: list[str] | None = None) -> None:
    """Merge every adapter in every way, a record for each number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--name", help="of the model in the records; the folder's name by default")
    parser.add_argument("--out", type=Path, required=True, help="file of records, which are appended")
    parser.add_argument("--fast", action="store_true", help="LoRA in two types only")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "benchmarks/merging.py", *(sys.argv[1:] if argv is None else argv)])
    ways = [(dtype, None) for dtype in DTYPES]
    if importlib.util.find_spec("bitsandbytes") is not None:
        ways += [("float32", name) for name in QUANTIZED]
    for kind in ["LoRA"] if args.fast else KINDS:
        for scale in SCALES:
            with tempfile.TemporaryDirectory() as folder:
                adapter = make_adapter(args.model, f"{folder}/adapter", kind, scale)
                for dtype, quantized in ways[::2] if args.fast else ways:
                    setting = {"model": args.name or Path(args.model).name, "kind": kind, "scale": scale}
                    record(
                        adapter, f"{folder}/merged-{dtype}-{quantized}", dtype, quantized, setting, command, args.out
                    )


def make_adapter(model: str, folder: str, kind: str, scale: float) -> str:
    """An adapter of rank 16 on all linear layers with random factors; returns its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **KINDS[kind])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    adapted.save_pretrained(folder)
    return folder


def record(adapter: str, merged: str, dtype: str, quantized: str | None, setting, command: str, out: Path) -> None:
    """Merge once and append what was found."""
    from transformers import BitsAndBytesConfig

    from sampo.io import records as results
    from sampo.training.merge import merge

    quantization = None if quantized is None else BitsAndBytesConfig(**QUANTIZED[quantized])
    report = merge(adapter, merged, dtype=dtype, quantization_config=quantization)
    print(f"{setting}, {quantized or 'not quantised'}: {report.describe()}", flush=True)
    config = {**setting, "dtype": dtype, "quantized": quantized}
    about = {"n": report.tokens, "config": config, "seed": 0, "command": command, **results.provenance()}
    results.append(out, [results.Record(name=name, value=getattr(report, name), **about) for name in NUMBERS])


def table(records: list) -> str:
    """Markdown of the last run of each setting."""
    found: dict[tuple, dict] = {}
    for each in records:
        found.setdefault(tuple(each.config.items()), {})[each.name] = each
    first = next(iter(next(iter(found.values())).values()))
    versions = ", ".join(f"{name} {number}" for name, number in sorted(first.versions.items()))
    lines = [
        f"{first.config['model']}, {first.n} tokens, random adapters of rank 16 on all linear layers; mean absolute "
        f"change of a token's log-prob in nats, in brackets the largest. `{first.command}`; {first.created[:10]}; "
        f"{versions}.",
        "",
        "| adapter | its own effect | base | saved in | merging changes |",
        "|---|---|---|---|---|",
    ]
    for numbers in found.values():
        value = {name: each.value for name, each in numbers.items()}
        config = numbers["difference_mean"].config
        lines.append(
            f"| {config['kind']} | {value['adapter_effect_mean']:.2g} | {config['quantized'] or 'as it is'} | "
            f"`{config['dtype']}` | {value['difference_mean']:.1g} ({value['difference_max']:.1g}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
