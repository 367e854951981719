"""Load, check, normalise and split preference pairs, before any model is loaded.

`pair_files` finds the rows, `pair_rows` knows what one row may look like; here all rows are counted and accounted for.
`check_preferences` asks the same of data that comes from elsewhere, and changes nothing.
"""

import hashlib
import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import ChatTemplate, template_of
from .columns import PairRows, nearest_column, pair_rows
from .json_files import BrokenLine
from .layouts import (
    EXTRA_COLUMNS,
    KINDS,
    PAIR_COLUMNS,
    READERS,
    Fault,
    Faults,
    Pair,
    PreferenceDataError,
    count_turns,
    fault_of_options,
    guess,
    has_other_content,
    is_text_block,
    layout_of,
    phrase,
    without_nulls,
)
from .repeated_prompts import FEW_BYTES, are_many
from .sources import Table, open_source, pick_split
from .treatment import Treatment, repeats_in_plain_text, treated

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

logger = logging.getLogger(__name__)

TOKENISED_COLUMNS = frozenset({"prompt_ids", "chosen_ids", "rejected_ids"})
IMAGE_COLUMNS = frozenset({"image", "images"})
ON_BAD_ROWS = ("error", "drop")
LENGTH_SPLITS = ("long", "short", "equal", "balanced")


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
        on_bad_rows: `error` raises with the list of all faults; `drop` leaves the bad rows out and logs how many, by
            reason.
        length_split: Keep only pairs whose chosen side is longer (`long`), shorter (`short`) or as long (`equal`) as
            the rejected one, or equally many of `long` and `short` (`balanced`). The subsets of SamPO's Table 1.
        tokenizer: Counts lengths in its tokens; without it they are whitespace words.
        seed: Which pairs `balanced` draws.
        columns: Names of the columns in the source, as `{"prompt": "question"}`; of `prompt`, `chosen`, `rejected`,
            `system` and `input`. An empty name for one of the last two: it is not used. Without a name, `system`
            (or `system_prompt`) and an `input` beside `instruction` are used as docs/data.md says.
        repeated_prompt: `error` refuses responses that begin with their prompt; `cut` cuts it there, with the role
            tags of a template around it.
        text_as_messages: Make a user's message of each text prompt and an assistant's of each text response, without
            the blanks at their ends, so that a chat model is trained through its template.
        chat_template_of: Tokenizer whose chat template every pair of messages is checked with; what it refuses or
            leaves out is a bad row.

    Raises:
        PreferenceDataError: bad rows with `on_bad_rows="error"`, missing columns, unreadable or cut-off files.
        FileNotFoundError: nothing is found at the path.
    """
    _one_of("on_bad_rows", on_bad_rows, ON_BAD_ROWS)
    _one_of("length_split", length_split, (None, *LENGTH_SPLITS))
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
    _one_of("on_bad_rows", on_bad_rows, ON_BAD_ROWS)
    _one_of("length_split", length_split, (None, *LENGTH_SPLITS))
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
                f"`eval_fraction` must leave pairs on both sides, got {eval_fraction} and {len(loaded['train'])} to "
                f"train on, {len(loaded['test'])} to evaluate on, from {label}. Choose another fraction or seed."
            )
    if length_split is not None:
        loaded["train"] = select_by_length(loaded["train"], length_split, tokenizer=tokenizer, seed=seed)
    return loaded


def check_preferences(
    dataset: "Dataset | IterableDataset", *, max_rows_named: int = 10, chat_template_of: Any = None
) -> None:
    """Raise a [`PreferenceDataError`] that lists all faults of a data set, or return quietly; nothing is changed.

    Takes whatever TRL's `DPOTrainer` takes. Of streams, of data sets with images and of those with a transform only
    the columns are looked at; data that is tokenised already is left alone. With a tokenizer in `chat_template_of`
    every pair of messages goes through its chat template.
    """
    from datasets import Dataset

    names = list(dataset.column_names or next(iter(dataset), ()))
    if set(names) >= TOKENISED_COLUMNS:
        return
    # A stream may be endless, and a transform or an image costs more to look at than this check is worth.
    readable = isinstance(dataset, Dataset) and dataset.format["type"] != "custom" and not IMAGE_COLUMNS & set(names)
    if not readable:
        if faults := missing_columns(names):
            raise _error("the preference data", faults, 0)
        return
    table = Table(dataset, names)
    _refuse_other_columns(table)
    scan = _scan(table, Treatment(), template_of(chat_template_of), strict=True)
    if faults := scan.list_faults(names, max_rows_named):
        raise _error("the preference data", faults, scan.total)
    if not scan.total:
        raise PreferenceDataError("A preference data set must have at least one pair, got none.")


def _refuse_other_columns(table: Table) -> None:
    """A trainer takes three columns, and messages as they are: what `load_preferences` would make is lost there."""
    made = pair_rows(table, label="the preference data")
    if isinstance(made, PairRows):
        used = ", ".join(f"`{name}`" for name in made.parts.values())
        raise PreferenceDataError(
            f"The preference data must be in TRL's format, got columns ({used}) of which pairs have to be made first: "
            "a system message, an input, or messages of ShareGPT. Load the data with `load_preferences`, or remove "
            "the columns that are not meant."
        )


def split_by_prompt(dataset: "Dataset", eval_fraction: float, seed: int = 42) -> "tuple[Dataset, Dataset]":
    """Split into (train, eval), so that all pairs of a prompt are on one side.

    The side is a hash of the prompt and the seed: it depends neither on the order of rows nor on the other rows, and
    about `eval_fraction` of the prompts go to the second part.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"`eval_fraction` must lie in [0, 1), got {eval_fraction}.")
    sides: tuple[list[int], list[int]] = ([], [])
    for row, number in enumerate(_prompt_hashes(dataset, str(seed))):
        sides[number < eval_fraction].append(row)
    return dataset.select(sides[0]), dataset.select(sides[1])


