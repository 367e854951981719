"""The numbers of one run, or of several seeds of one method together, from the files of their evaluation.

Several seeds are samples of one system: each prompt's value is their mean, and every interval is over prompts. It says
how sure the number is for these trained models on other prompts; what another seed would give is seen in the spread
of the runs, which the table has beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..diagnostics.findings import MATCHED, PLAIN, PairScores, groups, read_scores
from ..evaluation.answers.answers import Answer, read_answers
from ..evaluation.results.judged import AnswerFile, Judged, read_judged
from ..evaluation.results.verbosity import System, verbosity
from ..evaluation.results.verdicts import Comparisons, compare_orders
from ..io.hashing import hash_json
from ..io.schemas import read_json
from ..stats.intervals import Estimate, codes_of, mean_interval, prompt_means, rate_interval, undefined
from ..training.round_results import read_metrics
from .plan import START, RunOutcome, Sweep, SweepRun

SWEPT_LENGTHS = (
    "tokens_mean",
    "tokens_median",
    "tokens_ratio",
    "tokens_longer",
    "characters_mean",
    "characters_ratio",
)
ACCURACIES = {"all": "accuracy", "chosen longer": "accuracy_longer", "chosen shorter": "accuracy_shorter"}


@dataclass(frozen=True)
class Evaluated:
    """One evaluated run, read back."""

    run: SweepRun
    answers: list[Answer]
    scores: PairScores
    log_ratios: list[float]
    judged: Judged | None
    training: dict[str, Any]


def read_evaluated(sweep: Sweep, run: SweepRun) -> Evaluated:
    """Read what the evaluation of a run has left."""
    shards = sorted(sweep.evaluation(run.name).glob("diagnosis/pairs/*/*.parquet"))
    return Evaluated(
        run=run,
        answers=read_answers(sweep.answers(run.name)),
        scores=read_scores(shards),
        log_ratios=read_json(sweep.outcome(run.name), RunOutcome).log_ratios,
        judged=read_judged(sweep.judgements(run.name)) if sweep.definition.judge else None,
        training=read_metrics(sweep.run_folder(run.name)),
    )


def read_start(sweep: Sweep) -> list[Answer]:
    """The answers of the model that all runs start from."""
    return read_answers(sweep.answers(START))


def measure(evaluated: Sequence[Evaluated], start: Sequence[Answer]) -> dict[str, Estimate]:
    """All numbers of the runs together, by name.

    Args:
        evaluated: one run, or the seeds of one method.
        start: the answers to compare lengths with.
    """
    answers = [answer for one in evaluated for answer in one.answers]
    found = _accuracies(evaluated)
    found |= measure_answers(answers, start)
    ratios = np.array([value for one in evaluated for value in one.log_ratios])
    found["kl"] = mean_interval(prompt_means(ratios, codes_of([answer.prompt_id for answer in answers])[0]))
    if (judged := pool_judged(evaluated)) is not None:
        numbers = judged.summary().estimates()
        found |= {name: numbers[name] for name in ("win_rate", "win_rate/equal_length") if name in numbers}
    return found


def measure_answers(answers: Sequence[Answer], start: Sequence[Answer] = ()) -> dict[str, Estimate]:
    """Lengths, and the share that ended; with the start's answers also the paired ratio to them."""
    baseline = System.of(START, start) if start else None
    measures = verbosity(System.of("answers", answers), baseline).measures
    codes = codes_of([answer.prompt_id for answer in answers])[0]
    ended = np.array([float(answer.stop == "eos") for answer in answers])
    lengths = {name: measures[name] for name in SWEPT_LENGTHS if name in measures}
    return {**lengths, "ended": rate_interval(prompt_means(ended, codes))}


def right_pairs(scores: PairScores) -> np.ndarray:
    """`(n,)` 1 where the plain implicit reward prefers the chosen response, ½ for equal rewards."""
    return (np.sign(scores.margins[PLAIN]) + 1) / 2


def _accuracies(evaluated: Sequence[Evaluated]) -> dict[str, Estimate]:
    scores = evaluated[0].scores  # the pairs of all runs are the same, in the same order
    insides = {ACCURACIES[name]: inside for name, inside in groups(scores, {}).items() if name in ACCURACIES}
    insides["accuracy_matched"] = np.abs(scores.difference) <= MATCHED * scores.tokens.max(axis=0)
    right = np.mean([right_pairs(one.scores) for one in evaluated], axis=0)
    return {
        name: rate_interval(prompt_means(right[inside], codes_of(scores.prompts[inside])[0]))
        if inside.any()
        else undefined(0)
        for name, inside in insides.items()
    }


def compare_accuracy(evaluated: Sequence[Evaluated]) -> Comparisons:
    """Whether each held-out pair is ranked right, as verdicts: so methods are compared prompt by prompt."""
    prompts = [prompt for one in evaluated for prompt in one.scores.prompts.tolist()]
    return Comparisons(prompt=prompts, preference=np.concatenate([right_pairs(one.scores) for one in evaluated]))


def compare_wins(evaluated: Sequence[Evaluated]) -> Comparisons | None:
    """The judge's verdicts against the start; None without a judge."""
    judged = pool_judged(evaluated)
    return None if judged is None else compare_orders(judged.verdicts())


def pool_judged(evaluated: Sequence[Evaluated]) -> Judged | None:
    """The judgements of several seeds as those of one system with several samples; None without a judge."""
    runs = [one.judged for one in evaluated if one.judged is not None]
    if not runs:
        return None
    if len(runs) == 1:
        return runs[0]
    digest = hash_json([run.system.sha256 for run in runs])[:16]
    return replace(
        runs[0],
        system=AnswerFile(Path(evaluated[0].run.method).name, digest, runs[0].system.tokenizer),
        rows=[replace(row, sample=number) for number, run in enumerate(runs) for row in run.rows],
        empty=[replace(row, sample=number) for number, run in enumerate(runs) for row in run.empty],
    )
