"""`SamPOTrainer`: TRL's `DPOTrainer`, in which only the tokens that a weighting counts speak.

One training step (docs/concepts.md has it with shapes): the weighting chooses tokens from the completion mask; policy
and reference are scored on them; TRL's own loss then gets, in place of a model, a callable that returns the weighted
log-probs, a completion mask narrowed to the counted tokens, and the weighted reference sums, through the door that TRL
has for precomputed ones. So every loss of TRL works with every weighting, and no line of TRL stands here.

What we rely on in TRL 1.16, pinned by tests/training/test_trl_contract.py:

1. `DPOTrainer._compute_loss(model, inputs, return_outputs)` calls `model(**kw, labels=…, fused_lm_head=True)` once,
   sums `output.log_probs` over each row, and reads `input_ids`, `attention_mask` and `completion_mask` from `inputs`;
   everything else in `inputs` goes to the model, with `use_cache=False` and, for a mixture of experts,
   `output_router_logits=True`.
2. If `self.precompute_ref_logps`, it takes the sums `ref_chosen_logps` and `ref_rejected_logps` from `inputs` and runs
   no reference.
3. `DPOTrainer.compute_ref_log_probs(model, inputs)` does the same for a reference, with the adapter switched off or
   set to "ref" as needed, and returns the sums.
4. `self.loss_types`, `self.loss_weights`, `self.beta`, `self.ld_alpha`, `self.aux_loss_enabled`, `self._tokenizer` and
   `self._total_train_tokens` mean what they say; `self._metrics[mode][name]` is a list to which each call of
   `_compute_loss` appends and which `log` averages; `_compute_loss` talks to other processes through
   `self.accelerator.gather` and `gather_for_metrics` alone.
5. A model to which TRL has given its fused LM head (`add_fused_lm_head(model, outputs=…)`, which can be given again)
   takes `shift_labels`, and puts the head on `last_hidden_state` of what its `base_model` returns.
6. `DPOTrainer._prepare_dataset(dataset, processing_class, args, dataset_name)` adds `prompt_ids`, `chosen_ids` and
   `rejected_ids`; the collator cuts prompt + completion to `max_length`.
7. `DPOTrainer.create_model_card(model_name, dataset_name, tags)` writes `README.md` into `args.output_dir`, and
   `None` in the place of a base model that is not on the hub.
"""

import copy
import logging
import sys
import textwrap
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import DynamoBackend, is_compiled_module, is_peft_model
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from .checkpointing.files import find_output_folder_issue
from .checkpointing.resume import ResumableTrainer
from .config import SamPOConfig
from .data.chat import with_strings_for_template
from .data.end_tokens import ResponseEnds, end_token_ids
from .data.lengths import LengthSums, TokenCounts, count_tokens
from .data.tokenize import prepare, rows_with_other_ends
from .io.files import write_whole
from .logs import get_logger, show_logs
from .models.checks import find_token_issues, find_vocabulary_issues
from .models.load import check_model
from .old_options import find_old_argument_issues
from .reference_cache.fill import CachedReferenceTrainer
from .reference_cache.store import BATCH as CACHED_REF_LOGPS
from .reference_cache.store import END
from .scoring.lm_head import score_places
from .scoring.packing import PairStreams, Stream, lay_out, score
from .training.micro_batches import group_pairs, pair_tokens, put_pairs, take_pairs
from .training.model_card import finish_card
from .training.preflight import (
    check_data,
    find_package_issues,
    find_processor,
    refuse_another_engine,
    refuse_endless_responses,
    refuse_separate_processes,
    refuse_without_end_token,
)
from .training.run_state import RunState
from .weighting import (
    EVAL_EPOCH,
    WEIGHTINGS,
    balance_end,
    draw_keys,
    fingerprints,
    last_end_tokens,
    length_pressure,
    sequence_logps,
    token_weights,
)

logger = get_logger(__name__)

_NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", CACHED_REF_LOGPS, END.batch)
_TOKEN_STATISTICS = ("entropy", "mean_logits", "is_top1")  # of the head, for TRL's log alone
_WPO_STATISTIC = "log_sum_sq_probs"  # of the head, for WPO's weights
_TOKEN_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")  # what TRL makes of them


