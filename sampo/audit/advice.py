"""Which method to start with, from the length bias of the pairs: for `sampo audit` and `sampo init`.

docs/choose.md has the evidence. It is from the lab and one small model, so an advice is where to start comparing.
"""

from dataclasses import dataclass
from typing import Any

from ..methods import find_method
from .bias import LengthBias, sign_of_effect

NEARLY_ALL = 0.9  # of the pairs
NEAR_CHANCE = 0.05  # largest distance of the AUC's interval from 0.5


@dataclass(frozen=True)
class Advice:
    """Where to start.

    Attributes:
        found: what the pairs show, as the beginning of a sentence.
        options: of `SamPOConfig`.
        name: of the method that they make.
        reason: for it, as the end of a sentence.
    """

    found: str
    options: dict[str, Any]
    name: str
    reason: str


def advise(bias: LengthBias, *, unit: str) -> Advice:
    """The method that docs/choose.md names for these pairs.

    Args:
        bias: of the training pairs.
        unit: of its lengths; end tokens are known for `tokens` only.
    """
    sign = sign_of_effect(bias.auc, 0.5)
    side, share = ("longer", bias.longer) if sign > 0 else ("shorter", bias.shorter)
    nearly = sign != 0 and float(share.value or 0) >= NEARLY_ALL
    found = f"The chosen response is {'nearly always' if nearly else 'more often'} the {side} one"
    if sign == 0:
        found = "Length alone does not show which response was chosen"
    equal = float(bias.equal.value or 0) >= NEARLY_ALL
    if equal or _is_near_chance(bias):
        reason = (
            "nearly all pairs have responses of equal length" if equal else "length explains nothing in these pairs"
        )
        return Advice(found, dict(find_method("dpo").options), "Plain DPO", reason)
    options = dict(find_method("recommended").options)
    parts = ["a token budget over the data set", "a learned length penalty", "a balanced end token"]
    if unit == "tokens" and bias.end_chosen is None and bias.end_rejected is None:
        del options["balance_end_token"], parts[-1]
    name = f"SamPO with {', '.join(parts[:-1])} and {parts[-1]}"
    return Advice(found, options, name, _reason(sign, nearly))


def _is_near_chance(bias: LengthBias) -> bool:
    low, high = bias.auc.low, bias.auc.high
    return low is not None and high is not None and low >= 0.5 - NEAR_CHANCE and high <= 0.5 + NEAR_CHANCE


def _reason(sign: int, nearly: bool) -> str:
    if sign == 0:
        return "these pairs are too few to show whether length is preferred, and it was the safest in the lab"
    if nearly and sign > 0:
        return "DPO and plain SamPO lengthened the answers more on such pairs, at a lower win rate"
    if nearly:
        return "DPO collapsed on such pairs, and this did not"
    if sign > 0:
        return (
            "DPO lengthened the answers on such pairs, and this did not, at no loss of win rate. It shortened them: "
            "compare a fixed `length_penalty` with `token_weighting: all` too"
        )
    return "the longer rejected response has more terms to push down in DPO"
