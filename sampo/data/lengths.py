"""The one definition of length, and what truncation does to the lengths of a data set.

The length of a response is the number of its completion tokens after truncation, its end token included (T_w of the
chosen, T_l of the rejected one).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .end_tokens import ResponseEnds

TRUNCATION_MODES = ("keep_start", "keep_end")  # TRL's


@dataclass
class TokenCounts:
    """What truncation does to a tokenised data set.

    Attributes:
        pairs: number of pairs kept.
        dropped: pairs that TRL drops because the prompt alone fills `max_length`.
        cut_chosen: chosen responses that lose tokens.
        cut_rejected: rejected responses that lose tokens.
        identical: pairs whose two responses are the same tokens after truncation.
        empty_rows: rows with a response of no tokens.
        endless_chosen: chosen responses without an end token, after truncation.
        endless_rejected: rejected responses without one.
        other_ends: (row, column) of those among them that keep the end tokens of other turns.
        chosen_tokens: sum of T_w.
        rejected_tokens: sum of T_l.
        squared_differences: sum of (T_w − T_l)².
        longest_row: tokens of the longest row, its prompt included.
    """

    pairs: int = 0
    dropped: int = 0
    cut_chosen: int = 0
    cut_rejected: int = 0
    identical: int = 0
    empty_rows: list[int] = field(default_factory=list)
    endless_chosen: int = 0
    endless_rejected: int = 0
    other_ends: list[tuple[int, str]] = field(default_factory=list)
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    squared_differences: int = 0
    longest_row: int = 0

    @property
    def rms_difference(self) -> float:
        """Root mean square of T_w − T_l in tokens."""
        return (self.squared_differences / self.pairs) ** 0.5 if self.pairs else 0.0

    def describe(self, max_length: int | None) -> str:
        """One line for the log."""
        if not self.pairs:
            return f"no pairs; {self.dropped:,} dropped because their prompt alone fills max_length {max_length}."
        return (
            f"{self.pairs:,} pairs, {self.chosen_tokens / self.pairs:.1f} chosen and "
            f"{self.rejected_tokens / self.pairs:.1f} rejected tokens on average; at max_length {max_length}: "
            f"{self.dropped:,} dropped because the prompt alone fills it, {self.cut_chosen:,} chosen and "
            f"{self.cut_rejected:,} rejected responses truncated, {self.identical:,} pairs identical after truncation"
            f"{self._describe_endless()}."
        )

    @property
    def has_ends(self) -> bool:
        """Whether any response has its end token."""
        return self.endless_chosen + self.endless_rejected < 2 * self.pairs

    def _describe_endless(self) -> str:
        if not self.endless_chosen + self.endless_rejected:
            return ""
        return f"; {self.endless_chosen:,} chosen and {self.endless_rejected:,} rejected responses have no end token"


def count_tokens(
    dataset: Any, max_length: int | None, truncation_mode: str = "keep_start", ends: ResponseEnds | None = None
) -> TokenCounts:
    """Count what the collator will cut.

    Args:
        dataset: `datasets.Dataset` with `prompt_ids`, `chosen_ids`, `rejected_ids`.
        max_length: tokens of prompt and response together, or None.
        truncation_mode: `keep_start` cuts the end of the response, `keep_end` the beginning of the row.
        ends: finds the end token of a response; without it all responses count as ended.
    """
    counts = TokenCounts()
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    for batch in columns.with_format("arrow").iter(batch_size=1000):
        prompt, chosen, rejected = (_list_lengths(batch.column(i)) for i in range(3))
        kept_chosen, kept_rejected = kept_tokens(
            prompt, chosen, rejected, max_length=max_length, truncation_mode=truncation_mode
        )
        if ends is not None:
            _count_ends(counts, batch, kept_chosen, kept_rejected, truncation_mode, ends)
        empty = (kept_chosen <= 0) | (kept_rejected <= 0)
        counts.empty_rows += (counts.pairs + np.flatnonzero(empty)).tolist()
        counts.pairs += len(prompt)
        counts.cut_chosen += int((kept_chosen < chosen).sum())
        counts.cut_rejected += int((kept_rejected < rejected).sum())
        counts.chosen_tokens += int(kept_chosen.sum())
        counts.rejected_tokens += int(kept_rejected.sum())
        counts.squared_differences += int(((kept_chosen - kept_rejected) ** 2).sum())
        longest = int((prompt + np.maximum(chosen, rejected)).max())
        counts.longest_row = max(counts.longest_row, min(longest, max_length or longest))
        for row in np.flatnonzero((kept_chosen == kept_rejected) & ~empty):
            kept = int(kept_chosen[row])
            ids = (batch.column(column)[row].as_py() for column in (1, 2))
            left, right = (each[kept_part(len(each), kept, truncation_mode)] for each in ids)
            counts.identical += left == right
    return counts


def _count_ends(
    counts: TokenCounts,
    batch: Any,
    kept_chosen: np.ndarray,
    kept_rejected: np.ndarray,
    truncation_mode: str,
    ends: ResponseEnds,
) -> None:
    """Count the responses of an Arrow batch whose end token is cut, or that have none."""
    for number, (column, kept) in enumerate((("chosen_ids", kept_chosen), ("rejected_ids", kept_rejected)), 1):
        lists = batch.column(number).combine_chunks()
        values, borders = lists.values.to_numpy(), lists.offsets.to_numpy()
        endless = 0
        for row, (start, stop, n) in enumerate(zip(borders[:-1], borders[1:], kept, strict=True)):
            ids = values[start:stop]
            found = ends.classify(ids, kept_part(len(ids), int(n), truncation_mode))
            endless += found != "own"
            if found == "other":
                counts.other_ends.append((counts.pairs + row, column))
        if number == 1:
            counts.endless_chosen += endless
        else:
            counts.endless_rejected += endless


def _list_lengths(column: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.list_value_length(column).to_numpy().astype(np.int64)


def kept_tokens(
    prompt: np.ndarray, *responses: np.ndarray, max_length: int | None, truncation_mode: str = "keep_start"
) -> list[np.ndarray]:
    """Return how many tokens of each response the collator keeps; 0 or less where the prompt fills `max_length`.

    Args:
        prompt: `(n,)` tokens of the prompts.
        responses: `(n,)` tokens of the chosen or the rejected responses.
        max_length: tokens of prompt and response together, or None.
        truncation_mode: `keep_start` cuts the end of the response, `keep_end` the beginning of the row.
    """
    if max_length is None:
        return list(responses)
    room = max_length - prompt if truncation_mode == "keep_start" else np.full_like(prompt, max_length)
    return [np.minimum(response, room) for response in responses]


def kept_part(length: int, kept: int, truncation_mode: str) -> slice:
    """Which of the `length` tokens of a response the collator keeps, if it keeps `kept` of them (0 or less: none)."""
    return slice(0, max(kept, 0)) if truncation_mode == "keep_start" else slice(length - kept, None)


def kept_ids(ids: list[int], max_length: int | None, truncation_mode: str = "keep_start") -> list[int]:
    """Return what the collator keeps of the tokens of prompt and response."""
    if max_length is None:
        return ids
    return ids[:max_length] if truncation_mode == "keep_start" else ids[-max_length:]
