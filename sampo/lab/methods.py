"""The methods of the lab: a title, and options of `SamPOConfig`. This module does not import torch."""

from typing import Any, NamedTuple

from .. import plugins

SLOPE = "slope"  # as `length_penalty_start`: the logistic slope of preference on length in the training pairs


class Method(NamedTuple):
    """One method.

    Attributes:
        title: the name in tables.
        options: of `SamPOConfig`.
        beta_per_token: beta is multiplied by the mean length of a training answer, so that a mean
            over tokens has the scale of a sum.
        rounds: of iterative training, each on its share of pairs and steps, from the model of the previous round,
            which is also its reference.
    """

    title: str
    options: dict[str, Any]
    beta_per_token: bool = False
    rounds: int = 1


_SAMPO = {"token_weighting": "sampo"}
_REJECTED = {**_SAMPO, "sampled_sides": "rejected"}
_OURS = {**_REJECTED, "length_penalty": "learned"}
_DATASET = {"token_budget": "dataset"}
_BALANCED = {"balance_end_token": True}
METHODS = {  # of `sampo lab`
    "dpo": Method("DPO", {"token_weighting": "all"}),
    "sampo": Method("SamPO", _SAMPO),
    "sampo_rejected_learned": Method("SamPO, rejected + learned", _OURS),
}
if plugins.list_plugins():  # only then torch is loaded here
    from ..weighting import REGISTERED, WEIGHTINGS

    METHODS |= {name: Method(WEIGHTINGS[name].title, {"token_weighting": name}) for name in REGISTERED}
STUDY_METHODS = {  # and of `studies/`
    **METHODS,
    "sampo_rejected": Method("SamPO, rejected", _REJECTED),
    "dpo_learned": Method("DPO + learned", {"token_weighting": "all", "length_penalty": "learned"}),
    "rdpo_02": Method("R-DPO .02", {"token_weighting": "all", "length_penalty": 0.02}),
    "rdpo_05": Method("R-DPO .05", {"token_weighting": "all", "length_penalty": 0.05}),
    "ld_dpo": Method("LD-DPO .5", {"token_weighting": "all", "ld_alpha": 0.5}),
    "ld_dpo_balanced": Method(
        "LD-DPO .5, end balanced", {"token_weighting": "ld", "ld_tail_weight": 0.5, **_BALANCED}
    ),
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
}
