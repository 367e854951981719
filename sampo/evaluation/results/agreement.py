"""How far a judge agrees with people: accuracy, κ, α, position, length and calibration on labelled pairs.

The unit is the pair with the verdicts of both orders averaged, as in a win rate; a pair that lacks the verdict of one
order is omitted and counted. Which response is called the first is arbitrary, so κ, α and the slopes count every pair
in both directions: they do not change when the responses of a pair are swapped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from ...io.records import Record, provenance
from ...io.tables import Table
from ...stats.bootstrap import bootstrap
from ...stats.intervals import FEW, Estimate, codes_of, prompt_means, prompt_weights, rate_interval, undefined
from ...stats.logistic import slope_through_zero
from ..judging.judges import Judgement
from ..judging.labelled import LABEL_SIDES, LabelledPair, LabelledPairs
from .cells import BEHIND, percent_cell, show_estimate
from .judge_checks import PREFIX, JudgeCheck
from .judged import Judged
from .verdicts import LENGTHS, order_consistency
from .win_rate import TIE

CATEGORIES = len(LABEL_SIDES)  # the system's response, a tie, the baseline's
KAPPA_RESAMPLES = 2000
GRADES = 8  # with so many different verdicts or fewer they are grades and no probabilities
CONFIDENCE_BINS = 5  # of the confidence of a judge with probabilities, from ½ to 1


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What `measure_agreement` found.

    Attributes:
        pairs: pairs in which people prefer one response and the judge has both verdicts.
        tied: pairs with both verdicts in which people prefer neither; they count in κ and α alone.
        failed: pairs that lack a verdict.
        numbers: every number by its name, as in docs/judges.md.
        sizes: pairs behind the accuracy of each part.
        notes: what a reader has to know, in sentences.
    """

    pairs: int
    tied: int
    failed: int
    numbers: Mapping[str, Estimate]
    sizes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def check(self, judge: Mapping[str, Any], data: str) -> JudgeCheck:
        """The part that is shown with a win rate."""
        return JudgeCheck(
            judge=judge,
            data=data,
            pairs=self.pairs,
            accuracy=self.numbers["accuracy"],
            kappa=self.numbers["kappa"],
        )

    def records(self, config: Mapping[str, Any], *, seed: int, command: str) -> list[Record]:
        """One record per number; `config` has the judge as `judged_by` and the name of the set as `data`."""
        where = provenance()
        n = self.numbers["accuracy"].n
        counts = {name: getattr(self, name) for name in ("pairs", "tied", "failed")} | {
            f"pairs/{name}": size for name, size in self.sizes.items()
        }
        rows = [*self.numbers.items()]
        rows += [(f"count/{name}", Estimate(float(count), None, None, None, n)) for name, count in counts.items()]
        return [
            Record(
                name=f"{PREFIX}{name}",
                value=one.value,
                n=one.n,
                interval=one.interval,
                config=dict(config),
                seed=seed,
                command=command,
                **where,
            )
            for name, one in rows
        ]


@dataclass(frozen=True)
class _Rows:
    """Pairs with both verdicts, as arrays.

    Attributes:
        codes: `(n,)` number of the prompt.
        preference: `(n, 2)` for the response that people prefer, shown first and shown second.
        tied: `(n,)` whether people prefer neither.
        lengths: `(n, 2)` of the preferred response and of the other.
        votes: `(n, 3)` annotators for the preferred response, for neither, for the other.
    """

    codes: np.ndarray
    preference: np.ndarray
    tied: np.ndarray
    lengths: np.ndarray
    votes: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """`(n,)` preference, both orders averaged."""
        return self.preference.mean(axis=1)