def shard_by_prompt(dataset: "Dataset", shard: int, shards: int, seed: int = 42) -> "Dataset":
    """The pairs of shard 1, 2, … `shards`: all pairs of a prompt in one, and each pair in exactly one.

    The shard is a hash of the prompt and the seed, another one than that of `split_by_prompt`, so that the shards of
    what is left after a split are of about equal size too.
    """
    if not 1 <= shard <= shards:
        raise ValueError(f"`shard` must lie in 1 … {shards}, got {shard}.")
    numbers = _prompt_hashes(dataset, f"shard {seed}")
    rows = [row for row, number in enumerate(numbers) if int(number * shards) == shard - 1]
    if not rows:
        raise ValueError(
            f"Each of {shards} shards must have at least one pair, got none of {_number(len(dataset))} for shard "
            f"{shard}. Take fewer shards."
        )
    return dataset.select(rows)


def select_by_length(dataset: "Dataset", which: str, *, tokenizer: Any = None, seed: int = 42) -> "Dataset":
    """Keep the pairs of one length split (SamPO, arXiv 2406.10957, Table 1), in their order.

    Args:
        dataset: Normalised pairs.
        which: `long` (chosen longer than rejected), `short` (chosen shorter), `equal`, or `balanced` (equally many
            long and short ones, drawn at random).
        tokenizer: Counts tokens; without it lengths are whitespace words.
        seed: Of the draw for `balanced`.
    """
    _one_of("length_split", which, LENGTH_SPLITS)
    rows: dict[str, list[int]] = {"long": [], "short": [], "equal": []}
    for row, (chosen, rejected) in enumerate(_lengths(dataset, tokenizer)):
        rows["long" if chosen > rejected else "short" if chosen < rejected else "equal"].append(row)
    if which == "balanced":
        pairs_each = min(len(rows["long"]), len(rows["short"]))
        generator = random.Random(seed)
        rows["balanced"] = sorted(
            row for side in ("long", "short") for row in generator.sample(rows[side], pairs_each)
        )
    unit = "whitespace words" if tokenizer is None else "tokens"
    logger.info(
        "length split `%s`: %s of %s pairs kept (lengths in %s; %s long, %s short, %s equal)",
        *(which, _number(len(rows[which])), _number(len(dataset)), unit),
        *(_number(len(rows[side])) for side in ("long", "short", "equal")),
    )
    if not rows[which]:
        raise ValueError(f"`length_split: {which}` must keep at least one pair, got none of {_number(len(dataset))}.")
    return dataset.select(rows[which])


