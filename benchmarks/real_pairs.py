"""The pairs of the sweeps on a real model: those that fit into a length, some of them held out by prompt.

    python benchmarks/real_pairs.py --model FOLDER --data PAIRS.jsonl.gz --out pairs/harmless
    sampo sweep --config benchmarks/real_sweep.yaml --model_name_or_path FOLDER --dataset_name pairs/harmless \
        --out sweeps/harmless

Longer pairs are omitted, so that no response is truncated: a truncated one has no end token, and length is decided
there. The output is a folder with `train.jsonl` and `test.jsonl`, which `sampo` reads as two splits.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sampo import load_preferences
from sampo.data.subsets import split_by_prompt
from sampo.evaluation.texts import Texts
from sampo.models.load import load_tokenizer

SPLIT_SEED = 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="whose tokenizer measures lengths")
    parser.add_argument("--data", required=True, help="preference pairs: file, folder or hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of prompt and response; longer: omitted")
    parser.add_argument("--pairs", type=int, default=320, help="to train on")
    parser.add_argument("--held_out", type=float, default=0.3, help="share of prompts that are held out")
    parser.add_argument("--held_out_pairs", type=int, default=150, help="at most so many of their pairs are kept")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    texts = Texts(load_tokenizer(args.model))
    pairs = load_preferences(args.data, on_bad_rows="drop")
    fits = [i for i, row in enumerate(pairs) if _length(texts, row) <= args.max_length]
    train, held_out = split_by_prompt(pairs.select(fits), args.held_out, SPLIT_SEED)
    if len(train) < args.pairs:
        raise SystemExit(f"real_pairs: `--pairs` must be at most {len(train)}, got {args.pairs}.")
    args.out.mkdir(parents=True)
    wanted = {"train": args.pairs, "test": min(args.held_out_pairs, len(held_out))}
    for name, rows in (("train", train), ("test", held_out)):
        kept = rows.shuffle(seed=SPLIT_SEED).select(range(wanted[name]))
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(f"{len(fits)} of {len(pairs)} pairs fit into {args.max_length} tokens; {wanted} of them are in {args.out}.")


def _length(texts: Texts, row: dict[str, Any]) -> int:
    """Tokens of the prompt and the longer response."""
    sides = [texts.row(row["prompt"], _text(row[name])) for name in ("chosen", "rejected")]
    return max(len(prompt) + len(response) for prompt, response in sides)


def _text(response: Any) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


if __name__ == "__main__":
    main()
