"""What a benchmark of a training step works on: a model, and batches of preference pairs of a given shape."""

import copy
import random
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch

from sampo.training.memory import SHAPES as MODEL_SHAPES
from sampo.training.memory import Shape

# (median tokens, standard deviation of their logarithm) of prompt, chosen and rejected; each is log-normal.
# hh: measured on the 2,303 usable pairs of the harmless test set with SmolLM2's tokenizer and chat template.
# ultrafeedback, tldr: medians from the table in the README of github.com/frankxwang/dpo-prefix-sharing (arXiv
#   2410.20305): overall length 409 and 416, prompt 0.42 and 11.14 times the completion. It has no spread.
#   ultrafeedback: the spread is assumed. tldr: posts have at most 512 tokens and reference summaries 24 to 48
#   (arXiv 2009.01325), which a spread of 0.35 and 0.3 imitates.
SHAPES = {
    "hh": ((122, 0.75), (28, 0.87), (36, 0.91)),
    "ultrafeedback": ((121, 0.75), (288, 0.6), (288, 0.6)),
    "tldr": ((382, 0.35), (34, 0.3), (34, 0.3)),
}


def sizes_of(shape: Shape) -> dict[str, Any]:
    """Fields of a configuration in transformers."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    return {**{name: getattr(shape, name) for name in (*names, *heads)}, "tie_word_embeddings": shape.tied}


# Shapes of models with random weights; nothing is downloaded. Sizes as in their published configs.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {"model_type": "qwen2", "max_position_embeddings": 32768, **sizes_of(MODEL_SHAPES["0.5B"])},
    "llama-3-8b": {"model_type": "llama", "max_position_embeddings": 8192, **sizes_of(MODEL_SHAPES["8B"])},
}
POOL = 101  # batches that are drawn, and from which typical ones are taken


@dataclass
class Workload:
    """What all sides share: the same two models, tokenizer and rows.

    Attributes:
        policy: the model that is trained; the sides take turns with it.
        reference: a copy of it; None where only a side that needs it is to keep it.
        tokenizer: the model's own, or one of words for drawn lengths.
        data: `batch * batches` rows in the order of the batches.
        scratch: a folder that goes away at the end.
        args: the command line.
    """

    policy: Any
    reference: Any
    tokenizer: Any
    data: Any
    scratch: str
    args: Any


def make_workload(args, scratch: str) -> Workload:
    """Load the model once, and choose the rows."""
    policy = load_model(args)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    if args.data:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        data = typical_real_rows(args, tokenizer)
    else:
        n_words = min(1000, policy.config.vocab_size - 3)
        tokenizer, data = word_tokenizer(n_words), typical_drawn_rows(args, n_words)
    return Workload(policy, reference, tokenizer, data, scratch, args)


def load_model(args):
    """A local folder, or random weights in a published shape, on the device that is measured."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    config = AutoConfig.for_model(**MODELS[args.config])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


# --- which pairs -------------------------------------------------------------------------------------------------


def typical(batches: list[list[tuple[int, int, int]]], n: int) -> list[int]:
    """Indices of the n batches at even quantiles of padded tokens over needed tokens; of one, the median.

    So a benchmark that can afford one batch does not rest on a lucky one. A batch is a list of (prompt, chosen,
    rejected) tokens.
    """

    def waste(batch) -> float:
        longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in batch)
        return 2 * len(batch) * longest / sum(map(sum, batch))

    order = sorted(range(len(batches)), key=lambda i: waste(batches[i]))
    return [order[int((i + 0.5) / n * len(batches))] for i in range(n)]


def typical_rows(args, lengths: list[tuple[int, int, int]]) -> list[int]:
    """Indices of the rows that make `args.batches` typical batches of `args.batch` pairs."""
    top = args.max_length  # longer completions are cut
    usable = [i for i, (prompt, _, _) in enumerate(lengths) if prompt < top]
    cut = [(p, min(c, top - p), min(r, top - p)) for p, c, r in lengths]
    batches = [usable[i : i + args.batch] for i in range(0, len(usable) - args.batch + 1, args.batch)][:POOL]
    if len(batches) < args.batches:
        raise ValueError(
            f"`--batches {args.batches}` of `--batch {args.batch}` need {args.batches * args.batch} usable pairs, "
            f"got {len(usable)}. Lower one of them."
        )
    chosen = typical([[cut[i] for i in batch] for batch in batches], args.batches)
    return [row for i in chosen for row in batches[i]]


def typical_real_rows(args, tokenizer):
    from sampo import load_preferences

    pairs = load_preferences(args.data, on_bad_rows="drop").shuffle(seed=args.seed)
    pairs = pairs.select(range(min(len(pairs), 2 * POOL * args.batch)))  # twice: some have too long a prompt
    return pairs.select(typical_rows(args, [count_tokens(tokenizer, pair) for pair in pairs]))


def count_tokens(tokenizer, pair) -> tuple[int, int, int]:
    """Tokens of prompt, chosen and rejected as TRL will make them, give or take one at their border."""

    def tokens(value, **settings) -> int:
        if isinstance(value, str):
            return len(tokenizer(value)["input_ids"])
        return len(tokenizer.apply_chat_template(value, tokenize=True, return_dict=True, **settings)["input_ids"])

    prompt = pair["prompt"]
    n_prompt = tokens(prompt) if isinstance(prompt, str) else tokens(prompt, add_generation_prompt=True)
    return n_prompt, tokens(prompt + pair["chosen"]) - n_prompt, tokens(prompt + pair["rejected"]) - n_prompt


def typical_drawn_rows(args, n_words: int):
    """The typical of drawn rows."""
    lengths = drawn_lengths(args, 2 * POOL * args.batch if args.shape in SHAPES else args.batch * args.batches)
    return rows_of_words([lengths[i] for i in typical_rows(args, lengths)], n_words, args.seed)


def drawn_lengths(args, n: int) -> list[tuple[int, ...]]:
    """Tokens of prompt, chosen and rejected of n rows: a name of `SHAPES`, or `prompt:chosen:rejected` for all."""
    if args.shape not in SHAPES:
        return [tuple(map(int, args.shape.split(":")))] * n
    rng = random.Random(args.seed)
    # TRL adds the end token, and both completions must not be empty
    return [tuple(max(2, round(rng.lognormvariate(log(mid), sd))) for mid, sd in SHAPES[args.shape]) for _ in range(n)]


def rows_of_words(lengths: list[tuple[int, ...]], n_words: int, seed: int):
    """Random words whose numbers are these lengths."""
    from datasets import Dataset

    rng = random.Random(seed)

    def text(n: int) -> str:
        return "".join(f"w{rng.randrange(n_words)} " for _ in range(n))

    rows = [{"prompt": text(p), "chosen": text(c - 1), "rejected": text(r - 1)} for p, c, r in lengths]
    return Dataset.from_list(rows)


def word_tokenizer(n_words: int):
    """One token a word, so that drawn lengths are exact."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(n_words))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def label_of(args) -> dict[str, Any]:
    """The settings that a measured number depends on, for its record."""
    model = Path(args.model).name if args.model else args.config
    names = ("shape", "dtype", "threads", "batch", "batches", "max_length", "seed")
    data = Path(args.data).name if args.data else "random words"
    return {"benchmark": args.benchmark, "model": model, "data": data, **{name: getattr(args, name) for name in names}}
