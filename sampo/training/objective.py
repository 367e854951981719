"""TRL's loss of weighted log-probs: the only code that touches `DPOTrainer._compute_loss`.

TRL's function gets, instead of a model, a callable that returns the policy's log-probs already weighted, a completion
mask narrowed to the selected tokens, and the weighted reference sums, which it takes as precomputed ones. So every
loss of TRL works with every weighting. Instead of the trainer it gets a view of the trainer with some attributes of
its own ([`_View`]), so nothing of the trainer changes while it runs. `sampo.trainer` lists what is relied on.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from ..data.weight_columns import GIVEN_PAIR_WEIGHTS, GIVEN_TOKEN_WEIGHTS
from ..reference_cache.store import CACHED_REF_LOGPS, END
from ..weighting import sequence_logps
from .batch import Draw, PairBatch, Scored
from .micro_batches import MicroBatch, by_pair, by_row
from .score_shifts import dpop_shift, tdpo_shift

_OURS = (CACHED_REF_LOGPS, END.batch, GIVEN_TOKEN_WEIGHTS, GIVEN_PAIR_WEIGHTS)  # inputs that TRL does not know
NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", *_OURS)
TOKEN_STATISTICS = ("entropy", "mean_logits", "is_top1")  # of the head, for TRL's log alone
WPO_STATISTIC = "log_sum_sq_probs"  # of the head, for WPO's weights
TOKEN_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")  # what TRL makes of them


class _View:
    """An object with some attributes of its own; all others are those of the wrapped object."""

    def __init__(self, wrapped: Any, **own: Any):
        self._wrapped = wrapped
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def _unchanged(values: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces a gather: returns the values of this process."""
    return values


