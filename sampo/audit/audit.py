"""`audit_preferences`: all measurements of preference data that need no model."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.columns import TableRows, pair_rows
from ..data.issues import PreferenceDataError, suggest
from ..data.lengths import TRUNCATION_MODES
from ..data.sources import Files, open_source
from ..data.treatment import Treatment
from .bias import LengthBias, length_bias
from .duplicates import Duplicates, SplitOverlap, count_duplicates, find_overlap
from .scan import Advance, Groups, PairNumbers, SplitScan, scan_split
from .tokens import TokenCounter, WordCounter
from .truncation import Truncation, measure_truncation

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        label: name of the data.
        unit: unit of the lengths: `tokens` or `words`.
        about: the settings that the numbers depend on: tokenizer, group column, columns.
        fingerprint: hash of all good pairs in their order.
        scans: one per split, with issues by kind and the numbers of each pair.
        overall: how far length explains the preference in all good pairs.
        splits: the same of each split, where there are several.
        groups: the same of each value of the column `by`.
        group_names: these values by the number that `PairNumbers.group` gives them.
        truncations: the effect of each `max_length`; the first is without one. Empty if lengths are in words.
        repeats: duplicates within each split.
        overlaps: prompts and pairs that each two splits share.
    """

    label: str
    unit: str
    about: dict[str, Any]
    fingerprint: str
    scans: list[SplitScan]
    overall: LengthBias
    splits: dict[str, LengthBias]
    groups: dict[str, LengthBias]
    group_names: list[str]
    truncations: list[Truncation]
    repeats: dict[str, Duplicates]
    overlaps: list[SplitOverlap]

    @property
    def rows(self) -> int:
        """Rows of all splits, good and bad."""
        return sum(scan.rows for scan in self.scans)

    @property
    def has_issues(self) -> bool:
        """Whether any row is bad, or any file could not be read to its end."""
        return any(scan.issues for scan in self.scans)


def audit_preferences(
    *sources: "str | Path | Dataset | DatasetDict",
    tokenizer: "str | PreTrainedTokenizerBase | None" = None,
    by: str | None = None,
    max_length: int | Sequence[int] = (),
    truncation_mode: str = "keep_start",
    splits: Sequence[str] | None = None,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    label: str | None = None,
    progress: Advance | None = None,
    repeated_prompt: str = "error",
    text_as_messages: bool = False,
) -> Audit:
    """Check every row of preference data, and measure how far length explains the preference.

    JSON Lines and Parquet files are streamed; 64 bytes per pair are kept. Bad rows are counted and omitted; a
    truncated file is audited up to its last readable row, and the truncation is an issue.

    Args:
        sources: files, folders, data set ids on the hub, or data sets already loaded, as `load_preferences` takes
            them. All splits are read.
        tokenizer: of the model that is to be trained, or its name; lengths are then completion tokens as the trainer
            counts them. Without it, lengths are in whitespace-separated words.
        by: name of a column; every number is also given for each of its values.
        max_length: one or several lengths, in tokens of prompt and response together; the effect of each is computed.
        truncation_mode: `keep_start` or `keep_end`, as the trainer's option.
        splits: names of the splits to read; all without it.
        name: configuration of a hub data set; sub-folder of a local folder.
        columns: names of our columns in the source, as in `load_preferences`.
        label: name of the data; by default the name of the file, folder or data set.
        progress: called with (rows done, rows in all) of the current split.
        repeated_prompt: `error` or `cut`, as in `load_preferences`.
        text_as_messages: as in `load_preferences`.

    Raises:
        PreferenceDataError: `chosen` or `rejected` is missing, or there is no good pair at all.
        ValueError: an option has an invalid value.
        FileNotFoundError: nothing is found at a path.
    """
    lengths = [max_length] if isinstance(max_length, int) else list(max_length)
    _check(lengths, truncation_mode, tokenizer)
    counter = _counter(tokenizer)
    found, tables = _open_splits(sources, name, splits)
    groups = Groups()
    treatment = Treatment(repeated_prompt, text_as_messages)
    scans = [
        scan_split(
            split,
            pair_rows(rows(), columns, f"split `{split}`"),
            counter,
            by=by,
            groups=groups,
            advance=progress or (lambda done, of: None),
            treatment=treatment,
        )
        for split, rows in tables.items()
    ]
    pairs = PairNumbers.concatenate(scan.pairs for scan in scans)
    if not len(pairs):
        issues = [issue for scan in scans for issue in scan.issues]
        described = " ".join(issue.describe(scan.rows) for scan in scans for issue in scan.issues)
        raise PreferenceDataError(f"{found} must have at least one good pair, got none. {described}".rstrip(), issues)
    about = {**counter.about, "by": by, "columns": dict(columns or {}), "splits": list(tables)}
    if treatment != Treatment():
        about |= asdict(treatment)
    return _describe(label or found, counter.unit, about, scans, pairs, groups, lengths, truncation_mode)


