"""AlpacaEval 2's two numbers from AlpacaEval's annotations, for users who have its files.

The raw win rate is AlpacaEval's to rounding. The length-controlled one needs `df_gamed.csv` (the verdicts on two
baselines that were prompted to be verbose and concise, and the difficulty of each instruction) from the data set
`tatsu-lab/alpaca_eval`, which is CC BY-NC and not shipped here. The estimator is theirs (`metrics/glm_winrate.py` at
cd543a1, `length_controlled_v1`): logistic regression with an L1 penalty whose strength five folds choose. One thing
differs: the difficulty is looked up by instruction. AlpacaEval looks it up by row number, which gives models with
missing rows the difficulty of other instructions; `align="row"` does as they do.

The interval is ours: theirs leaves the uncertainty of the coefficients out and is 2 to 6 times too narrow.
"""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from ...stats.intervals import Estimate, rate_interval
from ...stats.logistic import lasso
from ..server_text import visible
from .controlled_fit import robust_scale

FOLDS = 5
PENALTIES = 1 / np.logspace(-4, 4, 10)  # scikit-learn's grid of C, from strong to weak
GAMED_WEIGHT = 0.2 / 2  # two gamed baselines share the weight 0.2
OUTLYING = 2.0  # standard deviation over the robust one, from which length control is noted to be weak
ROW = ("instruction", "output_1", "output_2", "preference")
NAMES = {"model": "generator_2", "baseline": "generator_1", "annotator": "annotator"}
LISTED = 10  # rows that a note names
GAMED_COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


@dataclass(frozen=True, kw_only=True)
class AlpacaEval:
    """The two numbers of AlpacaEval 2, in points of 0 to 100 as there.

    Attributes:
        win_rate: mean preference; its `se` is AlpacaEval's `standard_error`.
        length_controlled: the win rate at equal length, with an interval that AlpacaEval does not have; None without
            its files.
        slope: coefficient of tanh of the standardised length difference, baseline minus model; normally negative.
        mean_length: mean length of the model's outputs in characters.
        rows: annotations.
        failed: annotations without a preference.
        missing: numbers of the instructions without an annotation, from 1; none where `instructions` are not known.
        by_row: the length-controlled win rate with difficulty by row number, as on AlpacaEval's leaderboard, where
            that is another number; else None.
        model: name of the model, or "".
        baseline: name of the baseline, or "".
        annotator: name of the annotator, or "".
        notes: what a reader has to know, in sentences.
    """

    win_rate: Estimate
    length_controlled: Estimate | None
    slope: float | None
    mean_length: float
    rows: int
    failed: int
    missing: tuple[int, ...] = ()
    by_row: Estimate | None = None
    model: str = ""
    baseline: str = ""
    annotator: str = ""
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Gamed:
    """What `df_gamed.csv` holds: one row per verdict on a gamed baseline, all `(g,)`, and a difficulty by number."""

    preference: np.ndarray
    length: np.ndarray
    difficulty: np.ndarray
    difficulty_by_number: dict[int, float]

    @classmethod
    def read(cls, gamed: Path, difficulty: Path | None = None) -> "Gamed":
        """Read `df_gamed.csv`, and if given `instruction_difficulty.csv`, which must agree with it."""
        with Path(gamed).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        missing = [name for name in GAMED_COLUMNS if not rows or name not in rows[0]]
        if missing:
            raise ValueError(
                f"{gamed} must be AlpacaEval's df_gamed.csv with the columns {GAMED_COLUMNS}, got no {missing}."
            )
        by_number: dict[int, float] = {}
        for row in rows:
            by_number.setdefault(int(float(row["index"])), float(row["instruction_difficulty"]))
        if difficulty is not None:
            _check_difficulty(Path(difficulty), by_number)
        rows = [row for row in rows if row["preference"] not in ("", "nan")]
        if any(row["not_gamed_baseline"].lower() != "false" for row in rows):
            raise ValueError(f"{gamed} must hold gamed baselines only, got rows with `not_gamed_baseline` true.")

        def column(name: str) -> np.ndarray:
            return np.array([float(row[name]) for row in rows])

        return cls(column("preference"), column("std_delta_len"), column("instruction_difficulty"), by_number)


def _check_difficulty(path: Path, by_number: Mapping[int, float]) -> None:
    with path.open(newline="", encoding="utf-8-sig") as file:
        values = {int(float(row[0])): float(row[1]) for row in list(csv.reader(file))[1:]}
    differing = [i for i, value in by_number.items() if abs(values.get(i, np.inf) - value) > 1e-6]
    if differing:
        raise ValueError(
            f"{path} must agree with df_gamed.csv, got another difficulty (or none) for {len(differing)} "
            f"instructions, first {differing[:3]}. Take both files from one revision."
        )