class Objective:
    """The loss of a batch, averaged over its draws, and TRL's metrics.

    Args:
        trainer: whose losses, betas and metrics these are.

    Attributes:
        sft_weight: of `sft` in `loss_type`, where it is added here: TRL would give it the selected tokens of a
            micro-batch, but it is the mean of all chosen tokens of the batch.
    """

    def __init__(self, trainer: Any):
        self._trainer, self._args = trainer, trainer.args
        terms = list(zip(trainer.loss_types, trainer.loss_weights, strict=True))
        self.sft_weight = 0.0
        if not self._args.is_plain_dpo or self._args.max_tokens_per_forward or self._args.pair_weight_column:
            self.sft_weight = sum((weight for name, weight in terms if name == "sft"), 0.0)
            terms = [term for term in terms if term[0] != "sft"]
        self._loss_types = [name for name, _ in terms]
        self._loss_weights = [weight for _, weight in terms]

    def __call__(
        self, model: Any, batch: PairBatch, scored: Scored, shift: Tensor | None, *, return_outputs: bool = False
    ) -> tuple[Tensor, Any]:
        """Loss and outputs of a batch; TRL's metrics go into the trainer's.

        Args:
            model: for the logits, if outputs are asked for.
            batch: of B pairs.
            scored: its log-probs.
            shift: `(B,)` what is added to the score of each chosen response, if there is a length penalty.
            return_outputs: whether outputs are asked for.
        """
        trainer, losses, outputs = self._trainer, [], None
        mode = "train" if trainer.model.training else "eval"
        n_tokens = trainer._total_train_tokens
        for i, draw in enumerate(scored.draws):
            view = self._view(trainer.accelerator)
            asked = return_outputs and i == 0
            result = self._trl_loss(view, model, batch, scored, draw, shift, return_outputs=asked)
            loss = result[0] if isinstance(result, tuple) else result
            losses.append(self._weighted_value(loss, model, batch, scored, i, shift))
            if i == 0:  # TRL counts the tokens of a batch at each call
                outputs, n_tokens = (result[1] if isinstance(result, tuple) else None), view._total_train_tokens
            self._add_metrics(view._metrics[mode], draw, mode)
        trainer._total_train_tokens = n_tokens
        trainer._metrics[mode]["num_tokens"] = [n_tokens]
        return self._mean(losses) + self._sft(batch, scored), outputs

    def of_micro_batch(
        self, model: Any, batch: PairBatch, scored: Scored, shift: Tensor | None, part: MicroBatch
    ) -> Tensor:
        """A loss with the gradients that some pairs have in the losses of their batches, without metrics.

        Args:
            model: of the run.
            batch: of the micro-batch.
            scored: its log-probs.
            shift: as above.
            part: the weights of its pairs. TRL's loss is their plain mean, so the value of this loss is not weighted.
        """
        losses = []
        factors = batch.n_pairs * part.pair_weights.repeat(2)[:, None]  # (2B, 1)
        for draw in scored.draws:  # other processes have micro-batches of other sizes: nothing is gathered
            view = self._view(_View(self._trainer.accelerator, gather=_unchanged, gather_for_metrics=_unchanged))
            losses.append(self._trl_loss(view, model, batch, scored, draw, shift, factors=factors))
        return self._mean(losses) + self._sft(batch, scored, part.token_weights)

    def _weighted_value(
        self, loss: Tensor, model: Any, batch: PairBatch, scored: Scored, k: int, shift: Tensor | None
    ) -> Tensor:
        """The loss of draw k with the weights of pairs in its value; its gradient has them already.

        TRL gives the mean over the pairs of a batch. So it is asked for the loss of each pair, without a gradient.
        """
        weights = batch.inputs.get(GIVEN_PAIR_WEIGHTS)
        if weights is None:
            return loss
        n_pairs, of_pairs = batch.n_pairs, []
        inputs, known = (by_pair(rows, n_pairs) for rows in (batch.inputs, scored.tensors()))
        accelerator = _View(self._trainer.accelerator, gather=_unchanged, gather_for_metrics=_unchanged)
        with torch.no_grad():
            for i in range(n_pairs):
                rows = by_row({name: value[i : i + 1] for name, value in inputs.items()})
                del rows[GIVEN_PAIR_WEIGHTS]
                own = Scored.of(by_row({name: value[i : i + 1] for name, value in known.items()}))
                pair = replace(batch, inputs=rows, mask=batch.mask[[i, n_pairs + i]])
                view = self._view(accelerator, aux_loss_enabled=False)  # a mean over tokens, and not over pairs
                of_pair = None if shift is None else shift[i : i + 1]
                of_pairs.append(self._trl_loss(view, model, pair, own, own.draws[k], of_pair))
        return loss + ((weights - 1) * torch.stack(of_pairs)).mean().detach()

    @staticmethod
    def _mean(losses: list[Any]) -> Any:
        return sum(losses) / len(losses)

    def _sft(self, batch: PairBatch, scored: Scored, token_weights: Tensor | None = None) -> Tensor | float:
        """`sft`: the mean over the chosen tokens of a batch, or with `(B,)` weights its part from a micro-batch."""
        if not self.sft_weight:
            return 0.0
        logps, mask = scored.logps[: batch.n_pairs], batch.mask[: batch.n_pairs]
        if GIVEN_PAIR_WEIGHTS in batch.inputs:
            token_weights = 1 / mask.sum() if token_weights is None else token_weights
            token_weights = token_weights * batch.inputs[GIVEN_PAIR_WEIGHTS]
        if token_weights is None:
            return -(self.sft_weight * logps[mask].sum() / mask.sum())
        return -(self.sft_weight * (token_weights[:, None] * logps * mask).sum())

    def _view(self, accelerator: Any, **own: Any) -> _View:
        """The trainer as TRL's loss sees it, with more attributes of its own."""
        return _View(
            self._trainer,
            accelerator=accelerator,
            precompute_ref_logps=True,
            loss_types=self._loss_types,
            loss_weights=self._loss_weights,
            _metrics={mode: defaultdict(list) for mode in ("train", "eval")},
            _total_train_tokens=self._trainer._total_train_tokens,
            **own,
        )

    def _trl_loss(
        self,
        view: Any,
        model: Any,
        batch: PairBatch,
        scored: Scored,
        draw: Draw,
        shift: Tensor | None,
        *,
        return_outputs: bool = False,
        factors: Tensor | None = None,
    ) -> Any:
        """TRL's result for one draw; with `(2B, 1)` factors of the gradients of its rows."""
        plain = self._args.is_plain_dpo
        pair_weights = batch.inputs.get(GIVEN_PAIR_WEIGHTS)  # (B,), of the gradients; see `_weighted_value`
        if pair_weights is not None:
            factors = pair_weights.repeat(2)[:, None] * (1 if factors is None else factors)
            shift = None if shift is None else scale_gradient(shift, pair_weights)
        own_shift = self._own_shift(scored, draw, factors)
        kept = {name: value for name, value in batch.inputs.items() if name not in _OURS}
        ref_chosen, ref_rejected = draw.ref_sums.chunk(2)
        for each in (shift, own_shift):
            ref_chosen = ref_chosen if each is None else ref_chosen - each
        inputs = {
            **kept,
            "completion_mask": kept["completion_mask"] if plain else widen(kept, draw.weights > 0),
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
        }
        policy = self._scored_policy(view, model, batch, scored, draw, factors)
        return DPOTrainer._compute_loss(view, policy, inputs, return_outputs)

    def _own_shift(self, scored: Scored, draw: Draw, factors: Tensor | None) -> Tensor | None:
        """`(B,)` what the loss adds to the chosen scores beside a length penalty, with the gradient of the policy."""

        def total(values: Tensor) -> Tensor:  # (2B, N) -> (2B,)
            return sequence_logps(values if factors is None else scale_gradient(values, factors), draw.weights)

        if self._args.dpop_lambda:
            chosen_scores, _ = (total(scored.logps) - draw.ref_sums).chunk(2)
            return dpop_shift(chosen_scores, coefficient=self._args.dpop_lambda)
        if scored.kl is not None:
            return tdpo_shift(total(scored.kl), variant=self._args.tdpo, alpha=self._args.tdpo_alpha)
        return None

    def _scored_policy(
        self, view: Any, model: Any, batch: PairBatch, scored: Scored, draw: Draw, factors: Tensor | None
    ) -> Callable[..., Any]:
        """The function that TRL's loss calls instead of the model."""
        weighted = copy.copy(scored.output)
        if not self._args.is_plain_dpo:
            weighted.log_probs = draw.weights * scored.logps  # TRL takes the sum over a row
        if factors is not None:
            weighted.log_probs = scale_gradient(weighted.log_probs, factors)
        if not self._args.log_token_statistics:
            for name in TOKEN_STATISTICS:
                setattr(weighted, name, torch.zeros_like(batch.mask))
        expected = self.model_options(batch.inputs).keys() | {"labels", "fused_lm_head"}
        if view.aux_loss_enabled:
            expected |= {"output_router_logits"}

        def policy(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):  # the logits for `compute_metrics`
                return model(**kwargs)
            if kwargs.keys() != expected:
                raise RuntimeError(
                    f"TRL must call the model with {sorted(expected)}, got {sorted(kwargs)}. This version of TRL is "
                    "not supported: install `trl~=1.16.0`."
                )
            return weighted

        return policy

    @staticmethod
    def model_options(inputs: dict[str, Any]) -> dict[str, Any]:
        """What TRL hands on of a batch to the model's forward."""
        kept = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        return {**kept, "use_cache": False}

    def _add_metrics(self, found: dict[str, list], draw: Draw, mode: str) -> None:
        """TRL's metrics of one draw; rewards are logged without a length penalty and other terms of the margin."""
        if self._args.terms_of_margin:
            found |= {name: [value] for name, value in self._rewards(draw).items()}
        for name, values in found.items():
            if name != "num_tokens" and (self._args.log_token_statistics or name not in TOKEN_METRICS):
                self._trainer._metrics[mode][name].extend(values)

    def _rewards(self, draw: Draw) -> dict[str, float]:
        rewards = (self._trainer.beta * draw.scores).chunk(2)
        chosen, rejected = (self._trainer.accelerator.gather(part) for part in rewards)
        found = {
            "chosen": chosen,
            "rejected": rejected,
            "margins": chosen - rejected,
            "accuracies": (chosen > rejected).float(),
        }
        return {f"rewards/{name}": value.mean().item() for name, value in found.items()}


def scale_gradient(values: Tensor, factors: Tensor) -> Tensor:
    """The same values, whose gradients are multiplied by the factors."""
    constant = values.detach()
    return constant + factors * (values - constant)


def widen(inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """`(2B, N)` over predicted tokens to `(2B, L)` over all, in the completion mask's type.

    The first token of a row is never predicted, and not selected.
    """
    first = torch.zeros_like(inputs["completion_mask"][:, :1])
    return torch.cat((first, mask.to(first.dtype)), dim=1)
