"""The columns of token ids of tokenised pairs, and their hash."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def hash_token_ids(dataset: "Dataset") -> str:
    """SHA-256 of the token ids of all rows in their order; of nothing else, and not of `datasets`' random fingerprint.

    Args:
        dataset: with `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """
    import pyarrow.compute as pc

    total = hashlib.sha256()
    for batch in dataset.select_columns(list(ID_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        for name in ID_COLUMNS:
            ids = batch.column(name).combine_chunks()
            for numbers in (pc.list_value_length(ids), ids.flatten()):
                total.update(numbers.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return total.hexdigest()
