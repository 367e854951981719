"""The sides that a benchmark of a training step compares.

All of them work on the same two models and rows. What a trainer does to a model (TRL's fused head replaces its
`forward`, the pair stream its attention function) is remembered when the side is built, and put back when its turn
comes, so that a model of eight billion parameters fits a device together with one reference and no more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from workload import Workload

from sampo.scoring import lm_head


class NotAvailable(Exception):
    """This version of sampo, or this device, does not have the side; the text says why."""


class Side:
    """One way to do the forward and the backward pass of a batch.

    Attributes:
        step: both, for a batch as the side's own trainer collates it; returns the loss, a scalar.
        batches: the batches.
        live_reference: the reference model runs in each step.
        policy: the model that gets the gradients.
    """

    def __init__(self, work: Workload, trainer, loss: Callable[[dict[str, Any]], Tensor] | None = None):
        """Without a `loss`, the step is the trainer's own."""
        if len(trainer.train_dataset) != len(work.data):
            raise ValueError(f"All {len(work.data)} rows must be kept, got {len(trainer.train_dataset)}.")
        self.step = partial(step_of_trainer, trainer, work.policy) if loss is None else partial(step_of, loss)
        self.batches = list(trainer.get_train_dataloader())
        self.live_reference = not trainer.args.precompute_ref_log_probs
        self.policy = work.policy
        models = [work.policy, work.reference] if self.live_reference else [work.policy]
        self._states = [(m, m.__dict__.get("forward"), m.config._attn_implementation) for m in models]

    def activate(self) -> None:
        """Put the models into this side's state."""
        for state in self._states:
            set_state(*state)
        self.policy.train()


def step_of_trainer(trainer, policy, batch: dict[str, Any]) -> Tensor:
    """As the training loop does without accumulation."""
    batches, _ = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    return trainer.training_step(policy, batch)


def step_of(loss_of_batch: Callable[[dict[str, Any]], Tensor], batch: dict[str, Any]) -> Tensor:
    loss = loss_of_batch(batch)
    loss.backward()
    return loss.detach()


def set_state(model, forward: Callable | None, attention: str) -> None:
    model.__dict__.pop("forward", None)
    if forward is not None:
        model.forward = forward
    model.set_attn_implementation(attention)


def options(work: Workload, **more) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": work.scratch,
        "per_device_train_batch_size": work.args.batch,
        "max_length": work.args.max_length,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "bf16": False,  # the models are in `--dtype` already
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **more,
    }


def make_trainer(work: Workload, trainer_class, config):
    for model in (work.policy, work.reference):
        set_state(model, None, "sdpa")
    return trainer_class(
        model=work.policy,
        # with cached log-probs nobody passes one: the policy computes them at the start
        ref_model=None if config.precompute_ref_log_probs else work.reference,
        args=config,
        train_dataset=work.data,
        processing_class=work.tokenizer,
    )


def trl(work: Workload, **more) -> Side:
    """TRL's trainer as it is."""
    from trl import DPOConfig, DPOTrainer

    return Side(work, make_trainer(work, DPOTrainer, DPOConfig(**options(work, **more))))


def trl_compact_head(work: Workload) -> Side:
    """TRL's trainer, whose models let only labelled positions reach the head. On Triton devices they do anyway."""
    from trl import DPOConfig, DPOTrainer

    if torch.cuda.is_available():
        raise NotAvailable("TRL's head sees only labelled positions on this device already")
    trainer = make_trainer(work, DPOTrainer, DPOConfig(**options(work)))
    trainer.ref_model = partial(with_compact_head, work.reference)
    return Side(work, trainer, partial(trainer.compute_loss, partial(with_compact_head, work.policy)))


def with_compact_head(model, *, labels: Tensor, fused_lm_head: bool = True, **kwargs):
    """TRL's call of a model, with sampo's compact head for its padded rows; `labels` is `(2B, L)`."""
    targets = labels[:, 1:]
    labelled = (targets != -100).nonzero(as_tuple=True)  # the state at a position predicts the next token
    return lm_head.score_positions(model, model.base_model, labelled, labelled, [targets], **kwargs)[0]


