"""The methods of the lab, from the list of all named methods. This module does not import torch."""

from ..methods import NAMED_METHODS, plugin_methods

SLOPE = "slope"  # as `length_penalty_start`: the logistic slope of preference on length in the training pairs

METHODS = {name: NAMED_METHODS[name] for name in ("dpo", "sampo", "sampo_rejected_learned")}  # of `sampo lab`
METHODS |= plugin_methods()
# and of `studies/`, which train with sampo's trainer alone
STUDY_METHODS = {**METHODS, **{name: one for name, one in NAMED_METHODS.items() if "trainer" not in one.options}}
