"""The section of the page on training runs, from their logs."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from . import training_figures
from .collect import Found, TrainingRun
from .numbers import count_runs
from .page import MAX_RUNS, Origin, PageTable, Section, shorten


def training_section(found: Found) -> Section:
    """Curves of all runs in common figures."""
    section = Section("training", "Training")
    runs = found.runs[:MAX_RUNS]
    if runs:
        section.guarded(runs[0].file, partial(_add_training, section, runs, found))
    return section


def _add_training(section: Section, runs: Sequence[TrainingRun], found: Found) -> None:
    if len(found.runs) > MAX_RUNS:
        others = ", ".join(run.name for run in found.runs[MAX_RUNS:])
        found.notes.append(f"Training curves of {MAX_RUNS} runs are shown; omitted: {others}.")
    logs = {shorten(run.name): run.log for run in runs}
    if len(logs) < len(runs):  # names that are alike in their beginnings
        logs = {f"{n}: {shorten(run.name, 28)}": run.log for n, run in enumerate(runs, 1)}
    origins = tuple(_origin_of_run(run) for run in runs)
    columns = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = [  # a line for each setting: their names are many and long, runs are few
        ["steps", *(f"{run.step:,}" for run in runs)],
        ["last loss", *(_last(run, "loss") for run in runs)],
        *([name, *(run.settings.get(name, "–") for run in runs)] for name in columns),
    ]
    section.add(PageTable("Runs", ["run", *(run.name for run in runs)], rows, origins, count_runs(len(runs))))
    steps = " and ".join(dict.fromkeys(f"{run.step:,}" for run in runs))
    n = f"{count_runs(len(runs))} of {steps} steps"
    for name, curve in training_figures.CURVES.items():
        if training_figures.has_curve(logs, name):
            section.draw(
                partial(_draw_curve, logs, name),
                title=curve.title,
                description=_ends(logs, curve),
                origins=origins,
                n=n,
            )


def _draw_curve(logs: Mapping[str, training_figures.Log], name: str, figure: Any) -> None:
    training_figures.training_curve(logs, name, ax=figure.add_subplot())


def _origin_of_run(run: TrainingRun) -> Origin:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))
    return Origin(run.file, versions=versions, dates=f"file of {run.date}")


def _last(run: TrainingRun, metric: str) -> str:
    values = training_figures.points(run.log, metric)[1]
    return f"{values[-1]:.4f}" if values else "–"


def _ends(logs: Mapping[str, Any], curve: training_figures.Curve) -> str:
    """What the curves of a figure begin and end with."""
    curves = []
    for run, log in logs.items():
        for metric, part in curve.metrics.items():
            for held_out in (False, True):
                steps, values = training_figures.points(log, metric, evaluation=held_out)
                if steps:
                    name = ", ".join(text for text in (run, part, "evaluation" if held_out else "") if text)
                    curves.append(
                        f"{name}: {values[0]:.3g} at step {steps[0]:.0f}, {values[-1]:.3g} at {steps[-1]:.0f}."
                    )
    return f"Curves over the steps of training. {' '.join(curves)}"
