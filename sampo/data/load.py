"""Load preference pairs: check all rows, keep or refuse them, and bring them to explicit prompts."""

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import template_of
from .issues import ON_BAD_ROWS, PreferenceDataError, check_choice, phrase
from .layouts import PAIR_COLUMNS, READERS, Pair, count_turns
from .sources import SourceTable, open_source, pick_split
from .subsets import LENGTH_SPLITS, select_by_length, split_by_prompt
from .treatment import Treatment, apply_treatment
from .validate import RowScanner, make_error

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)


def load_preferences(
    source: "str | Path | Dataset | DatasetDict",
    *,
    split: str | None = None,
    name: str | None = None,
    on_bad_rows: str = "error",
    length_split: str | None = None,
    tokenizer: Any = None,
    seed: int = 42,
    columns: dict[str, str] | None = None,
    repeated_prompt: str = "error",
    text_as_messages: bool = False,
    chat_template_of: Any = None,
) -> "Dataset":
    """Load preference pairs, check each of them, and return them with columns `prompt`, `chosen` and `rejected`.

    Args:
        source: A JSON, JSONL or Parquet file (each also as `.gz`), a folder of them or of `save_to_disk`, a data set
            id on the hub, or a data set already loaded. A path that exists is never looked up on the hub.
        split: Name of the split, with a slice if wanted (`"train[:100]"`). Not needed where there is only one; where
            there are several, `train` is taken.
        name: Configuration of a hub data set, or a sub-folder of a local folder.
        on_bad_rows: `error` raises with the list of all issues; `drop` leaves the bad rows out and logs how many, by
            reason.
        length_split: Keep only pairs whose chosen response is longer (`long`), shorter (`short`) or as long (`equal`)
            as the rejected one, or equally many of `long` and `short` (`balanced`). The subsets of SamPO's Table 1.
        tokenizer: Counts lengths in its tokens; without it they are whitespace words.
        seed: Which pairs `balanced` draws.
        columns: Names of the columns in the source, as `{"prompt": "question"}`; of `prompt`, `chosen`, `rejected`,
            `system` and `input`. An empty name for one of the last two: it is not used. Without a name, `system`
            (or `system_prompt`) and an `input` beside `instruction` are used as described in docs/data.md.
        repeated_prompt: `error` raises for responses that begin with their prompt; `cut` removes the prompt there,
            with the role tags of a template around it.
        text_as_messages: Make a user message of each text prompt and an assistant message of each text response,
            without the blanks at their ends, so that a chat model is trained through its template.
        chat_template_of: Tokenizer whose chat template every pair of messages is checked with; a row that it raises
            for or leaves text out of is a bad row.

    Raises:
        PreferenceDataError: bad rows with `on_bad_rows="error"`, missing columns, unreadable or cut-off files.
        FileNotFoundError: nothing is found at the path.
    """
    check_choice("on_bad_rows", on_bad_rows, ON_BAD_ROWS)
    check_choice("length_split", length_split, (None, *LENGTH_SPLITS))
    treatment = Treatment(repeated_prompt, text_as_messages)
    label, tables = open_source(source, name)
    table = pick_split(tables, split, label).of_pairs(columns or {}, label)
    dataset = _normalise(table, label, on_bad_rows, treatment, chat_template_of)
    return dataset if length_split is None else select_by_length(dataset, length_split, tokenizer=tokenizer, seed=seed)


def load_preference_splits(
    source: "str | Path | Dataset | DatasetDict",
    *,
    name: str | None = None,
    train_split: str = "train",
    test_split: str | None = "test",
    eval_fraction: float = 0.0,
    on_bad_rows: str = "error",
    length_split: str | None = None,
    tokenizer: Any = None,
    seed: int = 42,
    columns: dict[str, str] | None = None,
    repeated_prompt: str = "error",
    text_as_messages: bool = False,
    chat_template_of: Any = None,
) -> "dict[str, Dataset]":
    """Load what a training run needs: `{"train": …}`, and `"test"` where the source has one or it is split off.

    Args:
        source: This and all that is not named here is as in [`load_preferences`].
        name: Configuration or sub-folder.
        train_split: Split to train on.
        test_split: Split to evaluate on, where the source has it. `None`: never look for one.
        eval_fraction: Share of the prompts to split off for evaluation where the source has no `test_split`.
        on_bad_rows: `error` or `drop`, for each split.
        length_split: Applies to the training pairs only, so that length subsets share one test set.
        tokenizer: For `length_split`.
        seed: Of `eval_fraction` and `length_split`.
        columns: Names of the columns in the source.
        repeated_prompt: As in [`load_preferences`].
        text_as_messages: Likewise.
        chat_template_of: Likewise.
    """
    check_choice("on_bad_rows", on_bad_rows, ON_BAD_ROWS)
    check_choice("length_split", length_split, (None, *LENGTH_SPLITS))
    treatment = Treatment(repeated_prompt, text_as_messages)
    label, tables = open_source(source, name)

    def load(split: str) -> "Dataset":
        table = pick_split(tables, split, label).of_pairs(columns or {}, label)
        return _normalise(table, f"split `{split}` of {label}", on_bad_rows, treatment, chat_template_of)

    loaded = {"train": load(train_split)}
    # Without a split called `test` there is nothing to evaluate on; one that was asked for by another name must exist.
    if test_split is not None and (test_split.split("[")[0] in tables or (test_split != "test" and not eval_fraction)):
        loaded["test"] = load(test_split)
    elif eval_fraction:
        loaded["train"], loaded["test"] = split_by_prompt(loaded["train"], eval_fraction, seed)
        if not len(loaded["train"]) or not len(loaded["test"]):
            raise ValueError(
                f"`eval_fraction` must leave pairs in both parts, got {eval_fraction} and {len(loaded['train'])} to "
                f"train on, {len(loaded['test'])} to evaluate on, from {label}. Choose another fraction or seed."
            )
    if length_split is not None:
        loaded["train"] = select_by_length(loaded["train"], length_split, tokenizer=tokenizer, seed=seed)
    return loaded


