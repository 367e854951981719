"""What is allowed in a `SamPOConfig`: the values of each option, and which options go together.

Each function returns sentences, one for each issue, in the order of the options.
"""

import math
from collections.abc import Callable
from typing import Any

from .data.lengths import TRUNCATION_MODES
from .data.weight_columns import TOKEN_WEIGHT_COLUMNS
from .old_options import OLD_LOSSES
from .weighting import WEIGHTINGS, Weighting

MASK_SHARINGS = ("shared", "independent")
SAMPLED_SIDES = ("both", "rejected")
TOKEN_BUDGETS = ("pair", "dataset")
TDPO_VARIANTS = ("none", "tdpo1", "tdpo2")
PAIR_STREAMS = ("auto", "true", "false")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")  # TRL's
REF_CACHE_DTYPES = ("float32", "float16", "bfloat16")

# TRL 1.16's losses by what they do with the two scores. A contract test compares the union with TRL's own list.
MARGIN_LOSSES = frozenset({"sigmoid", "hinge", "exo_pair", "robust", "discopop"})  # a function of β·(S_w − S_l) alone
COUNT_LOSSES = frozenset({"ipo", "sigmoid_norm"})  # divide each score by its number of selected tokens
SIDE_LOSSES = frozenset({"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired"})
BATCH_LOSSES = frozenset({"aot", "aot_unpaired"})  # among them, those that compare the pairs of a batch
LOSS_TYPES = MARGIN_LOSSES | COUNT_LOSSES | SIDE_LOSSES | {"sft"}


def find_range_issues(config: Any) -> list[str]:
    """Find options of a `SamPOConfig` that are wrong independently of other options."""
    rows = [*_own_range_rows(config), *_trl_range_rows(config)]
    issues = [f"`{name}` must be {must}, got {getattr(config, name)!r}." for name, holds, must in rows if not holds]
    if config.token_weighting not in WEIGHTINGS:
        issues[0] += " Plain DPO is `all`."
    if config.activation_offloading and config.device.type == "cpu":
        issues.append("`activation_offloading` moves activations to the CPU, got a run on the CPU. Unset it.")
    unknown = [name for name in config.loss_type if name not in LOSS_TYPES]
    if unknown:
        now = "".join(f" `{name}`: {OLD_LOSSES[name]}" for name in unknown if name in OLD_LOSSES)
        issues.append(f"`loss_type` must be among {sorted(LOSS_TYPES)}, got {unknown}.{now}")
    return issues


def _own_range_rows(config: Any) -> list[tuple[str, bool, str]]:
    """(option, holds, what it must be) of the options that `SamPOConfig` adds."""
    scale, tokens, ratio = config.length_penalty_scale, config.max_tokens_per_forward, config.max_length_ratio
    gamma, rate, tail = config.decay_gamma, config.length_penalty_lr, config.ld_tail_weight
    return [
        *(
            (name, getattr(config, name) in values, f"one of {list(values)}")
            for name, values in (
                ("token_weighting", sorted(WEIGHTINGS)),
                ("sampled_sides", SAMPLED_SIDES),
                ("token_budget", TOKEN_BUDGETS),
                ("mask_sharing", MASK_SHARINGS),
                ("tdpo", TDPO_VARIANTS),
                ("pair_stream", PAIR_STREAMS),
                ("ref_cache_dtype", REF_CACHE_DTYPES),
            )
        ),
        (
            "token_totals",
            config.token_totals is None or are_token_totals(config.token_totals),
            "two whole numbers of at least 1, the sums of T_w and of T_l",
        ),
        ("ref_cache_check", _is_count(config.ref_cache_check, 0), "a whole number of at least 0"),
        ("mask_samples", _is_count(config.mask_samples, 1), "a whole number of at least 1"),
        (
            "max_tokens_per_forward",
            tokens in (None, "auto") or _is_count(tokens, 1),
            "a whole number of at least 1, or `auto`",
        ),
        ("decay_gamma", _is_finite(gamma) and 0 < gamma <= 1, "in (0, 1]"),
        (
            "pair_weight_column",
            config.pair_weight_column not in ("", *TOKEN_WEIGHT_COLUMNS, "prompt", "chosen", "rejected"),
            "the name of a column of numbers",
        ),
        ("otpo_reg", _is_finite(config.otpo_reg) and config.otpo_reg > 0, "positive"),
        (
            "otpo_mass_reg",
            _is_finite(config.otpo_mass_reg) and 0 < config.otpo_mass_reg <= 100 * config.otpo_reg,
            f"positive and at most 100 times `otpo_reg` ({config.otpo_reg})",
        ),
        ("ld_tail_weight", _is_finite(tail) and 0 <= tail <= 1, "in [0, 1]"),
        (
            "length_penalty",
            config.learns_length_penalty or _is_finite(config.length_penalty),
            "a finite number or `learned`",
        ),
        ("length_penalty_scale", scale is None or (_is_finite(scale) and scale > 0), "a positive number of tokens"),
        ("length_penalty_lr", _is_finite(rate) and rate > 0, "positive"),
        ("length_penalty_start", _is_finite(config.length_penalty_start), "a finite number per token"),
        (
            "generate_every",
            config.generate_every is None or _is_count(config.generate_every, 1),
            "a whole number of steps of at least 1, or unset",
        ),
        *(
            (name, _is_count(getattr(config, name), 1), "a whole number of at least 1")
            for name in ("generate_prompts", "generate_max_tokens")
        ),
        ("max_length_ratio", ratio is None or (_is_finite(ratio) and ratio > 1), "a finite number above 1, or unset"),
        ("dpop_lambda", _is_finite(config.dpop_lambda) and config.dpop_lambda >= 0, "finite and at least 0"),
        ("tdpo_alpha", _is_finite(config.tdpo_alpha) and config.tdpo_alpha >= 0, "finite and at least 0"),
    ]


