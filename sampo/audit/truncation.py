"""The effect of `max_length`, from a few numbers of each pair."""

from dataclasses import dataclass

import numpy as np

from ..data.lengths import kept_tokens
from .bias import LengthBias, length_bias
from .scan import PairNumbers


@dataclass(frozen=True)
class Truncation:
    """The effect of one `max_length` on the pairs.

    Attributes:
        max_length: tokens of prompt and response together; None for no cut.
        truncation_mode: `keep_start` cuts the end of the response, `keep_end` the beginning of the row.
        dropped: pairs that TRL drops because the prompt alone fills `max_length`; excluded from the other counts.
        cut_chosen: chosen responses that lose tokens.
        cut_rejected: rejected responses that lose tokens.
        without_end_chosen: chosen responses without their end token after truncation.
        without_end_rejected: rejected responses without theirs.
        one_sided_end: pairs in which one response has its end token after truncation and the other does not.
        identical: pairs whose two responses are the same tokens after truncation.
        bias: how far length explains the preference in the remaining pairs, after truncation.
    """

    max_length: int | None
    truncation_mode: str
    dropped: int
    cut_chosen: int
    cut_rejected: int
    without_end_chosen: int
    without_end_rejected: int
    one_sided_end: int
    identical: int
    bias: LengthBias


def measure_truncation(pairs: PairNumbers, max_length: int | None, truncation_mode: str = "keep_start") -> Truncation:
    """Compute what TRL's collator will do at `max_length`."""
    prompt, chosen, rejected = pairs.prompt, pairs.chosen, pairs.rejected
    kept_chosen, kept_rejected = kept_tokens(
        prompt, chosen, rejected, max_length=max_length, truncation_mode=truncation_mode
    )
    remaining = (kept_chosen > 0) & (kept_rejected > 0)
    keeps_start = truncation_mode == "keep_start"

    def has_end(end: np.ndarray, complete: np.ndarray, kept: np.ndarray) -> np.ndarray:
        return (end >= 0) & ((end < kept) if keeps_start else (end >= complete - kept))

    end_chosen = has_end(pairs.chosen_end, chosen, kept_chosen)
    end_rejected = has_end(pairs.rejected_end, rejected, kept_rejected)
    shared = pairs.shared_start if keeps_start else pairs.shared_end
    return Truncation(
        max_length,
        truncation_mode,
        dropped=int((~remaining).sum()),
        cut_chosen=int((remaining & (kept_chosen < chosen)).sum()),
        cut_rejected=int((remaining & (kept_rejected < rejected)).sum()),
        without_end_chosen=int((remaining & ~end_chosen).sum()),
        without_end_rejected=int((remaining & ~end_rejected).sum()),
        one_sided_end=int((remaining & (end_chosen != end_rejected)).sum()),
        identical=int((remaining & (kept_chosen == kept_rejected) & (shared >= kept_chosen)).sum()),
        bias=length_bias(
            *(prompt[remaining], kept_chosen[remaining], kept_rejected[remaining], pairs.prompt_hash[remaining]),
            ended=(end_chosen[remaining], end_rejected[remaining]),
        ),
    )