def authors(work: Workload) -> Side:
    """SamPO as the authors' released code computes it, in our own words: full logits, rows in a Python loop.

    The draws of policy and reference differ, as they do there.
    """
    from trl import DPOConfig, DPOTrainer

    trainer = make_trainer(work, DPOTrainer, DPOConfig(**options(work)))
    policy, reference = work.policy, work.reference
    for model in (policy, reference):
        set_state(model, None, "sdpa")

    def sums(model, batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return sampled_sums(logits[:, :-1], batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:])

    def loss(batch) -> Tensor:
        with torch.no_grad():
            ref_sums = sums(reference, batch)
        chosen, rejected = (sums(policy, batch) - ref_sums).chunk(2)
        return -F.logsigmoid(trainer.beta * (chosen - rejected)).mean()

    return Side(work, trainer, loss)


def sampled_sums(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """`(2B,)` log-probs of T_m drawn tokens of each row; `logits` is `(2B, N, V)`, the others `(2B, N)`."""
    n_pairs = len(mask) // 2
    result: list[Any] = [None] * len(mask)
    for pair in range(n_pairs):
        rows = (pair, pair + n_pairs)
        shortest = min(int(mask[row].sum()) for row in rows)
        for row in rows:
            positions = mask[row].nonzero().squeeze(1)
            if len(positions) > shortest:
                positions = torch.multinomial(mask[row].float(), shortest, replacement=False)
            logps = logits[row, positions].float().log_softmax(dim=-1)  # (T_m, V)
            result[row] = logps.gather(1, targets[row, positions, None]).sum()
    return torch.stack(result)


def ours(work: Workload, **more) -> Side:
    """`SamPOTrainer` with some options."""
    from sampo import SamPOConfig, SamPOTrainer

    for name in more:
        if name not in SamPOConfig.__dataclass_fields__:
            raise NotAvailable(f"`{name}` is no option of this `SamPOConfig`")
    try:
        config = SamPOConfig(**options(work, **more))
    except ValueError as error:
        raise NotAvailable(str(error)) from None
    return Side(work, make_trainer(work, SamPOTrainer, config))


def limit(work: Workload, **more) -> Side:
    """The work that a step cannot do without."""
    from limit import limit_loss

    from sampo import SamPOConfig, SamPOTrainer

    config = SamPOConfig(**options(work, **more))
    trainer = make_trainer(work, SamPOTrainer, config)
    reference = None if config.precompute_ref_log_probs else work.reference

    def loss(inputs) -> Tensor:
        batch = trainer.prepare_batch(inputs)
        sizes = {"unique": batch.stream.input_ids.numel(), "selected": int(batch.positions.sum())}
        return limit_loss(work.policy, reference, **sizes, n_rows=batch.n_pairs)

    return Side(work, trainer, loss)


MICRO_BATCHES = {"max_tokens_per_forward": 512}
STREAM = {"pair_stream": "true"}
CACHED = {"precompute_ref_log_probs": True}
SILENT = {"log_token_statistics": False}
SIDES: dict[str, Callable[[Workload], Side]] = {
    "TRL": trl,
    "TRL, reference cached": partial(trl, **CACHED),
    "TRL, compact head": trl_compact_head,
    "authors' SamPO loss": authors,
    "DPO, padded": partial(ours, token_weighting="all", pair_stream="false"),
    "DPO, stream": partial(ours, token_weighting="all", **STREAM),
    "DPO, stream, reference cached": partial(ours, token_weighting="all", **STREAM, **CACHED),
    "SamPO, stream": partial(ours, token_weighting="sampo", **STREAM),
    "SamPO, stream, pieces of 512 tokens": partial(ours, token_weighting="sampo", **STREAM, **MICRO_BATCHES),
    "SamPO, stream, no statistics": partial(ours, token_weighting="sampo", **STREAM, **SILENT),
    "SamPO, stream, reference cached": partial(ours, token_weighting="sampo", **STREAM, **CACHED),
    "SamPO, stream, cached, no statistics": partial(ours, token_weighting="sampo", **STREAM, **CACHED, **SILENT),
    "limit": limit,
    "limit, reference cached": partial(limit, **CACHED),
}