@dataclass
class _Pairs:
    """A batch as the weighting sees it. Rows are 2B, chosen first; N = L − 1 predicted positions.

    Attributes:
        inputs: the collated batch.
        mask: `(2B, N)` bool, completion tokens.
        end: `(2B, N)` bool, the end token of each completion.
        epoch: key of the draws.
        known: weights of policy and reference for each draw, `(2B, N)` each; None if they depend on log-ratios.
        places: `(2B, N)` bool, the tokens that go through the LM head of the policy.
        ref_places: and of the reference.
        end_probs: `(2B, N)` the reference's probability of the end token, if weights depend on it.
    """

    inputs: dict[str, Any]
    mask: Tensor
    end: Tensor
    epoch: int
    known: list[tuple[Tensor, Tensor]] | None
    places: Tensor
    ref_places: Tensor
    end_probs: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(dim=1)  # (2B,)

    @cached_property
    def stream(self) -> Stream:
        ids, real, completion = (self.inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        return lay_out(ids, real, completion, needed=self.places | self.ref_places)


@dataclass
class _Draw:
    """One subset, or the one set of fractional weights, and what it makes of the batch.

    Attributes:
        weights: `(2B, N)` of the policy's log-probs.
        ref_sums: `(2B,)` Σ w·log π_ref.
        scores: `(2B,)` S without a length penalty, without gradient.
    """

    weights: Tensor
    ref_sums: Tensor
    scores: Tensor


@dataclass
class _Scored:
    """What policy and reference say of a batch.

    Attributes:
        output: TRL's output of the policy.
        logps: `(2B, N)` log π, zero where not scored.
        ref_logps: `(2B, N)` log π_ref of the scored tokens at least.
        ref_sums: `(2B,)` TRL's sums of log π_ref, if the reference is live.
        draws: what the weighting makes of them.
        pressure: `(B,)` length pressure, if it is logged.
    """

    output: Any
    logps: Tensor
    ref_logps: Tensor
    ref_sums: Tensor | None
    draws: list[_Draw]
    pressure: Tensor | None = None


@dataclass
class _Piece:
    """The part of a batch that is on its way through the models.

    Attributes:
        share: its part in the mean over the pairs of the batch.
        chosen_tokens: of the whole batch, for `sft`.
        seen: what came out, without gradient: rows of `(2n, …)` or `(n, …)` by name.
    """

    share: float
    chosen_tokens: int
    seen: dict[str, Tensor] = field(default_factory=dict)


class SamPOTrainer(ResumableTrainer, CachedReferenceTrainer):
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
        PreferenceDataError: the data has missing columns or bad rows; all faults in one message.
        RefCacheError: `precompute_ref_log_probs`, and the cache is damaged or disagrees with the live model.
        RuntimeError: several processes were launched that do not know of each other, or with FSDP or DeepSpeed and
            accelerate took another engine.
        FloatingPointError: in training, a loss that is not finite.
        ResumeRefusedError: in training, nothing whole to go on from, or a checkpoint of another run.
        CheckpointNotSavedError: in training, a checkpoint could not be written.
    """

    args: SamPOConfig
    model: Any  # PreTrainedModel or PeftModel, maybe wrapped

    dataset_name: str | None = None  # for the model card: a hub id or a file, where the caller knows it

    _checked = False  # whether tokens and options go together
    _tag_names = [*DPOTrainer._tag_names, "sampo"]
    _name = "SamPO"
    _paper = {
        "title": "Eliminating Biased Length Reliance of Direct Preference Optimization via Down-Sampled KL Divergence",
        "id": "2406.10957",
        "citation": textwrap.dedent("""\
            @inproceedings{lu2024eliminating,
                title        = {{Eliminating Biased Length Reliance of Direct Preference Optimization via
                                Down-Sampled KL Divergence}},
                author       = {Junru Lu and Jiazheng Li and Siyu An and Meng Zhao and Yulan He and Di Yin and
                                Xing Sun},
                year         = 2024,
                booktitle    = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language
                                Processing},
                pages        = {1047--1067},
            }"""),
    }

    def __init__(
        self,
        model,
        ref_model=None,
        args: SamPOConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *rest,
        **kwargs,
    ):
        if faults := find_old_argument_issues(kwargs, SamPOConfig.__dataclass_fields__):
            raise TypeError(" ".join(faults))
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SamPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-SamPO")
        if not isinstance(args, SamPOConfig):
            raise TypeError(
                f"`args` must be a `SamPOConfig`, got `{type(args).__name__}`. It takes all options of `DPOConfig`: "
                "change the class, and set `token_weighting='all'` for plain DPO."
            )
        show_logs(logging.INFO if args.log_level == "passive" else args.get_process_log_level())
        refuse_separate_processes(args)
        if faults := find_package_issues(args):
            raise ValueError(" ".join(faults))
        if fault := find_output_folder_issue(str(args.output_dir)):
            raise ValueError(fault)
        if processing_class is None:
            processing_class = find_processor(model, args, train_dataset, eval_dataset)
        check_data(args, train_dataset, eval_dataset, processing_class)
        refuse_without_end_token(train_dataset, processing_class, args)
        if isinstance(model, str):  # TRL would train what a folder lacks from random weights
            check_model(model, trust_remote_code=args.trust_remote_code)
        self._token_counts: dict[str, TokenCounts] = {}  # of each data set, filled by `_prepare_dataset`
        self._rows_with_other_ends: list[int] = []  # fingerprints of rows whose end tokens end other turns
        self._reference_is_start = ref_model is None
        if args.is_plain_dpo:
            self._name, self._paper, self._tag_names = DPOTrainer._name, DPOTrainer._paper, DPOTrainer._tag_names
        data = (train_dataset, eval_dataset, processing_class)
        super().__init__(model, ref_model, args, data_collator, *data, *rest, **kwargs)

        self._refuse_what_cannot_be_trained()
        self._weighting = WEIGHTINGS[args.token_weighting]
        # TRL would give `sft` the counted tokens of a piece, but it is the mean of all: we add that term ourselves.
        self._sft_weight = 0.0
        if (not args.is_plain_dpo or args.max_tokens_per_forward) and "sft" in self.loss_types:
            terms = list(zip(self.loss_types, self.loss_weights, strict=True))
            self._sft_weight = sum(weight for name, weight in terms if name == "sft")
            self.loss_types = [name for name, _ in terms if name != "sft"]
            self.loss_weights = [weight for name, weight in terms if name != "sft"]
        self._length_scale = self._find_length_scale()
        self._length_sums = {"train": LengthSums(), "eval": LengthSums()}
        self._first_loss_checked = False
        self._piece: _Piece | None = None
        if not args.log_token_statistics:
            self._switch_off_token_statistics()
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        self._streams = PairStreams(
            args.pair_stream,
            [self.accelerator.unwrap_model(each) for each in models],
            refuse=self._reason_against_streams(),
        )
        self.add_callback(RunState(args.length_penalty_lr, args.length_penalty_start * self._length_scale))
        self.make_resumable()
        self._say_what_is_run()

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; under FSDP2 the log-probs leave the model in float32.

        accelerate's policy for bf16 casts outputs too, and a sum of −150 nats in bf16 has a resolution of 1.
        """
        if self.args.ddp_find_unused_parameters is None and self._adapter_uses_all_parameters:
            self.args.ddp_find_unused_parameters = False  # else DDP looks for them in each step, and warns of it
        super().create_accelerator_and_postprocess()
        refuse_another_engine(self.accelerator)
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if isinstance(getattr(plugin, "mixed_precision_policy", None), MixedPrecisionPolicy):  # FSDP1 has another
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=torch.float32)

    @property
    def _adapter_uses_all_parameters(self) -> bool:
        """Whether each pair gives each trained parameter a gradient: not with experts, and not with images."""
        if not is_peft_model(self.model) or self._is_vlm:
            return False
        settings = self.model.config.get_text_config().to_dict()
        return isinstance(self.model.active_peft_config, LoraConfig) and not any("expert" in name for name in settings)

    # --- one step ------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        pairs = self._see_pairs(inputs, mode)
        scored = self._score(model, pairs, mode)
        if self._piece is not None and mode == "train":
            return self._piece_loss(model, pairs, scored)
        return self._whole_loss(model, pairs, scored, mode, return_outputs)

    def _score(self, model, pairs: _Pairs, mode: str) -> _Scored:
        if self._streams.to_be_compared:
            self._compare_streams(model, pairs)
        output = self._forward(model, pairs, pairs.places, aux_loss=True)
        logps = output.log_probs[:, -pairs.mask.size(1) :]  # (2B, N); prompt learning puts positions in front
        ref_logps, ref_sums = self._score_reference(pairs)
        draws = self._make_draws(pairs, logps.detach(), ref_logps, ref_sums)
        pressure = None
        if self.args.log_length_pressure:
            pressure = self._pressure(model, pairs, torch.stack([draw.weights for draw in draws]).mean(dim=0))
        return _Scored(output, logps, ref_logps, ref_sums, draws, pressure)

    def _whole_loss(self, model, pairs: _Pairs, scored: _Scored, mode: str, return_outputs: bool = False):
        """Loss and metrics of a batch, of which all log-probs are at hand."""
        shift = self._penalty_shift(pairs)  # (B,) or None
        loss, result = self._objective(model, pairs, scored, shift, mode, return_outputs=return_outputs)
        self._learn_penalty(loss, shift, pairs)
        self._record_lengths(pairs, scored, mode)
        self._check_finite(loss, pairs, scored.draws, mode)
        if mode == "train":
            self._check_first_loss(loss, model, pairs, scored.draws)
        return (loss, result[1]) if return_outputs else loss

    def _objective(self, model, pairs: _Pairs, scored: _Scored, shift, mode: str, *, return_outputs=False):
        """TRL's loss, averaged over the draws, with `sft` where it is ours to add; and TRL's result for one draw."""
        losses: list[Any] = []
        for i, draw in enumerate(scored.draws):
            result = self._trl_loss(model, pairs, scored, draw, shift, return_outputs and i == 0, mode)
            losses.append(result[0] if isinstance(result, tuple) else result)
            if i == 0:
                first_result, n_tokens = result, self._total_train_tokens
        self._total_train_tokens = n_tokens  # TRL counts the tokens of a batch at each call
        self._metrics[mode]["num_tokens"] = [n_tokens]
        loss = sum(losses) / len(losses) * (1.0 if self._piece is None else self._piece.share)
        if self._sft_weight:
            n_pairs = pairs.mask.size(0) // 2
            logps = scored.logps[:n_pairs][pairs.mask[:n_pairs]]
            loss = loss - self._sft_weight * logps.sum() / (
                logps.numel() if self._piece is None else self._piece.chosen_tokens
            )
        return loss, first_result

    @property
    def _n_draws(self) -> int:
        return self.args.mask_samples

    def _see_pairs(self, inputs: dict[str, Any], mode: str) -> _Pairs:
        pairs = self._find_completions(inputs, self._run_state.epoch if mode == "train" else EVAL_EPOCH)
        if self.args.balance_end_token:
            pairs.end_probs = self._reference_end_probs(pairs)
        if not self._weighting.needs_log_ratios:
            pairs.known = [self._weigh(pairs, k) for k in range(self._n_draws)]
            self._choose_places(pairs, pairs.known, mode)
        return pairs

    def _find_completions(self, inputs: dict[str, Any], epoch: int) -> _Pairs:
        """A batch of which all completion tokens are scored."""
        mask = inputs["completion_mask"][:, 1:].bool()
        end = last_end_tokens(inputs["input_ids"], mask, torch.tensor(self._end_token_ids, device=mask.device))
        if self._rows_with_other_ends:
            rows = fingerprints(inputs["input_ids"], inputs["attention_mask"])
            end &= ~torch.isin(rows, rows.new_tensor(self._rows_with_other_ends))[:, None]
        return _Pairs(inputs, mask, end, epoch, known=None, places=mask, ref_places=mask)

    def _weigh(self, pairs: _Pairs, draw: int, log_ratios: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights of the policy's and of the reference's log-probs, each `(2B, N)`; the same tensor if shared."""
        implied = self.args.balance_end_token and self._weighting.can_keep_end

        def weights(stream: int) -> Tensor:
            keys = None
            if self._weighting.random:
                ids, real = pairs.inputs["input_ids"], pairs.inputs["attention_mask"]
                keys = draw_keys(ids, real, seed=self.args.seed, epoch=pairs.epoch, stream=stream)
            weighed = token_weights(
                self.args.token_weighting,
                pairs.mask,
                end=pairs.end,
                keys=keys,
                log_ratios=log_ratios,
                sampled_sides=self.args.sampled_sides,
                keep_end_token=self.args.keep_end_token or implied,
                gamma=self.args.decay_gamma,
            )
            return weighed if pairs.end_probs is None else balance_end(weighed, pairs.end, pairs.end_probs)

        policy = weights(draw)
        return policy, weights(self._n_draws + draw) if self.args.mask_sharing == "independent" else policy

    def _choose_places(self, pairs: _Pairs, known: list[tuple[Tensor, Tensor]], mode: str) -> None:
        """In training the counted tokens alone go through the LM head, if they are known before."""
        if mode == "eval" or len(known) > 1 or self._sft_weight or self.args.is_plain_dpo:
            return
        pairs.places = known[0][0] > 0
        independent = self.args.mask_sharing == "independent"
        pairs.ref_places = pairs.places | (known[0][1] > 0) if independent else pairs.places

    def _forward(self, model, pairs: _Pairs, places: Tensor, targets: Tensor | None = None, *, aux_loss: bool = False):
        """TRL's per-token output of the tokens at `places`, `(2B, N)` bool; or of `targets` `(2B, N)` there."""
        targets = pairs.inputs["input_ids"][:, 1:] if targets is None else targets
        if self._streams.take(pairs):
            return score(model, self._backbone(model), pairs.stream, places, targets)
        return self._plain_forward(model, pairs, places, targets, aux_loss=aux_loss)

    def _plain_forward(self, model, pairs: _Pairs, places: Tensor, targets: Tensor, *, aux_loss: bool = False):
        kwargs = self._model_kwargs(pairs.inputs)
        if not aux_loss:
            kwargs.pop("output_router_logits", None)
        # the rows of the first two are not those of the batch, and a compiled forward does not see a passing hook
        if self._prompt_learning or self._is_vision_dataset or self._compiled:
            labels = torch.cat((targets[:, :1], targets), dim=1)
            labels = labels.masked_fill(~self._widen(pairs.inputs, places).bool(), -100)  # (2B, L)
            return model(**kwargs, labels=labels, fused_lm_head=True)
        rows, columns = places.nonzero(as_tuple=True)
        at = (rows, columns)
        return score_places(model, self._backbone(model), at, at, targets, **kwargs)

    def _reason_against_streams(self) -> str | None:
        """What the trainer knows and no model says."""
        if self._is_vision_dataset:
            return "vision data are laid out by their processor"
        if self.aux_loss_enabled:
            return (
                "the auxiliary loss of a mixture of experts counts the tokens of padded rows "
                "(`router_aux_loss_coef: 0` switches it off)"
            )
        if self._compiled:
            return "`torch_compile` compiles the model's own attention"
        if self.args.neftune_noise_alpha:
            return "`neftune_noise_alpha` is noise that depends on the length of a row"
        return None

    @cached_property
    def _compiled(self) -> bool:
        """Whether policy or reference is compiled, whole or in part: by option, launcher or caller."""
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            return True
        models = [each for each in (self.model, self.ref_model) if each is not None]
        parts = [part for each in models for part in each.modules()]
        return any(is_compiled_module(part) or part._compiled_call_impl is not None for part in parts)

    @property
    def _prompt_learning(self) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        return is_peft_model(model) and model.active_peft_config.is_prompt_learning

    @torch.no_grad()
    def _compare_streams(self, model, pairs: _Pairs) -> None:
        """The first batch both ways, by policy and reference, before the stream is trusted."""
        targets, places = pairs.inputs["input_ids"][:, 1:], pairs.places
        models = [model] if self.ref_model is None or self.ref_model is model else [model, self.ref_model]
        reduced = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        self._streams.compare(
            lambda: torch.cat(
                [score(m, self._backbone(m), pairs.stream, places, targets).log_probs[places] for m in models]
            ),
            lambda: torch.cat([self._plain_forward(m, pairs, places, targets).log_probs[places] for m in models]),
            tolerance=0.1 if reduced else 1e-4,  # rounding is some hundredths in bf16, 1e-6 in float32
            largest=lambda difference: self.accelerator.gather(difference[None]).max().item(),
            padded_tokens=pairs.inputs["input_ids"].numel(),
            stream_tokens=pairs.stream.input_ids.numel(),
        )

    def _backbone(self, model):
        base = self.accelerator.unwrap_model(model)
        return (base.get_base_model() if is_peft_model(base) else base).base_model

    def _model_kwargs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        kwargs = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        kwargs["use_cache"] = False
        if self.aux_loss_enabled:
            kwargs["output_router_logits"] = True
        return kwargs

    def _widen(self, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """`(2B, N)` over predicted tokens to `(2B, L)` over all, in the completion mask's type.

        The first token of a row is never predicted. TRL counts it where the prompt is empty, and with `all` so do we.
        """
        first = inputs["completion_mask"][:, :1]
        if not self.args.is_plain_dpo:
            first = torch.zeros_like(first)
        return torch.cat((first, mask.to(first.dtype)), dim=1)

    def _score_reference(self, pairs: _Pairs, reference=None, targets=None) -> tuple[Tensor, Tensor | None]:
        """`(2B, N)` log π_ref, of the scored tokens at least; and, of a live reference, TRL's `(2B,)` sums.

        Of the `(2B, N)` `targets` in place of the completion's tokens, if they are given.
        """
        if targets is None and CACHED_REF_LOGPS in pairs.inputs:
            return pairs.inputs[CACHED_REF_LOGPS], None
        reference = self._reference if reference is None else reference
        seen = []

        def reference_seen(**kwargs):
            output = self._forward(reference, pairs, pairs.ref_places, targets)
            seen.append(output.log_probs)
            return output

        # TRL's own function, for it knows which adapter is the reference; we take the tokens on their way to its sum
        batch = {**pairs.inputs, "completion_mask": self._widen(pairs.inputs, pairs.ref_places)}
        sums = self.compute_ref_log_probs(reference_seen, batch)
        return seen[0][:, -pairs.mask.size(1) :], torch.cat(sums)

    def _reference_end_probs(self, pairs: _Pairs) -> Tensor:
        """`(2B, N)` the reference's probability of the end token at each place of the completions."""
        if END.batch in pairs.inputs:
            return pairs.inputs[END.batch].exp() * pairs.mask
        everywhere = replace(pairs)  # with a stream of its own, for this one needs all places
        if self._streams.to_be_compared:
            self._compare_streams(self.model, everywhere)
        return self._score_reference(everywhere, targets=self._end_targets(pairs))[0].exp() * pairs.mask

    @cached_property
    def _end_token_ids(self) -> list[int]:
        return end_token_ids(self._tokenizer, self.model.generation_config)

    @property
    def _cached_targets(self) -> list[str]:
        end = f"end token {' or '.join(map(str, self._end_token_ids))}"
        return [*super()._cached_targets, *([end] if self.args.balance_end_token else [])]

    def _reference_logps(self, reference, inputs: dict[str, Any], of_end: bool) -> Tensor:
        pairs = self._find_completions(inputs, EVAL_EPOCH)
        if not hasattr(self, "_streams"):  # TRL fills the cache within its `__init__`; the run gets its own below
            self._streams = PairStreams(self.args.pair_stream, [self.accelerator.unwrap_model(reference)])
        if self._streams.to_be_compared:
            with self.accelerator.autocast():
                self._compare_streams(reference, pairs)
        return self._score_reference(pairs, reference, self._end_targets(pairs) if of_end else None)[0]

    def _make_draws(self, pairs: _Pairs, logps: Tensor, ref_logps: Tensor, ref_sums: Tensor | None) -> list[_Draw]:
        known = pairs.known
        if known is None:
            known = [self._weigh(pairs, 0, log_ratios=logps - ref_logps)]
        return [self._make_draw(w, v, logps, ref_logps, ref_sums, pairs) for w, v in known]

    def _make_draw(self, weights, ref_weights, logps, ref_logps, ref_sums, pairs: _Pairs) -> _Draw:
        if not self.args.is_plain_dpo:
            ref_sums = sequence_logps(ref_logps, ref_weights)
        elif self.ld_alpha is None:
            ref_sums = sequence_logps(ref_logps, weights) if ref_sums is None else ref_sums
        else:  # TRL weighs by itself; for our metrics, and for a cached reference, we do the same in the same order
            prefix = token_weights("prefix", pairs.mask)
            tail = weights - prefix
            if ref_sums is None:
                ref_sums = sequence_logps(ref_logps, prefix) + self.ld_alpha * sequence_logps(ref_logps, tail)
            weights = prefix + self.ld_alpha * tail
        return _Draw(weights, ref_sums, sequence_logps(logps, weights) - ref_sums)

    def _trl_loss(self, model, pairs: _Pairs, scored: _Scored, draw: _Draw, shift, return_outputs: bool, mode: str):
        """TRL's loss and metrics of the weighted log-probs, as if they were a model's."""
        weighted = copy.copy(scored.output)
        if not self.args.is_plain_dpo:
            weighted.log_probs = draw.weights * scored.logps  # TRL takes the sum over a row
        if not self.args.log_token_statistics:
            for name in _TOKEN_STATISTICS:
                setattr(weighted, name, torch.zeros_like(pairs.mask))
        expected = self._model_kwargs(pairs.inputs).keys() | {"labels", "fused_lm_head"}

        def scored_policy(**kwargs):
            if not kwargs.get("fused_lm_head"):  # the logits for `compute_metrics`
                return model(**kwargs)
            if kwargs.keys() != expected:
                raise RuntimeError(
                    f"TRL must call the model with {sorted(expected)}, got {sorted(kwargs)}. This version of TRL is "
                    "not supported: install `trl~=1.16.0`."
                )
            return weighted

        ref_chosen, ref_rejected = draw.ref_sums.chunk(2)
        batch = {
            **{name: value for name, value in pairs.inputs.items() if name not in (CACHED_REF_LOGPS, END.batch)},
            "completion_mask": self._widen(pairs.inputs, draw.weights > 0)
            if not self.args.is_plain_dpo
            else pairs.inputs["completion_mask"],
            "ref_chosen_logps": ref_chosen if shift is None else ref_chosen - shift,
            "ref_rejected_logps": ref_rejected,
        }
        with self._reference_sums_given():
            result = super()._compute_loss(scored_policy, batch, return_outputs)
        if not self.args.log_token_statistics:
            for name in _TOKEN_METRICS:
                self._metrics[mode].pop(name, None)
        if shift is not None:
            self._log_rewards_without_penalty(draw, mode)
        return result

    @contextmanager
    def _reference_sums_given(self):
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    # --- a batch in pieces ---------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in transformers; with `max_tokens_per_forward` a batch is back-propagated piece after piece."""
        groups = self._cut(inputs)
        if len(groups) == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        n_pairs = inputs["input_ids"].size(0) // 2
        chosen_tokens = int(inputs["completion_mask"][:n_pairs, 1:].sum())
        state, sync = self.accelerator.gradient_state, self.accelerator.sync_gradients
        total: Any = 0.0
        done = []
        for i, group in enumerate(groups):
            last = i == len(groups) - 1
            self._piece = _Piece(len(group) / n_pairs, chosen_tokens)
            state._set_sync_gradients(sync and last)  # gradients of processes and DeepSpeed's step wait for the last
            try:
                with nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                    total += super().training_step(model, take_pairs(inputs, group), num_items_in_batch)
                done.append((group, self._piece.seen))
            finally:
                self._piece = None
                state._set_sync_gradients(sync)
        pairs = self._see_pairs(inputs, "train")
        with self.compute_loss_context_manager():
            self._whole_loss(model, pairs, self._join(pairs, done), "train")
        return total

    def _cut(self, inputs: dict[str, Any]) -> list[list[int]]:
        """The pairs of each forward: as many groups on every process, for each waits for the others in a forward."""
        if self.args.max_tokens_per_forward is None:
            return [[]]
        streamed, longest = pair_tokens(inputs)
        limit, padded = self.args.max_tokens_per_forward, not self._streams.on
        groups = group_pairs(streamed, longest, limit, padded=padded)
        most = self.accelerator.gather(torch.tensor([len(groups), -len(longest)], device=self.args.device))
        most, fewest_pairs = most.view(-1, 2).amax(dim=0).tolist()
        if most > -fewest_pairs:
            raise RuntimeError(
                f"`max_tokens_per_forward` needs as many forwards on every process, got a batch that has to be cut "
                f"into {most} pieces on one process and has {-fewest_pairs} pairs on another. Raise it, or set "
                "`dataloader_drop_last: true`."
            )
        return group_pairs(streamed, longest, limit, padded=padded, at_least=most)

    def _piece_loss(self, model, pairs: _Pairs, scored: _Scored) -> Tensor:
        """What the pairs of a piece add to the loss of their batch."""
        with self._unrecorded():
            loss, _ = self._objective(model, pairs, scored, self._penalty_shift(pairs), "train")
        self._check_finite(loss, pairs, scored.draws, "train")
        assert self._piece is not None
        of_policy = {name: getattr(scored.output, name) for name in ("log_probs", *_TOKEN_STATISTICS, _WPO_STATISTIC)}
        of_all = {**of_policy, "ref_logps": scored.ref_logps, "ref_sums": scored.ref_sums, "pressure": scored.pressure}
        self._piece.seen = {name: value.detach() for name, value in of_all.items() if value is not None}
        return loss

    @contextmanager
    def _unrecorded(self):
        """TRL's loss without its metrics, and without their gathers: other processes have pieces of other sizes."""
        metrics, n_tokens = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in metrics}
        for name in ("gather", "gather_for_metrics"):
            setattr(self.accelerator, name, lambda values, *args, **kwargs: values)
        try:
            yield
        finally:
            for name in ("gather", "gather_for_metrics"):
                delattr(self.accelerator, name)
            self._metrics, self._total_train_tokens = metrics, n_tokens

    def _join(self, pairs: _Pairs, done: list[tuple[list[int], dict[str, Tensor]]]) -> _Scored:
        """The pieces as one batch again."""
        rows, n_places = pairs.mask.shape
        whole = {}
        for name, part in done[0][1].items():
            n_rows = rows if name != "pressure" else rows // 2
            whole[name] = part.new_zeros((n_rows, n_places) if part.dim() == 2 else (n_rows,))
            for group, seen in done:
                put_pairs(whole[name], group, seen[name], n_pairs=rows // 2)
        logps, ref_logps, ref_sums = whole["log_probs"], whole["ref_logps"], whole.get("ref_sums")
        draws = self._make_draws(pairs, logps, ref_logps, ref_sums)
        return _Scored(SimpleNamespace(**whole), logps, ref_logps, ref_sums, draws, whole.get("pressure"))

    def _refuse_pieces_of_other_data(self) -> None:
        what = {
            "a mixture of experts with an auxiliary loss, which is one of the whole batch (`router_aux_loss_coef: 0` "
            "switches it off)": self.aux_loss_enabled,
            "vision data, which are laid out by their processor": self._is_vision_dataset,
            "a prompt-learning adapter, whose rows are longer than those of the batch": self._prompt_learning,
        }
        wrong = [text for text, is_so in what.items() if is_so]
        if self.args.max_tokens_per_forward and wrong:
            raise ValueError(f"`max_tokens_per_forward` must cut batches at pair borders, got {wrong[0]}. Unset it.")

    # --- the length penalty --------------------------------------------------------------------------------------

    @property
    def _run_state(self) -> RunState:
        # looked up, not kept: transformers replaces callbacks that it restores
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, RunState))

    def _find_length_scale(self) -> float:
        if not self.args.learns_length_penalty:
            return 1.0
        if self.args.length_penalty_scale is not None:
            return self.args.length_penalty_scale
        counts = self._token_counts.get("train")
        if counts is None or not counts.rms_difference:
            raise ValueError(
                "`length_penalty_scale` must be given where the lengths of the training pairs cannot be measured "
                "before (streamed or vision data) or do not differ, got None. Set it to a typical T_w - T_l in tokens."
            )
        return counts.rms_difference

    def _penalty_shift(self, pairs: _Pairs) -> Tensor | None:
        """`(B,)` what is added to the chosen score so that the logit β·(S_w − S_l) grows by the penalty."""
        if not self.args.has_length_penalty:
            return None
        chosen, rejected = pairs.lengths.float().chunk(2)
        shift = self._penalty_per_token * (chosen - rejected) / self.beta
        return shift.requires_grad_(self.args.learns_length_penalty and torch.is_grad_enabled())

    @property
    def _penalty_per_token(self) -> float:
        if self.args.learns_length_penalty:
            return self._run_state.theta / self._length_scale
        return float(self.args.length_penalty or 0.0)

    def _learn_penalty(self, loss: Tensor, shift: Tensor | None, pairs: _Pairs) -> None:
        """dL/dθ by way of the shift, which is no parameter of the model: every engine treats it alike."""
        if shift is None or not shift.requires_grad:
            return
        (gradient,) = torch.autograd.grad(loss, shift, retain_graph=True)
        chosen, rejected = pairs.lengths.float().chunk(2)
        by_theta = (gradient * (chosen - rejected)).sum() / (self._length_scale * self.beta)
        self._run_state.add_gradient(self.accelerator.reduce(by_theta.detach(), reduction="mean").item())

    def _log_rewards_without_penalty(self, draw: _Draw, mode: str) -> None:
        rewards = self.beta * draw.scores
        chosen, rejected = (self.accelerator.gather(side) for side in rewards.chunk(2))
        for name, value in {
            "chosen": chosen,
            "rejected": rejected,
            "margins": chosen - rejected,
            "accuracies": (chosen > rejected).float(),
        }.items():
            self._metrics[mode][f"rewards/{name}"][-1] = value.mean().item()

    # --- metrics and guards --------------------------------------------------------------------------------------

    def _record_lengths(self, pairs: _Pairs, scored: _Scored, mode: str) -> None:
        draws = scored.draws
        chosen, rejected = pairs.lengths.chunk(2)
        counted = torch.stack([(draw.weights > 0).sum(dim=1).float() for draw in draws]).mean(dim=0)  # (2B,)
        margin = self._margin(torch.stack([draw.scores for draw in draws]).mean(dim=0))
        columns = {
            "chosen_tokens": chosen,
            "rejected_tokens": rejected,
            "counted_tokens": counted.view(2, -1).sum(dim=0),
            "margin": margin,
        }
        if mode == "eval":  # all tokens were scored
            columns["dpo_margin"] = self._margin((scored.logps.detach() - scored.ref_logps).sum(dim=1))
        if scored.pressure is not None:
            columns["pressure"] = scored.pressure
        rows = torch.stack([column.float() for column in columns.values()], dim=1)  # (B, columns)
        if mode == "train":
            self.recall_remainder()
        rows = self.accelerator.gather_for_metrics(rows)
        self._length_sums[mode].add(dict(zip(columns, rows.cpu().double().numpy().T, strict=True)))

    def _margin(self, row_scores: Tensor) -> Tensor:
        chosen, rejected = (self.beta * row_scores).chunk(2)
        return chosen - rejected  # (B,)

    @torch.no_grad()
    def _pressure(self, model, pairs: _Pairs, weights: Tensor) -> Tensor:
        """`(B,)`; the end token takes the place of each counted label, which is a forward pass of its own."""
        targets = self._end_targets(pairs)
        output = self._forward(model, pairs, weights > 0, targets)
        end_probs = output.log_probs[:, -pairs.mask.size(1) :].exp()
        return length_pressure(weights, pairs.mask & (pairs.inputs["input_ids"][:, 1:] == targets), end_probs)

    def _end_targets(self, pairs: _Pairs) -> Tensor:
        """`(2B, N)` the end token of each completion, at all its places.

        One that was cut has none, and takes the batch's first; in a batch of cut completions it is EOS.
        """
        ids, ended = pairs.inputs["input_ids"][:, 1:], pairs.end.any(dim=1, keepdim=True)
        ends = ids[pairs.end]  # (number of rows that end,), for no row has two
        other = ends[0] if len(ends) else ids.new_tensor(self._end_token_ids[0])
        return torch.where(ended, (ids * pairs.end).sum(dim=1, keepdim=True), other).expand_as(ids)

    def _check_finite(self, loss: Tensor, pairs: _Pairs, draws: list[_Draw], mode: str) -> None:
        if not torch.isfinite(loss):
            bad = ~torch.isfinite(torch.stack([draw.scores for draw in draws]).sum(dim=0))
            rows = fingerprints(pairs.inputs["input_ids"], pairs.inputs["attention_mask"])
            names = [f"{row & (2**64 - 1):016x}" for row in (rows[bad] if bad.any() else rows).tolist()]
            raise FloatingPointError(
                f"The loss must be finite, got {loss.item()} at step {self.state.global_step + 1} ({mode}), in rows "
                f"with the fingerprints {names}. Look at these rows (`sampo.weighting.fingerprints`), lower "
                "`learning_rate`, or use bf16 or fp32 instead of fp16."
            )

    def _check_first_loss(self, loss: Tensor, model, pairs: _Pairs, draws: list[_Draw]) -> None:
        if self._first_loss_checked:
            return
        self._first_loss_checked = True
        if not self._start_implies_zero_scores():
            return
        tolerance = 0.02  # rounding in bf16 stays well below; ln 2 would move by 0.01
        if self._mean_margin(draws) <= tolerance:
            return
        size = self._mean_margin(self._score_without_noise(model, pairs))
        if size <= tolerance:
            logger.info(
                f"The first loss is {loss.item():.4f} and not ln 2 = 0.6931, because the policy has noise in training "
                "(dropout, `neftune_noise_alpha` or a router's jitter). Without it, it is its reference."
            )
            return
        says = (
            f"The first loss is {loss.item():.4f}, and the implicit rewards are not 0 (mean |margin| {size:.3f}), but "
            "policy and reference should be the same model at the first step, where the sigmoid loss is ln 2 = 0.6931."
        )
        if self._reference_is_base:
            logger.warning(
                f"{says} The reference is the base model without the adapter, and the adapter changes it before it "
                "is trained. If that is not meant, choose an initialisation that begins with no change."
            )
            return
        logger.warning(
            f"{says} The reference is not what the configuration says: check `model`, `ref_model` and the adapter's "
            "initialisation."
        )

    def _mean_margin(self, draws: list[_Draw]) -> float:
        """Mean |margin| over draws, pairs and processes."""
        sizes = torch.stack([self._margin(draw.scores) for draw in draws]).abs().mean(dim=0)
        return self.accelerator.gather(sizes).mean().item()

    @torch.no_grad()
    def _score_without_noise(self, model, pairs: _Pairs) -> list[_Draw]:
        """One draw of a batch, by the policy in evaluation mode; cut as in training."""
        self.model.eval()
        try:
            groups, draws = self._cut(pairs.inputs), []
            for group in groups:
                inputs = pairs.inputs if len(groups) == 1 else take_pairs(pairs.inputs, group)
                draws.append(self._score(model, self._see_pairs(inputs, "train"), "train").draws[0])
        finally:
            self.model.train()
        scores = [torch.cat(sides) for sides in zip(*(draw.scores.chunk(2) for draw in draws), strict=True)]
        return [replace(draws[0], scores=torch.cat(scores))]

    def _start_implies_zero_scores(self) -> bool:
        virtual_tokens = self._prompt_learning and self._reference_is_base  # of the policy alone, from its start
        return (
            self._reference_is_start
            and self.state.global_step == 0
            and self.args.mask_sharing == "shared"
            and not virtual_tokens
        )

    @property
    def _reference_is_base(self) -> bool:
        """Whether the reference is the policy with its adapter disabled."""
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {})
        return self._reference_is_start and bool(adapters) and "ref" not in adapters

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with the metrics of length over the whole window or evaluation set."""
        mode = "train" if self.model.training else "eval"
        # of several evaluation sets each has its own prefix, which `Trainer.evaluate` has put before `loss`
        prefix = next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), "eval_")
        measured = self._length_sums[mode].metrics()
        if mode == "train" and self.args.learns_length_penalty and measured:
            measured["length_penalty/theta"] = self._run_state.theta
            measured["length_penalty/per_token"] = self._penalty_per_token
        logs.update({name if mode == "train" else prefix + name: value for name, value in measured.items()})
        self._length_sums[mode] = LengthSums()
        super().log(logs, start_time)

    # --- before the first step -----------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if hasattr(self, "_weighting"):  # another set for `evaluate`; the first ones were checked before the model
            check_data(args, None, dataset, processing_class)
        dataset = with_strings_for_template(dataset, processing_class, f"{dataset_name} data")
        trl_prepares = partial(super()._prepare_dataset, dataset, processing_class, args, dataset_name)
        prepared, note = prepare(trl_prepares, processing_class)
        if note is not None:
            logger.warning(f"{dataset_name} data: {note}")
        if isinstance(prepared, Dataset):
            ends = ResponseEnds(self._tokenizer, end_token_ids(self._tokenizer))  # there is no `self.model` yet
            counts = count_tokens(prepared, args.max_length, args.truncation_mode, ends)
            counts.dropped = len(dataset) - len(prepared)
            self._token_counts[dataset_name] = counts
            if counts.empty_rows:
                raise ValueError(
                    f"Each completion must have at least one token, got {len(counts.empty_rows)} pairs without in "
                    f"the {dataset_name} data, first at rows {counts.empty_rows[:10]} of the tokenised set. Remove "
                    "them, or load the data with `sampo.load_preferences(..., on_bad_rows='drop')`."
                )
            self._rows_with_other_ends += rows_with_other_ends(prepared, counts, args.max_length, args.truncation_mode)
            refuse_endless_responses(counts, args, dataset_name)
            log = logger.warning if counts.dropped or counts.identical else logger.info
            log(f"{dataset_name} data: {counts.in_words(args.max_length)}")
        else:
            logger.info(f"{dataset_name} data: streamed, so dropped and truncated pairs are not counted.")
        return prepared

    def _switch_off_token_statistics(self) -> None:
        outputs = ("log_probs", _WPO_STATISTIC) if self.use_weighting else ("log_probs",)
        add_fused_lm_head(self.model.get_base_model() if is_peft_model(self.model) else self.model, outputs=outputs)

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        self._refuse_what_cannot_be_trained()  # TRL fills the cache within its `__init__`
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _refuse_what_cannot_be_trained(self) -> None:
        """Once, before policy or reference score anything."""
        if self._checked:
            return
        self._checked = True
        self._refuse_wrong_tokens()
        self._refuse_pieces_of_other_data()
        if self.args.pair_stream == "true":
            PairStreams("true", [], refuse=self._reason_against_streams())

    def _refuse_wrong_tokens(self) -> None:
        """What would end in an index error on the device, or in a run on nothing."""
        models = [each for each in (self.model, self.ref_model) if each is not None]
        configs = [self.accelerator.unwrap_model(each).config for each in models]  # DeepSpeed's engine has its own
        sizes = [getattr(config.get_text_config(), "vocab_size", None) for config in configs]
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        known = {
            name: dataset
            for name, dataset in {"train": self.train_dataset, **sets}.items()
            if isinstance(dataset, Dataset) and "prompt_ids" in dataset.column_names
        }
        faults = find_token_issues(known, vocabulary=sizes[0], tokenizer=self._tokenizer)
        faults += find_vocabulary_issues(sizes[0], sizes[-1])
        if faults:
            raise ValueError(" ".join(faults))

    def _say_what_is_run(self) -> None:
        logger.info(f"method: {self._method_in_words()}")
        logger.info(f"reference: {self._reference_in_words()}")
        if self.args.mask_sharing == "independent":
            logger.warning(
                "`mask_sharing: independent` repeats the authors' released code, not their equation: policy and "
                "reference are compared on different tokens, the first loss is not ln 2 and rewards are noisy. Use "
                "`shared` unless you need parity with that code."
            )

    def _method_in_words(self) -> str:
        args = self.args
        words = f"{self._weighting.title} (`token_weighting: {args.token_weighting}`, {self._weighting.source})"
        options = ("sampled_sides", "keep_end_token", "balance_end_token", "mask_sharing", "mask_samples")
        for name in (*options, "length_penalty"):
            default = SamPOConfig.__dataclass_fields__[name].default
            if getattr(args, name) != default:
                words += f", `{name}: {getattr(args, name)}`"
        if args.token_weighting == "decay":
            words += f", `decay_gamma: {args.decay_gamma}`"
        if args.learns_length_penalty:
            words += f" with a scale of {self._length_scale:.1f} tokens"
        return words

    def _reference_in_words(self) -> str:
        if self.args.precompute_ref_log_probs:
            whose = "the initial policy" if self._reference_is_start else "the `ref_model` that was passed"
            return f"log-probs of {whose}, one per token, from the cache"  # without its path: this goes to the card
        if not self._reference_is_start:
            return "the `ref_model` that was passed"
        if self.ref_model is None:
            if self._reference_is_base:
                return "the base model, with the adapter disabled"
            return 'a copy of the adapter as it was passed (adapter "ref")'
        config = getattr(
            self.accelerator.unwrap_model(self.ref_model), "config", None
        )  # DeepSpeed's engine has another
        source = "the policy's path" if config is None else config._name_or_path
        synced = f", synchronised every {self.args.ref_model_sync_steps} steps" if self.args.sync_ref_model else ""
        return f"a copy of the initial policy, loaded from `{source}`{synced}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As in transformers, with the model card: checkpoints have it too."""
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            folder = Path(output_dir or str(self.args.output_dir))
            self._write_card(folder, model_name=(self.hub_model_id or Path(str(self.args.output_dir)).name))

    def create_model_card(self, *args, **kwargs):
        """TRL's card, with method, data, options, length metrics, versions and the command."""
        if self.is_world_process_zero():
            self._write_card(Path(str(self.args.output_dir)), *args, **kwargs)

    def _write_card(self, folder: Path, model_name: str | None = None, dataset_name: str | None = None, tags=None):
        known = dataset_name or self.dataset_name
        on_hub = known if known and not Path(known).exists() else None
        before, self.args.output_dir = self.args.output_dir, str(folder)  # where TRL writes
        try:
            super().create_model_card(model_name, on_hub, tags)
        finally:
            self.args.output_dir = before
        method = f"Trained with sampo. Method: {self._method_in_words()}.\nReference: {self._reference_in_words()}. "
        method += f"Beta {self.beta}, loss {self.args.loss_type}."
        counts = self._token_counts.get("train")
        data = "" if known is None else f"`{known if on_hub else Path(known).name}`: "
        data += "streamed." if counts is None else counts.in_words(self.args.max_length)
        path = folder / "README.md"
        card = finish_card(path.read_text(encoding="utf-8"), self, {"Method": method, "Data": data}, sys.argv)
        write_whole(path, card)