def _normalise(table: SourceTable, label: str, on_bad_rows: str, treatment: Treatment, tokenizer: Any) -> "Dataset":
    """Check all rows, raise or drop, and bring the rest to explicit prompts."""
    scanner = RowScanner(table, treatment, template=template_of(tokenizer))
    kept: list[int] = []
    duplicates = _Duplicates()
    joined_turns = 0  # rows in which consecutive turns of one speaker became one
    for row in scanner:
        if row.issues:
            continue
        kept.append(row.number)
        if not scanner.missing:
            duplicates.add(row.pair)
            joined_turns += scanner.layout == "transcripts" and count_turns(row.cells[1]) > len(row.pair[0]) + 1
    bad = scanner.settle_repeats()
    kept = [row for row in kept if row not in bad]
    scanner.warn_of_prompt_like_column()
    _account_for_bad_rows(scanner, len(kept), label, on_bad_rows)
    duplicates.warn(label, len(kept))
    if joined_turns:
        logger.info("%s: consecutive turns of one speaker joined in %s pairs", label, f"{joined_turns:,}")
    dataset = table.select(kept)
    if scanner.layout not in ("text", "messages"):
        logger.info("%s: layout `%s`, made into explicit prompts", label, scanner.layout)
        dataset = dataset.with_format(None).map(
            _read_batch,
            batched=True,
            fn_kwargs={"layout": scanner.layout},
            features=_explicit_features(dataset, scanner.layout),
            desc="Separating prompts from completions",
        )
    return apply_treatment(dataset, treatment, scanner.repeats_prompts, label)


def _account_for_bad_rows(scanner: RowScanner, n_kept: int, label: str, on_bad_rows: str) -> None:
    """Raise for bad rows or log how many are dropped, by the first issue of each."""
    issues, total = scanner.list_issues(), scanner.total
    if any(issue.kind == "missing_column" for issue in issues) or (issues and on_bad_rows == "error"):
        raise make_error(label, issues, total)
    if not n_kept:
        raise make_error(label, issues, total) if issues else PreferenceDataError(f"{label} has no rows.")
    if issues:
        dropped = scanner.issues.first_issues.items()
        reasons = "; ".join(f"{count:,} {phrase(kind, column, count)}" for (kind, column), count in dropped)
        numbers = (f"{total - n_kept:,}", f"{total:,}", f"{n_kept:,}")
        logger.warning("%s: dropped %s of %s pairs, kept %s: %s", label, *numbers, reasons)


class _Duplicates:
    """Counts pairs that repeat an earlier one, and pairs that contradict another one, by their hashes."""

    def __init__(self) -> None:
        self.seen: Counter[int] = Counter()  # hash of (prompt, chosen, rejected) -> rows
        self.swapped: list[int] = []  # the same with the responses swapped

    def add(self, pair: Pair) -> None:
        """Remember a good pair."""
        prompt, chosen, rejected = pair if isinstance(pair[0], str) else map(repr, pair)
        self.seen[hash((prompt, chosen, rejected))] += 1
        self.swapped.append(hash((prompt, rejected, chosen)))

    def warn(self, label: str, n_kept: int) -> None:
        """Log a warning if there are duplicates."""
        repeated = sum(count - 1 for count in self.seen.values())
        contradicting = sum(swapped in self.seen for swapped in self.swapped)
        if repeated or contradicting:
            logger.warning(
                "%s: %s of %s pairs repeat an earlier pair, and %s contradict another one (same prompt, responses "
                "swapped); all are kept",
                *(label, f"{repeated:,}", f"{n_kept:,}", f"{contradicting:,}"),
            )


def _read_batch(batch: dict[str, list], layout: str) -> dict[str, list]:
    prompts = batch.get("prompt") or [None] * len(batch["chosen"])
    pairs = [READERS[layout](*row)[0] for row in zip(prompts, batch["chosen"], batch["rejected"], strict=True)]
    return dict(zip(PAIR_COLUMNS, map(list, zip(*pairs, strict=True)), strict=True))


def _explicit_features(dataset: "Dataset", layout: str) -> Any:
    """Column types of the normalised data: those of the responses, which hold the prompt too in shared layouts."""
    from datasets import Features, List, Value

    plain_message = List({"role": Value("string"), "content": Value("string")})
    kept = dict(dataset.features)
    if layout == "transcripts":
        kept |= dict.fromkeys(PAIR_COLUMNS, plain_message)
    return Features({"prompt": kept["chosen"], **{name: kind for name, kind in kept.items() if name != "prompt"}})