def alpaca_eval(
    annotations: str | Path | Sequence[Mapping[str, Any]],
    *,
    gamed: str | Path | None = None,
    difficulty: str | Path | None = None,
    instructions: Sequence[str] | None = None,
    align: str = "prompt",
    confidence: float = 0.95,
) -> AlpacaEval:
    """AlpacaEval 2's win rate and length-controlled win rate of one model.

    Args:
        annotations: `annotations.json` or its rows: `instruction`, `output_1` (baseline), `output_2` (model) and
            `preference` (1 to 2, 0 a draw, None a failure); an output of None is an empty one.
        gamed: `df_gamed.csv`; without it there is no length-controlled win rate.
        difficulty: `instruction_difficulty.csv`, only to check that it fits the other file.
        instructions: AlpacaEval's instructions in their order, as in the baseline's outputs; needed by `prompt`.
        align: difficulty by `prompt`, or by `row` number as AlpacaEval does.
        confidence: of the intervals.

    Raises:
        ValueError: rows are no annotations of one model, an instruction comes more often than in `instructions`, or
            nothing has a preference.
    """
    if align not in ("prompt", "row"):
        raise ValueError(f"`align` must be `prompt` or `row`, got {align!r}.")
    rows = _read_rows(annotations) if isinstance(annotations, str | Path) else list(annotations)
    _check_rows(rows, instructions)
    preference = np.array([_preference(row, number) for number, row in enumerate(rows, 1)])
    lengths = np.array([[len(row["output_1"] or ""), len(row["output_2"] or "")] for row in rows], dtype=float)
    known = ~np.isnan(preference)
    if not known.any():
        raise ValueError(
            f"`preference` must be known in at least one annotation, got none in all {len(rows)}. The annotator "
            "failed everywhere: annotate again."
        )
    slope, controlled, by_row = None, None, None
    numbers = None if instructions is None else _instruction_numbers(rows, instructions)
    difference = lengths[:, 0] - lengths[:, 1]
    if gamed is not None:
        table = Gamed.read(Path(gamed), None if difficulty is None else Path(difficulty))
        hard = _difficulty(_aligned(numbers, len(rows), align), table)
        if all(row["output_1"] == row["output_2"] for row in rows):
            controlled, slope = Estimate(0.5, 0.5, 0.5, 0.0, len(rows)), None  # by construction, as in AlpacaEval
        else:
            controlled, slope = length_controlled_rate(preference, difference, hard, table, confidence)
            if align == "prompt" and numbers != list(range(len(rows))):
                as_published = _difficulty(_aligned(None, len(rows), "row"), table)
                by_row, _ = length_controlled_rate(preference, difference, as_published, table, confidence)
    missing = _missing(numbers, instructions)
    return AlpacaEval(
        win_rate=_in_points(rate_interval(preference[known], confidence)),
        length_controlled=controlled and _in_points(controlled),
        slope=slope,
        mean_length=float(lengths[:, 1].mean()),
        rows=len(preference),
        failed=int((~known).sum()),
        missing=missing,
        by_row=by_row and _in_points(by_row),
        **{name: visible(str(rows[0].get(column) or "")) for name, column in NAMES.items()},
        notes=(
            *_notes_on_rows(known, missing, instructions),
            *_notes_on_alignment(align, numbers, len(rows), by_row and _in_points(by_row), gamed is not None),
            *_notes_on_annotations(rows, difference),
        ),
    )


def read_instructions(path: str | Path) -> list[str]:
    """The instructions of a list of texts, or of rows with `instruction` such as the outputs of AlpacaEval's baseline.

    Raises:
        ValueError: the file holds neither.
    """
    rows = _read_rows(path)
    found = [row.get("instruction") if isinstance(row, dict) else row for row in rows]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise ValueError(f"{path} must hold texts or rows with `instruction`, got others. Take alpaca_eval.json.")
    return texts


def _read_rows(path: str | Path) -> list[Any]:
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON list in UTF-8 as AlpacaEval writes it, got: {error}.") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a JSON list as AlpacaEval writes it, got {type(rows).__name__}.")
    return rows


