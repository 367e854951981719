"""`SamPOTrainer`: TRL's `DPOTrainer` with a weight for each completion token.

One training step (docs/concepts.md has it with shapes): the weigher selects tokens from the completion mask, the
scorer computes log π and log π_ref of them, the objective hands the weighted log-probs to TRL's own loss. The parts
are in `sampo.training`; this class wires them. No line of TRL is copied.

What we rely on in TRL 1.16, pinned by tests/training/test_trl_contract.py:

1. `DPOTrainer._compute_loss(model, inputs, return_outputs)` calls `model(**kw, labels=…, fused_lm_head=True)` once,
   sums `output.log_probs` over each row, and reads `input_ids`, `attention_mask` and `completion_mask` from `inputs`;
   everything else in `inputs` is passed to the model, with `use_cache=False` and, for a mixture of experts,
   `output_router_logits=True`.
2. If `self.precompute_ref_logps`, it takes the sums `ref_chosen_logps` and `ref_rejected_logps` from `inputs` and runs
   no reference.
3. `DPOTrainer.compute_ref_log_probs(model, inputs)` does the same for a reference, with the adapter disabled or
   set to "ref" as needed, and returns the sums.
4. `self.loss_types`, `self.loss_weights`, `self.beta`, `self.ld_alpha`, `self.aux_loss_enabled`, `self._tokenizer` and
   `self._total_train_tokens` mean what their names say; `self._metrics[mode][name]` is a list to which each call of
   `_compute_loss` appends and which `log` averages; `_compute_loss` communicates with other processes only through
   `self.accelerator.gather` and `gather_for_metrics`, and uses `self` only for its attributes (`training.objective`
   passes a view of the trainer).
5. A model to which TRL has given its fused LM head (`add_fused_lm_head(model, outputs=…)`, which can be given again)
   takes `shift_labels`, and puts the head on `last_hidden_state` of what its `base_model` returns. Its `aux_loss` is a
   mean over tokens weighted by `attention_mask`, which can have numbers other than 0 and 1. The head calls
   `trl.trainer.utils._ChunkedLogProbFunction.apply` with nine arguments; `scoring.cpu_head` replaces it for a while.
6. `DPOTrainer._prepare_dataset(dataset, processing_class, args, dataset_name)` adds `prompt_ids`, `chosen_ids` and
   `rejected_ids`; the collator cuts prompt + completion to `max_length`.
7. `DPOTrainer.create_model_card(model_name, dataset_name, tags)` writes `README.md` into `args.output_dir`, and
   `None` instead of a base model that is not on the hub.
"""

from functools import cached_property, partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from .checkpointing.resume import ResumableTrainer
from .config import SamPOConfig
from .data.end_tokens import end_token_ids
from .data.lengths import TokenCounts
from .data.weight_columns import WeightCollator
from .logs import get_logger
from .reference_cache.trainer import CachedReferenceTrainer
from .training import engines
from .training.batch import PairBatch, Scored
from .training.description import PAPER, describe_method, describe_reference
from .training.generated_length import GeneratedLength
from .training.length_metrics import LengthRecorder
from .training.length_penalty import LengthPenalty
from .training.loss_checks import check_finite, check_first_loss
from .training.micro_batch_trainer import MicroBatchTrainer
from .training.micro_batches import MICRO_BATCH, MicroBatch
from .training.model_card import CardTrainer
from .training.objective import WPO_STATISTIC, Objective
from .training.passes import Passes
from .training.preflight import (
    check_before_loading,
    check_data,
    check_divergence,
    check_micro_batches,
    check_tokens,
    check_weight_columns,
    refuse_another_engine,
)
from .training.preparation import prepare_dataset
from .training.run_state import RunState
from .training.weigher import Weigher, find_token_totals
from .weighting import EVAL_EPOCH

logger = get_logger(__name__)


