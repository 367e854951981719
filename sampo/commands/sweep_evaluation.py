"""Evaluate the runs of a sweep, several in one process: the ordinary commands one after the other, and the log-ratios.

A process of its own that `sampo sweep` starts. Each command continues what a killed one has begun; `outcome.json` is
written last. A run whose evaluation fails does not stop the others.
"""

import argparse
import gc
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from ..io.files import write_atomic
from ..sweep.plan import START, RefusedSweep, RunOutcome, Sweep, SweepRun
from ..sweep.state import read_state_file
from .endpoints import INCOMPLETE
from .shown import say


def evaluate(folder: Path, names: list[str]) -> int:
    """Evaluate runs, or the start; returns 1 if one has failed.

    Args:
        folder: of the sweep.
        names: of trained runs, or `start`.
    """
    state = read_state_file(folder)
    if state is None:
        raise RefusedSweep(f"{folder} must hold a sweep.")
    sweep, failed = Sweep(folder, state.definition), 0
    runs = {run.name: run for run in state.definition.runs}
    for name in names:
        try:
            log_ratios = _evaluate_start(sweep) if name == START else _evaluate_run(sweep, runs[name])
            outcome = RunOutcome(name, log_ratios, [] if name == START else state.definition.judge)
            write_atomic(sweep.outcome(name), json.dumps(asdict(outcome)) + "\n")
            sweep.error(name).unlink(missing_ok=True)
        except (SystemExit, ValueError, OSError, RuntimeError) as error:  # a model that is broken may raise several
            failed += 1
            write_atomic(sweep.error(name), f"{error}")
            say(f"error: {name}: {error}")
        _free_memory()
    return min(failed, 1)


def _evaluate_start(sweep: Sweep) -> list[float]:
    _call(_generate(sweep, START, sweep.definition.model))
    _call([*_diagnose(sweep, sweep.definition.model, "train", START), "--beta", _beta(sweep.definition.runs[0])])
    return []


def _evaluate_run(sweep: Sweep, run: SweepRun) -> list[float]:
    folder, definition = str(sweep.run_folder(run.name)), sweep.definition
    _call(_generate(sweep, run.name, folder))
    diagnose = _diagnose(sweep, folder, "held_out", run.name)
    _call([*diagnose, "--reference", definition.model, "--beta", _beta(run), "--ref_cache_dir", str(sweep.ref_cache)])
    if definition.judge:
        files = ["--system", str(sweep.answers(run.name)), "--baseline", str(sweep.answers(START))]
        cache = ["--cache", str(sweep.folder / "judge-replies.jsonl")] if definition.judge[0] == "endpoint" else []
        out = ["--out", str(sweep.judgements(run.name))]
        _call(["judge", *files, *out, "--judge", *definition.judge, *cache], accepted=(INCOMPLETE,))
    return _log_ratios(sweep, run)


def _log_ratios(sweep: Sweep, run: SweepRun) -> list[float]:
    from ..evaluation.answers.answers import read_answers
    from ..evaluation.answers.log_ratios import answer_log_ratios
    from .progress import progress

    definition = sweep.definition
    template = sweep.folder / "data" / "chat_template.jinja"
    with progress("log-ratios") as advance:
        return answer_log_ratios(
            str(sweep.run_folder(run.name)),
            definition.model,
            read_answers(sweep.answers(run.name)),
            prompt_format="chat" if definition.chat else "raw",
            chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
            device="cpu" if definition.settings["use_cpu"] else None,
            dtype="float32",
            progress=advance,
        )


def _beta(run: SweepRun) -> str:
    return f"{run.train_beta:g}"


def _generate(sweep: Sweep, name: str, model: str) -> list[str]:
    one = sweep.definition
    words = ["generate", model, "--prompts", str(sweep.data("prompts")), "--out", str(sweep.answers(name))]
    words += ["--max_tokens", str(one.max_tokens), "--temperature", f"{one.temperature:g}", "--seed", str(one.seed)]
    words += ["--format", "chat" if one.chat else "raw", *_shared(sweep), *_dtype(sweep)]
    return [*words, "--device", "cpu"] if one.settings["use_cpu"] else words


def _diagnose(sweep: Sweep, policy: str, data: str, name: str) -> list[str]:
    settings = sweep.definition.settings
    words = ["diagnose", "--policy", policy, "--data", str(sweep.data(data))]
    words += ["--out", str(sweep.evaluation(name) / "diagnosis"), "--max_length", str(settings["max_length"] or 0)]
    words += ["--truncation_mode", settings["truncation_mode"], "--pair_stream", settings["pair_stream"]]
    words += [*_shared(sweep), *_dtype(sweep)]
    return [*words, *(f"--{name}" for name in ("bf16", "use_cpu") if settings[name])]


def _shared(sweep: Sweep) -> Iterator[str]:
    template = sweep.folder / "data" / "chat_template.jinja"
    if template.is_file():
        yield from ("--chat_template", str(template))
    if sweep.definition.settings["trust_remote_code"]:
        yield "--trust_remote_code"


def _dtype(sweep: Sweep) -> list[str]:
    """That of the training; `generate` and `diagnose` choose another one for themselves."""
    dtype = sweep.definition.settings["dtype"]
    return ["--dtype", dtype] if dtype in ("float32", "bfloat16", "float16") else []


def _call(words: list[str], accepted: tuple[int, ...] = ()) -> None:
    """Run a command of sampo in this process, and print it first, so that it can be run by hand.

    Raises:
        SystemExit: it has failed, with another status than those accepted.
    """
    say(f"$ {shlex.join(['sampo', *words])}")
    module: Any = import_module(f".{words[0]}", __package__)
    parser: argparse.ArgumentParser = module.make_parser()
    try:
        module.main(parser.parse_args(words[1:]))
    except SystemExit as error:
        if error.code not in accepted:
            raise


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
