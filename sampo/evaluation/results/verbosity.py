"""How long answers are, and how much of their length is repetition.

The unit is the prompt: several answers to one prompt are averaged, or share its weight. The mean is always shown with
median and 90th percentile, because a few answers that repeat themselves up to the limit move the mean alone.
"""

import re
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...data.layouts import is_blank_text
from ...io.tables import Table
from ...stats.intervals import (
    Estimate,
    codes_of,
    mean_interval,
    prompt_means,
    quantile_interval,
    rate_interval,
    undefined,
)
from .cells import BELOW, NONE, show_estimate

UNITS = ("tokens", "words", "characters")
QUANTILES = {"median": 0.5, "p90": 0.9}
LONG_TEXT = 200  # characters above which a compression ratio depends on the text and not on zlib's overhead
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


@dataclass(frozen=True, kw_only=True)
class System:
    """Answers of one system, one row per answer.

    Attributes:
        name: of the system.
        prompt: `(n,)` id of the prompt; several answers to a prompt repeat it.
        text: `(n,)` the answers.
        tokens: `(n,)` tokens of each answer, or None.
        tokenizer: whose tokens these are; must be named where `tokens` is given.
        stop: `(n,)` `eos`, `length` (cut off by the limit) or `unknown`; None if nothing is known.
    """

    name: str
    prompt: Sequence[Hashable]
    text: Sequence[str]
    tokens: Sequence[int] | None = None
    tokenizer: str | None = None
    stop: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for column in ("text", "tokens", "stop"):
            rows = getattr(self, column)
            if rows is not None and len(rows) != len(self.prompt):
                raise ValueError(
                    f"`{column}` of {self.name!r} must have one row per answer, got {len(rows)} for "
                    f"{len(self.prompt)} of `prompt`."
                )
        if self.tokens is not None and not self.tokenizer:
            raise ValueError(
                f"`tokenizer` must be named where `tokens` are given, got none for {self.name!r}. "
                "A number of tokens means nothing without it."
            )

    @classmethod
    def of(cls, name: str, answers: Iterable[Any]) -> "System":
        """From answer records: `prompt_id`, `answer`, `tokens`, `tokenizer` and `stop` of each.

        Token counts are taken only where every answer has one, all by the same tokenizer.
        """
        rows = list(answers)
        tokenizers = {row.tokenizer for row in rows}
        counted = (
            rows and all(row.tokens is not None for row in rows) and len(tokenizers) == 1 and None not in tokenizers
        )
        return cls(
            name=name,
            prompt=[row.prompt_id for row in rows],
            text=[row.answer for row in rows],
            tokens=[row.tokens for row in rows] if counted else None,
            tokenizer=tokenizers.pop() if counted else None,
            stop=[row.stop for row in rows],
        )

    def counted_by(self, tokenizer: str, count: Callable[[str], int]) -> "System":
        """The same answers with their tokens counted anew, so that systems with other tokenizers can be compared.

        Args:
            tokenizer: its name.
            count: number of tokens of a text, without special tokens.
        """
        return replace(self, tokens=[count(text) for text in self.text], tokenizer=tokenizer)

    def lengths(self, unit: str) -> np.ndarray | None:
        """`(n,)` lengths in `tokens`, `words` (parts between blanks) or `characters` (code points)."""
        if unit not in UNITS:
            raise ValueError(f"`unit` must be one of {list(UNITS)}, got {unit!r}.")
        if unit == "tokens":
            return None if self.tokens is None else np.asarray(self.tokens, dtype=float)
        return np.array([len(text.split()) if unit == "words" else len(text) for text in self.text], dtype=float)


@dataclass(frozen=True, kw_only=True)
class Verbosity:
    """The measures of one system.

    Attributes:
        system: its name.
        tokenizer: of the tokens, or None.
        answers: their number.
        prompts: their number.
        measures: by name, as in docs/evaluation.md; an undefined measure has the value None.
        baseline: whom the ratios are to, or None.
        notes: what a reader has to know, in sentences.
    """

    system: str
    tokenizer: str | None
    answers: int
    prompts: int
    measures: Mapping[str, Estimate]
    baseline: str | None = None
    notes: tuple[str, ...] = field(default=())

    def row(self) -> dict[str, Any]:
        """One flat row for CSV or JSON: every measure with the bounds of its interval."""
        row: dict[str, Any] = {
            "system": self.system,
            "baseline": self.baseline,
            "answers": self.answers,
            "prompts": self.prompts,
            "tokenizer": self.tokenizer,
        }
        for name, estimate in self.measures.items():
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return row | {"notes": " ".join(self.notes)}


