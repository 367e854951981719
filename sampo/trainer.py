"""`SamPOTrainer`: TRL's `DPOTrainer`, in which only the tokens that a weighting counts speak.

One training step (docs/concepts.md has it with shapes): the weighting chooses tokens from the completion mask; policy
and reference are scored on them; TRL's own loss then gets, in place of a model, a callable that returns the weighted
log-probs, a completion mask narrowed to the counted tokens, and the weighted reference sums, through the door that TRL
has for precomputed ones. So every loss of TRL works with every weighting, and no line of TRL stands here.

What we rely on in TRL 1.16, pinned by tests/test_trl_contract.py:

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
   `_compute_loss` appends and which `log` averages.
5. A model to which TRL has given its fused LM head takes `shift_labels`, and puts the head on `last_hidden_state` of
   what its `base_model` returns (the pair stream).
6. `DPOTrainer._prepare_dataset(dataset, processing_class, args, dataset_name)` adds `prompt_ids`, `chosen_ids` and
   `rejected_ids`; the collator cuts prompt + completion to `max_length`.
"""

import copy
import math
import os
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.trainer_callback import ExportableState, TrainerCallback
from trl import DPOTrainer

from .cached_reference import CachedReferenceTrainer
from .config import SamPOConfig
from .data import check_preferences
from .lengths import LengthSums, TokenCounts, count_tokens
from .pair_stream import PairStreams, Stream, lay_out, score
from .ref_logps import BATCH as CACHED_REF_LOGPS
from .weighting import (
    WEIGHTINGS,
    draw_keys,
    fingerprints,
    last_end_tokens,
    length_pressure,
    sequence_logps,
    token_weights,
)

logger = get_logger(__name__)

EVAL_EPOCH = -1  # evaluation draws the same subsets whenever it runs
_NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", CACHED_REF_LOGPS)


class RunState(TrainerCallback, ExportableState):
    """What a run has to remember beside the model: the index of the epoch, and θ of a learned length penalty.

    It is saved in `trainer_state.json` with every checkpoint. transformers restores callbacks only on request
    (`restore_callback_states_from_checkpoint`), so the state is taken back here.

    Attributes:
        epoch: index of the running epoch, 0, 1, … `state.epoch` itself is late by an epoch border for streamed data.
    """

    def __init__(self, length_penalty_lr: float = 0.05):
        self.epoch = 0
        self.length_penalty_lr = length_penalty_lr
        self._begun = False
        self._gradients: list[float] = []  # of the micro-batches since the last step
        self._set_theta(0.0)

    @property
    def theta(self) -> float:
        """Weight of (T_w − T_l)/scale in the logit."""
        return self._theta.item()

    def add_gradient(self, gradient: float) -> None:
        """One micro-batch's dL/dθ, already averaged over processes."""
        self._gradients.append(gradient)

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102, transformers' own interface
        self.epoch, self._begun = int(state.epoch or 0), False
        saved = (state.stateful_callbacks or {}).get(type(self).__name__, {}).get("attributes", {})
        if "adam" in saved:
            self._set_theta(saved["adam"]["theta"], saved["adam"])

    def on_epoch_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.epoch += self._begun
        self._begun = True

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if self._gradients:
            mean = math.fsum(self._gradients) / len(self._gradients)
            self._theta.grad = torch.tensor(mean, dtype=torch.float64)
            self._adam.step()
            self._gradients.clear()

    def state(self) -> dict:
        """What `trainer_state.json` keeps."""
        moments = {name: value.item() for name, value in self._adam.state[self._theta].items()}
        return {
            "args": {"length_penalty_lr": self.length_penalty_lr},
            "attributes": {"adam": {"theta": self.theta, **moments}},
        }

    @property
    def adam(self) -> dict[str, float]:
        """θ and its optimiser's moments; transformers sets it when it restores callbacks itself."""
        return self.state()["attributes"]["adam"]

    @adam.setter
    def adam(self, saved: dict[str, float]) -> None:
        self._set_theta(saved["theta"], saved)

    def _set_theta(self, theta: float, moments: dict[str, float] | None = None) -> None:
        self._theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self._adam = torch.optim.Adam([self._theta], lr=self.length_penalty_lr)
        moments = {name: value for name, value in (moments or {}).items() if name != "theta"}
        if moments:
            self._adam.state[self._theta] = {
                # Adam keeps its step in float32 and the moments in the parameter's type
                name: torch.tensor(value, dtype=torch.float32 if name == "step" else torch.float64)
                for name, value in moments.items()
            }