def _trl_range_rows(config: Any) -> list[tuple[str, bool, str]]:
    """The same of options of TRL and transformers, which do not check them."""
    return [
        *_trainer_range_rows(config),
        ("truncation_mode", config.truncation_mode in TRUNCATION_MODES, f"one of {list(TRUNCATION_MODES)}"),
        ("f_divergence_type", config.f_divergence_type in DIVERGENCES, f"one of {list(DIVERGENCES)}"),
        ("loss_weights", all(map(_is_finite, config.loss_weights or [])), "finite numbers"),
    ]


def find_trainer_issues(config: Any) -> list[str]:
    """Find options that are wrong for every trainer of TRL.

    Args:
        config: with an attribute for each option, of any of TRL's configs.
    """
    rows = _trainer_range_rows(config)
    return [f"`{name}` must be {must}, got {getattr(config, name)!r}." for name, holds, must in rows if not holds]


def _trainer_range_rows(config: Any) -> list[tuple[str, bool, str]]:
    rows = []
    for name, (must, holds) in TRAINER_RANGES.items():
        value = getattr(config, name, None)  # None: another trainer's, or unset
        rows.append((name, value is None or holds(value), must))
    epochs = config.num_train_epochs
    positive = config.max_steps > 0 or (_is_finite(epochs) and epochs > 0)
    return [*rows, ("num_train_epochs", positive, "positive where `max_steps` is not")]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _at_least(low: float) -> Callable[[Any], bool]:
    return lambda value: _is_finite(value) and value >= low


def _in_unit(*, with_one: bool) -> Callable[[Any], bool]:
    return lambda value: _is_finite(value) and (0 <= value < 1 or (with_one and value == 1))


# options of TRL's configs -> what they must be where they are set, and whether they are
TRAINER_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "beta": ("positive and finite", lambda value: _is_finite(value) and value > 0),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "eval_delay"),
            *("router_aux_loss_coef", "neftune_noise_alpha", "desirable_weight", "undesirable_weight", "cpo_alpha"),
        ),
        ("finite and not negative", _at_least(0)),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("in [0, 1)", _in_unit(with_one=False))),
    **dict.fromkeys(
        ("ld_alpha", "ref_model_mixup_alpha", "label_smoothing_factor"), ("in [0, 1]", _in_unit(with_one=True))
    ),
    "label_smoothing": ("in [0, 0.5)", lambda value: _is_finite(value) and 0 <= value < 0.5),
    "discopop_tau": ("positive and finite", lambda value: _is_finite(value) and value > 0),
    **dict.fromkeys(
        ("f_alpha_divergence_coef", "simpo_gamma", "alpha"), ("a finite number", lambda value: _is_finite(value))
    ),
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("precompute_ref_batch_size", "dataset_num_proc", "eval_accumulation_steps", "ref_model_sync_steps"),
        ),
        ("at least 1", lambda value: value >= 1),
    ),
    "max_length": ("at least 2 tokens, or unset", lambda value: value >= 2),
    "dataloader_num_workers": ("at least 0", lambda value: value >= 0),
    **dict.fromkeys(("seed", "data_seed"), ("between 0 and 2^32 - 1", lambda value: 0 <= value < 2**32)),
}


