"""The length of the policy's own answers while it trains: a few held-out prompts, answered greedily every k steps.

Greedy decoding in evaluation mode draws no random number and changes no weight, so a run trains the same model with
and without it. Each process answers its share of the prompts. Under ZeRO-3 and FSDP2 the processes call the model
equally often, since each call gathers the weights, layer by layer as in training; transformers' trainer registers
`generate` with FSDP2.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..logs import get_logger
from ..models.inference import generate_ids
from .preflight import check_generation

logger = get_logger(__name__)

RATIO = "length/generated_ratio"


class GeneratedLength(TrainerCallback):
    """Logs the lengths of `generate_every`, and stops the run at `max_length_ratio`.

    Added before the callback that saves at a signal, so that what is measured at a step is in its checkpoint.

    Args:
        trainer: a `SamPOTrainer` with evaluation data.

    Raises:
        ValueError: data, a model or a launch for which no answers can be generated.
    """

    def __init__(self, trainer: Any):
        self._trainer, args = trainer, trainer.args
        check_generation(trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        room = math.inf if positions is None else positions - args.generate_max_tokens
        self._prompts = list(
            itertools.islice(find_distinct_prompts(trainer.eval_dataset, longest=room), args.generate_prompts)
        )
        if not self._prompts:
            raise ValueError(
                f"`generate_every` needs evaluation prompts that leave room for `generate_max_tokens: "
                f"{args.generate_max_tokens}` within {positions} positions of the model, got none. Lower it."
            )
        of = [self._prompts, args.generate_max_tokens, sorted(trainer.end_token_ids)]
        self._key = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]  # of what a length depends on

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start, or, in a resumed run, take it from the checkpoint."""
        start = self._trainer.run_state.start_length
        if start is not None and start["key"] == self._key:
            ratio = next((entry[RATIO] for entry in reversed(state.log_history) if RATIO in entry), 1.0)
            self._stop_if_longer(ratio, args, state, control)
            return
        if start is not None:
            logger.warning(
                f"generate_every: prompts, `generate_max_tokens` or end tokens have changed, so `{RATIO}` refers to "
                f"step {state.global_step} instead of {start['step']}."
            )
        self._trainer.run_state.start_length = None
        self._measure(state, control)
        n, times = len(self._prompts), math.ceil((state.max_steps - state.global_step) / args.generate_every)
        logger.info(
            f"generate_every: {n} evaluation prompts, answered greedily with up to {args.generate_max_tokens} tokens "
            f"each. It took {state.log_history[-1]['generate_runtime']:.1f} s at the start, and comes {times} times "
            "more."
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `generate_every` steps and after the last one."""
        is_last = state.global_step >= state.max_steps
        if not is_last and state.global_step % args.generate_every:
            return
        ratio = self._measure(state, control)
        if self._stop_if_longer(ratio, args, state, control):  # save and evaluate as after the last
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS

    def _measure(self, state: Any, control: Any) -> float:
        """Log the lengths, the first ones as those of the start, and return the ratio."""
        trainer, began = self._trainer, time.perf_counter()
        was_training, waits = trainer.model.training, control.should_log
        trainer.model.eval()
        try:
            tokens, ended = self._answer()
            start = trainer.run_state.start_length or {"key": self._key, "step": state.global_step, "tokens": tokens}
            trainer.run_state.start_length = start
            ratio = tokens / start["tokens"]
            trainer.log(  # in evaluation mode, or it would close the window of the training's metrics
                {
                    "length/generated": tokens,
                    "length/generated_ended": ended,
                    RATIO: ratio,
                    "generate_runtime": round(time.perf_counter() - began, 4),
                }
            )
        finally:
            trainer.model.train(was_training)
        control.should_log = waits  # a log of its own, after which that of the step is still due
        return ratio

    def _answer(self) -> tuple[float, float]:
        """Mean tokens of an answer, its end token included, and the share that has one; of all processes."""
        trainer, args, n = self._trainer, self._trainer.args, len(self._prompts)
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        share = range(rank, math.ceil(n / world) * world, world)  # equally many each; those from n on do not count
        size = args.per_device_eval_batch_size
        answers: list[list[int]] = []
        for first in range(0, len(share), size):
            with trainer.accelerator.autocast():
                answers += generate_ids(
                    trainer.accelerator.unwrap_model(trainer.model_wrapped),
                    [self._prompts[i % n] for i in share[first : first + size]],
                    max_tokens=args.generate_max_tokens,
                    end_ids=trainer.end_token_ids,
                    pad_id=trainer._tokenizer.pad_token_id,
                    synced_gpus=world > 1,
                )
        counted = [answer for i, answer in zip(share, answers, strict=True) if i < n]
        sums = [sum(map(len, counted)), sum(answer[-1] in trainer.end_token_ids for answer in counted)]
        totals = trainer.accelerator.reduce(torch.tensor(sums, device=trainer.accelerator.device), reduction="sum")
        tokens, ended = totals.tolist()
        return tokens / n, ended / n

    def _stop_if_longer(self, ratio: float, args: Any, state: Any, control: Any) -> bool:
        if args.max_length_ratio is None or ratio <= args.max_length_ratio or state.global_step >= state.max_steps:
            return False
        reason = (
            f"Stopped at step {state.global_step} of {state.max_steps}: the generated answers are {ratio:.2f} times "
            f"as long as at the start, above `max_length_ratio: {args.max_length_ratio:g}`."
        )
        logger.info(reason)
        self._trainer.run_state.stop_reason = reason
        control.should_training_stop = True
        return True


def find_distinct_prompts(dataset: Any, *, longest: float = math.inf) -> Iterator[list[int]]:
    """The distinct prompts of up to `longest` tokens, in their order.

    Args:
        dataset: tokenised pairs with `prompt_ids`, or several sets by name.
        longest: tokens.
    """
    seen: set[tuple[int, ...]] = set()
    for each in dataset.values() if isinstance(dataset, dict) else [dataset]:
        for row in each.select_columns(["prompt_ids"]):
            ids = tuple(row["prompt_ids"])
            if 0 < len(ids) <= longest and ids not in seen:
                seen.add(ids)
                yield list(ids)
