"""What a run trains, in sentences: for the log, the model card and the errors."""

from typing import Any

from ..config import SamPOConfig
from ..weighting import WEIGHTINGS

DESCRIBED_OPTIONS = (
    *("sampled_sides", "token_budget", "keep_end_token", "balance_end_token", "mask_sharing", "mask_samples"),
    *("length_penalty", "dpop_lambda", "tdpo", "pair_weight_column"),
)
PAPER = {
    "title": "Eliminating Biased Length Reliance of Direct Preference Optimization via Down-Sampled KL Divergence",
    "id": "2406.10957",
    "citation": """\
@inproceedings{lu2024eliminating,
    title        = {{Eliminating Biased Length Reliance of Direct Preference Optimization via
                    Down-Sampled KL Divergence}},
    author       = {Junru Lu and Jiazheng Li and Siyu An and Meng Zhao and Yulan He and Di Yin and
                    Xing Sun},
    year         = 2024,
    booktitle    = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language
                    Processing},
    pages        = {1047--1067},
}""",
}


def describe_method(args: SamPOConfig, length_scale: float, token_totals: tuple[int, int] | None = None) -> str:
    """The weighting, its source and the options that are not the default.

    Args:
        args: of the run.
        length_scale: of a learned length penalty, in tokens.
        token_totals: ΣT_w and ΣT_l with `token_budget: dataset`.
    """
    method = WEIGHTINGS[args.token_weighting]
    text = f"{method.title} (`token_weighting: {args.token_weighting}`, {method.source})"
    for name in DESCRIBED_OPTIONS:
        if getattr(args, name) != SamPOConfig.__dataclass_fields__[name].default:
            text += f", `{name}: {getattr(args, name)}`"
    if args.token_weighting == "decay":
        text += f", `decay_gamma: {args.decay_gamma}`"
    if args.token_weighting == "otpo":
        text += f", `otpo_reg: {args.otpo_reg}`, `otpo_mass_reg: {args.otpo_mass_reg}`"
    if args.token_weighting == "ld":
        text += f", `ld_tail_weight: {args.ld_tail_weight}`"
    if args.tdpo == "tdpo2":
        text += f", `tdpo_alpha: {args.tdpo_alpha}`"
    if args.learns_length_penalty:
        text += f" with a scale of {length_scale:.1f} tokens"
    return text if token_totals is None else f"{text}; {_describe_budget(args, *token_totals)}"


def _describe_budget(args: SamPOConfig, chosen: int, rejected: int) -> str:
    share = min(1.0, rejected / chosen) if args.sampled_sides == "both" else 1.0
    return (
        f"of {chosen:,} chosen and {rejected:,} rejected tokens, each chosen response keeps the "
        f"share {share:.4g} and each rejected one {min(1.0, chosen / rejected):.4g}"
    )


def describe_reference(trainer: Any) -> str:
    """Describe the reference of the policy."""
    args = trainer.args
    if args.precompute_ref_log_probs:
        whose = "the initial policy" if trainer.reference_is_start else "the `ref_model` that was passed"
        return f"log-probs of {whose}, one per token, from the cache"  # without its path: this goes to the card
    if not trainer.reference_is_start:
        return "the `ref_model` that was passed"
    if trainer.ref_model is None:
        if trainer.reference_is_base:
            return "the base model, with the adapter disabled"
        return 'a copy of the adapter as it was passed (adapter "ref")'
    # DeepSpeed's engine has another kind of config
    config = getattr(trainer.accelerator.unwrap_model(trainer.ref_model), "config", None)
    source = "the policy's path" if config is None else config._name_or_path
    synced = f", synchronised every {args.ref_model_sync_steps} steps" if args.sync_ref_model else ""
    return f"a copy of the initial policy, loaded from `{source}`{synced}"