def verbosity(system: System, baseline: System | None = None, *, confidence: float = 0.95) -> Verbosity:
    """All measures of one system, and its lengths beside a baseline's, paired by prompt."""
    codes, ids = codes_of(system.prompt)
    if not ids:
        raise ValueError(f"{system.name!r} must have at least one answer, got none.")
    measures: dict[str, Estimate] = {}
    for unit in UNITS:
        measures |= _of_length(system.lengths(unit), codes, unit, confidence)
    measures |= _of_stops(system, codes, confidence) | _of_repetition(system, codes, confidence)
    notes: list[str] = []
    unknown = system.stop is None or any(stop == "unknown" for stop in system.stop)
    if unknown:
        notes.append("Some answers have no stop reason: cut ones among them would look concise.")
    if baseline is not None:
        for unit in UNITS:
            measures |= _relative_lengths(system, baseline, unit, confidence, notes)
    return Verbosity(
        system=system.name,
        tokenizer=system.tokenizer,
        answers=len(codes),
        prompts=len(ids),
        measures=measures,
        baseline=None if baseline is None else baseline.name,
        notes=tuple(notes),
    )


def _of_length(values: np.ndarray | None, codes: np.ndarray, unit: str, confidence: float) -> dict[str, Estimate]:
    if values is None:
        return {f"{unit}_{name}": undefined(0) for name in ("mean", *QUANTILES)}
    found = {f"{unit}_mean": mean_interval(prompt_means(values, codes), confidence)}
    for name, level in QUANTILES.items():
        found[f"{unit}_{name}"] = quantile_interval(values, codes, level, confidence=confidence)
    return found


def _of_stops(system: System, codes: np.ndarray, confidence: float) -> dict[str, Estimate]:
    empty = np.array([is_blank_text(text) for text in system.text])
    known = np.array([stop in ("eos", "length") for stop in system.stop or []], dtype=bool)
    cut = np.array([stop == "length" for stop in system.stop or []], dtype=bool)
    return {
        "cut": _share_of_answers(cut[known], codes[: len(known)][known], confidence),
        "empty": _share_of_answers(empty, codes, confidence),
    }


def _of_repetition(system: System, codes: np.ndarray, confidence: float) -> dict[str, Estimate]:
    """Each measure over the answers that are long enough for it."""
    found = {}
    for n in (1, 2, 3):
        values, own = _defined([distinct_n(text, n) for text in system.text], codes)
        found[f"distinct_{n}"] = _share_of_answers(values, own, confidence)
    values, own = _defined([repeated_sentences(text) for text in system.text], codes)
    found["repeated_sentences"] = _share_of_answers(values, own, confidence)
    values, own = _defined([compression_ratio(text) for text in system.text], codes)
    found["compression_mean"] = mean_interval(prompt_means(values, own), confidence) if len(own) else undefined(0)
    for name, level in {"median": 0.5, "p99": 0.99}.items():
        found[f"compression_{name}"] = quantile_interval(values, own, level, confidence=confidence)
    return found