@dataclass
class _Scan:
    """What one pass over the rows found."""

    layout: str
    total: int = 0
    kept: list[int] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)  # (kind, column) of the first fault of a row -> rows
    faults: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # (kind, column) -> all its rows
    places: dict[str, list[str]] = field(default_factory=dict)  # kind -> file and line of unreadable rows
    seen: Counter = field(default_factory=Counter)  # hash of (prompt, chosen, rejected) -> rows
    swapped: list[int] = field(default_factory=list)  # the same with the sides swapped
    joined_turns: int = 0  # rows in which consecutive turns of one speaker became one
    repeating: list[int] = field(default_factory=list)  # good rows whose responses both begin with the prompt, as text
    telling: int = 0  # how many of them have a prompt that is long enough to tell something
    cut: dict[int, Faults] = field(default_factory=dict)  # what is wrong with them once it is cut
    reasons: dict[str, str] = field(default_factory=dict)  # kind -> what a template said first

    def add(self, faults: Faults) -> None:
        """Count the next row."""
        if not faults:
            self.kept.append(self.total)
        else:
            self.dropped[faults[0]] += 1
            for fault in faults:
                self.faults.setdefault(fault, []).append(self.total)
        self.total += 1

    def settle_repeats(self, treatment: Treatment) -> None:
        """All rows are read: rows that begin with their prompt are bad if they are many, or have faults when cut."""
        if not are_many(self.telling, self.total):
            self.repeating.clear()
            return
        bad = {row: [("repeated_prompt", "chosen"), ("repeated_prompt", "rejected")] for row in self.repeating}
        if treatment.cuts:
            bad = {row: faults for row, faults in self.cut.items() if faults}
        self.kept = [row for row in self.kept if row not in bad]
        for row, faults in bad.items():
            self.dropped[faults[0]] += 1
            for fault in faults:
                self.faults[fault] = sorted([*self.faults.get(fault, []), row])

    def add_broken(self, line: BrokenLine) -> None:
        """Count a row that could not be read."""
        self.places.setdefault(line.kind, []).append(line.place)
        self.add([(line.kind, "")])

    def note_pair(self, pair: Pair) -> None:
        """Remember a good pair, to find its duplicates."""
        prompt, chosen, rejected = pair if isinstance(pair[0], str) else map(repr, pair)
        self.seen[hash((prompt, chosen, rejected))] += 1
        self.swapped.append(hash((prompt, rejected, chosen)))

    def list_faults(self, columns: list[str], max_rows_named: int = 10) -> list[Fault]:
        """All faults, missing columns first."""
        missing = missing_columns(columns)
        # Some unshared beginnings are bad rows, many mean that the prompt is elsewhere.
        unshared = len(self.faults.get(("prompt_not_shared", "prompt"), ()))
        if 10 * unshared > self.total and nearest_column("prompt", columns):
            missing.append(_missing_column("prompt", columns))
        return missing + [
            Fault(kind, column, rows[:max_rows_named], len(rows), self._cure(kind, max_rows_named))
            for (kind, column), rows in self.faults.items()
        ]

    def _cure(self, kind: str, max_rows_named: int) -> str:
        cure = KINDS[kind][1]
        if kind == "wrong_type" and self.layout == "text_beside_messages":
            cure = f"`load_preferences` makes a message of a text `prompt` beside messages. {cure}"
        if kind in self.reasons:
            cure = f"The first: {self.reasons[kind]}. {cure}"
        places = self.places.get(kind, [])
        more = "; …" if len(places) > max_rows_named else ""
        return f"See {'; '.join(places[:max_rows_named])}{more}. {cure}" if places else cure