@dataclass
class _Pairs:
    """A batch as the weighting sees it. Rows are 2B, chosen first; N = L − 1 predicted positions.

    Attributes:
        inputs: the collated batch.
        mask: `(2B, N)` bool, completion tokens.
        end: `(2B, N)` bool, the end token of each completion.
        epoch: key of the draws.
    """

    inputs: dict[str, Any]
    mask: Tensor
    end: Tensor
    epoch: int

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(dim=1)  # (2B,)

    @cached_property
    def stream(self) -> Stream:
        return lay_out(self.inputs["input_ids"], self.inputs["attention_mask"], self.inputs["completion_mask"])


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


class SamPOTrainer(CachedReferenceTrainer):
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
        RuntimeError: several processes were launched that do not know of each other.
        FloatingPointError: in training, a loss that is not finite.
    """

    args: SamPOConfig
    model: Any  # PreTrainedModel or PeftModel, maybe wrapped

    _tag_names = ["trl", "sampo"]
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
        *rest,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SamPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-SamPO")
        if not isinstance(args, SamPOConfig):
            raise TypeError(
                f"`args` must be a `SamPOConfig`, got `{type(args).__name__}`. It takes all options of `DPOConfig`: "
                "change the class, and set `token_weighting='all'` for plain DPO."
            )
        _refuse_separate_processes(args)
        _check_data(train_dataset, eval_dataset)
        self._token_counts: dict[str, TokenCounts] = {}  # of each data set, filled by `_prepare_dataset`
        self._reference_is_start = ref_model is None
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *rest, **kwargs)

        self._weighting = WEIGHTINGS[args.token_weighting]
        if args.token_weighting == "all":
            self._name, self._paper = DPOTrainer._name, DPOTrainer._paper
        # TRL would give `sft` the counted tokens only, but it is defined on all of them: we add that term ourselves.
        self._sft_weight = 0.0
        if args.token_weighting != "all" and "sft" in self.loss_types:
            terms = list(zip(self.loss_types, self.loss_weights, strict=True))
            self._sft_weight = sum(weight for name, weight in terms if name == "sft")
            self.loss_types = [name for name, _ in terms if name != "sft"]
            self.loss_weights = [weight for name, weight in terms if name != "sft"]
        self._end_token_ids = _end_token_ids(self._tokenizer, self.model.generation_config)
        self._length_scale = self._find_length_scale()
        self._length_sums = {"train": LengthSums(), "eval": LengthSums()}
        self._first_loss_checked = False
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        self._streams = PairStreams(
            args.pair_stream,
            [self.accelerator.unwrap_model(each) for each in models],
            refuse="vision data are laid out by their processor" if self._is_vision_dataset else None,
        )
        self.add_callback(RunState(args.length_penalty_lr))
        self._say_what_is_run()

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; under FSDP2 the log-probs leave the model in float32.

        accelerate's policy for bf16 casts outputs too, and a sum of −150 nats in bf16 has a resolution of 1.
        """
        super().create_accelerator_and_postprocess()
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if isinstance(getattr(plugin, "mixed_precision_policy", None), MixedPrecisionPolicy):  # FSDP1 has another
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=torch.float32)

    # --- one step ------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        pairs = self._see_pairs(inputs, mode)
        known = None if self._weighting.needs_log_ratios else [self._weigh(pairs, k) for k in range(self._n_draws)]
        scored = self._tokens_to_score(pairs, known, mode)

        if self._streams.to_be_compared:
            self._compare_streams(model, pairs)
        output = self._forward(model, pairs, scored)
        logps = output.log_probs[:, -pairs.mask.size(1) :]  # (2B, N); prompt learning puts positions in front
        ref_logps, ref_sums = self._score_reference(
            pairs, scored if known is None else self._ref_scored(known, scored)
        )
        if known is None:
            known = [self._weigh(pairs, 0, log_ratios=logps.detach() - ref_logps)]
        draws = [self._make_draw(w, v, logps.detach(), ref_logps, ref_sums, pairs) for w, v in known]

        shift = self._penalty_shift(pairs)  # (B,) or None
        losses: list[Any] = []
        for i, draw in enumerate(draws):
            result = self._trl_loss(model, pairs, output, logps, draw, shift, return_outputs and i == 0, mode)
            losses.append(result[0] if isinstance(result, tuple) else result)
            if i == 0:
                first_result, n_tokens = result, self._total_train_tokens
        self._total_train_tokens = n_tokens  # TRL counts the tokens of a batch at each call
        self._metrics[mode]["num_tokens"] = [n_tokens]
        loss = sum(losses) / len(losses)
        if self._sft_weight:
            n_pairs = pairs.mask.size(0) // 2
            loss = loss - self._sft_weight * logps[:n_pairs][pairs.mask[:n_pairs]].mean()

        self._learn_penalty(loss, shift, pairs)
        self._record_lengths(model, pairs, draws, logps, ref_logps, mode)
        self._check_loss(loss, pairs, draws, mode)
        return (loss, first_result[1]) if return_outputs else loss

    @property
    def _n_draws(self) -> int:
        return self.args.mask_samples

    def _see_pairs(self, inputs: dict[str, Any], mode: str) -> _Pairs:
        mask = inputs["completion_mask"][:, 1:].bool()
        end_ids = torch.tensor(self._end_token_ids, device=mask.device)
        end = last_end_tokens(inputs["input_ids"], mask, end_ids)
        return _Pairs(inputs, mask, end, self._run_state.epoch if mode == "train" else EVAL_EPOCH)

    def _weigh(self, pairs: _Pairs, draw: int, log_ratios: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights of the policy's and of the reference's log-probs, each `(2B, N)`; the same tensor if shared."""

        def weights(stream: int) -> Tensor:
            keys = None
            if self._weighting.random:
                ids, real = pairs.inputs["input_ids"], pairs.inputs["attention_mask"]
                keys = draw_keys(ids, real, seed=self.args.seed, epoch=pairs.epoch, stream=stream)
            return token_weights(
                self.args.token_weighting,
                pairs.mask,
                end=pairs.end,
                keys=keys,
                log_ratios=log_ratios,
                sampled_sides=self.args.sampled_sides,
                keep_end_token=self.args.keep_end_token,
                gamma=self.args.decay_gamma,
            )

        policy = weights(draw)
        return policy, weights(self._n_draws + draw) if self.args.mask_sharing == "independent" else policy

    def _tokens_to_score(self, pairs: _Pairs, known: list[tuple[Tensor, Tensor]] | None, mode: str) -> Tensor:
        """`(2B, N)` bool: in training the counted tokens alone go through the LM head where they are known before."""
        if mode == "eval" or known is None or len(known) > 1 or self._sft_weight:
            return pairs.mask
        return pairs.mask if self.args.token_weighting == "all" else known[0][0] > 0

    def _ref_scored(self, known: list[tuple[Tensor, Tensor]], scored: Tensor) -> Tensor:
        """`(2B, N)` bool: the policy's tokens, unless the reference has drawn its own."""
        if self.args.mask_sharing == "independent" and len(known) == 1:
            return scored | (known[0][1] > 0)
        return scored

    def _forward(self, model, pairs: _Pairs, scored: Tensor, targets: Tensor | None = None):
        """TRL's per-token output of the scored tokens, `(2B, N)` bool; or of `targets` `(2B, N)` in their places."""
        targets = pairs.inputs["input_ids"][:, 1:] if targets is None else targets
        if self._streams.take(pairs):
            return score(model, self._backbone(model), pairs.stream, scored, targets)
        return self._plain_forward(model, pairs, scored, targets)

    def _plain_forward(self, model, pairs: _Pairs, scored: Tensor, targets: Tensor):
        places = self._widen(pairs.inputs, scored).bool()
        labels = torch.cat((targets[:, :1], targets), dim=1).masked_fill(~places, -100)  # (2B, L)
        return model(**self._model_kwargs(pairs.inputs), labels=labels, fused_lm_head=True)

    @torch.no_grad()
    def _compare_streams(self, model, pairs: _Pairs) -> None:
        """The first batch both ways, by policy and reference, before the stream is trusted."""
        targets, mask = pairs.inputs["input_ids"][:, 1:], pairs.mask
        models = [model] if self.ref_model in (None, model) else [model, self.ref_model]
        reduced = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        self._streams.compare(
            lambda: torch.cat(
                [score(m, self._backbone(m), pairs.stream, mask, targets).log_probs[mask] for m in models]
            ),
            lambda: torch.cat([self._plain_forward(m, pairs, mask, targets).log_probs[mask] for m in models]),
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
        if self.args.token_weighting != "all":
            first = torch.zeros_like(first)
        return torch.cat((first, mask.to(first.dtype)), dim=1)

    def _score_reference(self, pairs: _Pairs, scored: Tensor, reference=None) -> tuple[Tensor, Tensor | None]:
        """`(2B, N)` log π_ref, of the scored tokens at least; and, of a live reference, TRL's `(2B,)` sums."""
        if CACHED_REF_LOGPS in pairs.inputs:
            return pairs.inputs[CACHED_REF_LOGPS], None
        reference = reference or self.ref_model or self.model
        seen = []

        def reference_seen(**kwargs):
            output = self._forward(reference, pairs, scored) if self._streams.on else reference(**kwargs)
            seen.append(output.log_probs)
            return output

        # TRL's own function, for it knows which adapter is the reference; we take the tokens on their way to its sum
        batch = {**pairs.inputs, "completion_mask": self._widen(pairs.inputs, scored)}
        sums = self.compute_ref_log_probs(reference_seen, batch)
        return seen[0][:, -pairs.mask.size(1) :], torch.cat(sums)

    def _reference_logps(self, reference, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"][:, 1:].bool()
        pairs = _Pairs(inputs, mask, end=mask, epoch=EVAL_EPOCH)  # nothing is drawn
        if not hasattr(self, "_streams"):  # TRL fills the cache within its `__init__`; the run gets its own below
            self._streams = PairStreams(self.args.pair_stream, [self.accelerator.unwrap_model(reference)])
        if self._streams.to_be_compared:
            with self.accelerator.autocast():
                self._compare_streams(reference, pairs)
        return self._score_reference(pairs, mask, reference)[0]

    def _make_draw(self, weights, ref_weights, logps, ref_logps, ref_sums, pairs: _Pairs) -> _Draw:
        if self.args.token_weighting != "all":
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

    def _trl_loss(self, model, pairs: _Pairs, output, logps, draw: _Draw, shift, return_outputs: bool, mode: str):
        """TRL's loss and metrics of the weighted log-probs, as if they were a model's."""
        weighted = output
        if self.args.token_weighting != "all":
            weighted = copy.copy(output)
            weighted.log_probs = draw.weights * logps  # TRL takes the sum over a row
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
            **{name: value for name, value in pairs.inputs.items() if name != CACHED_REF_LOGPS},
            "completion_mask": self._widen(pairs.inputs, draw.weights > 0)
            if self.args.token_weighting != "all"
            else pairs.inputs["completion_mask"],
            "ref_chosen_logps": ref_chosen if shift is None else ref_chosen - shift,
            "ref_rejected_logps": ref_rejected,
        }
        with self._reference_sums_given():
            result = super()._compute_loss(scored_policy, batch, return_outputs)
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

    def _record_lengths(self, model, pairs: _Pairs, draws: list[_Draw], logps, ref_logps, mode: str) -> None:
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
            columns["dpo_margin"] = self._margin((logps.detach() - ref_logps).sum(dim=1))
        if self.args.log_length_pressure:
            columns["pressure"] = self._pressure(model, pairs, torch.stack([d.weights for d in draws]).mean(dim=0))
        rows = torch.stack([column.float() for column in columns.values()], dim=1)  # (B, columns)
        rows = self.accelerator.gather_for_metrics(rows)
        self._length_sums[mode].add(dict(zip(columns, rows.cpu().double().numpy().T, strict=True)))

    def _margin(self, row_scores: Tensor) -> Tensor:
        chosen, rejected = (self.beta * row_scores).chunk(2)
        return chosen - rejected  # (B,)

    @torch.no_grad()
    def _pressure(self, model, pairs: _Pairs, weights: Tensor) -> Tensor:
        """`(B,)`; the end token takes the place of each counted label, which is a forward pass of its own."""
        targets = pairs.inputs["input_ids"][:, 1:]
        # the end token of these data; a batch in which every completion was cut falls back to EOS
        end_id = targets[pairs.end][0].item() if pairs.end.any() else self._end_token_ids[0]
        output = self._forward(model, pairs, weights > 0, torch.full_like(targets, end_id))
        end_probs = output.log_probs[:, -pairs.mask.size(1) :].exp()
        return length_pressure(weights, pairs.mask & (targets == end_id), end_probs)

    def _check_loss(self, loss: Tensor, pairs: _Pairs, draws: list[_Draw], mode: str) -> None:
        if not torch.isfinite(loss):
            bad = ~torch.isfinite(torch.stack([draw.scores for draw in draws]).sum(dim=0))
            rows = fingerprints(pairs.inputs["input_ids"], pairs.inputs["attention_mask"])
            names = [f"{row & (2**64 - 1):016x}" for row in (rows[bad] if bad.any() else rows).tolist()]
            raise FloatingPointError(
                f"The loss must be finite, got {loss.item()} at step {self.state.global_step + 1} ({mode}), in rows "
                f"with the fingerprints {names}. Look at these rows (`sampo.weighting.fingerprints`), lower "
                "`learning_rate`, or use bf16 or fp32 instead of fp16."
            )
        if mode == "eval" or self._first_loss_checked:
            return
        self._first_loss_checked = True
        if self._start_implies_zero_scores():
            size = torch.stack([self._margin(draw.scores).abs().mean() for draw in draws]).mean().item()
            if size > 0.02:  # rounding in bf16 stays well below; ln 2 would move by 0.01
                logger.warning(
                    f"The first loss is {loss.item():.4f}, and the implicit rewards are not 0 (mean |margin| "
                    f"{size:.3f}), but policy and reference should be the same model at the first step, where the "
                    "sigmoid loss is ln 2 = 0.6931. The reference is not what the configuration says: check `model`, "
                    "`ref_model` and the adapter's initialisation."
                )

    def _start_implies_zero_scores(self) -> bool:
        return (
            self._reference_is_start
            and self.state.global_step == 0
            and self.args.mask_sharing == "shared"
            and self.args.disable_dropout
        )

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
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(prepared, Dataset):
            counts = count_tokens(prepared, args.max_length, args.truncation_mode)
            counts.dropped = len(dataset) - len(prepared)
            self._token_counts[dataset_name] = counts
            if counts.empty_rows:
                raise ValueError(
                    f"Each completion must have at least one token, got {len(counts.empty_rows)} pairs without in "
                    f"the {dataset_name} data, first at rows {counts.empty_rows[:10]} of the tokenised set. Remove "
                    "them, or load the data with `sampo.load_preferences(..., on_bad_rows='drop')`."
                )
            log = logger.warning if counts.dropped or counts.identical else logger.info
            log(f"{dataset_name} data: {counts.in_words(args.max_length)}")
        else:
            logger.info(f"{dataset_name} data: streamed, so dropped and truncated pairs are not counted.")
        return prepared

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
        for name in ("sampled_sides", "keep_end_token", "mask_sharing", "mask_samples", "length_penalty"):
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
            if "ref" in self.accelerator.unwrap_model(self.model).peft_config:
                return 'a copy of the adapter as it was passed (adapter "ref")'
            return "the base model, with the adapter disabled"
        source = self.ref_model.config._name_or_path if hasattr(self.ref_model, "config") else "the policy's path"
        synced = f", synchronised every {self.args.ref_model_sync_steps} steps" if self.args.sync_ref_model else ""
        return f"a copy of the initial policy, loaded from `{source}`{synced}"

    def create_model_card(self, *args, **kwargs):
        """TRL's card, with the method, its weighting and its source."""
        super().create_model_card(*args, **kwargs)
        path = Path(str(self.args.output_dir)) / "README.md"
        if self.is_world_process_zero() and path.exists():
            section = f"\n## Method\n\nTrained with sampo. Method: {self._method_in_words()}.\n"
            section += f"Reference: {self._reference_in_words()}. Beta {self.beta}, loss {self.args.loss_type}.\n"
            path.write_text(path.read_text(encoding="utf-8") + section, encoding="utf-8")


def _refuse_separate_processes(args: SamPOConfig) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and args.world_size == 1:
        raise RuntimeError(
            f"All {world} launched processes must train one model together, got a process that sees itself alone: "
            "each would train on the same rows and overwrite the other's output. On CPU set `use_cpu: true` and "
            "launch with `torchrun` or an accelerate config of type MULTI_GPU; on GPUs check that each process sees "
            "its device."
        )


def _each_dataset(train_dataset, eval_dataset) -> list:
    return [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]


def _check_data(train_dataset, eval_dataset) -> None:
    """All faults of the rows, before a model is loaded."""
    for dataset in _each_dataset(train_dataset, eval_dataset):
        if isinstance(dataset, Dataset | IterableDataset):  # of other types TRL says what it thinks of them
            check_preferences(dataset)


def _end_token_ids(tokenizer, generation_config) -> list[int]:
    """EOS first, then whatever else ends a turn: the model's other EOS ids, and the template's end of a turn."""
    from jinja2 import TemplateError

    eos = generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    if tokenizer.chat_template:
        answer = "An answer."
        turn = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
        try:
            text = tokenizer.apply_chat_template(turn, tokenize=False)
        except TemplateError:  # a template for other roles: then EOS has to do
            text = answer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        after = tokenizer(text.rsplit(answer, 1)[-1], add_special_tokens=False)["input_ids"]
        ids += [token for token in after if token in special]
    return list(dict.fromkeys(i for i in ids if i is not None))