def _defined(values: Sequence[float | None], codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that there are, and their prompts numbered anew."""
    kept = [i for i, value in enumerate(values) if value is not None]
    return np.array([values[i] for i in kept], dtype=float), codes_of(codes[kept])[0]


def _share_of_answers(values: np.ndarray, codes: np.ndarray, confidence: float) -> Estimate:
    if not len(values):
        return undefined(0)
    return rate_interval(prompt_means(values.astype(float), codes_of(codes)[0]), confidence)


def distinct_n(text: str, n: int) -> float | None:
    """Share of different n-grams of words among all of one answer; None with fewer than n words."""
    words = text.casefold().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def compression_ratio(text: str) -> float | None:
    """Bytes over bytes packed by zlib: prose has 1.5 to 3, an answer in a loop 10 and more. None for short texts."""
    if len(text) <= LONG_TEXT:
        return None
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw) / len(zlib.compress(raw, 9))


def repeated_sentences(text: str) -> float | None:
    """Share of sentences (or lines) of an answer that stood in it before; None with fewer than two."""
    sentences = [" ".join(part.casefold().split()) for part in _SENTENCE_END.split(text)]
    sentences = [sentence for sentence in sentences if sentence]
    return 1 - len(set(sentences)) / len(sentences) if len(sentences) > 1 else None


def _relative_lengths(
    system: System, baseline: System, unit: str, confidence: float, notes: list[str]
) -> dict[str, Estimate]:
    """Ratio of lengths (geometric mean over prompts) and share of longer answers, on the prompts that both have."""
    names = (f"{unit}_ratio", f"{unit}_longer")
    ours, theirs = system.lengths(unit), baseline.lengths(unit)
    if ours is None or theirs is None:
        return dict.fromkeys(names, undefined(0))
    if unit == "tokens" and system.tokenizer != baseline.tokenizer:
        notes.append(
            f"Tokens of {system.tokenizer} and of {baseline.tokenizer} do not compare: no ratio. "
            "Count both by one tokenizer."
        )
        return dict.fromkeys(names, undefined(0))
    rows, other = _rows_by_prompt(system.prompt), _rows_by_prompt(baseline.prompt)
    shared = [prompt for prompt in rows if prompt in other]
    longer = [_share_above(ours[rows[p]], theirs[other[p]]) for p in shared]
    full = [p for p in shared if (ours[rows[p]] > 0).all() and (theirs[other[p]] > 0).all()]
    logs = np.array([np.log(ours[rows[p]]).mean() - np.log(theirs[other[p]]).mean() for p in full])
    if unit == UNITS[-1]:  # noted once, for characters, which every system has
        apart, empty = len(rows) + len(other) - 2 * len(shared), len(shared) - len(full)
        if apart:
            notes.append(f"{apart} prompts that only one of the two systems has are left out beside {baseline.name}.")
        if empty:
            notes.append(f"{empty} prompts with an empty answer have no ratio of lengths.")
    return {names[0]: _exp(mean_interval(logs, confidence)), names[1]: rate_interval(np.array(longer), confidence)}


def _share_above(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of all pairs of `(n,)` and `(m,)` values in which ours is larger, without the `(n, m)` table of them."""
    return float(np.searchsorted(np.sort(theirs), ours, side="left").mean() / len(theirs))


def _rows_by_prompt(prompts: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    rows: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    return rows


def _exp(estimate: Estimate) -> Estimate:
    if estimate.value is None:
        return estimate
    bounds = [None if x is None else float(np.exp(x)) for x in (estimate.low, estimate.high)]
    value = float(np.exp(estimate.value))
    return Estimate(value, bounds[0], bounds[1], None if estimate.se is None else value * estimate.se, estimate.n)


def compare_verbosity(
    systems: Sequence[System], baseline: str | None = None, *, confidence: float = 0.95
) -> list[Verbosity]:
    """Measures of any number of systems; `baseline` names the one that the others are compared with."""
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        raise ValueError(f"Systems must have different names, got {names}.")
    if baseline is not None and baseline not in names:
        raise ValueError(f"`baseline` must be one of {names}, got {baseline!r}.")
    of_baseline = None if baseline is None else systems[names.index(baseline)]
    return [
        verbosity(system, None if system is of_baseline else of_baseline, confidence=confidence) for system in systems
    ]


def verbosity_table(found: Sequence[Verbosity], *, unit: str | None = None) -> Table:
    """What fits on a screen. `Verbosity.row` has everything.

    Args:
        found: one per system.
        unit: of the lengths; by default tokens where all systems have them by one tokenizer, else characters.
    """
    tokenizers = {one.tokenizer for one in found}
    if unit is None:
        unit = "tokens" if len(tokenizers) == 1 and None not in tokenizers else "characters"
    title = f"Length in {unit}" + (f" of {', '.join(sorted(map(str, tokenizers)))}" if unit == "tokens" else "")
    columns = {
        "mean": (f"{unit}_mean", ".0f", BELOW),
        "median": (f"{unit}_median", ".0f", NONE),
        "p90": (f"{unit}_p90", ".0f", NONE),
        "ratio": (f"{unit}_ratio", ".2f", BELOW),
        "longer": (f"{unit}_longer", ".0%", NONE),
        "cut": ("cut", ".1%", NONE),
        "empty": ("empty", ".1%", NONE),
        "distinct-3": ("distinct_3", ".2f", NONE),
        "compr.\np99": ("compression_p99", ".1f", NONE),
        "repeated": ("repeated_sentences", ".1%", NONE),
    }
    table = Table(title, ["system", "prompts", *columns])
    for one in found:
        cells = [show_estimate(one.measures.get(name), form, bounds=bounds) for name, form, bounds in columns.values()]
        table.add(one.system, f"{one.prompts:,}", *cells)
    return table