def _check_rows(rows: Sequence[Any], instructions: Sequence[str] | None) -> None:
    """One annotation of one model for each instruction, as `annotations.json` of one `alpaca_eval evaluate` is."""
    if not rows:
        raise ValueError("`annotations` must hold at least one row, got none.")
    for number, row in enumerate(rows, 1):
        missing = [name for name in ROW if not isinstance(row, Mapping) or name not in row]
        if missing:
            raise ValueError(f"An annotation must have the fields {list(ROW)}, got no {missing} in row {number}.")
        for name in ROW[:3]:
            if not isinstance(row[name], str) and (row[name] is not None or name == "instruction"):
                raise ValueError(f"`{name}` must be a text, got {type(row[name]).__name__} in row {number}.")
    for name in ("generator_1", "generator_2", "annotator"):
        several = sorted({str(row[name]) for row in rows if row.get(name) is not None})
        if len(several) > 1:
            raise ValueError(f"`{name}` must be one in all annotations, got {several[:5]}. Give one run at a time.")
    if instructions is None:  # AlpacaEval's own set repeats an instruction, but no answer
        counts = Counter((row["instruction"], row["output_1"], row["output_2"]) for row in rows)
        several = [key[0] for key, n in counts.items() if n > 1]
    else:
        allowed = Counter(instructions)
        several = [
            text for text, n in Counter(row["instruction"] for row in rows).items() if n > max(allowed[text], 1)
        ]
    if several:
        raise ValueError(
            f"Each instruction must have one annotation, got several of {len(several)}, first "
            f"{several[0][:80]!r}. Take the repeated rows out."
        )


def _notes_on_rows(known: np.ndarray, missing: Sequence[int], instructions: Sequence[str] | None) -> tuple[str, ...]:
    notes = []
    if not known.all():
        failed = (np.flatnonzero(~known) + 1).tolist()
        notes.append(
            f"{len(failed)} of {len(known)} annotations have no preference and are left out of the win rate: rows "
            f"{_listed(failed)}."
        )
    if missing and instructions is not None:
        notes.append(
            f"{len(missing)} of {len(instructions)} instructions have no annotation: numbers {_listed(missing)} of "
            "`instructions`. The rates are those of the others."
        )
    return tuple(notes)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:LISTED])) + (f" and {len(numbers) - LISTED} more" if numbers[LISTED:] else "")


def _notes_on_alignment(
    align: str, numbers: list[int] | None, n: int, by_row: Estimate | None, controlled: bool
) -> tuple[str, ...]:
    """Whose difficulty each annotation got, where the two ways differ."""
    if not controlled or numbers is None or numbers == list(range(n)):
        return ()
    first = next(i for i, number in enumerate(numbers) if number != i) + 1
    text = f"From row {first} on the row number is not the number of the instruction. "
    if align == "row":
        return (
            f"{text}As in AlpacaEval, these rows have the difficulty of other instructions; `align: prompt` differs.",
        )
    other = "" if by_row is None else f": {by_row.value:.2f}, which is what its leaderboard has"
    return (f"{text}Each row has the difficulty of its own instruction; AlpacaEval goes by row number{other}.",)


def _notes_on_annotations(rows: Sequence[Mapping[str, Any]], difference: np.ndarray) -> tuple[str, ...]:
    notes = []
    empty = sum(not row["output_2"] for row in rows)
    if empty:
        notes.append(f"{empty} outputs of the model are empty.")
    if all(row["output_1"] == row["output_2"] for row in rows):
        notes.append("All outputs are those of the baseline, whose rate at equal length is 50 % by construction.")
    robust, plain = robust_scale(difference, np.ones(len(rows))), float(np.std(difference))
    if robust and plain > OUTLYING * robust:
        far = int((np.abs(difference - np.median(difference)) > 10 * robust).sum())
        notes.append(
            f"A few differences of length ({far} of {len(rows)}) are so large that the standard deviation is "
            f"{plain / robust:.1f} times the robust one. AlpacaEval divides by it, so its control hardly works here: "
            "look for answers that repeat themselves."
        )
    return tuple(notes)


def _preference(row: Mapping[str, Any], number: int) -> float:
    value = row["preference"]
    if value is None or value != value:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"`preference` must be a number or None, got {value!r} in row {number}.")
    if value == 0:
        return 0.5
    if not 1 <= value <= 2:
        raise ValueError(f"`preference` must lie in [1, 2], or be 0 or None, got {value} in row {number}.")
    return float(value) - 1


def _instruction_numbers(annotations: Sequence[Mapping[str, Any]], instructions: Sequence[str]) -> list[int]:
    """Number of each annotation's instruction, from 0."""
    rows_of: dict[str, list[int]] = {}
    for number, text in enumerate(instructions):
        rows_of.setdefault(text, []).append(number)
    numbers = []
    for row in annotations:
        left = rows_of.get(row["instruction"])
        if not left:
            raise ValueError(f"`instructions` must hold every instruction, got none of {row['instruction'][:80]!r}.")
        numbers.append(left.pop(0))  # an instruction that comes twice: first to first
    return numbers


def _missing(numbers: list[int] | None, instructions: Sequence[str] | None) -> tuple[int, ...]:
    """Numbers of the instructions without an annotation, from 1."""
    there = set(numbers or ())
    return tuple(i + 1 for i in range(len(instructions or ())) if i not in there)