def _scan(table: Table, treatment: Treatment, template: ChatTemplate | None, *, strict: bool) -> _Scan:
    """Read every row once. `strict`: for a trainer, which takes the rows as they are."""
    absent = {fault.column for fault in missing_columns(table.columns)}
    extras = [column for column in EXTRA_COLUMNS if column in table.columns]
    cells = iter(()) if {"chosen", "rejected"} <= absent else table.cells([*PAIR_COLUMNS, *extras])
    head = list(itertools.islice(cells, 1000))
    scan = _Scan(layout_of(table.columns, [row[:3] for row in head if not isinstance(row, BrokenLine)]))
    treatment.check_layout(scan.layout)
    look = _Look(scan, treatment, template, strict, not IMAGE_COLUMNS & set(table.columns))
    for row in itertools.chain(head, cells):
        if isinstance(row, BrokenLine):
            scan.add_broken(row)
            continue
        pair, faults = look.read(row[:3])
        if absent:  # the other columns are still looked at
            faults = [fault for fault in faults if fault[1] not in absent]
        elif not faults:
            pair, faults = look.check(pair, dict(zip(extras, row[3:], strict=True)))
        if not faults and not absent and not strict:
            scan.note_pair(pair)
            scan.joined_turns += scan.layout == "transcripts" and count_turns(row[1]) > len(pair[0]) + 1
        scan.add(faults)
    scan.settle_repeats(treatment)
    scan.reasons = {} if template is None else template.reasons
    near = nearest_column("prompt", table.columns)
    if scan.layout == "shared_text" and near:
        logger.warning(
            "there is no column `prompt`, so what `chosen` and `rejected` begin with is taken for it. If `%s` is "
            "meant, set `columns` prompt=%s (in Python `columns={'prompt': '%s'}`)",
            *(near, near, near),
        )
    return scan


@dataclass
class _Look:
    """How one row is looked at."""

    scan: _Scan
    treatment: Treatment
    template: ChatTemplate | None
    strict: bool
    text_only: bool  # no columns of images
    first_options: dict[str, Any] | None = None

    def read(self, cells: tuple) -> tuple[Pair, Faults]:
        """The pair of a row, treated as asked."""
        text_beside = self.scan.layout == "text_beside_messages"
        pair, faults = READERS["messages" if self.strict and text_beside else self.scan.layout](*cells)
        pair, faults = self.treatment.take(pair, faults)
        if not faults and (size := repeats_in_plain_text(pair)):
            self.scan.repeating.append(self.scan.total)
            self.scan.telling += size >= FEW_BYTES
            if self.treatment.cuts:
                self.scan.cut[self.scan.total] = self.treatment.take(pair, [], plain_repeats=True)[1]
        return pair, faults

    def check(self, pair: Pair, extra: dict[str, Any]) -> tuple[Pair, Faults]:
        """What the chat template and its options have against a good pair."""
        if self.first_options is None:
            self.first_options = extra
        if fault := fault_of_options(extra, self.first_options):
            return pair, [fault]
        if isinstance(pair[0], str) or not self.text_only:
            return pair, []
        found: Faults = [("not_text", name) for name, part in zip(PAIR_COLUMNS, pair, strict=True) if
                         has_other_content(part)]  # fmt: skip
        if not found and self.template is not None and (fault := self.template.find_fault(pair, extra)):
            found = [fault]
        return pair, found


def _normalise(table: Table, label: str, on_bad_rows: str, treatment: Treatment, tokenizer: Any) -> "Dataset":
    """Check all rows, raise or drop, and bring the rest to explicit prompts."""
    scan = _scan(table, treatment, template_of(tokenizer), strict=False)
    faults = scan.list_faults(table.columns)
    if any(fault.kind == "missing_column" for fault in faults) or (faults and on_bad_rows == "error"):
        raise _error(label, faults, scan.total)
    if not scan.kept:
        raise _error(label, faults, scan.total) if faults else PreferenceDataError(f"{label} has no rows.")
    if faults:
        reasons = "; ".join(f"{_number(n)} {phrase(kind, column, n)}" for (kind, column), n in scan.dropped.items())
        numbers = (label, _number(scan.total - len(scan.kept)), _number(scan.total), _number(len(scan.kept)))
        logger.warning("%s: dropped %s of %s pairs, kept %s: %s", *numbers, reasons)
    _report_twins(scan, label)
    dataset = table.select(scan.kept)
    if scan.layout in ("text", "messages"):
        return treated(dataset, treatment, bool(scan.repeating), label)
    logger.info("%s: layout `%s`, made into explicit prompts", label, scan.layout)
    dataset = dataset.with_format(None).map(
        _read_batch,
        batched=True,
        fn_kwargs={"layout": scan.layout},
        features=_explicit_features(dataset, scan.layout),
        desc="Separating prompts from completions",
    )
    return treated(dataset, treatment, bool(scan.repeating), label)


def _read_batch(batch: dict[str, list], layout: str) -> dict[str, list]:
    prompts = batch.get("prompt") or [None] * len(batch["chosen"])
    pairs = [READERS[layout](*row)[0] for row in zip(prompts, batch["chosen"], batch["rejected"], strict=True)]
    return dict(zip(PAIR_COLUMNS, map(list, zip(*pairs, strict=True)), strict=True))


