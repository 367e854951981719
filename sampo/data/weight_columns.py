"""Weights that the data give: one for each completion token (`token_weighting: column`), and one for each pair.

The columns `chosen_weights` and `rejected_weights` have a list for each row: one number for each token of the response
as the tokeniser makes it, the end token included, before truncation. They are cut with the tokens. A pair weight is a
column of numbers, which the loss of the pair is multiplied by.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .lengths import kept_part

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

TOKEN_WEIGHT_COLUMNS = ("chosen_weights", "rejected_weights")
GIVEN_TOKEN_WEIGHTS, GIVEN_PAIR_WEIGHTS = "given_token_weights", "given_pair_weights"  # in a collated batch
_IDS = dict(zip(TOKEN_WEIGHT_COLUMNS, ("chosen_ids", "rejected_ids"), strict=True))


def check_weights(dataset: "Dataset", columns: Sequence[str], name: str) -> None:
    """Check the weights of a tokenised data set.

    Args:
        dataset: with `chosen_ids` and `rejected_ids`.
        columns: that the run reads: those of token weights, and that of pair weights.
        name: of the data, for the message.

    Raises:
        ValueError: a missing column, a list that has not one weight for each token, or a weight that is no finite
            number of at least 0; the message names the rows of the tokenised set.
    """
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(f"The {name} data must have the columns of weights {missing}, got {dataset.column_names}.")
    issues = []
    for column in columns:
        lists = column in TOKEN_WEIGHT_COLUMNS
        lengths, values = _read(dataset, column, name, lists=lists)
        rows = np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0))
        if lists:
            tokens = _read(dataset, _IDS[column], name, lists=True)[0]
            wrong = np.flatnonzero(lengths != tokens)
            if len(wrong):
                row = int(wrong[0])
                issues.append(
                    f"`{column}` must have one weight for each token of the response before truncation, its end token "
                    f"included, got another number in {len(wrong)} of {len(lengths)} pairs of the {name} data, first "
                    f"at rows {wrong[:10].tolist()} (row {row}: {max(lengths[row], 0)} weights, {tokens[row]} tokens)."
                )
        bad = ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            wrong = np.unique(rows[bad])
            issues.append(
                f"`{column}` must have finite numbers of at least 0, got others in {len(wrong)} of {len(lengths)} "
                f"pairs of the {name} data, first at rows {wrong[:10].tolist()} (row {wrong[0]}: {values[bad][0]})."
            )
    if issues:
        raise ValueError(" ".join(issues))


def _read(dataset: "Dataset", column: str, name: str, *, lists: bool) -> tuple[np.ndarray, np.ndarray]:
    """Number of values of each row, −1 for a missing list, and all values, NaN where one is missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        found = batch.column(0).combine_chunks()
        numbers = found.type.value_type if lists and pa.types.is_list(found.type) else found.type
        if lists != pa.types.is_list(found.type) or not (
            pa.types.is_floating(numbers) or pa.types.is_integer(numbers)
        ):
            what = "lists of numbers" if lists else "numbers"
            raise ValueError(f"`{column}` of the {name} data must hold {what}, got {found.type}.")
        counts = pc.list_value_length(found).fill_null(-1).to_numpy() if lists else np.ones(len(found), dtype=np.int64)
        lengths.append(counts)
        flat = found.flatten() if lists else found
        values.append(flat.cast(pa.float64()).fill_null(math.nan).to_numpy(zero_copy_only=False))
    return np.concatenate(lengths).astype(np.int64), np.concatenate(values)


def hash_weight_columns(dataset: "Dataset", columns: Sequence[str]) -> str:
    """SHA-256 of the weights of all rows in their order."""
    total = hashlib.sha256()
    for column in columns:
        for numbers in _read(dataset, column, "training", lists=column in TOKEN_WEIGHT_COLUMNS):
            total.update(numbers.astype("<f8").tobytes())
    return total.hexdigest()


@dataclass
class WeightCollator:
    """Another collator, and the weights of the data beside the batch that it makes.

    Example, rows of two and of one completion token after prompts of two and three:

        completion_mask  0 0 1 1     given_token_weights  0 a b
                         0 0 0 1                          0 0 c

    Attributes:
        collate: makes `(2B, L)` tensors of examples, chosen rows first.
        columns: of weights that the run reads.
        truncation_mode: which end of a response is cut.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: Sequence[str]
    truncation_mode: str = "keep_start"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate; examples without weights pass as they are.

        Raises:
            ValueError: weights that are wrong, of streamed data, whose rows cannot be checked before.
        """
        import torch  # here, for the checks above do without it

        found = [column for column in self.columns if column in examples[0]]
        batch = self.collate([{k: v for k, v in e.items() if k not in found} for e in examples])
        if set(found) >= set(TOKEN_WEIGHT_COLUMNS):
            batch[GIVEN_TOKEN_WEIGHTS] = self._token_weights(examples, batch["completion_mask"][:, 1:].bool())
        for column in set(found) - set(TOKEN_WEIGHT_COLUMNS):
            batch[GIVEN_PAIR_WEIGHTS] = torch.tensor([_checked([e[column]], column)[0] for e in examples])
        return batch

    def _token_weights(self, examples: list[dict[str, Any]], mask: "Tensor") -> "Tensor":
        """`(2B, L − 1)` at the completion tokens of `mask`."""
        import torch  # as above

        rows = [
            _checked(e[column], column, tokens=len(e[_IDS[column]]))
            for column in TOKEN_WEIGHT_COLUMNS
            for e in examples
        ]
        kept = [
            row[kept_part(len(row), n, self.truncation_mode)]
            for row, n in zip(rows, mask.sum(dim=1).tolist(), strict=True)
        ]
        return torch.zeros(mask.shape).masked_scatter(mask, torch.tensor([w for row in kept for w in row]))


def _checked(weights: list[float], column: str, tokens: int = 1) -> list[float]:
    if len(weights) != tokens or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(
            f"`{column}` must have one finite weight of at least 0 for each of {tokens} tokens (or one for the pair), "
            f"got {len(weights)}: {str(weights)[:80]}."
        )
    return [float(weight) for weight in weights]
