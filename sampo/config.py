"""What can be chosen: `SamPOConfig` is TRL's `DPOConfig` plus the few options below.

`sampo.config_checks` holds what is allowed. It is checked when the config is built, before a model is loaded, and all
issues are in one error.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any, Self

from trl import DPOConfig

from .config_checks import (
    MASK_SHARINGS,
    PAIR_STREAMS,
    REF_CACHE_DTYPES,
    SAMPLED_SIDES,
    TDPO_VARIANTS,
    TOKEN_BUDGETS,
    find_combination_issues,
    find_range_issues,
    find_weight_columns,
)
from .old_options import find_old_option_issues
from .weighting import WEIGHTINGS


@dataclass
class SamPOConfig(DPOConfig):
    r"""Configuration of [`SamPOTrainer`]: all of TRL's `DPOConfig`, and which completion tokens count.

    The defaults are those of the SamPO paper (arXiv 2406.10957). With `token_weighting="all"` and nothing else
    changed, the trainer is TRL's `DPOTrainer`.

    Raises:
        ValueError: options out of range or combinations without a defined meaning, all of them in one message.
    """

    token_weighting: str = field(
        default="sampo",
        metadata={
            "help": "Which completion tokens count, and how much: `all` (DPO), `sampo` (a uniform random subset of "
            "T_m = min(T_w, T_l) tokens of each response), `expected` (its mean, T_m/T each), `mean_rescaled`, "
            "`mean` (1/T each), `prefix` (the first T_m), `ld` (1 on the first T_m, alpha on the others), `top_k` "
            "(the T_m largest log-ratios), `decay` (gamma^t), `otpo` (optimal transport between the "
            "responses) or `column` (the data's columns `chosen_weights` and `rejected_weights`).",
            "choices": sorted(WEIGHTINGS),
        },
    )
    sampled_sides: str = field(
        default="both",
        metadata={
            "help": "`both`: whichever response is longer is downsampled to T_m tokens, as in the paper. `rejected`: "
            "only a longer rejected response is downsampled, a longer chosen one keeps all its tokens. For `sampo`, "
            "`expected`, `prefix` and `top_k`.",
            "choices": list(SAMPLED_SIDES),
        },
    )
    token_budget: str = field(
        default="pair",
        metadata={
            "help": "How many tokens a downsampled response keeps. `pair`: T_m, so that both responses of a pair have "
            "equally many, as in the paper. `dataset`: its share of a total, so that chosen and rejected "
            "responses have equally many over the training data: min(1, sum T_w / sum T_l) of each rejected response "
            "and, with `sampled_sides: both`, min(1, sum T_l / sum T_w) of each chosen one. For `sampo`, `expected`, "
            "`prefix` and `top_k`.",
            "choices": list(TOKEN_BUDGETS),
        },
    )
    token_totals: list[int] | None = field(
        default=None,
        metadata={
            "help": "The sums of T_w and of T_l for `token_budget: dataset`. Default: those of the training data "
            "after truncation, counted once at the start. Needed for streamed and vision data."
        },
    )
    keep_end_token: bool = field(
        default=False,
        metadata={
            "help": "The end token of a completion always counts; the other T_m - 1 tokens come from the rest. "
            "For `sampo`, `expected` and `top_k`. A truncated completion has no end token: all its tokens are equal."
        },
    )
    balance_end_token: bool = field(
        default=False,
        metadata={
            "help": "The end token weighs what makes the length pressure of each response 0 under the reference: "
            "sum_t w_t p_end(t) / (1 - p_end(T)) over the other tokens. For every method; `keep_end_token` is implied "
            "where there is one. The reference scores it in the same pass as the completion."
        },
    )
    mask_sharing: str = field(
        default="shared",
        metadata={
            "help": "`shared`: policy and reference are scored on the same subset (the paper's equation). "
            "`independent`: the reference draws a subset of its own, as the authors' released code does; noisier, and "
            "the first loss is not ln 2. For `sampo` only.",
            "choices": list(MASK_SHARINGS),
        },
    )
    mask_samples: int = field(
        default=1,
        metadata={
            "help": "Number of subsets per step over which the loss of the same log-ratios is averaged: less variance "
            "for no further forward pass. For `sampo` only."
        },
    )
    decay_gamma: float = field(
        default=0.98,
        metadata={
            "help": "Gamma in (0, 1] of `token_weighting: decay`; completion token t = 0, 1, ... weighs gamma^t."
        },
    )
    ld_tail_weight: float = field(
        default=0.5,
        metadata={
            "help": "Alpha in [0, 1] of `token_weighting: ld`: the weight of the tokens after the first T_m. At 0 it "
            "is `prefix`, at 1 `all`. TRL's `ld_alpha` is the same weighting, for `token_weighting: all` alone."
        },
    )
    otpo_reg: float = field(
        default=1.0,
        metadata={"help": "Coefficient of the entropy of the transport plan of `token_weighting: otpo`."},
    )
    otpo_mass_reg: float = field(
        default=0.2,
        metadata={
            "help": "Coefficient of the marginals of that plan: the larger, the closer are the weights to T_m/T. At "
            "most 100 times `otpo_reg`."
        },
    )
    pair_weight_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the data with a number of at least 0 for each pair, which its loss is multiplied by; "
            "the loss of a batch stays a mean over its pairs. Metrics other than the loss are not weighted."
        },
    )
    # The last of two types is what the command line parses; a number may be given as either.
    length_penalty: float | str | None = field(
        default=0.0,
        metadata={
            "help": "Added to the logit of the loss: alpha * (T_w - T_l) for a number alpha (per token; R-DPO), or "
            "theta * (T_w - T_l) / length_penalty_scale with a theta learned through the same loss for `learned`. "
            "For losses of the margin: sigmoid, hinge, exo_pair, robust, discopop."
        },
    )
    length_penalty_scale: float | None = field(
        default=None,
        metadata={
            "help": "Tokens by which T_w - T_l is divided for `length_penalty: learned`. Default: the root mean "
            "square of T_w - T_l over the training pairs, measured once at the start."
        },
    )
    length_penalty_lr: float = field(
        default=0.05,
        metadata={"help": "Learning rate (Adam, constant) of the theta of `length_penalty: learned`."},
    )
    length_penalty_start: float = field(
        default=0.0,
        metadata={
            "help": "Where `length_penalty: learned` starts, per token of T_w - T_l: 0, or the slope of a logistic "
            "fit of preference on length."
        },
    )
    dpop_lambda: float = field(
        default=0.0,
        metadata={
            "help": "Lambda of DPO-Positive (DPOP). The margin S_w - S_l becomes S_w - lambda * max(0, -S_w) - S_l, "
            "so that a chosen response whose score S_w falls below 0 costs more. S_w is the score of "
            "`token_weighting`; with `all` it is that of the paper, whose lambda is 50. 0: no such term. For losses "
            "of the margin, as `length_penalty`."
        },
    )
    tdpo: str = field(
        default="none",
        metadata={
            "help": "A difference of divergences in the margin. With D = sum_t w_t KL(reference || policy) over the "
            "vocabulary at each token of a response, `tdpo1` adds D_w - D_l and `tdpo2` -tdpo_alpha * (D_l - D_w), "
            "without a gradient of D_w. Needs a live reference. For losses of the margin, as `length_penalty`.",
            "choices": list(TDPO_VARIANTS),
        },
    )
    tdpo_alpha: float = field(
        default=0.5,
        metadata={"help": "Alpha of `tdpo: tdpo2`, at least 0. The weight of its difference of divergences."},
    )
    pair_stream: str = field(
        default="auto",
        metadata={
            "help": "Lay each batch out as one row without padding and with each prompt computed once. `auto` does so "
            "where it is exact up to rounding and faster: it computes and times the first batches both ways. A model "
            "that cannot do it gets rows grouped by length, which need little padding, else the plain forward of TRL. "
            "`true` does so or raises an error. `false` is the plain forward.",
            "choices": list(PAIR_STREAMS),
        },
    )
    # As above: the command line gives a text.
    max_tokens_per_forward: int | str | None = field(
        default=None,
        metadata={
            "help": "Compute the pairs of an optimiser step (batch size x accumulation x processes) in as few forward "
            "passes as this number of tokens allows. The tokens are those of the pair stream, else padded ones. Each "
            "pass is full and back-propagated before the next: the loss, gradients and metrics of the batches, with "
            "the memory of one forward pass. Pairs move between processes, so that all compute like numbers of "
            "tokens. A longer pair is computed alone. `auto`: the largest number that fits the GPU, found before the "
            "first step; on a CPU 4096."
        },
    )
    log_token_statistics: bool = field(
        default=True,
        metadata={
            "help": "Log TRL's `entropy`, `logits/*` and `mean_token_accuracy`, which the LM head computes for the "
            "scored tokens. Without them the head has less to do."
        },
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the per-token reference log-probs that `precompute_ref_log_probs` keeps. Default: "
            "`ref_logps` in the folder that the environment variable SAMPO_CACHE names, or in ~/.cache/sampo, so that "
            "another run with the same reference, data and truncation finds them."
        },
    )
    ref_cache_dtype: str = field(
        default="float32",
        metadata={
            "help": "Type in which they are stored. `float16` halves the size and rounds each by up to 2^-11 of "
            "itself, `bfloat16` by up to 2^-8.",
            "choices": list(REF_CACHE_DTYPES),
        },
    )
    ref_cache_check: int = field(
        default=8,
        metadata={
            "help": "Number of rows of a cache that an earlier run has filled which are compared with the live "
            "reference at the start, where there is one; a difference is an error. 0 compares none."
        },
    )
    log_length_pressure: bool = field(
        default=False,
        metadata={
            "help": "Log `length_gap/pressure`: by how much a shift of the end token's logit raises the margin, per "
            "pair; negative means that training lengthens. Scored in the same pass as the completion."
        },
    )
    generate_every: int | None = field(
        default=None,
        metadata={
            "help": "Steps between logged lengths of answers to held-out prompts. They come at the start and "
            "after the last step too, and are greedy: `length/generated`, `length/generated_ended` and "
            "`length/generated_ratio`. The trained weights do not change. Default: never."
        },
    )
    generate_prompts: int = field(
        default=16,
        metadata={
            "help": "Number of these prompts. They are the first distinct ones of the evaluation data; all processes "
            "share them, in batches of `per_device_eval_batch_size`."
        },
    )
    generate_max_tokens: int = field(
        default=256,
        metadata={"help": "Tokens at which these answers are cut. A cut answer counts with this length."},
    )
    max_length_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Stop when answers are over so many times as long as at the start. For example 1.2, "
            "compared with `length/generated_ratio` of `generate_every`. The model is saved as after the last step."
        },
    )

    def __new__(cls, *_args: Any, **given: Any) -> Self:
        """Name options that TRL or transformers has dropped; the generated `__init__` says only `unexpected`."""
        if issues := find_old_option_issues(given):
            raise TypeError("SamPOConfig: " + " ".join(f"({i}) {issue}" for i, issue in enumerate(issues, 1)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        with contextlib.suppress(ValueError, TypeError):  # `learned`, or an issue that is reported below
            self.length_penalty = float(str(self.length_penalty or 0.0))  # `true` is not 1
        with contextlib.suppress(ValueError):  # `auto` or None, or an issue that is reported below
            self.max_tokens_per_forward = int(str(self.max_tokens_per_forward))
        self.pair_stream = str(self.pair_stream).lower()  # YAML makes a boolean of `true`
        if issues := [*find_range_issues(self), *find_combination_issues(self)]:
            raise ValueError("SamPOConfig: " + " ".join(f"({i}) {issue}" for i, issue in enumerate(issues, 1)))

    @property
    def learns_length_penalty(self) -> bool:
        """Whether θ is learned."""
        return self.length_penalty == "learned"

    @property
    def finds_tokens_per_forward(self) -> bool:
        """Whether the number of tokens of a forward pass is found before the first step."""
        return self.max_tokens_per_forward == "auto"

    @property
    def is_plain_dpo(self) -> bool:
        """Whether all tokens weigh 1, so that TRL's own weights apply."""
        return self.token_weighting == "all" and not self.balance_end_token

    @property
    def weight_columns(self) -> list[str]:
        """The columns of weights that are read from the data."""
        return find_weight_columns(self)

    @property
    def has_length_penalty(self) -> bool:
        """Whether the lengths of a pair are in the margin."""
        return self.learns_length_penalty or self.length_penalty != 0

    @property
    def has_tdpo(self) -> bool:
        """Whether the divergence of policy and reference is in the margin."""
        return self.tdpo != "none"

    @property
    def terms_of_margin(self) -> list[str]:
        """The options that add something to the margin of the loss, and not to the rewards that are logged."""
        terms = {
            "length_penalty": self.has_length_penalty,
            "dpop_lambda": self.dpop_lambda != 0,
            "tdpo": self.has_tdpo,
        }
        return [name for name, is_set in terms.items() if is_set]
