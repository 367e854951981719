"""What `max_length` would cut, from a few numbers of each pair."""

from dataclasses import dataclass

import numpy as np

from ..data.lengths import kept_tokens
from .bias import LengthBias, length_bias
from .scan import PairNumbers


@dataclass(frozen=True)
class Truncation:
    """What one `max_length` does to the pairs.

    Attributes:
        max_length: tokens of prompt and response together; None for no cut.
        truncation_mode: `keep_start` cuts the end of the response, `keep_end` the beginning of the row.
        dropped: pairs that TRL leaves out because the prompt alone fills `max_length`; the other counts are without
            them.
        cut_chosen: chosen responses that lose tokens.
        cut_rejected: rejected responses that lose tokens.
        without_end_chosen: chosen responses without their end token, the last one that they had, after the cut.
        without_end_rejected: rejected responses that have none.
        one_sided_end: pairs of which one side has an end token after the cut and the other has none.
        identical: pairs whose two sides are the same tokens after the cut.
        bias: what length says about the pairs that are left, after the cut.
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


def truncation(pairs: PairNumbers, max_length: int | None, truncation_mode: str = "keep_start") -> Truncation:
    """Count what TRL's collator does at `max_length`, before it does."""
    prompt, chosen, rejected = pairs.prompt, pairs.chosen, pairs.rejected
    left_chosen, left_rejected = kept_tokens(
        prompt, chosen, rejected, max_length=max_length, truncation_mode=truncation_mode
    )
    left = (left_chosen > 0) & (left_rejected > 0)
    keeps_start = truncation_mode == "keep_start"

    def has_end(end: np.ndarray, whole: np.ndarray, kept: np.ndarray) -> np.ndarray:
        return (end >= 0) & ((end < kept) if keeps_start else (end >= whole - kept))

    end_chosen = has_end(pairs.chosen_end, chosen, left_chosen)
    end_rejected = has_end(pairs.rejected_end, rejected, left_rejected)
    shared = pairs.shared_start if keeps_start else pairs.shared_end
    return Truncation(
        max_length,
        truncation_mode,
        dropped=int((~left).sum()),
        cut_chosen=int((left & (left_chosen < chosen)).sum()),
        cut_rejected=int((left & (left_rejected < rejected)).sum()),
        without_end_chosen=int((left & ~end_chosen).sum()),
        without_end_rejected=int((left & ~end_rejected).sum()),
        one_sided_end=int((left & (end_chosen != end_rejected)).sum()),
        identical=int((left & (left_chosen == left_rejected) & (shared >= left_chosen)).sum()),
        bias=length_bias(
            *(prompt[left], left_chosen[left], left_rejected[left], pairs.prompt_hash[left]),
            ended=(end_chosen[left], end_rejected[left]),
        ),
    )