def find_weight_columns(config: Any) -> list[str]:
    """The columns of weights that a run with a `SamPOConfig` reads from its data."""
    of_tokens = TOKEN_WEIGHT_COLUMNS if WEIGHTINGS[config.token_weighting].from_data else ()
    return [*of_tokens, *([config.pair_weight_column] if config.pair_weight_column else [])]


def are_token_totals(value: Any) -> bool:
    """Whether a value can be `token_totals`."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(_is_count(each, 1) for each in value)


def find_combination_issues(config: Any) -> list[str]:
    """Find options of a `SamPOConfig` that do not go together; docs/concepts.md gives the reason of each row."""
    if config.token_weighting not in WEIGHTINGS:
        return []
    method = WEIGHTINGS[config.token_weighting]
    table = [*_method_rows(config, method), *_option_rows(config), *_loss_rows(config, method)]
    table += [row for name in config.terms_of_margin for row in _margin_rows(config, name)]
    return [message for wrong, message in table if wrong]


def _method_rows(config: Any, method: Weighting) -> list[tuple[bool, str]]:
    """(wrong, message) of the options that only some methods have."""
    name = config.token_weighting

    def methods(flag: str) -> list[str]:
        return [n for n, w in WEIGHTINGS.items() if getattr(w, flag)]

    return [
        (
            config.sampled_sides != "both" and not method.downsamples,
            f"`sampled_sides: {config.sampled_sides}` needs a method that downsamples the longer response "
            f"{methods('downsamples')}, got `token_weighting: {name}`.",
        ),
        (
            config.token_budget != "pair" and not method.downsamples,
            f"`token_budget: {config.token_budget}` needs a method that downsamples responses "
            f"{methods('downsamples')}, got `token_weighting: {name}`.",
        ),
        (
            config.keep_end_token and not method.can_keep_end,
            f"`keep_end_token` is for {methods('can_keep_end')}, got `token_weighting: {name}`.",
        ),
        (
            config.balance_end_token
            and config.max_tokens_per_forward is not None
            and not config.precompute_ref_log_probs,
            "`balance_end_token` needs a live reference for complete batches, got `max_tokens_per_forward: "
            f"{config.max_tokens_per_forward}`. Set `precompute_ref_log_probs: true`, or unset one of them.",
        ),
        (
            config.mask_sharing == "independent" and not method.random,
            f"`mask_sharing: independent` needs random subsets {methods('random')}, got `token_weighting: {name}`.",
        ),
        (
            config.mask_samples != 1 and not method.random,
            f"`mask_samples: {config.mask_samples}` needs random subsets {methods('random')}, got "
            f"`token_weighting: {name}`.",
        ),
        (
            not config.is_plain_dpo and config.ld_alpha is not None,
            f"`ld_alpha` is itself a token weighting and cannot be combined with `token_weighting: {name}`"
            f"{' and `balance_end_token`' if config.balance_end_token else ''}. Unset it, use `all` alone, or `ld` "
            "with `ld_tail_weight`.",
        ),
    ]


def _option_rows(config: Any) -> list[tuple[bool, str]]:
    """(wrong, message) of options that need another option, whatever the method."""
    return [
        (
            config.token_totals is not None and config.token_budget != "dataset",
            f"`token_totals: {config.token_totals}` is for `token_budget: dataset`, got `{config.token_budget}`.",
        ),
        (
            config.token_budget == "dataset" and config.mask_sharing == "independent",
            "`token_budget: dataset` needs one subset for policy and reference, got `mask_sharing: independent`, with "
            "which they would be compared on different numbers of tokens. Use `shared`.",
        ),
        (
            config.length_penalty_start != 0 and not config.learns_length_penalty,
            f"`length_penalty_start: {config.length_penalty_start}` is for `length_penalty: learned`, got "
            f"`{config.length_penalty}`.",
        ),
        (
            config.has_tdpo and config.precompute_ref_log_probs,
            f"`tdpo: {config.tdpo}` needs a live reference for its distribution over the vocabulary, got "
            "`precompute_ref_log_probs: true`. Set it to false.",
        ),
        (
            config.has_tdpo and config.dpop_lambda != 0,
            f"`tdpo: {config.tdpo}` with `dpop_lambda: {config.dpop_lambda}` has no source that defines it.",
        ),
        (
            config.max_length_ratio is not None and config.generate_every is None,
            f"`max_length_ratio: {config.max_length_ratio}` compares lengths that are measured every `generate_every` "
            "steps, got no `generate_every`. Set it, such as `generate_every: 100`.",
        ),
    ]


def _loss_rows(config: Any, method: Weighting) -> list[tuple[bool, str]]:
    """(wrong, message) of losses, divergences and WPO."""
    name, losses = config.token_weighting, set(config.loss_type)
    subset = method.subset and not config.balance_end_token
    name += " with balance_end_token" if config.balance_end_token else ""
    divergence = config.f_divergence_type != "reverse_kl"
    return [
        (
            not subset and bool(losses & COUNT_LOSSES),
            f"`loss_type: {sorted(losses & COUNT_LOSSES)}` divides by the number of selected tokens, which has no "
            f"meaning for the fractional weights of `token_weighting: {name}`. Use a subset method.",
        ),
        (
            not subset and divergence,
            f"`f_divergence_type: {config.f_divergence_type}` needs a likelihood ratio, and the fractional weights "
            f"of `token_weighting: {name}` do not give one. Use `reverse_kl` or a subset method.",
        ),
        (
            not subset and config.use_weighting,
            f"`use_weighting` (WPO) has no meaning for the fractional weights of `token_weighting: {name}`.",
        ),
        (
            (not config.is_plain_dpo or config.max_tokens_per_forward is not None)
            and config.use_weighting
            and "sft" in losses,
            "`use_weighting` (WPO) together with `loss_type: sft` is defined for `token_weighting: all` without "
            "`max_tokens_per_forward` only, because `sft` sees all chosen tokens and the WPO weights only the "
            "selected ones.",
        ),
        (
            config.max_tokens_per_forward is not None and bool(losses & BATCH_LOSSES),
            f"`max_tokens_per_forward` needs losses that are means over the pairs, got "
            f"{sorted(losses & BATCH_LOSSES)}, which sort the rows of a batch.",
        ),
        (
            config.pair_weight_column is not None and bool(losses & BATCH_LOSSES),
            f"`pair_weight_column` needs losses that are means over the pairs, got {sorted(losses & BATCH_LOSSES)}, "
            "which sort the rows of a batch.",
        ),
    ]


def _margin_rows(config: Any, name: str) -> list[tuple[bool, str]]:
    """(wrong, message) of an option that adds a term to the margin."""
    losses, option = set(config.loss_type), f"`{name}: {getattr(config, name)}`"
    not_of_margin = sorted((losses & LOSS_TYPES) - {"sft"} - MARGIN_LOSSES)
    return [
        (
            bool(not_of_margin),
            f"{option} needs a loss that is a function of the margin {sorted(MARGIN_LOSSES)}, got {not_of_margin}.",
        ),
        (
            (name != "length_penalty" or config.learns_length_penalty) and losses == {"sft"},
            f"{option} needs a preference loss to learn from, got only `sft`.",
        ),
        (
            config.f_divergence_type != "reverse_kl",
            f"{option} needs `f_divergence_type: reverse_kl`, got `{config.f_divergence_type}`: it is added to the "
            "margin of log-ratios.",
        ),
        (config.use_weighting, f"{option} with `use_weighting` (WPO) has no source that defines it."),
        (
            name != "length_penalty" and config.mask_sharing == "independent",
            f"{option} needs policy and reference on one subset, got `mask_sharing: independent`, with which the "
            "score of a response is no log-ratio. Use `shared`.",
        ),
    ]
