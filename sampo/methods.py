"""The named methods: a name, a title for tables, and options of `SamPOConfig`.

The lab, `sampo sweep`, the advice of `sampo audit` and the tests of the recipes take them from here.

A method with a number is written `NAME=NUMBER`, as `rdpo=0.01`. This module does not import torch.
"""

import difflib
from typing import Any, NamedTuple

from . import plugins


class Method(NamedTuple):
    """One method.

    Attributes:
        title: the name in tables.
        options: of `SamPOConfig`, or `trainer` for the method of another trainer.
        beta_per_token: beta is multiplied by the mean length of a training answer, so that a mean
            over tokens has the scale of a sum.
        rounds: of iterative training, each on its share of pairs and steps, from the model of the previous round,
            which is also its reference.
        beta: its own, where beta is another quantity than in DPO.
    """

    title: str
    options: dict[str, Any]
    beta_per_token: bool = False
    rounds: int = 1
    beta: float | None = None


_SAMPO = {"token_weighting": "sampo"}
_REJECTED = {**_SAMPO, "sampled_sides": "rejected"}
_OURS = {**_REJECTED, "length_penalty": "learned"}
_DATASET = {"token_budget": "dataset"}
_BALANCED = {"balance_end_token": True}
_TDPO: dict[str, Any] = {"token_weighting": "all", "precompute_ref_log_probs": False}  # a cache has no distributions
NAMED_METHODS: dict[str, Method] = {
    "dpo": Method("DPO", {"token_weighting": "all"}),
    "sampo": Method("SamPO", _SAMPO),
    "sampo_rejected_learned": Method("SamPO, rejected + learned", _OURS),
    "sampo_rejected": Method("SamPO, rejected", _REJECTED),
    "dpo_learned": Method("DPO + learned", {"token_weighting": "all", "length_penalty": "learned"}),
    "rdpo_02": Method("R-DPO .02", {"token_weighting": "all", "length_penalty": 0.02}),
    "rdpo_05": Method("R-DPO .05", {"token_weighting": "all", "length_penalty": 0.05}),
    "ld_dpo": Method("LD-DPO .5", {"token_weighting": "all", "ld_alpha": 0.5}),
    "ld_dpo_balanced": Method(
        "LD-DPO .5, end balanced", {"token_weighting": "ld", "ld_tail_weight": 0.5, **_BALANCED}
    ),
    "tdpo1": Method("TDPO1", {**_TDPO, "tdpo": "tdpo1"}),
    "tdpo2": Method("TDPO2 .5", {**_TDPO, "tdpo": "tdpo2", "tdpo_alpha": 0.5}),
    "dpop": Method("DPOP 50", {"token_weighting": "all", "dpop_lambda": 50.0}),
    "expected": Method("expected", {"token_weighting": "expected"}),
    "mean_rescaled": Method("DPO-SANorm", {"token_weighting": "mean_rescaled"}),
    "mean": Method("length-normalised DPO", {"token_weighting": "mean"}, beta_per_token=True),
    "prefix": Method("POET", {"token_weighting": "prefix"}),
    "top_k": Method("SamPO-TopK", {"token_weighting": "top_k"}),
    "otpo": Method("OTPO", {"token_weighting": "otpo"}),
    "decay": Method("D2PO .97", {"token_weighting": "decay", "decay_gamma": 0.97}),
    "sampo_end": Method("SamPO, end kept", {**_SAMPO, "keep_end_token": True}),
    "expected_end": Method("expected, end kept", {"token_weighting": "expected", "keep_end_token": True}),
    "top_k_end": Method("SamPO-TopK, end kept", {"token_weighting": "top_k", "keep_end_token": True}),
    "rejected_learned_end": Method("SamPO, rejected + learned, end kept", {**_OURS, "keep_end_token": True}),
    "dpo_balanced": Method("DPO, end balanced", {"token_weighting": "all", **_BALANCED}),
    "sampo_balanced": Method("SamPO, end balanced", {**_SAMPO, **_BALANCED}),
    "expected_balanced": Method("expected, end balanced", {"token_weighting": "expected", **_BALANCED}),
    "rejected_learned_balanced": Method("SamPO, rejected + learned, end balanced", {**_OURS, **_BALANCED}),
    "sampo_dataset": Method("SamPO, data set's budget", {**_SAMPO, **_DATASET}),
    "rejected_learned_dataset": Method("SamPO, rejected + learned, data set's budget", {**_OURS, **_DATASET}),
    "rejected_learned_dataset_balanced": Method(
        "SamPO, rejected + learned, data set's budget, end balanced", {**_OURS, **_DATASET, **_BALANCED}
    ),
    "dpo_learned_balanced": Method(
        "DPO + learned, end balanced", {"token_weighting": "all", "length_penalty": "learned", **_BALANCED}
    ),
    "sampo_independent": Method("SamPO, independent", {**_SAMPO, "mask_sharing": "independent"}),
    "sampo_iterative": Method("Iterative SamPO", _SAMPO, rounds=3),
    # By TRL's trainers, with the beta that the authors' code or TRL has as its default (docs/baselines.md).
    "simpo": Method("SimPO", {"trainer": "simpo"}, beta=2.0),
    "cpo": Method("CPO", {"trainer": "cpo"}, beta=0.1),
    "orpo": Method("ORPO", {"trainer": "orpo"}, beta=0.1),
    "kto": Method("KTO", {"trainer": "kto"}, beta=0.1),
}
SHORT_NAMES = {
    "onesided": "rejected_learned_balanced",
    "dataset": "rejected_learned_dataset_balanced",
    "recommended": "rejected_learned_dataset_balanced",  # of docs/choose.md
    "ln_dpo": "mean",
}  # of methods above
# `NAME=NUMBER` -> title, fixed options, and the option of the number
WITH_NUMBER: dict[str, tuple[str, dict[str, Any], str]] = {
    "rdpo": ("R-DPO", {"token_weighting": "all"}, "length_penalty"),
    "ld_dpo": ("LD-DPO", {"token_weighting": "all"}, "ld_alpha"),
    "decay": ("D2PO", {"token_weighting": "decay"}, "decay_gamma"),
    "dpop": ("DPOP", {"token_weighting": "all"}, "dpop_lambda"),
    "tdpo2": ("TDPO2", {**_TDPO, "tdpo": "tdpo2"}, "tdpo_alpha"),
}
METHOD_OPTIONS = (  # that a method sets or leaves at their default; a recipe's own values give way to the method's
    *dict.fromkeys(name for method in NAMED_METHODS.values() for name in method.options),
    *("mask_samples", "length_penalty_start"),
)


