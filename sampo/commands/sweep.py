"""`sampo sweep`: several methods on the same pairs with the same budget, and what came out of it.

Each run is an ordinary `sampo train` in `OUT/runs/NAME`; `sampo.sweep` says what else lies in the folder.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpointing.files import numbered_checkpoints
from ..io.command_line import format_command
from ..io.files import write_atomic
from ..io.locks import FolderInUseError, alone_in
from ..io.records import lines as record_lines
from ..sweep.plan import RefusedSweep, Sweep, SweepRun
from ..sweep.processes import Starter, divide_devices, local_starter
from ..sweep.runs import SweepRunner, SweepStopped
from ..sweep.state import SweepState, restore_state, write_state
from .launch import asks_for_cpu
from .next_steps import after_sweep, show_next
from .options import make_parser as make_train_parser
from .shown import say, show
from .sweep_check import Checked, check_request, write_swept_recipe
from .sweep_options import Request, make_parser, read_request

__all__ = ["make_parser", "run"]


def run(argv: list[str]) -> int:
    """Run what is missing, and report; returns the exit status: 1 if a run has failed, 2 if the sweep is refused."""
    if argv[:1] == ["--evaluate"]:  # by the sweep itself
        from .sweep_evaluation import evaluate

        return evaluate(Path(argv[1]), argv[2:])
    if {"--help_all", "--help-all"} & set(argv):
        make_train_parser(prog="sampo sweep").parse_args(["--help_all"])
    try:
        return _sweep(argv)
    except (RefusedSweep, FolderInUseError, SweepStopped) as error:
        print(f"sampo sweep: error: {error}", file=sys.stderr)
        return error.status if isinstance(error, SweepStopped) else 2


def _sweep(argv: list[str]) -> int:
    import datasets
    import yaml

    datasets.disable_progress_bars()
    request = read_request(argv)
    with tempfile.TemporaryDirectory(prefix="sampo-sweep-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(request.recipe), encoding="utf-8")
        devices = _devices(request)
        checked = check_request(request, recipe, len(devices) // max(1, int(request.own["jobs"])))
    if request.own.get("dry_run"):
        from .sweep_preview import preview  # no other run needs it

        preview(checked, int(request.own["jobs"]))
        return 0
    sweep = checked.sweep
    with alone_in(sweep.folder) as lock:
        state = restore_state(sweep.folder, sweep.definition)
        for trainer in {"dpo", *(method.trainer for method in sweep.definition.methods.values())}:
            write_swept_recipe(sweep, trainer, sweep.folder)
        _write_data(checked)
        write_state(sweep.folder, state)
        _run_all(request, sweep, state, devices, lock, format_command(["sampo", "sweep", *argv]))
    failed = {name: one.error for name, one in state.runs.items() if one.error}
    for name, error in failed.items():
        say(f"failed: {name}: {error}")
    if failed:
        say("The same command tries the failed runs again.")
    show_next(*after_sweep(sweep.folder))
    return 1 if failed else 0


def _run_all(request: Request, sweep: Sweep, state: SweepState, devices: list[str], lock: int, command: str) -> None:
    jobs = int(request.own["jobs"])
    runner = SweepRunner(
        sweep,
        state,
        _starter(request, sweep, lock),
        divide_devices(jobs, devices, os.cpu_count() or 1),
        say=say,
        show=lambda: _write_results(sweep, state, command),
        after_training=lambda one: _remove_checkpoints(sweep, one, keep=bool(request.own["keep_checkpoints"])),
    )
    missing = [one.name for one in sweep.definition.runs if not sweep.is_evaluated(one.name)]
    say(f"{len(sweep.definition.runs)} runs, {len(missing)} of them not finished, {jobs} at a time")
    runner.run()
    _write_results(sweep, state, command, last=True)


def _starter(request: Request, sweep: Sweep, lock: int) -> Starter:
    if request.own["launcher"] == "local":
        return local_starter(sweep, lock)
    from ..sweep.slurm import slurm_starter  # needs an extra

    given = request.own["slurm"]
    pairs = given if isinstance(given, Mapping) else dict(str(one).partition("=")[::2] for one in given)
    parameters = {str(name): str(value) for name, value in pairs.items()}
    return slurm_starter(sweep, parameters, cluster=parameters.pop("cluster", None))


def _devices(request: Request) -> list[str]:
    """Ids of the GPUs to divide among the jobs; none on the CPU, and none for a scheduler, which gives them.

    Raises:
        RefusedSweep: there are fewer GPUs than jobs.
    """
    import torch

    on_cpu = asks_for_cpu(request.words, default=bool(request.recipe.get("use_cpu")))
    if on_cpu or request.own["launcher"] != "local" or not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    if int(request.own["jobs"]) > len(devices):
        raise RefusedSweep(f"`jobs` must be at most the number of GPUs, {len(devices)}, got {request.own['jobs']}.")
    return devices


def _remove_checkpoints(sweep: Sweep, one: SweepRun, *, keep: bool) -> None:
    """Delete the checkpoints of a run that has finished training: with their optimisers they fill a disk."""
    for path in [] if keep else numbered_checkpoints(str(sweep.run_folder(one.name))):
        shutil.rmtree(path)


# --- data ------------------------------------------------------------------------------------------------------------


def _write_data(checked: Checked) -> None:
    """Write the pairs and prompts of the evaluation as ordinary files, once."""
    sweep, definition = checked.sweep, checked.sweep.definition
    if sweep.data("prompts").is_file():  # written last
        return

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        write_atomic(sweep.data(name), "".join(json.dumps(row) + "\n" for row in rows))

    if definition.settings["chat_template"]:
        write_atomic(sweep.folder / "data" / "chat_template.jinja", checked.processor.chat_template)
    pairs = {
        name: list(_draw(checked.data[split], definition.pairs, definition.split_seed))
        for name, split in (("train", "train"), ("held_out", "test"))
    }
    for name, rows in pairs.items():
        write(name, rows)
    write("prompts", _draw_prompts(checked))


def _draw(rows: Any, n: int, seed: int) -> Any:
    """At most `n` pairs, drawn by the seed, in their order."""
    import random

    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), min(n, len(rows)))))


def _draw_prompts(checked: Checked) -> list[dict[str, Any]]:
    """Different held-out prompts that leave room for an answer, drawn by a hash.

    Raises:
        RefusedSweep: there are none.
    """
    from transformers import AutoConfig

    from ..evaluation.answers.answers import prompt_id
    from ..evaluation.judging.judges import drawn_prompts
    from ..evaluation.texts import Texts

    definition = checked.sweep.definition
    tokenizer = getattr(checked.processor, "tokenizer", checked.processor)
    texts = Texts(tokenizer, "chat" if definition.chat else "raw", checked.processor.chat_template)
    config = AutoConfig.from_pretrained(definition.model, trust_remote_code=definition.settings["trust_remote_code"])
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    rows = {prompt_id(row["prompt"]): row["prompt"] for row in checked.data["test"].select_columns(["prompt"])}
    fits = {
        name: prompt
        for name, prompt in rows.items()
        if positions is None or len(texts.prompt(prompt)) + definition.max_tokens <= positions
    }
    if not fits:
        raise RefusedSweep("No held-out prompt leaves room for `max_tokens`. Lower it.")
    drawn = drawn_prompts(fits, min(definition.prompts, len(fits)), definition.split_seed)
    say(f"{len(drawn)} of {len(rows)} held-out prompts are answered by each run")
    return [{"prompt": prompt} for name, prompt in fits.items() if name in drawn]


# --- results ---------------------------------------------------------------------------------------------------------


def _write_results(sweep: Sweep, state: SweepState, command: str, *, last: bool = False) -> None:
    """Write records and tables of what is evaluated so far; at the end show them, and make the figure and the page."""
    from ..sweep import conclusion, frontier, lines, results, table

    records = results.make_records(sweep, state, command)
    write_atomic(sweep.folder / "records.jsonl", record_lines(records))
    found = lines.read_lines(records)
    sentences = conclusion.conclude(found)
    write_atomic(sweep.folder / "table.md", table.markdown_page(found, sentences, command))
    written = ["records.jsonl", "table.md"]
    if found.methods:
        write_atomic(sweep.folder / "table.tex", table.latex(found))
        written.append("table.tex")
    try:
        if last:
            written += frontier.write_frontier(found, sweep.folder) if frontier.paths_of(found) else []
            written += _write_page(sweep)
    except ImportError:
        written.append('no figure and no page, which need `pip install "sampo-dpo[report]"`')
    if last:
        show(*([table.screen_table(found)] if found.methods else []))
        say("", *(f"- {sentence}" for sentence in sentences))
        say("", f"Written to {sweep.folder}: {', '.join(written)}")


def _write_page(sweep: Sweep) -> list[str]:
    from ..lab.section import lab_section
    from ..report.build import build_report
    from ..sweep.section import sweep_section

    report = build_report(sweep.folder, lab_section=lab_section, sweep_section=sweep_section)
    write_atomic(sweep.folder / "report.html", report.html)
    return ["report.html"]
