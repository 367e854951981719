"""Write pairs as JSON Lines or Parquet, by the name of the file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.files import replacing

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".parquet")


def check_pairs_path(path: Path) -> None:
    """Raise for a name that is of neither format."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"`out` must end in one of {list(SUFFIXES)}, got {path.name!r}.")


def beside(path: Path, ending: str) -> Path:
    """The name of a further file of the same pairs: `pairs.account.jsonl` beside `pairs.jsonl`."""
    return path.with_suffix(f".{ending}")


def write_pairs(path: Path, pairs: "Dataset") -> None:
    """Write all rows; the write is atomic."""
    check_pairs_path(path)
    with replacing(path) as file:
        if path.suffix == ".parquet":
            pairs.to_parquet(file)
        else:
            for row in pairs:
                file.write(f"{json.dumps(row)}\n".encode())
