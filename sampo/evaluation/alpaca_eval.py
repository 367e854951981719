"""AlpacaEval 2's two numbers from AlpacaEval's annotations, for users who have its files.

The raw win rate is AlpacaEval's to rounding. The length-controlled one needs `df_gamed.csv` (the verdicts on two
baselines that were told to be verbose and concise, and the difficulty of each instruction) from the data set
`tatsu-lab/alpaca_eval`, which is CC BY-NC and not shipped here. The estimator is theirs (`metrics/glm_winrate.py` at
cd543a1, `length_controlled_v1`): logistic regression with an L1 penalty whose strength five folds choose. One thing
differs: the difficulty is looked up by instruction. AlpacaEval looks it up by row number, which gives models with
missing rows the difficulty of other instructions; `align="row"` does as they do.

The interval is ours: theirs leaves the uncertainty of the coefficients out and is 2 to 6 times too narrow.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from .intervals import Estimate, rate_interval
from .logistic import lasso

FOLDS = 5
PENALTIES = 1 / np.logspace(-4, 4, 10)  # scikit-learn's grid of C, from strong to weak
GAMED_WEIGHT = 0.2 / 2  # two gamed baselines share the weight 0.2
COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


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
        notes: what a reader has to know, in sentences.
    """

    win_rate: Estimate
    length_controlled: Estimate | None
    slope: float | None
    mean_length: float
    rows: int
    failed: int
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
        """Read `df_gamed.csv`, and if given `instruction_difficulty.csv`, which must say the same."""
        with Path(gamed).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        missing = [name for name in COLUMNS if not rows or name not in rows[0]]
        if missing:
            raise ValueError(
                f"{gamed} must be AlpacaEval's df_gamed.csv with the columns {COLUMNS}, got no {missing}."
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
    with path.open(newline="", encoding="utf-8") as file:
        values = {int(float(row[0])): float(row[1]) for row in list(csv.reader(file))[1:]}
    differing = [i for i, value in by_number.items() if abs(values.get(i, np.inf) - value) > 1e-6]
    if differing:
        raise ValueError(
            f"{path} must say the same as df_gamed.csv, got another difficulty (or none) for {len(differing)} "
            f"instructions, first {differing[:3]}. Take both files from one revision."
        )


def alpaca_eval(
    annotations: Path | Sequence[Mapping[str, Any]],
    *,
    gamed: Path | None = None,
    difficulty: Path | None = None,
    instructions: Sequence[str] | None = None,
    align: str = "prompt",
    confidence: float = 0.95,
) -> AlpacaEval:
    """AlpacaEval 2's win rate and length-controlled win rate of one model.

    Args:
        annotations: rows of `annotations.json`: `instruction`, `output_1` (baseline), `output_2` (model) and
            `preference` (1 to 2, 0 a draw, None a failure).
        gamed: `df_gamed.csv`; without it there is no length-controlled win rate.
        difficulty: `instruction_difficulty.csv`, only to check that it fits the other file.
        instructions: AlpacaEval's instructions in their order (of the baseline's outputs, say); needed by `prompt`.
        align: difficulty by `prompt`, or by `row` number as AlpacaEval does.
        confidence: of the intervals.
    """
    if align not in ("prompt", "row"):
        raise ValueError(f"`align` must be `prompt` or `row`, got {align!r}.")
    rows = json.loads(annotations.read_text(encoding="utf-8")) if isinstance(annotations, Path) else annotations
    if not rows:
        raise ValueError("`annotations` must hold at least one row, got none.")
    preference = np.array([_preference(row, number) for number, row in enumerate(rows)])
    lengths = np.array([[len(row["output_1"]), len(row["output_2"])] for row in rows], dtype=float)
    known = ~np.isnan(preference)
    slope, controlled = None, None
    if gamed is not None:
        table = Gamed.read(gamed, difficulty)
        hard = _difficulty(rows, table, instructions, align)
        controlled, slope = _controlled(preference, lengths[:, 0] - lengths[:, 1], hard, table, confidence)
    return AlpacaEval(
        win_rate=_points(rate_interval(preference[known], confidence)),
        length_controlled=controlled and _points(controlled),
        slope=slope,
        mean_length=float(lengths[:, 1].mean()),
        rows=len(preference),
        failed=int((~known).sum()),
    )


def _preference(row: Mapping[str, Any], number: int) -> float:
    value = row["preference"]
    if value is None or value != value:
        return np.nan
    if value == 0:
        return 0.5
    if not 1 <= value <= 2:
        raise ValueError(f"`preference` must lie in [1, 2], or be 0 or None, got {value} in row {number}.")
    return float(value) - 1


def _difficulty(
    annotations: Sequence[Mapping[str, Any]], table: Gamed, instructions: Sequence[str] | None, align: str
) -> np.ndarray:
    if align == "row":
        numbers = list(range(len(annotations)))
    elif instructions is None:
        raise ValueError(
            "`instructions` must be given to align by prompt, got None. Pass the instructions of AlpacaEval in their "
            'order, or `align="row"` for what AlpacaEval does.'
        )
    else:
        places: dict[str, list[int]] = {}
        for number, text in enumerate(instructions):
            places.setdefault(text, []).append(number)
        numbers = []
        for row in annotations:
            left = places.get(row["instruction"])
            if not left:
                raise ValueError(
                    f"`instructions` must hold every instruction, got none of {row['instruction'][:80]!r}."
                )
            numbers.append(left.pop(0))  # an instruction that comes twice: first to first
    absent = [number for number in numbers if number not in table.difficulty_by_number]
    if absent:
        raise ValueError(
            f"df_gamed.csv must have a difficulty for every row, got none for {len(absent)}, first {absent[0]}. "
            "AlpacaEval's fit is for its own 805 instructions; for other prompts use `length_controlled`."
        )
    return np.array([table.difficulty_by_number[number] for number in numbers])


def _controlled(
    y: np.ndarray, difference: np.ndarray, hard: np.ndarray, gamed: Gamed, confidence: float
) -> tuple[Estimate, float]:
    """The fit; rows without a preference do not train it, but count in scale and prediction, as in AlpacaEval."""
    known = ~np.isnan(y)
    scale = np.std(difference, ddof=1)
    own = np.stack([np.tanh(difference / scale), hard, np.ones(len(y))], axis=1)
    theirs = np.stack([np.tanh(gamed.length), gamed.difficulty, np.zeros(len(gamed.length))], axis=1)
    design = np.concatenate([own[known], theirs])
    labels = np.concatenate([y[known], gamed.preference])
    weight = np.concatenate([np.ones(known.sum()), np.full(len(theirs), GAMED_WEIGHT)])
    beta = _cross_validated(design, labels, weight)
    predicted = expit(own[:, 1:] @ beta[1:])
    rate = float(predicted.mean())
    return _interval(own, y, design, weight, beta, predicted, rate, confidence), float(beta[0])


def _cross_validated(design: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The fit whose penalty has the least log loss on rows left out."""
    fold = np.empty(len(labels), dtype=int)
    # the folds of scikit-learn's GroupKFold, in which each row stands twice: it deals the rows out in this order
    fold[np.argsort(np.full(len(labels), 2))[::-1]] = np.arange(len(labels)) % FOLDS

    def left_out_loss(penalty: float) -> float:
        losses = []
        for k in range(FOLDS):
            inside, outside = fold != k, fold == k
            eta = design[outside] @ lasso(design[inside], labels[inside], weight[inside], penalty)
            losses.append((weight[outside] * (np.logaddexp(0, eta) - labels[outside] * eta)).mean())
        return float(np.mean(losses))

    return lasso(design, labels, weight, min(PENALTIES, key=left_out_loss))


def _interval(own, y, design, weight, beta, predicted, rate, confidence) -> Estimate:
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


def _points(estimate: Estimate) -> Estimate:
    def times(x: float | None) -> float | None:
        return None if x is None else 100 * x

    return Estimate(times(estimate.value), times(estimate.low), times(estimate.high), times(estimate.se), estimate.n)
