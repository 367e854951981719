"""The tiny language model of the lab: tokenizer, supervised start, sampling, and log-probabilities of given answers.

A row is a prompt and an answer. All prompts have the same length and batches are padded on the right, so a causal
model needs no attention mask anywhere. B rows, T answer tokens (padded), V words.
"""

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..io.files import new_folder
from ..scoring.scorer import ModelScorer, Rows
from .world import BOS, EOS, PAD, PROMPT_TOKENS, WORDS

PromptWithAnswer = tuple[list[int], list[int]]  # prompt ids, answer ids
MAX_POSITIONS = 160
IGNORED = -100
# transformers 5.24 names it `cache`; 5.40 removes the other name
_CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def build_model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama with 110,784 parameters."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, words separated by spaces."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=WORDS[PAD], bos_token=WORDS[BOS], eos_token=WORDS[EOS]
    )


def _padded(sequences: Sequence[Sequence[int]], padding: int) -> Tensor:
    width = max(map(len, sequences))
    return torch.tensor([[*s, *[padding] * (width - len(s))] for s in sequences])  # (B, width)


def train_supervised(
    rows: Sequence[PromptWithAnswer],
    *,
    steps: int,
    seed: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> LlamaForCausalLM:
    """The supervised start: AdamW, 30 steps of warm-up and a cosine, batches drawn at random.

    Batches are not sorted by length: with a loss that is a mean over tokens, that would weight the end tokens of short
    answers more than those of long ones and shorten the answers (measured: 15 tokens instead of 20).
    """
    model = build_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + np.cos(np.pi * min(step / steps, 1)))
        return min((step + 1) / 30, 1) * (0.05 + 0.95 * float(cosine))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = np.random.default_rng([seed, 1])
    for step in range(steps):
        batch = [rows[i] for i in order.integers(len(rows), size=batch_size)]
        inputs = _padded([prompt + answer for prompt, answer in batch], PAD)  # (B, P+T)
        labels = _padded([[IGNORED] * len(prompt) + answer for prompt, answer in batch], IGNORED)
        logits = model(input_ids=inputs[:, :-1], use_cache=False).logits[:, PROMPT_TOKENS - 1 :]  # (B, T, V)
        loss = F.cross_entropy(logits.transpose(1, 2), labels[:, PROMPT_TOKENS:], ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1)
    return model.eval()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write model and tokenizer; the write of the folder is atomic."""
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        build_tokenizer().save_pretrained(partial)


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel, prompts: Sequence[list[int]], *, seed: int | None, max_tokens: int
) -> list[list[int]]:
    """One answer per prompt, sampled at temperature 1, or greedily with `seed=None`.

    Finished rows are removed from the batch and the cache, since most answers are much shorter than the longest.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = np.arange(len(prompts))
    cache, inputs = DynamicCache(config=model.config), torch.tensor(prompts)  # (B, P)
    for _ in range(max_tokens):
        logits = model(input_ids=inputs, use_cache=True, **{_CACHE: cache}).logits[:, -1]  # (B, V)
        if generator is None:
            tokens = logits.argmax(dim=1)  # (B,)
        else:
            tokens = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
        for row, token in zip(alive, tokens.tolist(), strict=True):
            answers[row].append(token)
        unfinished = tokens != EOS
        if not unfinished.any():
            break
        if not unfinished.all():
            cache.batch_select_indices(unfinished.nonzero()[:, 0])
            alive = alive[unfinished.numpy()]
        inputs = tokens[unfinished, None]  # (B, 1)
    return answers


def _batches(rows: Sequence[PromptWithAnswer], size: int = 256) -> Iterator[list[int]]:
    """Row numbers, answers of similar length together."""
    order = np.argsort([len(answer) for _, answer in rows], kind="stable").tolist()
    for start in range(0, len(rows), size):
        yield order[start : start + size]


def _token_logps(
    model: PreTrainedModel, rows: Sequence[PromptWithAnswer], target: int | None = None
) -> list[np.ndarray]:
    """`(T,)` log-probs in nats at the positions of each row's answer: of its tokens, or of one target."""
    score = ModelScorer(model, own_head=True)
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    for numbers in _batches(rows):
        batch = Rows.of([rows[number] for number in numbers])
        targets = [] if target is None else [torch.full_like(batch.inputs["input_ids"][:, 1:], target)]
        (logps,) = score(batch.inputs, *targets)  # (B, N)
        for number, row, is_answer in zip(numbers, logps, batch.mask, strict=True):
            found[number] = row[is_answer].double().numpy()
    return found


def answer_logps(model: PreTrainedModel, rows: Sequence[PromptWithAnswer]) -> np.ndarray:
    """Log-probability of each row's answer, in nats."""
    return np.array([logps.sum() for logps in _token_logps(model, rows)])


def end_probs(model: PreTrainedModel, rows: Sequence[PromptWithAnswer]) -> list[np.ndarray]:
    """Probability of the end token at each position of each row's answer, (T,)."""
    return [np.exp(logps) for logps in _token_logps(model, rows, EOS)]


@torch.no_grad()
def divergence(policy: PreTrainedModel, reference: PreTrainedModel, rows: Sequence[PromptWithAnswer]) -> np.ndarray:
    """Sum of KL(policy ‖ reference) over the tokens of each row, in nats.

    Over answers sampled from the policy, its mean is KL(policy ‖ reference) of complete answers (up to the cap), with
    less noise than the mean log-ratio, which has the same expectation.
    """
    sums = np.empty(len(rows))
    for numbers in _batches(rows):
        inputs = _padded([[*rows[number][0], *rows[number][1]] for number in numbers], PAD)[:, :-1]
        is_answer = _padded([[1] * len(rows[number][1]) for number in numbers], 0)  # (B, T)
        p, q = (
            model(input_ids=inputs, use_cache=False).logits[:, PROMPT_TOKENS - 1 :].log_softmax(dim=2)  # (B, T, V)
            for model in (policy, reference)
        )
        sums[numbers] = ((p.exp() * (p - q)).sum(dim=2) * is_answer).sum(dim=1).double().numpy()
    return sums
