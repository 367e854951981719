"""`max_tokens_per_forward: auto`: the largest number of tokens of a forward pass that fits the memory of the device.

On CUDA it is found before the first step, by forward and backward passes over pairs as long as the longest of the
data: their number doubles until the memory is exhausted, and then the interval is halved. A tenth is kept free.
Elsewhere it is 4,096, a pair of 2 × 2,048 tokens: a CPU's system kills a process that tries out its memory.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..data.weight_columns import GIVEN_TOKEN_WEIGHTS, TOKEN_WEIGHT_COLUMNS
from ..logs import get_logger
from ..reference_cache.store import CACHED_REF_LOGPS, END

logger = get_logger(__name__)

TOKENS_WITHOUT_PROBE = 4096
SAFETY = 0.9  # of the largest number of tokens that fits


def largest_that_fits(fits: Callable[[int], bool], one: int, most: int) -> int:
    """The largest number of equal pairs that fits, in tokens; exact to one pair or a sixteenth.

    Args:
        fits: whether so many tokens fit.
        one: tokens of a pair.
        most: pairs that are enough.

    Raises:
        RuntimeError: not even one pair fits.
    """
    if not fits(one):
        raise RuntimeError(
            f"A pair of the longest rows must fit the memory of the device, got out of memory at {one:,} tokens. "
            "Lower `max_length`, set `gradient_checkpointing: true`, or train an adapter."
        )
    low, high = 1, most + 1  # `low` pairs fit, `high` do not or are not needed
    while high - low > max(1, low // 16):
        middle = min(2 * low, (low + high) // 2)
        low, high = (middle, high) if fits(middle * one) else (low, middle)
    return low * one


def find_token_budget(trainer: Any) -> int:
    """The number of tokens of a forward pass, the same on all processes.

    Args:
        trainer: whose models and data it is for.

    Raises:
        RuntimeError: not even one pair fits.
        ValueError: it is not known how long rows are.
    """
    if trainer.args.device.type != "cuda":
        budget, how = TOKENS_WITHOUT_PROBE, "the fixed number of devices other than CUDA"
    else:
        budget, how = probe(trainer), "found by a probe"
    logger.info(f"max_tokens_per_forward: auto takes {budget:,} tokens, {how}.")
    return budget


def probe(trainer: Any) -> int:
    """The number of tokens that fits with a margin, found on the device."""
    counts = trainer.token_counts.get("train")
    longest = trainer.args.max_length if counts is None else counts.longest_row
    if longest is None:
        raise ValueError(
            "`max_tokens_per_forward: auto` needs to know the length of the longest row, got streamed data without "
            "`max_length`. Set one of the two to a number."
        )
    trained = [each for each in trainer.model.parameters() if each.requires_grad]
    moments = 2 * sum(each.numel() * each.element_size() for each in trained)  # Adam's, made at the first step
    reserve = torch.empty(moments, dtype=torch.uint8, device=trainer.args.device)
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    trainer.model.train()
    pairs_per_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    with torch.random.fork_rng(devices):
        found = largest_that_fits(lambda tokens: _fits(trainer, tokens, longest), 2 * longest, pairs_per_step)
    del reserve
    return int(SAFETY * found)


def _fits(trainer: Any, tokens: int, longest: int) -> bool:
    """Whether all processes can compute a batch of so many tokens, without a word to each other while they do."""
    try:
        _forward_and_backward(trainer, tokens // (2 * longest), longest)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    trainer.model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    on_all = trainer.accelerator.gather(torch.tensor([fits], device=trainer.args.device))
    return bool(on_all.all())


def _forward_and_backward(trainer: Any, n_pairs: int, longest: int) -> None:
    """Of pairs with a prompt of one token, so that all other tokens are scored."""
    vocabulary = trainer.model.config.get_text_config().vocab_size
    ids = torch.arange(2 * n_pairs * longest, device=trainer.args.device).view(2 * n_pairs, longest) % vocabulary
    ids[:, 0] = 0
    completion = torch.ones_like(ids)
    completion[:, 0] = 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    if trainer.args.precompute_ref_log_probs:
        names = [CACHED_REF_LOGPS, *([END.batch] if trainer.args.balance_end_token else [])]
        inputs |= {name: torch.zeros(2 * n_pairs, longest - 1, device=ids.device) for name in names}
    if TOKEN_WEIGHT_COLUMNS[0] in trainer.args.weight_columns:
        inputs[GIVEN_TOKEN_WEIGHTS] = torch.ones(2 * n_pairs, longest - 1, device=ids.device)
    with trainer.maybe_activation_offload_context, trainer.compute_loss_context_manager():
        model = trainer.accelerator.unwrap_model(trainer.model)
        scored = trainer.passes.score(model, trainer.prepare_batch(inputs))
    scored.logps.sum().backward()