class SamPOTrainer(CardTrainer, MicroBatchTrainer, ResumableTrainer, CachedReferenceTrainer):
    """Drop-in subclass of TRL's `DPOTrainer` that chooses which completion tokens count.

    Takes the arguments of `DPOTrainer`; `args` is a [`SamPOConfig`], and `ref_model` may be a path. Source: SamPO,
    arXiv 2406.10957, Eq. 10.

    Example:
    ```python
    from datasets import load_dataset
    from sampo import SamPOConfig, SamPOTrainer

    trainer = SamPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=SamPOConfig(output_dir="qwen-sampo"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```

    Raises:
        TypeError: `args` is no `SamPOConfig`.
        PreferenceDataError: the data has missing columns or bad rows; one message lists all issues.
        RefCacheError: `precompute_ref_log_probs`, and the cache is damaged or disagrees with the live model.
        RuntimeError: several processes were launched but not connected to each other, or with FSDP or DeepSpeed and
            accelerate took another engine.
        FloatingPointError: in training, a loss that is not finite.
        ResumeRefusedError: in training, no complete checkpoint to resume from, or one of another run.
        CheckpointNotSavedError: in training, a checkpoint could not be written.
    """

    args: SamPOConfig
    model: Any  # PreTrainedModel or PeftModel, maybe wrapped

    _tag_names = [*DPOTrainer._tag_names, "sampo"]
    _name, _paper = "SamPO", PAPER
    objective: Objective
    _initialised = _checked = _first_loss_checked = False

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: SamPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *rest: Any,
        **kwargs: Any,
    ):
        args, processing_class = check_before_loading(
            model, args, train_dataset, eval_dataset, processing_class, unknown=kwargs
        )
        self.token_counts: dict[str, TokenCounts] = {}  # of each data set, filled by `_prepare_dataset`
        self._rows_with_other_ends: list[int] = []
        self.reference_is_start = ref_model is None
        if args.is_plain_dpo:
            self._name, self._paper, self._tag_names = DPOTrainer._name, DPOTrainer._paper, DPOTrainer._tag_names
        data = (train_dataset, eval_dataset, processing_class)
        super().__init__(model, ref_model, args, data_collator, *data, *rest, **kwargs)

        self._refuse_what_cannot_be_trained()
        if args.weight_columns:
            self.data_collator = WeightCollator(self.data_collator, args.weight_columns, args.truncation_mode)
        self.objective = Objective(self)
        self.length_penalty = LengthPenalty(
            args,
            self.token_counts.get("train"),
            theta=lambda: self.run_state.theta,
            mean=partial(self.accelerator.reduce, reduction="mean"),
        )
        self.length_recorder = LengthRecorder(self.beta, self.gather_pairs)
        if not args.log_token_statistics:
            self._switch_off_token_statistics()
        self.passes.start()
        self.add_callback(RunState(args.length_penalty_lr, args.length_penalty_start * self.length_penalty.scale))
        if args.generate_every is not None:  # a signal that comes while answers are generated is seen right after
            self.add_callback(GeneratedLength(self))
        self.make_resumable(carried=self.length_recorder)
        self._report_what_is_run()
        self._initialised = True

    # --- one step ------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        part: MicroBatch | None = inputs.get(MICRO_BATCH)
        batch = self.prepare_batch(inputs if part is None else part.inputs)
        scored = self.passes.score(model, batch)  # log π and log π_ref of the selected tokens
        if part is not None:
            return self._micro_batch_loss(model, part, batch, scored)
        loss, outputs = self._loss_of_batch(model, batch, scored, return_outputs=return_outputs)
        return (loss, outputs) if return_outputs else loss

    def _loss_of_batch(
        self, model: Any, batch: PairBatch, scored: Scored, *, return_outputs: bool = False
    ) -> tuple[Tensor, Any]:
        mode = "train" if self.model.training else "eval"
        shift = self.length_penalty.shift(batch.lengths)  # (B,) or None
        loss, outputs = self.objective(model, batch, scored, shift, return_outputs=return_outputs)
        self.length_penalty.learn(loss, shift, batch.lengths)
        self.length_recorder.record(batch, scored, mode)
        self._check_loss(loss, model, batch, scored, mode)
        return loss, outputs

    def prepare_batch(self, inputs: dict[str, Any]) -> PairBatch:
        """A collated batch with its selected tokens, as far as they are known before the models have run."""
        return self.weigher.prepare_batch(inputs, self.run_state.epoch if self.model.training else EVAL_EPOCH)

    @cached_property
    def weigher(self) -> Weigher:
        """The method; made when it is first asked for, which may be by a cache within TRL's `__init__`."""
        return Weigher(
            self.args,
            self.end_token_ids,
            self._rows_with_other_ends,
            scores_all="sft" in self.loss_types,
            ld_alpha=self.ld_alpha,
            token_totals=find_token_totals(self.args, self.token_counts.get("train")),
        )

    @cached_property
    def end_token_ids(self) -> list[int]:
        """Tokens that end a response, EOS first."""
        return end_token_ids(self._tokenizer, self.model.generation_config)

    @cached_property
    def passes(self) -> Passes:
        """Forward passes of policy and reference."""
        return Passes(self, self.weigher)

    def create_accelerator_and_postprocess(self) -> None:
        """Transformers' method; also keeps the log-probs in float32 under FSDP2."""
        all_used = not self._is_vlm and engines.adapter_uses_all_parameters(self.model)
        if self.args.ddp_find_unused_parameters is None and all_used:
            self.args.ddp_find_unused_parameters = False  # else DDP looks for them in each step, and warns of it
        super().create_accelerator_and_postprocess()
        refuse_another_engine(self.accelerator)
        engines.keep_log_probs_in_float32(self.accelerator)

    def _switch_off_token_statistics(self) -> None:
        outputs = ("log_probs", WPO_STATISTIC) if self.use_weighting else ("log_probs",)
        add_fused_lm_head(self.model.get_base_model() if is_peft_model(self.model) else self.model, outputs=outputs)

    def _micro_batch_loss(self, model: Any, part: MicroBatch, batch: PairBatch, scored: Scored) -> Tensor:
        """Of a micro-batch; with the last one, loss and metrics of each batch of the step are computed too."""
        loss = self.objective.of_micro_batch(model, batch, scored, self.length_penalty.shift(batch.lengths), part)
        check_finite(loss, batch, scored, f"step {self.state.global_step + 1} (train)")
        part.keep(scored)
        if part.is_last:  # now, because DeepSpeed updates the weights when this one is back-propagated
            step = part.step
            for inputs, of_batch in zip(step.batches, step.scored_batches(), strict=True):
                full = self.weigher.find_completions(inputs, batch.epoch)
                step.losses.append(self._loss_of_batch(model, full, of_batch.with_scores_kept())[0].detach())
        return loss

    # --- checks and logs -----------------------------------------------------------------------------------------

    def _check_loss(self, loss: Tensor, model: Any, batch: PairBatch, scored: Scored, mode: str) -> None:
        check_finite(loss, batch, scored, f"step {self.state.global_step + 1} ({mode})")
        if mode == "eval" or self._first_loss_checked:
            return
        self._first_loss_checked = True
        virtual_tokens = engines.uses_prompt_learning(self.accelerator.unwrap_model(self.model))  # of the policy alone
        starts_as_reference = self.reference_is_start and self.state.global_step == 0
        shared = self.args.mask_sharing == "shared"
        if starts_as_reference and shared and not (virtual_tokens and self.reference_is_base):
            check_first_loss(
                loss,
                [draw.scores for draw in scored.draws],
                partial(self._score_without_noise, model, batch.inputs),
                beta=self.beta,
                gather=self.accelerator.gather,
                reference_is_base=self.reference_is_base,
            )

    @torch.no_grad()
    def _score_without_noise(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """`(2B,)` scores of one draw by the policy in evaluation mode; in micro-batches, as in training."""

        def score(rows: dict[str, Any]) -> Scored:
            return self.passes.score(model, self.weigher.prepare_batch(rows, self.run_state.epoch))

        self.model.eval()
        try:
            if self.args.max_tokens_per_forward is None:
                return score(inputs).draws[0].scores
            step = self.share_pairs([inputs])
            for part in step:
                part.keep(score(part.inputs))
            return step.scored_batches()[0].draws[0].scores
        finally:
            self.model.train()

    @property
    def run_state(self) -> RunState:
        """Epoch and θ; looked up, not kept: transformers replaces callbacks that it restores."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, RunState))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with the length metrics of the full window or evaluation set."""
        mode = "train" if self.model.training else "eval"
        # of several evaluation sets each has its own prefix, which `Trainer.evaluate` has put before `loss`
        prefix = next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), "eval_")
        measured = self.length_recorder.take_metrics(mode)
        if mode == "train" and measured:
            measured |= self.length_penalty.metrics()
        logs.update({name if mode == "train" else prefix + name: value for name, value in measured.items()})
        super().log(logs, start_time)

    # --- before the first step -----------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if self._initialised:  # another set for `evaluate`; the first ones were checked before the model
            check_data(args, None, dataset, processing_class)
        prepared = prepare_dataset(super()._prepare_dataset, dataset, dataset_name, processing_class, args)
        if prepared.counts is not None:
            self.token_counts[dataset_name] = prepared.counts
        self._rows_with_other_ends += prepared.other_ends
        return prepared.dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *self.args.weight_columns]))

    @property
    def cached_targets(self) -> list[str]:
        """The completion's own tokens, and with `balance_end_token` the end token."""
        end = f"end token {' or '.join(map(str, self.end_token_ids))}"
        return [*super().cached_targets, *([end] if self.args.balance_end_token else [])]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._refuse_what_cannot_be_trained()  # TRL fills the cache within its `__init__`
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _refuse_what_cannot_be_trained(self) -> None:
        """Once, before policy or reference score anything."""
        if self._checked:
            return
        self._checked = True
        check_tokens(self)
        check_micro_batches(self)
        check_weight_columns(self)
        check_divergence(self)
        self.passes.refuse_packing()

    def describe_run(self) -> tuple[str, str]:
        """Method and reference, in words."""
        method = describe_method(self.args, self.length_penalty.scale, self.weigher.token_totals)
        return method, describe_reference(self)

    def _report_what_is_run(self) -> None:
        method, reference = self.describe_run()
        logger.info(f"method: {method}")
        logger.info(f"reference: {reference}")
        if self.args.mask_sharing == "independent":
            logger.warning(
                "`mask_sharing: independent` repeats the authors' released code, not their equation: policy and "
                "reference are compared on different tokens, the first loss is not ln 2 and rewards are noisy. Use "
                "`shared` unless you need parity with that code."
            )
