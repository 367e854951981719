"""Every way to tokens gives what TRL's trainer makes of a pair, and every finder of end tokens the same position."""

import random

import pytest
import torch
from datasets import Dataset
from tiny import make_model, make_pairs, make_tokenizer, training_options
from trl import DPOConfig, DPOTrainer

from sampo.data.end_tokens import ResponseEnds, end_token_ids, last_end_position
from sampo.data.lengths import kept_ids
from sampo.data.tokenize import PairTokenizer, tokenize_pairs
from sampo.weighting import last_end_tokens

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
COLUMNS = ("prompt", "chosen", "rejected")


def texts_that_merge() -> Dataset:
    """Text whose last prompt token differs before some of the responses."""
    words = ("w5", "w6 w7", "w8")
    return Dataset.from_list(
        [{"prompt": p, "chosen": f"{blank}w9 w{i}", "rejected": f"{blank}w1{i}"} for p in words for i in range(3)
         for blank in ("", " ", "0")]
    )  # fmt: skip


@pytest.mark.parametrize("data", [make_pairs(9, conversational=True), make_pairs(9), texts_that_merge()])
def test_data_sets_and_streams_get_the_tokens_of_the_trainer(data, tmp_path):
    is_text = isinstance(data[0]["prompt"], str)
    tokenizer = make_tokenizer(chat=not is_text)
    options = {name: value for name, value in training_options(tmp_path).items() if name != "max_length"}
    args = DPOConfig(**options, max_length=None)
    trainer = DPOTrainer(make_model(), make_model(), args, train_dataset=data, processing_class=tokenizer)
    expected = trainer.train_dataset
    expected = expected.select_columns(list(IDS)).with_format(None).to_list()
    found = tokenize_pairs(data, tokenizer, max_length=None).select_columns(list(IDS)).to_list()
    assert found == expected
    pairs = [tuple(row[name] for name in COLUMNS) for row in data]
    streamed = PairTokenizer(tokenizer).tokenize(pairs, [{}] * len(pairs))
    assert [dict(zip(IDS, pair[:3], strict=True)) for pair in streamed] == expected
    if not is_text:
        assert not any(pair.is_merged for pair in streamed)


def test_the_last_end_token_of_a_batch_is_that_of_the_lists():
    """Where a row has its own end token or none; rows that keep other ends alone are left out by fingerprint."""
    tokenizer = make_tokenizer()
    ends = ResponseEnds(tokenizer, end_token_ids(tokenizer))
    eos, turn, newline = tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>", "\n"])
    rng = random.Random(0)
    kinds = dict.fromkeys(("own", "other", "none"), 0)
    for _ in range(400):
        prompt = [rng.choice([eos, turn, 20]) for _ in range(rng.randint(1, 4))]
        response = [rng.choice([eos, turn, newline, 20, 21]) for _ in range(rng.randint(1, 8))]
        max_length, padding = rng.randint(len(prompt) + 1, 12), rng.randint(0, 3)
        kept = kept_ids(prompt + response, max_length)[len(prompt) :]
        row = prompt + kept + [eos] * padding
        mask = torch.tensor([[0] * (len(prompt) - 1) + [1] * len(kept) + [0] * padding]).bool()
        marked = last_end_tokens(torch.tensor([row]), mask, torch.tensor(sorted(ends.ids)))[0].nonzero().flatten()
        position = last_end_position(kept, ends.ids)
        assert marked.tolist() == ([] if position < 0 else [len(prompt) - 1 + position])
        kind = ends.classify(response, slice(0, len(kept)))
        kinds[kind] += 1
        assert (position < 0) == (kind == "none")
        if kind == "own":
            assert position == ends.find(response)
    assert min(kinds.values()) > 20
