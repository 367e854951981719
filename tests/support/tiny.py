"""Tiny models, tokenizers and pairs that the tests make on the spot."""

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sampo.data.tokenize import tokenize_pairs

WORDS = [f"w{i}" for i in range(60)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> \n {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def make_tokenizer(chat=True) -> PreTrainedTokenizerFast:
    """Words split at blanks; with a ChatML-like template that puts a newline token after `<|im_end|>`."""
    special = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, "<unk>", "\n", "user", "assistant", "system", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(vocab_size=69, seed=0, **overrides) -> LlamaForCausalLM:
    """A Llama of 20,000 parameters with weights large enough that tokens differ."""
    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings["max_position_embeddings"] = 256
    config = LlamaConfig(
        vocab_size=vocab_size,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **settings | overrides,
    )
    return LlamaForCausalLM(config).float()


def save_model(folder, chat=True, **overrides) -> str:
    """Model and tokenizer as an ordinary local folder; returns its path."""
    make_model(**overrides).save_pretrained(folder)
    make_tokenizer(chat).save_pretrained(folder)
    return str(folder)


def make_pairs(n=16, seed=0, conversational=False, longer=None, min_len=1, max_len=12) -> Dataset:
    """Random pairs. `longer`: chosen | rejected | equal, or None for whatever comes."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < n:
        prompt, chosen, rejected = (" ".join(rng.choices(WORDS, k=rng.randint(min_len, max_len))) for _ in range(3))
        gap = len(chosen.split()) - len(rejected.split())
        fits = {"chosen": gap > 0, "rejected": gap < 0, "equal": gap == 0, None: True}[longer]
        if chosen == rejected or not fits:
            continue
        if conversational:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
        else:
            # the tokenizer splits at blanks: keep prompt and completion apart
            rows.append({"prompt": prompt + " ", "chosen": chosen + " ", "rejected": rejected + " "})
    return Dataset.from_list(rows)


def with_weights(pairs: Dataset, seed=0) -> Dataset:
    """The pairs with random weights of their tokens and of themselves in the columns that sampo reads."""
    rng = random.Random(seed)
    ids = tokenize_pairs(pairs, make_tokenizer(), max_length=None)
    columns = {
        f"{side}_weights": [[rng.random() * 2 for _ in row] for row in ids[f"{side}_ids"]]
        for side in ("chosen", "rejected")
    }
    columns["pair_weight"] = [rng.random() * 3 for _ in ids]
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    return pairs


PLAIN = {"pair_stream": "false"}  # TRL's forward, with its arithmetic to the bit


def training_options(output_dir, **options) -> dict:
    """Options of a quick, silent, deterministic run on CPU."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return defaults | options
