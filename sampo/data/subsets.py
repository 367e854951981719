"""Subsets of preference pairs: splits and shards by prompt, and splits by length."""

import hashlib
import logging
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .issues import check_choice
from .layouts import serialize, visible_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

LENGTH_SPLITS = ("long", "short", "equal", "balanced")


def split_by_prompt(dataset: "Dataset", eval_fraction: float, seed: int = 42) -> "tuple[Dataset, Dataset]":
    """Split into (train, eval), so that all pairs of a prompt are in one part.

    The part follows from a hash of the prompt and the seed: it depends neither on the order of rows nor on the other
    rows, and about `eval_fraction` of the prompts go to the second part.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"`eval_fraction` must lie in [0, 1), got {eval_fraction}.")
    parts: tuple[list[int], list[int]] = ([], [])
    for row, number in enumerate(_hash_prompts(dataset, str(seed))):
        parts[number < eval_fraction].append(row)
    return dataset.select(parts[0]), dataset.select(parts[1])


def shard_by_prompt(dataset: "Dataset", shard: int, shards: int, seed: int = 42) -> "Dataset":
    """Select shard 1, 2, … `shards`: all pairs of a prompt are in one shard, and each pair is in exactly one.

    The shard follows from a hash of the prompt and the seed. It differs from the hash of `split_by_prompt`, so that
    the shards of one part of a split have about equal sizes too.
    """
    if not 1 <= shard <= shards:
        raise ValueError(f"`shard` must lie in 1 … {shards}, got {shard}.")
    numbers = _hash_prompts(dataset, f"shard {seed}")
    rows = [row for row, number in enumerate(numbers) if int(number * shards) == shard - 1]
    if not rows:
        raise ValueError(
            f"Each of {shards} shards must have at least one pair, got none of {len(dataset):,} for shard "
            f"{shard}. Use fewer shards."
        )
    return dataset.select(rows)


def shard_of_prompt(prompt: Any, shards: int, seed: int = 42) -> int:
    """The shard 1, 2, … `shards` of a prompt, as `shard_by_prompt` assigns it."""
    return int(_hash_prompt(prompt, f"shard {seed}") * shards) + 1


def select_by_length(dataset: "Dataset", which: str, *, tokenizer: Any = None, seed: int = 42) -> "Dataset":
    """Keep the pairs of one length split (SamPO, arXiv 2406.10957, Table 1), in their order.

    Args:
        dataset: Normalised pairs.
        which: `long` (chosen longer than rejected), `short` (chosen shorter), `equal`, or `balanced` (equally many
            long and short ones, drawn at random).
        tokenizer: Counts tokens; without it lengths are whitespace words.
        seed: Of the draw for `balanced`.
    """
    check_choice("length_split", which, LENGTH_SPLITS)
    rows: dict[str, list[int]] = {"long": [], "short": [], "equal": []}
    for row, (chosen, rejected) in enumerate(_measure_lengths(dataset, tokenizer)):
        rows["long" if chosen > rejected else "short" if chosen < rejected else "equal"].append(row)
    if which == "balanced":
        pairs_each = min(len(rows["long"]), len(rows["short"]))
        generator = random.Random(seed)
        rows["balanced"] = sorted(
            row for kind in ("long", "short") for row in generator.sample(rows[kind], pairs_each)
        )
    unit = "whitespace words" if tokenizer is None else "tokens"
    logger.info(
        "length split `%s`: %s of %s pairs kept (lengths in %s; %s long, %s short, %s equal)",
        *(which, f"{len(rows[which]):,}", f"{len(dataset):,}", unit),
        *(f"{len(rows[kind]):,}" for kind in ("long", "short", "equal")),
    )
    if not rows[which]:
        raise ValueError(f"`length_split: {which}` must keep at least one pair, got none of {len(dataset):,}.")
    return dataset.select(rows[which])


def _hash_prompts(dataset: "Dataset", key: str) -> Iterator[float]:
    """Hash the prompt of each row."""
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"A split by prompt needs a `prompt` column, got {dataset.column_names}. Load the data with "
            "`load_preferences`, which finds the prompt that both responses share."
        )
    for batch in dataset.with_format(None).select_columns(["prompt"]).iter(batch_size=1000):
        yield from (_hash_prompt(prompt, key) for prompt in batch["prompt"])


def _hash_prompt(prompt: Any, key: str) -> float:
    """Map a prompt to a number in [0, 1)."""
    digest = hashlib.blake2b(f"{key}\n{serialize(prompt)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _measure_lengths(dataset: "Dataset", tokenizer: Any) -> Iterator[tuple[int, int]]:
    """Yield the lengths of chosen and rejected, in tokens or whitespace words, without template and end token."""
    for batch in dataset.with_format(None).select_columns(["chosen", "rejected"]).iter(batch_size=1000):
        texts = [[visible_text(response) for response in batch[name]] for name in ("chosen", "rejected")]
        if tokenizer is None:
            lengths = [[len(text.split()) for text in column] for column in texts]
        else:
            lengths = [
                [len(ids) for ids in tokenizer(column, add_special_tokens=False)["input_ids"]] for column in texts
            ]
        yield from zip(*lengths, strict=True)