def _describe(
    label: str,
    unit: str,
    about: dict[str, Any],
    scans: list[SplitScan],
    pairs: PairNumbers,
    groups: Groups,
    lengths: list[int],
    truncation_mode: str,
) -> Audit:
    names = list(groups.names)
    filled = [(names[number], number) for number in np.unique(pairs.group)] if names else []
    cuts: list[int | None] = [None, *lengths]
    return Audit(
        label=label,
        unit=unit,
        about=about,
        fingerprint=hashlib.sha256(pairs.pair_hash.tobytes()).hexdigest()[:16],
        scans=scans,
        overall=_bias(pairs, unit),
        splits={scan.name: _bias(scan.pairs, unit) for scan in scans} if len(scans) > 1 else {},
        groups={name: _bias(pairs.select(pairs.group == number), unit) for name, number in filled},
        group_names=names,
        truncations=[measure_truncation(pairs, cut, truncation_mode) for cut in cuts] if unit == "tokens" else [],
        repeats={scan.name: count_duplicates(scan.pairs) for scan in scans},
        overlaps=[find_overlap(a.name, a.pairs, b.name, b.pairs) for a, b in itertools.combinations(scans, 2)],
    )


def _bias(pairs: PairNumbers, unit: str) -> LengthBias:
    ended = (pairs.chosen_end >= 0, pairs.rejected_end >= 0) if unit == "tokens" else None
    return length_bias(pairs.prompt, pairs.chosen, pairs.rejected, pairs.prompt_hash, unit=unit, ended=ended)


def _check(lengths: list[int], truncation_mode: str, tokenizer: Any) -> None:
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(f"`truncation_mode` must be one of {list(TRUNCATION_MODES)}, got {truncation_mode!r}.")
    if any(length < 2 for length in lengths):
        raise ValueError(f"`max_length` must be at least 2 tokens, got {lengths}.")
    if lengths and tokenizer is None:
        raise ValueError("`max_length` must come with a `tokenizer`, since it counts tokens, got none.")


def _counter(tokenizer: Any) -> WordCounter | TokenCounter:
    if tokenizer is None:
        return WordCounter()
    if isinstance(tokenizer, str | Path):
        from ..models.load import load_tokenizer

        tokenizer, name = load_tokenizer(str(tokenizer)), str(tokenizer)
    else:
        name = tokenizer.name_or_path
    # for a folder, only its last component: the path has no influence on tokens, and the hash identifies it
    return TokenCounter(tokenizer, Path(name).name if Path(name).is_dir() else name)


def _open_splits(
    sources: Sequence[Any], name: str | None, splits: Sequence[str] | None
) -> tuple[str, dict[str, Callable[[], TableRows]]]:
    """Return a name of the data and the rows of each split. Splits of several sources are named after their source."""
    opened = [open_source(source, name) for source in sources]
    if not opened:
        raise ValueError("At least one source must be given, got none.")
    tables: dict[str, Callable[[], TableRows]] = {}
    for number, (label, found) in enumerate(opened):
        for split, read in found.items():
            title = split if len(opened) == 1 else label if len(found) == 1 else f"{label} {split}"
            title = f"{title} ({number + 1})" if title in tables else title
            tables[title] = read.stream if isinstance(read, Files) else read
    if splits is not None:
        unknown = [split for split in splits if split not in tables]
        if unknown:
            raise ValueError(
                f"`splits` must be among {list(tables)}, got {unknown[0]!r}.{suggest(unknown[0], tables)}"
            )
        tables = {split: tables[split] for split in splits}
    return ", ".join(label for label, _ in opened), tables