def _aligned(numbers: list[int] | None, n: int, align: str) -> list[int]:
    """Number of the instruction whose difficulty each of `n` annotations gets."""
    if align == "row":
        return list(range(n))
    if numbers is None:
        raise ValueError(
            "`instructions` must be given to align by prompt, got None. Pass the instructions of AlpacaEval in their "
            'order, or `align="row"` for what AlpacaEval does.'
        )
    return numbers


def _difficulty(numbers: list[int], table: Gamed) -> np.ndarray:
    absent = [number for number in numbers if number not in table.difficulty_by_number]
    if absent:
        raise ValueError(
            f"df_gamed.csv must have a difficulty for every row, got none for {len(absent)}, first {absent[0]}. "
            "AlpacaEval's fit is for its own 805 instructions; for other prompts use `length_controlled`."
        )
    return np.array([table.difficulty_by_number[number] for number in numbers])


def length_controlled_rate(
    y: np.ndarray, difference: np.ndarray, hard: np.ndarray, gamed: Gamed, confidence: float
) -> tuple[Estimate, float]:
    """AlpacaEval's fit; rows without a preference do not train it, but count in scale and prediction, as there.

    Args:
        y: `(n,)` preferences in [0, 1], NaN where there is none.
        difference: `(n,)` length of the baseline's output minus that of the model's.
        hard: `(n,)` difficulty of the instructions.
        gamed: the verdicts on the gamed baselines, which train the fit too.
        confidence: of the interval.

    Returns:
        The win rate at equal length in [0, 1], and the slope on the length term.
    """
    known = ~np.isnan(y)
    scale = np.std(difference, ddof=1) if len(difference) > 1 else 0.0
    if scale == 0 and difference.any():
        raise ValueError(
            f"Differences of length must vary for a control, got {difference[0]:.0f} characters in all {len(y)} "
            "annotations. Leave `gamed` out for the raw win rate."
        )
    own = np.stack([np.tanh(difference / (scale or 1.0)), hard, np.ones(len(y))], axis=1)
    theirs = np.stack([np.tanh(gamed.length), gamed.difficulty, np.zeros(len(gamed.length))], axis=1)
    design = np.concatenate([own[known], theirs])
    labels = np.concatenate([y[known], gamed.preference])
    weight = np.concatenate([np.ones(known.sum()), np.full(len(theirs), GAMED_WEIGHT)])
    beta = _cross_validated(design, labels, weight)
    predicted = expit(own[:, 1:] @ beta[1:])
    rate = float(predicted.mean())
    return _interval(own, y, design, weight, beta, predicted, rate, confidence), float(beta[0])


def _cross_validated(design: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The fit whose penalty has the least log loss on held-out rows."""
    fold = np.empty(len(labels), dtype=int)
    # the folds of scikit-learn's GroupKFold, in which each row occurs twice: it assigns the rows in this order
    fold[np.argsort(np.full(len(labels), 2))[::-1]] = np.arange(len(labels)) % FOLDS

    def left_out_loss(penalty: float) -> float:
        losses = []
        for k in range(FOLDS):
            inside, outside = fold != k, fold == k
            eta = design[outside] @ lasso(design[inside], labels[inside], weight[inside], penalty)
            losses.append((weight[outside] * (np.logaddexp(0, eta) - labels[outside] * eta)).mean())
        return float(np.mean(losses))

    return lasso(design, labels, weight, min(PENALTIES, key=left_out_loss))


def _interval(
    own: np.ndarray,
    y: np.ndarray,
    design: np.ndarray,
    weight: np.ndarray,
    beta: np.ndarray,
    predicted: np.ndarray,
    rate: float,
    confidence: float,
) -> Estimate:
    """Sandwich interval of the mean prediction over the model's rows; gamed rows and penalty are taken as given."""
    n, known = len(y), ~np.isnan(y)
    p = expit(design @ beta)
    curvature = (design * (weight * p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(3)
    residual = np.where(known, np.nan_to_num(y) - expit(own @ beta), 0.0)
    level = own * np.array([0.0, 1.0, 1.0])
    gradient = (level * (predicted * (1 - predicted))[:, None]).mean(axis=0)
    influence = n * (own * residual[:, None]) @ np.linalg.solve(curvature, gradient) + predicted - rate
    se = np.sqrt((influence**2).sum() / max(n - 3, 1) / n)
    half = stats.norm.ppf((1 + confidence) / 2) * se / (rate * (1 - rate))
    return Estimate(rate, float(expit(logit(rate) - half)), float(expit(logit(rate) + half)), float(se), n)


def _in_points(estimate: Estimate) -> Estimate:
    def times(x: float | None) -> float | None:
        return None if x is None else 100 * x

    return Estimate(times(estimate.value), times(estimate.low), times(estimate.high), times(estimate.se), estimate.n)