def measure_agreement(labelled: LabelledPairs, run: Judged, *, length_unit: str = "characters") -> Agreement:
    """Compare the verdicts on labelled pairs with the labels.

    Args:
        labelled: the pairs.
        run: the judgements on them, both orders of each pair next to each other.
        length_unit: of all lengths, `characters` or `words`.
    """
    rows, kept = _rows(labelled.pairs, run.rows, length_unit)
    decided, right = ~rows.tied, _side(rows.mean)
    parts = _parts([pair for pair, keep in zip(labelled.pairs, kept, strict=True) if keep], rows)
    accuracy = partial(_accuracy, right, rows.codes)
    numbers = {"accuracy": accuracy(decided), "kappa": _kappa(rows, right)}
    verdicts = run.verdicts(length_unit)
    if verdicts.order is not None:
        shown = zip(("first", "second"), rows.preference.T, strict=True)
        numbers |= {f"accuracy/{where}": _accuracy(_side(p), rows.codes, decided) for where, p in shown}
        orders = order_consistency(verdicts)
        numbers |= {"order/consistent": orders.consistent, "order/first_shown": orders.first_shown}
    numbers |= {f"accuracy/{name}": accuracy(part & decided) for name, part in parts.items()}
    numbers |= _slopes(rows, right)
    if len(labelled.annotators) > 1:
        numbers |= _annotators(rows, right)
    if len(np.unique(rows.preference)) > GRADES:
        numbers |= _calibration(rows, decided)
    failed = int((~kept).sum())
    return Agreement(
        pairs=int(decided.sum()),
        tied=int(rows.tied.sum()),
        failed=failed,
        numbers=numbers,
        sizes={name: int((part & decided).sum()) for name, part in parts.items()},
        notes=_notes_on_agreement(numbers, labelled, failed),
    )


def _rows(pairs: Sequence[LabelledPair], judgements: Sequence[Judgement], unit: str) -> tuple[_Rows, np.ndarray]:
    """The pairs with both verdicts, and `(pairs,)` which of all these are."""
    preference = np.array([np.nan if row.preference is None else row.preference for row in judgements]).reshape(-1, 2)
    kept = ~np.isnan(preference).any(axis=1)
    some = [pair for pair, keep in zip(pairs, kept, strict=True) if keep]
    votes = [[pair.labels.count(side) for side in LABEL_SIDES.values()] for pair in some]
    lengths = [[getattr(a, LENGTHS[unit]) for a in (pair.pair.system, pair.pair.baseline)] for pair in some]
    rows = _Rows(
        codes_of([pair.pair.system.prompt_id for pair in some])[0],
        preference[kept],
        np.array([pair.tied for pair in some], dtype=bool),
        np.array(lengths, dtype=float).reshape(-1, 2),
        np.array(votes, dtype=float).reshape(-1, CATEGORIES),
    )
    return rows, kept


def _side(preference: np.ndarray) -> np.ndarray:
    """1 where the judge prefers the response that people prefer, ½ for a tie, 0 for the other."""
    return 0.5 + np.sign(np.where(np.abs(preference - 0.5) < TIE, 0.0, preference - 0.5)) / 2


def _accuracy(right: np.ndarray, codes: np.ndarray, part: np.ndarray) -> Estimate:
    return rate_interval(prompt_means(right[part], codes_of(codes[part])[0])) if part.any() else undefined(0)


def _parts(pairs: Sequence[LabelledPair], rows: _Rows) -> dict[str, np.ndarray]:
    """Length classes of the response that people prefer, and groups of the data."""
    difference = rows.lengths[:, 0] - rows.lengths[:, 1]
    parts = {"longer": difference > 0, "shorter": difference < 0, "equal": difference == 0}
    for column in pairs[0].groups if pairs else ():
        values = np.array([pair.groups[column] for pair in pairs], dtype=object)
        parts |= {f"{column}={value}": values == value for value in dict.fromkeys(values.tolist())}
    return {name: part for name, part in parts.items() if part.any()}


# --- κ and α ---------------------------------------------------------------------------------------------------------


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """Cohen's κ (1960, Educational and Psychological Measurement 20), unweighted: a tie is an answer of its own.

    Args:
        table: `(…, k, k)` how often the first rater gave category i and the second one category j.

    Returns:
        `(…,)`; NaN where both raters always give one and the same category.
    """
    total = table.sum(axis=(-2, -1))
    observed = np.trace(table, axis1=-2, axis2=-1) / total
    chance = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1) / total**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)


