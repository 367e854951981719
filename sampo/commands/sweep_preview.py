"""`sampo sweep --dry_run`: the runs, their steps, the time and the disk that they will take. Nothing is written."""

import tempfile
from typing import Any

from ..io.tables import Table
from .dry_run import FirstSteps, measure_first_steps
from .log_line import duration
from .shown import say, show
from .sweep_check import Checked


def preview(checked: Checked, jobs: int) -> None:
    """Print the runs, and measure the first steps of the first one."""
    sweep, definition = checked.sweep, checked.sweep.definition
    table = Table(f"{len(definition.runs)} runs", ["run", "method", "learning_rate", "beta", "seed", ""])
    for run in definition.runs:
        done = "finished" if sweep.is_evaluated(run.name) else "trained" if sweep.is_trained(run) else ""
        table.add(run.name, run.title, f"{run.learning_rate:g}", f"{run.train_beta:g}", str(run.seed), done)
    show(table)
    missing = sum(not sweep.is_trained(run) for run in definition.runs)
    with tempfile.TemporaryDirectory(prefix="sampo-dry-run-") as folder:
        trainer, steps, _ = measure_first_steps(folder, *checked.built)
        facts = {
            "budget": f"{steps.max_steps:,} steps each, on {len(checked.data['train']):,} pairs; "
            f"{len(checked.data['test']):,} are held out",
            "time": _describe_time(steps, missing, jobs),
            "disk": _describe_disk(trainer, checked, missing, jobs),
        }
    say("", *(f"{name:<7} {text}" for name, text in facts.items()))
    say("", "Nothing was written. The same command without `--dry_run` runs the sweep.")


def _describe_time(steps: FirstSteps, runs: int, jobs: int) -> str:
    if not steps.seconds:
        return f"not measured: a run has {steps.max_steps} step(s), and its first ones are slower than the others"
    each = sum(steps.seconds) / len(steps.seconds) * steps.max_steps
    rounds = -(-runs // jobs)
    return (
        f"{duration(each)} for a run, {duration(each * rounds)} for {runs} with {jobs} at a time (steps measured "
        "with a live reference, which the shared cache saves; loading and evaluation are not counted)"
    )


def _describe_disk(trainer: Any, checked: Checked, runs: int, jobs: int) -> str:
    """Weights of each run, checkpoints with the optimiser's two states for those that run, and the cache."""
    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    kept = trained if checked.options.use_peft else parameters
    weights = sum(p.numel() * p.element_size() for p in kept)
    checkpoint = weights + sum(8 * p.numel() for p in trained)
    limit = trainer.args.save_total_limit or 1
    pairs = sum(len(checked.data[split]) for split in ("train", "test"))
    ends = 1 + any(run.options.get("balance_end_token", False) for run in checked.sweep.definition.runs)
    cache = int(pairs * 2 * checked.sweep.definition.answer_tokens * 4 * ends)
    checkpoints = min(jobs, runs) * limit * checkpoint
    total = runs * weights + checkpoints + cache
    return (
        f"about {total / 1e9:.2f} GB: {runs} models of {weights / 1e9:.2f} GB, checkpoints of "
        f"{checkpoints / 1e9:.2f} GB while they train, and a reference cache of {cache / 1e9:.2f} GB"
    )