def plugin_methods() -> dict[str, Method]:
    """The weightings of plugins as methods of their own; torch is loaded only where there are some."""
    if not plugins.list_plugins():
        return {}
    from .weighting import REGISTERED, WEIGHTINGS

    return {name: Method(WEIGHTINGS[name].title, {"token_weighting": name}) for name in REGISTERED}


def find_method(name: str) -> Method:
    """A method by its name, its short name, or `NAME=NUMBER`.

    Raises:
        ValueError: there is none; the text gives the nearest name.
    """
    begin, equals, _ = name.partition("=")
    known = NAMED_METHODS | plugin_methods()
    if equals and (begin in WITH_NUMBER or (begin in known and known[begin].beta is not None)):
        value = _number_of(name)
        if begin in WITH_NUMBER:
            title, options, option = WITH_NUMBER[begin]
            return Method(f"{title} {f'{value:g}'.removeprefix('0') or '0'}", {**options, option: value})
        return known[begin]._replace(title=f"{known[begin].title}, beta {value:g}", beta=value)
    if (found := known.get(SHORT_NAMES.get(name, name))) is not None:
        return found
    with_number = [f"{each}=NUMBER" for each in WITH_NUMBER]
    near = difflib.get_close_matches(begin, [*known, *SHORT_NAMES, *WITH_NUMBER], n=1)
    hint = f" Did you mean `{near[0]}{'' if near[0] in {**known, **SHORT_NAMES} else '=NUMBER'}`?" if near else ""
    raise ValueError(f"A method must be one of {[*known, *SHORT_NAMES, *with_number]}, got {name!r}.{hint}")


def canonical_name(name: str) -> str:
    """The name of a method with its number in one form: `rdpo=1e-2` and `rdpo=0.010` are `rdpo=0.01`."""
    begin, equals, _ = name.partition("=")
    return f"{begin}={_number_of(name):g}" if equals else name


def _number_of(name: str) -> float:
    begin, _, number = name.partition("=")
    try:
        return float(number)
    except ValueError:
        what = "must be followed by a number" if begin in WITH_NUMBER else "may be followed by its beta"
        raise ValueError(f"`{begin}` {what}, as `{begin}=0.02`, got {name!r}.") from None
