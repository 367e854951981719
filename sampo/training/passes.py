"""The forward passes of a step: one of the policy, and one of the reference unless its log-probs are cached."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference_cache.key import OWN_TOKENS
from ..reference_cache.store import CACHED_REF_LOGPS, END
from ..scoring.divergence import forward_kl
from ..scoring.scorer import Scorer, Scores
from ..scoring.ways import PACKED, Ways
from ..weighting import length_pressure
from .batch import PairBatch, Reference, Scored
from .engines import is_compiled, uses_prompt_learning
from .objective import Objective, widen
from .weigher import Weigher


class Passes:
    """Policy and reference of a run.

    Args:
        trainer: whose models they are.
        weigher: chooses the tokens, and weighs their log-probs.
    """

    def __init__(self, trainer: Any, weigher: Weigher):
        self._trainer, self._args, self._weigher = trainer, trainer.args, weigher
        self._scorer: Scorer | None = None  # of the run
        self._scorers: list[Scorer] = []  # TRL fills the reference cache before the run has one

    def start(self) -> None:
        """Make the scorer of the run, when policy and reference exist."""
        models = [self._trainer.accelerator.unwrap_model(each) for each in self._models]
        same = (known for known in self._scorers if list(map(id, known.models)) == list(map(id, models)))
        self._scorer = next(same, None) or self._make_scorer(models)
        self._scorers = [self._scorer]

    def forget(self, model: Any) -> None:
        """Release a reference that was loaded for its cache alone."""
        self._scorers = [known for known in self._scorers if not _has(known, model)]

    @property
    def packed(self) -> bool:
        """Whether batches are packed."""
        return self._scorer is not None and self._scorer.ways.way == PACKED

    def score(self, model: Any, batch: PairBatch) -> Scored:
        """Score a batch by policy and reference, and weigh it.

        Args:
            model: the policy as the training loop calls it.
            batch: as the weigher prepared it.
        """
        assert self._scorer is not None
        run_state = self._trainer.run_state
        run_state.way = self._scorer.ways.settle(run_state.way)
        weigher, reference = self._weigher, None
        batch.every_token = self._trainer.aux_loss_enabled
        if weigher.needs_end_probs:  # of the reference, before the weights are known
            reference = self._score_reference(batch)
            if not weigher.method.needs_policy:
                weigher.weigh(batch, end_probs=reference.end_probs)
        targets = [batch.ids, *([weigher.end_targets(batch)] if self._args.log_length_pressure else [])]
        aux_loss = {"output_router_logits": True} if self._trainer.aux_loss_enabled else {}
        keep_states = bool(self._needing_states)
        policy = self._scorer(model, batch, batch.positions, *targets, keep_states=keep_states, **aux_loss)
        logps, *end_logps = policy.log_probs
        reference = reference or self._score_reference(batch)
        kl = None
        if self._args.has_tdpo:
            assert reference.scores is not None
            with self._trainer.accelerator.autocast():
                kl = forward_kl(reference.scores, policy, batch.positions)
        states = None if policy.states is None else policy.states.detach()
        draws = weigher.make_draws(batch, logps.detach(), reference, states)
        pressure = None
        if end_logps:
            weights = torch.stack([draw.weights for draw in draws]).mean(dim=0)
            pressure = length_pressure(weights, batch.mask & (batch.ids == targets[1]), end_logps[0].exp())
        return Scored(policy.output, logps, reference.logps, draws, pressure, kl)

    def _score_reference(self, batch: PairBatch) -> Reference:
        """From the cache, or by a pass of the live reference."""
        if CACHED_REF_LOGPS in batch.inputs:
            logps, sums, end_logps = batch.inputs[CACHED_REF_LOGPS], None, batch.inputs.get(END.batch)
            scores = None
        else:
            ends = [self._weigher.end_targets(batch)] if self._weigher.needs_end_probs else []
            scores, sums = self._pass_of_reference(self._trainer.reference, batch, [batch.ids, *ends])
            logps, end_logps = scores.log_probs[0], scores.log_probs[1] if ends else None
        return Reference(logps, sums, None if end_logps is None else end_logps.exp() * batch.mask, scores)

    def reference_logps(self, reference: Any, inputs: dict[str, Any], targets: Sequence[str]) -> dict[str, Tensor]:
        """The content of a cache: for each of `targets`, `(2B, N)` log π_ref at the completion tokens, by one pass."""
        batch = self._weigher.find_completions(inputs)
        wanted = [batch.ids if each == OWN_TOKENS else self._weigher.end_targets(batch) for each in targets]
        scores, _ = self._pass_of_reference(reference, batch, wanted)
        return dict(zip(targets, scores.log_probs, strict=True))

    def _pass_of_reference(self, model: Any, batch: PairBatch, targets: list[Tensor]) -> tuple[Scores, Tensor]:
        """Log-probs of each target, with `tdpo` also hidden states; and TRL's `(2B,)` sums of the first."""
        found: list[Scores] = []
        scorer = self._scorer_of(model)

        def reference(**kwargs: Any) -> Any:
            found.append(scorer(model, batch, batch.ref_positions, *targets, keep_states=self._args.has_tdpo))
            return found[0].output

        # TRL's own function selects the adapter of the reference; the log-probs are kept on the way to their sum
        mask = batch.inputs["completion_mask"]
        if not self._args.is_plain_dpo:  # TRL counts the first token of a row where the prompt is empty
            mask = widen(batch.inputs, batch.ref_positions)
        sums = self._trainer.compute_ref_log_probs(reference, {**batch.inputs, "completion_mask": mask})
        return found[0], torch.cat(sums)

    @property
    def _needing_states(self) -> list[str]:
        """The options that need hidden states."""
        weighting = f"`token_weighting: {self._args.token_weighting}`" if self._weigher.method.needs_states else ""
        return [each for each in (weighting, f"`tdpo: {self._args.tdpo}`" if self._args.has_tdpo else "") if each]

    # --- how models are called -----------------------------------------------------------------------------------

    @property
    def _models(self) -> list[Any]:
        return [each for each in (self._trainer.model, self._trainer.ref_model) if each is not None]

    def _scorer_of(self, model: Any) -> Scorer:
        """The run's, or one for a reference that scores for its cache before the run begins."""
        unwrapped = self._trainer.accelerator.unwrap_model(model)
        if not any(_has(known, unwrapped) for known in self._scorers):
            self._scorers.append(self._make_scorer([unwrapped]))
        return next(known for known in self._scorers if _has(known, unwrapped))

    def _make_scorer(self, models: list[Any]) -> Scorer:
        """A scorer for models that are not wrapped."""
        trainer, gather = self._trainer, self._trainer.accelerator.gather
        virtual_tokens = uses_prompt_learning(trainer.accelerator.unwrap_model(trainer.model))
        compiled = is_compiled(trainer.accelerator, self._models)
        by_labels = virtual_tokens or trainer._is_vision_dataset or compiled
        if by_labels and self._needing_states:
            raise ValueError(
                f"{self._needing_states[0]} needs the hidden states of the policy, got vision data, a prompt-learning "
                "adapter or `torch_compile`, with which sampo does not see them. Use another method."
            )
        # micro-batches have like lengths already, and as many forwards on every process only if each is one
        one_forward = virtual_tokens or compiled or self._args.max_tokens_per_forward is not None
        return Scorer(
            models,
            pair_stream=self._args.pair_stream,
            refuse=self._reason_against_packing,
            may_group=not (one_forward or trainer.aux_loss_enabled or self._args.neftune_noise_alpha),
            head="labels" if by_labels else "positions",
            reduced=self._args.bf16 or self._args.fp16 or trainer.model.dtype != torch.float32,
            unwrap=trainer.accelerator.unwrap_model,
            options=Objective.model_options,
            largest=lambda numbers: gather(numbers[None]).amax(dim=0).tolist(),
        )

    def refuse_packing(self) -> None:
        """Refuse `pair_stream: true` if the run cannot pack, before anything is scored.

        Raises:
            ValueError: there is a reason against it.
        """
        if self._args.pair_stream == "true":
            Ways("true", [], refuse=self._reason_against_packing)

    @property
    def _reason_against_packing(self) -> str | None:
        """A reason that only the trainer knows."""
        if self._trainer._is_vision_dataset:
            return "vision data are laid out by their processor"
        if is_compiled(self._trainer.accelerator, self._models):
            return "`torch_compile` compiles the model's own attention"
        if self._args.neftune_noise_alpha:
            return "`neftune_noise_alpha` is noise that depends on the length of a row"
        return None


def _has(scorer: Scorer, model: Any) -> bool:
    return any(model is known for known in scorer.models)
