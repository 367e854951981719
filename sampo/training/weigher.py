"""From a collated batch to the weights of its tokens, and to the scores that they make: where a method is asked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import SamPOConfig
from ..data.lengths import TokenCounts
from ..data.weight_columns import GIVEN_TOKEN_WEIGHTS
from ..weighting import (
    EVAL_EPOCH,
    WEIGHTINGS,
    balance_end,
    draw_keys,
    draw_row_keys,
    fingerprints,
    last_end_tokens,
    sequence_logps,
    token_weights,
)
from .batch import Draw, PairBatch, Reference, Weights


def find_token_totals(args: SamPOConfig, counts: TokenCounts | None) -> tuple[int, int] | None:
    """ΣT_w and ΣT_l of the training data with `token_budget: dataset`, else None.

    They are a function of the data and of options that a resumed run must share (`checkpointing.fingerprint`), and
    every process counts all data, so they need not be saved or communicated.

    Args:
        args: of the run.
        counts: of the tokenised training data, if they could be counted.

    Raises:
        ValueError: the sums are neither given nor countable.
    """
    if args.token_budget != "dataset":
        return None
    if args.token_totals is not None:
        chosen, rejected = args.token_totals
        return chosen, rejected
    if counts is None or not counts.pairs:
        raise ValueError(
            "`token_totals` must be given for `token_budget: dataset` where the tokens of the training pairs cannot "
            "be counted before (streamed, vision or no data), got None. Set it to the sums of T_w and of T_l, or use "
            "`token_budget: pair`."
        )
    return counts.chosen_tokens, counts.rejected_tokens


class Weigher:
    """The method of a run.

    Args:
        args: of the run.
        end_token_ids: tokens that end a response, EOS first.
        rows_with_other_ends: fingerprints of rows whose end tokens end other turns (`data.tokenize`).
        scores_all: all chosen tokens have to be scored (`sft`).
        ld_alpha: TRL's, which is a weighting itself.
        token_totals: ΣT_w and ΣT_l of the training data, with `token_budget: dataset`; of evaluation data too.
    """

    def __init__(
        self,
        args: SamPOConfig,
        end_token_ids: Sequence[int],
        rows_with_other_ends: Sequence[int] = (),
        *,
        scores_all: bool = False,
        ld_alpha: float | None = None,
        token_totals: tuple[int, int] | None = None,
    ):
        self.method = WEIGHTINGS[args.token_weighting]
        self._args, self._ld_alpha, self.token_totals = args, ld_alpha, token_totals
        self._end_token_ids = list(end_token_ids)
        self._rows_with_other_ends = rows_with_other_ends  # not a copy: `evaluate` may add rows of another data set
        # In evaluation all tokens are scored, so that the sums over the full response are known too.
        self._scores_all = scores_all or args.is_plain_dpo or args.mask_samples > 1 or self.method.needs_policy

    @property
    def needs_end_probs(self) -> bool:
        """The weights depend on the reference's probability of the end token."""
        return self._args.balance_end_token

    def find_completions(self, inputs: dict[str, Any], epoch: int = EVAL_EPOCH) -> PairBatch:
        """A batch of which all completion tokens are scored, and nothing is weighed yet."""
        mask = inputs["completion_mask"][:, 1:].bool()
        end = last_end_tokens(inputs["input_ids"], mask, torch.tensor(self._end_token_ids, device=mask.device))
        if self._rows_with_other_ends:
            rows = fingerprints(inputs["input_ids"], inputs["attention_mask"])
            end &= ~torch.isin(rows, rows.new_tensor(self._rows_with_other_ends))[:, None]
        return PairBatch(inputs, mask, end, epoch, positions=mask, ref_positions=mask)

    def prepare_batch(self, inputs: dict[str, Any], epoch: int = EVAL_EPOCH) -> PairBatch:
        """A batch with its selected tokens, where no model has to be asked for them."""
        batch = self.find_completions(inputs, epoch)
        if not self.method.needs_policy and not self.needs_end_probs:
            self.weigh(batch)
        return batch

    def weigh(
        self,
        batch: PairBatch,
        *,
        log_ratios: Tensor | None = None,
        states: Tensor | None = None,
        end_probs: Tensor | None = None,
    ) -> list[Weights]:
        """Set the weights of a batch, and omit the positions that they do not select.

        Args:
            batch: gets them.
            log_ratios: `(2B, N)`, for methods that need them.
            states: `(2B, N, H)`, likewise.
            end_probs: `(2B, N)` of the reference, for `balance_end_token`.
        """
        assert end_probs is not None or not self.needs_end_probs
        draws = range(self._args.mask_samples)
        found = {"log_ratios": log_ratios, "states": states}
        batch.weights = [self._draw(batch, k, found, end_probs) for k in draws]
        if batch.epoch != EVAL_EPOCH and not self._scores_all:
            policy, reference = batch.weights[0]
            positions = policy > 0
            batch.select(positions, positions if reference is policy else positions | (reference > 0))
        return batch.weights

    def _draw(self, batch: PairBatch, k: int, found: dict[str, Any], end_probs: Tensor | None) -> Weights:
        policy = self._weights(batch, k, found, end_probs)
        if self._args.mask_sharing == "shared":
            return policy, policy
        return policy, self._weights(batch, self._args.mask_samples + k, found, end_probs)

    def _weights(self, batch: PairBatch, stream: int, found: dict[str, Any], end_probs: Tensor | None) -> Tensor:
        """`(2B, N)`; `stream` distinguishes the draws of an epoch, `found` is what a pass of the policy gave."""
        args, rows = self._args, (batch.inputs["input_ids"], batch.inputs["attention_mask"])
        keys = row_keys = None
        if self.method.random:
            keys = draw_keys(*rows, seed=args.seed, epoch=batch.epoch, stream=stream)
        if self.token_totals is not None and self.method.subset:
            row_keys = draw_row_keys(*rows, seed=args.seed, epoch=batch.epoch, stream=stream)
        weights = token_weights(
            args.token_weighting,
            batch.mask,
            end=batch.end,
            keys=keys,
            row_keys=row_keys,
            **found,
            sampled_sides=args.sampled_sides,
            token_totals=self.token_totals,
            keep_end_token=args.keep_end_token or (args.balance_end_token and self.method.can_keep_end),
            gamma=args.decay_gamma,
            tail_weight=args.ld_tail_weight,
            transport=(args.otpo_reg, args.otpo_mass_reg),
            given=batch.inputs.get(GIVEN_TOKEN_WEIGHTS),
        )
        return weights if end_probs is None else balance_end(weights, batch.end, end_probs)

    def make_draws(
        self, batch: PairBatch, logps: Tensor, reference: Reference, states: Tensor | None = None
    ) -> list[Draw]:
        """Apply the weights to the log-probs.

        Args:
            batch: weighed here, if its method looks at log-ratios or states.
            logps: `(2B, N)` log π, without gradient.
            reference: of the same batch.
            states: `(2B, N, H)` of the policy, for methods that need them.
        """
        weights = batch.weights
        if weights is None:
            ratios = logps - reference.logps
            weights = self.weigh(batch, log_ratios=ratios, states=states, end_probs=reference.end_probs)
        return [self._make_draw(*each, batch, logps, reference) for each in weights]

    def _make_draw(
        self, weights: Tensor, ref_weights: Tensor, batch: PairBatch, logps: Tensor, reference: Reference
    ) -> Draw:
        ref_sums = reference.sums
        if not self._args.is_plain_dpo:
            ref_sums = sequence_logps(reference.logps, ref_weights)
        elif self._ld_alpha is None:
            ref_sums = sequence_logps(reference.logps, weights) if ref_sums is None else ref_sums
        else:  # TRL applies the weights; our metrics and a cached reference need the same in the same order
            prefix = token_weights("prefix", batch.mask)
            tail = weights - prefix
            if ref_sums is None:
                of_prefix, of_tail = (sequence_logps(reference.logps, part) for part in (prefix, tail))
                ref_sums = of_prefix + self._ld_alpha * of_tail
            weights = prefix + self._ld_alpha * tail
        return Draw(weights, ref_sums, sequence_logps(logps, weights) - ref_sums)

    def end_targets(self, batch: PairBatch) -> Tensor:
        """`(2B, N)` the end token of each completion, at all its positions.

        One that was cut has none, and takes the batch's first; in a batch of cut completions it is EOS.
        """
        ids, ended = batch.ids, batch.end.any(dim=1, keepdim=True)
        ends = ids[batch.end]  # (number of rows that end,), for no row has two
        other = ends[0] if len(ends) else ids.new_tensor(self._end_token_ids[0])
        return torch.where(ended, (ids * batch.end).sum(dim=1, keepdim=True), other).expand_as(ids)
