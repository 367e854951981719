"""`sampo merge ADAPTER --out FOLDER`: a complete model from an adapter and its base, checked by log-probs."""

import argparse
import importlib.util
import logging
from pathlib import Path
from typing import Any

from ..io.locks import alone_at
from ..training.merge import BOUNDS, DTYPES, TEXTS
from .next_steps import after_merging, show_next


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    bounds = ", ".join(f"{bound:g} in {dtype}" for dtype, bound in BOUNDS.items())
    parser = argparse.ArgumentParser(
        prog="sampo merge",
        allow_abbrev=False,
        description="Merge an adapter into its base model, on the CPU in float32. The log-probs of some texts are "
        f"compared before and after; a change of more than {bounds} (nats, of any token) is refused.",
    )
    parser.add_argument("adapter", help="folder or hub id of the adapter")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--base", help="model to merge into, if not the one that the adapter names")
    parser.add_argument("--base_revision", help="its revision on the hub")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the saved weights; `auto`: as the base's")
    parser.add_argument(
        "--texts", type=Path, help="file with texts to compare, one per line, instead of the built-in ones"
    )
    quantized = parser.add_argument_group(
        "after QLoRA", "As in the training: the adapter is merged into the base as it was quantised then, dequantised."
    )
    kinds = quantized.add_mutually_exclusive_group()
    kinds.add_argument("--load_in_4bit", action="store_true", help="as in `sampo train`")
    kinds.add_argument("--load_in_8bit", action="store_true", help="as in `sampo train`")
    quantized.add_argument("--bnb_4bit_quant_type", default="nf4", choices=["fp4", "nf4"], help="as in `sampo train`")
    quantized.add_argument("--use_bnb_nested_quant", action="store_true", help="as in `sampo train`")
    return parser


def main(args: argparse.Namespace) -> None:
    """Merge and print the report."""
    import transformers

    from ..training.merge import merge

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sampo").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    try:
        texts = args.texts.read_text(encoding="utf-8").splitlines() if args.texts else TEXTS
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise ValueError(f"`texts` must hold at least one line of text, got none in {args.texts}.")
        with alone_at(args.out):
            report = merge(
                args.adapter,
                args.out,
                base=args.base,
                base_revision=args.base_revision,
                dtype=args.dtype,
                texts=texts,
                quantization_config=_quantization(args),
            )
    except (ValueError, ArithmeticError, ImportError, OSError) as error:
        raise SystemExit(f"sampo merge: error: {error}") from None
    print(report.describe())
    print(f"{args.adapter} merged into {report.base}: {args.out}")
    show_next(*after_merging(args.out))


def _quantization(args: argparse.Namespace) -> Any:
    if not (args.load_in_4bit or args.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("Quantised weights need bitsandbytes: `pip install 'sampo-dpo[quantization]'`.")
    from transformers import BitsAndBytesConfig

    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
    )