def krippendorff_alpha(votes: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Krippendorff's α for nominal labels (2011, "Computing Krippendorff's Alpha-Reliability"); labels may be missing.

    Args:
        votes: `(n, k)` how many raters gave unit i the category c; units with fewer than two labels do not count.
        weight: `(R, n)` how often each unit counts, for a bootstrap.

    Returns:
        `(R,)`; NaN where all labels are of one category.
    """
    weight = np.ones((1, len(votes))) if weight is None else weight
    raters = votes.sum(axis=1)
    pairable = raters > 1
    votes, raters, weight = votes[pairable], raters[pairable], weight[:, pairable]
    apart = (raters**2 - (votes**2).sum(axis=1)) / (raters - 1)
    total, counts = weight @ raters, weight @ votes  # (R,), (R, k)
    possible = total**2 - (counts**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(possible > 0, 1 - (total - 1) * (weight @ apart) / possible, np.nan)


def _one_hot(side: np.ndarray) -> np.ndarray:
    """`(n,)` 1, ½ or 0 -> `(n, 3)` with a 1 in the column of that side."""
    return (side[:, None] == np.array(list(LABEL_SIDES.values()))).astype(float)


def _kappa(rows: _Rows, right: np.ndarray) -> Estimate:
    if not len(right):
        return undefined(0)
    people = _one_hot(np.where(rows.tied, 0.5, 1.0))
    tables = people[:, :, None] * _one_hot(right)[:, None, :]  # (n, 3, 3)
    tables = (tables + tables[:, ::-1, ::-1]) * prompt_weights(rows.codes)[:, None, None]
    prompts = int(rows.codes.max()) + 1
    by_prompt = np.zeros((prompts, CATEGORIES, CATEGORIES))
    np.add.at(by_prompt, rows.codes, tables)

    def statistic(counts: np.ndarray) -> np.ndarray:
        return cohen_kappa((counts @ by_prompt.reshape(prompts, -1)).reshape(-1, CATEGORIES, CATEGORIES))

    return bootstrap([statistic], prompts, resamples=KAPPA_RESAMPLES, seed=0)[0]


def _annotators(rows: _Rows, right: np.ndarray) -> dict[str, Estimate]:
    """How far annotators agree with each other, and the judge with one of them."""
    prompts, judge = int(rows.codes.max()) + 1, _one_hot(right)

    def alpha(votes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        both_directions = np.concatenate([votes, votes[:, ::-1]])
        return krippendorff_alpha(both_directions, np.tile(counts[:, rows.codes], 2))

    statistics = [partial(alpha, rows.votes), partial(alpha, rows.votes + judge)]
    people, with_judge = bootstrap(statistics, prompts, resamples=KAPPA_RESAMPLES, seed=0)
    raters = rows.votes.sum(axis=1)
    several = raters > 1
    same = (rows.votes * (rows.votes - 1)).sum(axis=1)[several] / (raters * (raters - 1))[several]
    as_one = (rows.votes * judge).sum(axis=1) / raters
    return {
        "alpha/people": people,
        "alpha/with_judge": with_judge,
        "annotators/each_other": _accuracy_of(same, rows.codes[several]),
        "annotators/judge": _accuracy_of(as_one, rows.codes),
    }


def _accuracy_of(values: np.ndarray, codes: np.ndarray) -> Estimate:
    return _accuracy(values, codes, np.ones(len(values), dtype=bool))


# --- length and calibration ------------------------------------------------------------------------------------------


def _slopes(rows: _Rows, right: np.ndarray) -> dict[str, Estimate]:
    """Slope of the log-odds per doubling of the length ratio: the judge's, people's, and their difference.

    The judge's is of which response it prefers, not of its probability: people have none.
    """
    some = (rows.lengths > 0).all(axis=1)
    codes = codes_of(rows.codes[some])[0]
    doublings = np.log2(rows.lengths[some, 0] / rows.lengths[some, 1])
    judge, of_judge = slope_through_zero(doublings, right[some], codes)
    people, of_people = slope_through_zero(doublings, np.where(rows.tied[some], 0.5, 1.0), codes)
    difference = undefined(judge.n)
    if judge.value is not None and people.value is not None and judge.n > 1:
        se = float(np.sqrt(((of_judge - of_people) ** 2).sum()))
        half = float(stats.t.ppf(0.975, judge.n - 1)) * se
        value = judge.value - people.value
        difference = Estimate(value, value - half, value + half, se, judge.n)
    return {"slope/judge": judge, "slope/people": people, "slope/difference": difference}


def _calibration(rows: _Rows, decided: np.ndarray) -> dict[str, Estimate]:
    """Brier score, and the expected calibration error over bins of the judge's confidence, both orders averaged."""
    p, codes = rows.mean[decided], codes_of(rows.codes[decided])[0]
    if not len(p):
        return {}
    confidence, right = np.maximum(p, 1 - p), _side(p)
    bins = np.minimum(((confidence - 0.5) * 2 * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    found = {"calibration/brier": rate_interval(prompt_means((1 - p) ** 2, codes))}
    error = 0.0
    for b in range(CONFIDENCE_BINS):
        inside = bins == b
        if inside.any():
            one = _accuracy(right, codes, inside)
            sure = float(confidence[inside].mean())
            error += inside.mean() * abs(sure - float(right[inside].mean()))
            found[f"calibration/accuracy_at_{sure:.2f}"] = one
    return found | {"calibration/error": Estimate(float(error), None, None, None, len(p))}


def _notes_on_agreement(numbers: Mapping[str, Estimate], labelled: LabelledPairs, failed: int) -> tuple[str, ...]:
    notes, accuracy, longer = [], numbers["accuracy"], numbers["slope/difference"]
    if failed:
        notes.append(f"{failed} of {len(labelled.pairs)} pairs are left out because a verdict failed.")
    if labelled.unlabelled:
        notes.append(f"{labelled.unlabelled} rows have no label and are left out.")
    if accuracy.n < FEW:
        notes.append(f"{accuracy.n} prompts: below {FEW} the intervals are a hint only.")
    if accuracy.low is not None and accuracy.high is not None and accuracy.low <= 0.5:
        worse = "lies below 50 %: the judge is worse than a coin."
        notes.append(
            "The interval of the accuracy "
            + (worse if accuracy.high < 0.5 else "holds 50 %: this does not show that the judge beats a coin.")
        )
    if longer.low is not None and longer.high is not None and (longer.low > 0 or longer.high < 0):
        notes.append(
            f"The judge likes {'longer' if longer.low > 0 else 'shorter'} responses more than people do: use the win "
            "rate at equal length."
        )
    return tuple(notes)


# --- on screen -------------------------------------------------------------------------------------------------------

HEADS = {  # number -> what it is for a reader; the accuracies have a table of their own
    "kappa": "Cohen's κ",
    "alpha/people": "Krippendorff's α of the annotators",
    "alpha/with_judge": "Krippendorff's α with the judge as one more annotator",
    "annotators/each_other": "two annotators agree, share",
    "annotators/judge": "judge and one annotator agree, share",
    "order/consistent": "same verdict in both orders, share of pairs",
    "order/first_shown": "preference for the response shown first (½: none)",
    "slope/judge": "judge: slope of the log-odds per doubling of the length",
    "slope/people": "people: the same slope",
    "slope/difference": "judge minus people",
    "calibration/brier": "Brier score",
    "calibration/error": "expected calibration error",
}
PARTS = {  # part of the accuracies -> what it is for a reader
    "first": "preferred one shown first",
    "second": "preferred one shown second",
    "longer": "preferred one longer",
    "shorter": "preferred one shorter",
    "equal": "equal lengths",
}


def agreement_tables(found: Agreement) -> list[Table]:
    """The accuracy of each part, and the other numbers."""
    parts = Table("Agreement with people", ["pairs that count", "pairs", "accuracy, %"])
    for name, one in found.numbers.items():
        if name.split("/")[0] == "accuracy":
            part = name.partition("/")[2]
            size = found.sizes.get(part, found.pairs)
            parts.add(PARTS.get(part, part) or "all pairs", f"{size:,}", percent_cell(one, bounds=BEHIND))
    others = Table("Other numbers (95 % intervals over prompts)", ["number", "value"])
    for name, one in found.numbers.items():
        if name.split("/")[0] != "accuracy":
            others.add(number_head(name), show_estimate(one, ".2f", bounds=BEHIND))
    return [parts, others]


def number_head(name: str) -> str:
    """A number for a reader."""
    sure = name.removeprefix("calibration/accuracy_at_")
    return HEADS[name] if name in HEADS else f"accuracy where the judge is {100 * float(sure):.0f} % sure"
