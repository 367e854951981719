"""All records of a sweep: of the start, each run, each method over its seeds, and each two methods prompt by prompt.

Every table, figure and sentence is made from these records alone.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..diagnostics.pair_scores import diagnosed_name
from ..evaluation.results.comparing import Duel, compare_pairs
from ..evaluation.results.verdicts import Comparisons
from ..io import records as results
from ..io.records import Record, provenance
from ..report.numbers import estimate
from ..stats.intervals import Estimate
from .outcome import Evaluated, compare_accuracy, compare_wins, measure, measure_answers, read_evaluated, read_start
from .plan import START, Sweep, SweepRun
from .state import SweepState

LOGGED = (  # of the last evaluation in a run's log
    *("eval_loss", "eval_length_gap/slope", "eval_length_gap/correlation", "eval_dpo/length_gap/slope"),
    *("eval_dpo/length_gap/correlation", "eval_accuracies/chosen_longer", "eval_accuracies/chosen_shorter"),
)
QUALITIES: dict[str, Callable[[Sequence[Evaluated]], Comparisons | None]] = {
    "win rate": compare_wins,
    "accuracy": compare_accuracy,
}


def make_records(sweep: Sweep, state: SweepState, command: str) -> list[Record]:
    """Records of everything that is evaluated so far, and of the runs that have failed."""
    start = read_start(sweep)
    evaluated = {run.name: read_evaluated(sweep, run) for run in sweep.definition.runs if sweep.is_evaluated(run.name)}
    shared = {"experiment": "sweep", **_describe_sweep(sweep)}
    where = {"command": command, **provenance()}

    def record(level: str, name: str, one: Estimate, config: dict[str, Any], seed: int | None = None) -> Record:
        return Record(
            name=f"sweep/{name}",
            value=one.value,
            n=one.n,
            interval=one.interval,
            seed=seed,
            config={**shared, "level": level, **config},
            **where,
        )

    made = [record(START, name, one, {}) for name, one in measure_answers(start).items()]
    for run in sweep.definition.runs:
        config = {"run": run.name, **_describe_run(run), "seed": run.seed}
        if run.name in evaluated:
            made += [record("run", *one, config, run.seed) for one in _numbers_of_run(evaluated[run.name], start)]
        elif state.runs[run.name].error:
            failed = {**config, "error": state.runs[run.name].error}
            made.append(record("run", "failed", _count(1), failed, run.seed))
    cells = group_seeds(list(evaluated.values()))
    pressures = read_pressures(sweep)
    for seeds in cells.values():
        run = seeds[0].run
        config = {**_describe_run(run), "seeds": [one.run.seed for one in seeds]}
        made += [record("method", name, one, config) for name, one in measure(seeds, start).items()]
        if (pressure := pressures(run.options)) is not None:
            made.append(record("method", "pressure", pressure, config))
    for quality, duel, shared_seeds, agree in compare_methods(cells):
        about = {"quality": quality, "first": duel.first, "second": duel.second}
        config = {**about, "seeds": shared_seeds, "seeds_agree": agree}
        numbers = {"difference": duel.paired.difference, "p_holm": _count(duel.p_holm, duel.paired.difference.n)}
        made += [record("duel", name, one, config) for name, one in numbers.items()]
    return made


def _describe_sweep(sweep: Sweep) -> dict[str, Any]:
    one = sweep.definition
    return {
        "model": one.model.rstrip("/").rpartition("/")[2],
        "inputs": one.inputs,
        "split_seed": one.split_seed,
        "prompts": one.prompts,
        "pairs": one.pairs,
        "max_tokens": one.max_tokens,
        "temperature": one.temperature,
        "judge": " ".join(one.judge[:1]),
    }


def _describe_run(run: SweepRun) -> dict[str, Any]:
    options: dict[str, Any] = {"method": run.method, "title": run.title, "options": run.options}
    if run.has_own_beta:
        options["own_beta"] = True
    return {**options, "learning_rate": run.learning_rate, "beta": run.beta, "train_beta": run.train_beta}


def _count(value: float | None, n: int = 1) -> Estimate:
    return Estimate(value, None, None, None, n)


def _numbers_of_run(one: Evaluated, start: Sequence[Any]) -> Iterator[tuple[str, Estimate]]:
    yield "steps", _count(one.training["steps"])
    logged = one.training.get("eval", {})
    yield from ((f"log/{name}", _count(logged[name])) for name in LOGGED if name in logged)
    yield from measure([one], start).items()


def group_seeds(evaluated: Sequence[Evaluated]) -> dict[tuple[str, float, float], list[Evaluated]]:
    """The runs of each method and grid value."""
    cells: dict[tuple[str, float, float], list[Evaluated]] = {}
    for one in evaluated:
        cells.setdefault(one.run.cell, []).append(one)
    return cells


def compare_methods(
    cells: dict[tuple[str, float, float], list[Evaluated]],
) -> Iterator[tuple[str, Duel, list[int], int]]:
    """Each two methods at the same grid value, by each quality that is known: (quality, comparison, seeds, agreeing).

    The seeds are those that both methods have, and those agree whose own difference has the sign of the difference.

    p-values are adjusted by Holm for all duels of one quality.
    """
    names = {cell: cell_name(*cell) for cell in cells}
    own = {cell for cell, seeds in cells.items() if seeds[0].run.has_own_beta}
    pairs = [(a, b) for a, b in combinations(cells, 2) if a[1] == b[1] and (a[2] == b[2] or own & {a, b})]
    for quality, compare in QUALITIES.items():
        compared = {names[cell]: one for cell, seeds in cells.items() if (one := compare(seeds)) is not None}
        if not compared:
            continue
        for (a, b), duel in zip(pairs, compare_pairs(compared, [(names[a], names[b]) for a, b in pairs]), strict=True):
            yield quality, duel, *_count_agreeing(cells[a], cells[b], duel, compare)


def cell_name(method: str, learning_rate: float, beta: float) -> str:
    """As it stands in the records of comparisons."""
    return f"{method} lr {learning_rate:g} beta {beta:g}"


def _count_agreeing(
    first: list[Evaluated], second: list[Evaluated], duel: Duel, compare: Any
) -> tuple[list[int], int]:
    """The seeds of both methods, and how many have a difference with the sign of the difference over all seeds."""
    theirs = {one.run.seed: one for one in second}
    both = [(one, theirs[one.run.seed]) for one in first if one.run.seed in theirs]
    signs = [np.sign(compare([a]).scores.mean() - compare([b]).scores.mean()) for a, b in both]
    agreeing = sum(sign == np.sign(duel.paired.difference.value or 0.0) for sign in signs)
    return [one.run.seed for one, _ in both], int(agreeing)


def read_pressures(sweep: Sweep) -> Callable[[dict[str, Any]], Estimate | None]:
    """The length pressure of a method's weights before training, from the diagnosis of the start."""
    found = {
        str(record.config["method"]): estimate(record)
        for record in results.read(sweep.evaluation(START) / "diagnosis" / "records.jsonl")
        if record.name == "diagnose/pressure" and record.config["group"] == "all"
    }

    def pressure(options: dict[str, Any]) -> Estimate | None:
        if options.get("balance_end_token") and found:
            return Estimate(0.0, 0.0, 0.0, None, next(iter(found.values())).n)  # by construction
        return found.get(diagnosed_name(options) or "")

    return pressure
