"""What can be chosen: `SamPOConfig` is TRL's `DPOConfig` plus the few options below.

Everything that has no defined meaning is refused here, when the config is built and before a model is loaded, with
all conflicts in one error.
"""

import contextlib
import math
from dataclasses import dataclass, field

from trl import DPOConfig

from .old_options import OLD_LOSSES, faults_of_options
from .weighting import WEIGHTINGS, Weighting

MASK_SHARINGS = ("shared", "independent")
SAMPLED_SIDES = ("both", "rejected")
PAIR_STREAMS = ("auto", "true", "false")
TRUNCATION_MODES = ("keep_start", "keep_end")  # TRL's
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")  # TRL's
REF_CACHE_DTYPES = ("float32", "float16", "bfloat16")

# TRL 1.16's losses by what they do with the two scores. A contract test compares the union with TRL's own list.
MARGIN_LOSSES = frozenset({"sigmoid", "hinge", "exo_pair", "robust", "discopop"})  # a function of β·(S_w − S_l) alone
COUNT_LOSSES = frozenset({"ipo", "sigmoid_norm"})  # divide each score by its number of counted tokens
SIDE_LOSSES = frozenset({"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired"})
BATCH_LOSSES = frozenset({"aot", "aot_unpaired"})  # among them, those that compare the pairs of a batch
LOSS_TYPES = MARGIN_LOSSES | COUNT_LOSSES | SIDE_LOSSES | {"sft"}


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
            "`mean` (1/T each), `prefix` (the first T_m), `top_k` (the T_m largest log-ratios) or `decay` (gamma^t).",
            "choices": sorted(WEIGHTINGS),
        },
    )
    sampled_sides: str = field(
        default="both",
        metadata={
            "help": "`both`: whichever response is longer is thinned to T_m tokens, as in the paper. `rejected`: only "
            "a longer rejected response is thinned, a longer chosen one is kept whole. For `sampo`, `expected`, "
            "`prefix` and `top_k`.",
            "choices": list(SAMPLED_SIDES),
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
            "where there is one. Costs one more forward pass of the reference, with `precompute_ref_log_probs` once."
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
    pair_stream: str = field(
        default="false",
        metadata={
            "help": "Lay each batch out as one row without padding and with each prompt computed once: `auto` where "
            "the model allows it and the first batch agrees with the plain forward, `true` or an error, `false`. "
            "Exact up to rounding. Measured on CPU only.",
            "choices": list(PAIR_STREAMS),
        },
    )
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Cut each batch at pair borders so that no forward pass takes more tokens than this (those of the "
            "pair stream, else padded ones), and back-propagate each piece before the next: the same loss and "
            "gradients with the memory of one piece. A longer pair is a piece of its own."
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
            "pair; negative means that training lengthens. Costs one more forward pass without gradient."
        },
    )

    def __new__(cls, *_args, **given):
        """Refuse options that TRL or transformers has dropped by name; the generated `__init__` says `unexpected`."""
        if faults := faults_of_options(given):
            raise TypeError("SamPOConfig: " + " ".join(f"({i}) {fault}" for i, fault in enumerate(faults, 1)))
        return super().__new__(cls)

    def __post_init__(self):
        super().__post_init__()
        with contextlib.suppress(ValueError, TypeError):  # `learned`, or a fault that is named below with the others
            self.length_penalty = float(self.length_penalty or 0.0)
        self.pair_stream = str(self.pair_stream).lower()  # YAML makes a boolean of `true`
        faults = [*self._range_faults(), *self._combination_faults()]
        if faults:
            raise ValueError("SamPOConfig: " + " ".join(f"({i}) {fault}" for i, fault in enumerate(faults, 1)))

    @property
    def learns_length_penalty(self) -> bool:
        """Whether θ is learned."""
        return self.length_penalty == "learned"

    @property
    def is_plain_dpo(self) -> bool:
        """Whether all tokens weigh 1, so that TRL can weigh by itself."""
        return self.token_weighting == "all" and not self.balance_end_token

    @property
    def has_length_penalty(self) -> bool:
        """Whether anything is added to the margin."""
        return self.learns_length_penalty or self.length_penalty != 0

    def _range_faults(self) -> list[str]:
        """Options that are wrong whatever the others say."""
        faults = []

        def expect(holds: bool, name: str, must: str, cure: str = "") -> None:
            if not holds:
                faults.append(f"`{name}` must be {must}, got {getattr(self, name)!r}.{' ' + cure if cure else ''}")

        def is_number(value) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        known = f"one of {sorted(WEIGHTINGS)}"
        expect(self.token_weighting in WEIGHTINGS, "token_weighting", known, "Plain DPO is `all`.")
        expect(self.sampled_sides in SAMPLED_SIDES, "sampled_sides", f"one of {list(SAMPLED_SIDES)}")
        expect(self.mask_sharing in MASK_SHARINGS, "mask_sharing", f"one of {list(MASK_SHARINGS)}")
        expect(self.pair_stream in PAIR_STREAMS, "pair_stream", f"one of {list(PAIR_STREAMS)}")
        expect(self.ref_cache_dtype in REF_CACHE_DTYPES, "ref_cache_dtype", f"one of {list(REF_CACHE_DTYPES)}")
        expect(
            isinstance(self.ref_cache_check, int) and self.ref_cache_check >= 0,
            "ref_cache_check",
            "a whole number of at least 0",
        )
        expect(
            isinstance(self.mask_samples, int) and self.mask_samples >= 1,
            "mask_samples",
            "a whole number of at least 1",
        )
        expect(
            self.max_tokens_per_forward is None
            or (isinstance(self.max_tokens_per_forward, int) and self.max_tokens_per_forward >= 1),
            "max_tokens_per_forward",
            "a whole number of at least 1",
        )
        expect(is_number(self.decay_gamma) and 0 < self.decay_gamma <= 1, "decay_gamma", "in (0, 1]")
        expect(
            self.learns_length_penalty or is_number(self.length_penalty),
            "length_penalty",
            "a finite number or `learned`",
        )
        expect(
            self.length_penalty_scale is None
            or (is_number(self.length_penalty_scale) and self.length_penalty_scale > 0),
            "length_penalty_scale",
            "a positive number of tokens",
        )
        expect(is_number(self.length_penalty_lr) and self.length_penalty_lr > 0, "length_penalty_lr", "positive")
        expect(is_number(self.length_penalty_start), "length_penalty_start", "a finite number per token")
        expect(is_number(self.beta) and self.beta > 0, "beta", "positive and finite")
        expect(is_number(self.learning_rate) and self.learning_rate >= 0, "learning_rate", "finite and not negative")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            expect(getattr(self, name) >= 1, name, "at least 1")
        expect(self.max_length is None or self.max_length >= 2, "max_length", "at least 2 tokens, or unset")
        expect(
            self.max_steps > 0 or (is_number(self.num_train_epochs) and self.num_train_epochs > 0),
            "num_train_epochs",
            "positive where `max_steps` is not",
        )
        expect(self.truncation_mode in TRUNCATION_MODES, "truncation_mode", f"one of {list(TRUNCATION_MODES)}")
        expect(self.f_divergence_type in DIVERGENCES, "f_divergence_type", f"one of {list(DIVERGENCES)}")
        expect(self.neftune_noise_alpha is None or self.neftune_noise_alpha >= 0, "neftune_noise_alpha", "at least 0")
        if self.activation_offloading and self.device.type == "cpu":
            faults.append("`activation_offloading` moves activations to the CPU, got a run on the CPU. Unset it.")
        unknown = [name for name in self.loss_type if name not in LOSS_TYPES]
        if unknown:
            now = "".join(f" `{name}`: {OLD_LOSSES[name]}" for name in unknown if name in OLD_LOSSES)
            faults.append(f"`loss_type` must be among {sorted(LOSS_TYPES)}, got {unknown}.{now}")
        return faults

    def _combination_faults(self) -> list[str]:
        """The table of what goes together; docs/concepts.md says why, row by row."""
        if self.token_weighting not in WEIGHTINGS:
            return []
        method = WEIGHTINGS[self.token_weighting]
        table = [*self._method_rows(method), *self._loss_rows(method)]
        return [message for wrong, message in table if wrong]

    def _method_rows(self, method: Weighting) -> list[tuple[bool, str]]:
        """(wrong?, message) of the options that only some methods have."""
        name = self.token_weighting

        def methods(flag: str) -> list[str]:
            return [n for n, w in WEIGHTINGS.items() if getattr(w, flag)]

        return [
            (
                self.sampled_sides != "both" and not method.thins,
                f"`sampled_sides: {self.sampled_sides}` needs a method that thins the longer side {methods('thins')}, "
                f"got `token_weighting: {name}`.",
            ),
            (
                self.keep_end_token and not method.can_keep_end,
                f"`keep_end_token` is for {methods('can_keep_end')}, got `token_weighting: {name}`.",
            ),
            (
                self.balance_end_token
                and self.max_tokens_per_forward is not None
                and not self.precompute_ref_log_probs,
                "`balance_end_token` asks a live reference about whole batches, got `max_tokens_per_forward: "
                f"{self.max_tokens_per_forward}`. Set `precompute_ref_log_probs: true`, or unset one of them.",
            ),
            (
                self.length_penalty_start != 0 and not self.learns_length_penalty,
                f"`length_penalty_start: {self.length_penalty_start}` is for `length_penalty: learned`, got "
                f"`{self.length_penalty}`.",
            ),
            (
                self.mask_sharing == "independent" and not method.random,
                f"`mask_sharing: independent` needs random subsets {methods('random')}, got "
                f"`token_weighting: {name}`.",
            ),
            (
                self.mask_samples != 1 and not method.random,
                f"`mask_samples: {self.mask_samples}` needs random subsets {methods('random')}, got "
                f"`token_weighting: {name}`.",
            ),
            (
                not self.is_plain_dpo and self.ld_alpha is not None,
                f"`ld_alpha` is itself a token weighting and cannot be combined with `token_weighting: {name}`"
                f"{' and `balance_end_token`' if self.balance_end_token else ''}. Unset it, or use `all` alone.",
            ),
        ]

    def _loss_rows(self, method: Weighting) -> list[tuple[bool, str]]:
        """(wrong?, message) of losses, divergences, WPO and the length penalty."""
        name, losses = self.token_weighting, set(self.loss_type)
        subset = method.subset and not self.balance_end_token
        name += " with balance_end_token" if self.balance_end_token else ""
        divergence = self.f_divergence_type != "reverse_kl"
        not_of_margin = sorted((losses & LOSS_TYPES) - {"sft"} - MARGIN_LOSSES)
        return [
            (
                not subset and bool(losses & COUNT_LOSSES),
                f"`loss_type: {sorted(losses & COUNT_LOSSES)}` divides by the number of counted tokens, which has no "
                f"meaning for the fractional weights of `token_weighting: {name}`. Use a subset method.",
            ),
            (
                not subset and divergence,
                f"`f_divergence_type: {self.f_divergence_type}` needs a likelihood ratio, and the fractional weights "
                f"of `token_weighting: {name}` do not give one. Use `reverse_kl` or a subset method.",
            ),
            (
                not subset and self.use_weighting,
                f"`use_weighting` (WPO) has no meaning for the fractional weights of `token_weighting: {name}`.",
            ),
            (
                (not self.is_plain_dpo or self.max_tokens_per_forward is not None)
                and self.use_weighting
                and "sft" in losses,
                "`use_weighting` (WPO) together with `loss_type: sft` is defined for `token_weighting: all` without "
                "`max_tokens_per_forward` only, because `sft` sees all chosen tokens and the WPO weights only the "
                "counted ones.",
            ),
            (
                self.max_tokens_per_forward is not None and bool(losses & BATCH_LOSSES),
                f"`max_tokens_per_forward` needs losses that are means over the pairs, got "
                f"{sorted(losses & BATCH_LOSSES)}, which sort the rows of a batch.",
            ),
            (
                self.has_length_penalty and bool(not_of_margin),
                f"`length_penalty: {self.length_penalty}` needs a loss that is a function of the margin "
                f"{sorted(MARGIN_LOSSES)}, got {not_of_margin}.",
            ),
            (
                self.learns_length_penalty and losses == {"sft"},
                "`length_penalty: learned` needs a preference loss to learn from, got only `sft`.",
            ),
            (
                self.has_length_penalty and divergence,
                f"`length_penalty: {self.length_penalty}` needs `f_divergence_type: reverse_kl`, got "
                f"`{self.f_divergence_type}`: it is added to the margin of log-ratios.",
            ),
            (
                self.has_length_penalty and self.use_weighting,
                f"`length_penalty: {self.length_penalty}` with `use_weighting` (WPO) has no source that defines it.",
            ),
        ]