def _explicit_features(dataset: "Dataset", layout: str) -> Any:
    """Column types of the normalised data: those of the sides, which also hold the prompt in shared layouts."""
    from datasets import Features, List, Value

    plain_message = List({"role": Value("string"), "content": Value("string")})
    kept = dict(dataset.features)
    if layout == "transcripts":
        kept |= dict.fromkeys(PAIR_COLUMNS, plain_message)
    return Features({"prompt": kept["chosen"], **{name: kind for name, kind in kept.items() if name != "prompt"}})


def _report_twins(scan: _Scan, label: str) -> None:
    again = sum(count - 1 for count in scan.seen.values())
    against = sum(swapped in scan.seen for swapped in scan.swapped)
    if again or against:
        logger.warning(
            "%s: %s of %s pairs repeat an earlier pair, and %s contradict another one (same prompt, sides swapped); "
            "all are kept",
            *(label, _number(again), _number(len(scan.kept)), _number(against)),
        )
    if scan.joined_turns:
        logger.info("%s: consecutive turns of one speaker joined in %s pairs", label, _number(scan.joined_turns))


def missing_columns(columns: list[str]) -> list[Fault]:
    """A fault for each side that has no column."""
    return [_missing_column(column, columns) for column in ("chosen", "rejected") if column not in columns]


def _missing_column(column: str, columns: list[str]) -> Fault:
    near = nearest_column(column, columns)
    option = f"`columns` {column}={near or 'NAME'} (in Python `columns={{{column!r}: {near or 'NAME'!r}}}`)"
    what = f"Did you mean `{near}`? Set {option}" if near else f"Name the right one with {option}"
    return Fault("missing_column", column, [], 0, f"The columns are {columns}. {what}.")


def _error(label: str, faults: list[Fault], total: int) -> PreferenceDataError:
    lines = [f"{label} cannot be trained on (rows count from 0):"]
    for fault in faults:
        if fault.kind == "missing_column":
            lines.append(f"- There is no column `{fault.column}`. {fault.cure}")
            continue
        lines.append(f"- {fault.in_words(total)}")
    return PreferenceDataError("\n".join(lines), faults)


def _number(count: int) -> str:
    return f"{count:,}"


def _one_of(option: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"`{option}` must be one of {list(choices)}, got {value!r}.{guess(str(value), choices)}")


def _prompt_hashes(dataset: "Dataset", key: str) -> Iterator[float]:
    """`_prompt_hash` of each row."""
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"A split by prompt needs a `prompt` column, got {dataset.column_names}. Load the data with "
            "`load_preferences`, which finds the prompt that both sides share."
        )
    for batch in dataset.with_format(None).select_columns(["prompt"]).iter(batch_size=1000):
        yield from (_prompt_hash(prompt, key) for prompt in batch["prompt"])


def _prompt_hash(prompt: Any, key: str) -> float:
    """A number in [0, 1) for a prompt."""
    digest = hashlib.blake2b(f"{key}\n{as_text(prompt)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def as_text(part: Any) -> str:
    """A prompt or side as one text, equal for equal content: Arrow adds nulls to messages that lack a key."""
    return json.dumps([without_nulls(message) for message in part], sort_keys=True) if isinstance(part, list) else part


def _lengths(dataset: "Dataset", tokenizer: Any) -> Iterator[tuple[int, int]]:
    """Lengths of chosen and rejected of each pair, in tokens or whitespace words, without template and end token."""
    for batch in dataset.with_format(None).select_columns(["chosen", "rejected"]).iter(batch_size=1000):
        sides = [[said(completion) for completion in batch[side]] for side in ("chosen", "rejected")]
        if tokenizer is None:
            counted = [[len(text.split()) for text in side] for side in sides]
        else:
            counted = [[len(ids) for ids in tokenizer(side, add_special_tokens=False)["input_ids"]] for side in sides]
        yield from zip(*counted, strict=True)


def said(completion: str | list[dict]) -> str:
    """The text of a prompt or completion: what its messages say, without template, tool calls and reasoning."""
    if isinstance(completion, str):
        return completion
    parts = []
    for message in completion:
        content = message.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        parts += [block["text"] for block in blocks if is_text_block(block) and block["text"]]
    return "\n".join(parts)
