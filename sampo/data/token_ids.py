"""The columns of token ids of tokenised pairs, and their hash."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def hash_token_ids(dataset: "Dataset", columns: Sequence[str] = ID_COLUMNS) -> str:
    """SHA-256 of the token ids of all rows in their order; of nothing else, and not of `datasets`' random fingerprint.

    Args:
        dataset: with these columns.
        columns: of token ids.
    """
    import pyarrow.compute as pc

    total = hashlib.sha256()
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            ids = batch.column(name).combine_chunks()
            for numbers in (pc.list_value_length(ids), ids.flatten()):
                total.update(numbers.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return total.hexdigest()
