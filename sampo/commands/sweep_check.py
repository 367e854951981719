"""The definition of a sweep from its options, with all issues of all runs at once."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..io.files import write_atomic
from ..sweep.plan import GRID, Definition, RefusedSweep, Sweep
from ..training.round_results import hash_data, hash_model
from .launch import split_options
from .nested_options import split_words
from .option_checks import is_adapter
from .options import TRAINERS, RecipeParser, listed
from .options import make_parser as make_train_parser
from .sweep_options import Request

NEEDED = (
    "model_name_or_path",
    "max_length",
    "truncation_mode",
    "dtype",
    "use_cpu",
    "bf16",
    "pair_stream",
    "trust_remote_code",
)


@dataclass
class Checked:
    """A definition, and the parsed options of its first run.

    Attributes:
        sweep: the folder and the definition.
        options: an attribute for each option of `sampo train`.
        built: the dataclasses of the first run.
        data: `train` and `test`.
        processor: the tokenizer, with its chat template.
    """

    sweep: Sweep
    options: Any
    built: list[Any]
    data: Mapping[str, Any]
    processor: Any


def check_request(request: Request, recipe: Path, devices: int) -> Checked:
    """Find all issues of all runs, and define the sweep.

    Args:
        request: what was asked for.
        recipe: file with the base recipe, anywhere.
        devices: GPUs of each run.

    Raises:
        RefusedSweep: with all issues.
    """
    from .dry_run import find_issues
    from .models import load_processor
    from .train import load_data

    files = rf"{re.escape(str(recipe.with_suffix('')))}(-\w+)?\.yaml"

    def by_name(issue: str) -> str:  # the recipes of all trainers are written from one file, which the user knows
        return re.sub(files, lambda _: request.file, issue)

    def refuse(issues: Sequence[str]) -> None:
        if issues:
            raise RefusedSweep(listed(list(dict.fromkeys(map(by_name, issues)))))

    parser = make_train_parser(prog="sampo sweep")
    first = ["--config", str(recipe), *request.words, "--output_dir", str(request.own["out"])]
    swept = {name: _options_of(name) for name in ("dpo", *(one.trainer for one in request.methods.values()))}
    parser.not_ours = set().union(*swept.values())
    issues, base, _ = parser.find_issues(first)
    issues = list(map(by_name, issues))
    definition = _define(request, base, devices, swept)
    sweep = Sweep(Path(request.own["out"]), definition)
    for trainer in swept:
        write_swept_recipe(sweep, trainer, recipe.parent)
    issues += _find_issues_of_runs(parser, sweep, recipe, issues, by_name)
    command = _words_of(sweep, definition.runs[0], recipe)
    issues += find_issues(parser, command)
    issues += _find_base_issues(base, sweep)
    refuse(issues)
    _, options, built = parser.find_issues(command)
    script, training, model, mixture = built
    processor = load_processor(script, training, model)
    data = load_data(script, training, mixture, processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    settings = {name: getattr(base, name) for name in NEEDED if hasattr(base, name)}
    settings |= {
        "bf16": bool(training.bf16),
        "max_length": training.max_length,
        "chat_template": options.chat_template,
    }
    definition = replace(
        definition,
        settings=settings,
        answer_tokens=_mean_answer_tokens(data["train"], tokenizer, definition.pairs),
        chat=isinstance(data["train"][0]["prompt"], list),
    )
    return Checked(Sweep(sweep.folder, definition), options, built, data, processor)


def _options_of(trainer: str) -> set[str]:
    if trainer not in TRAINERS:  # which is an issue of its runs
        return set()
    return {action.dest for action in make_train_parser(prog="sampo sweep", trainer=trainer)._actions}


def write_swept_recipe(sweep: Sweep, trainer: str, folder: Path) -> None:
    """Write the base recipe as runs of a trainer read it.

    Args:
        sweep: with the base recipe.
        trainer: of the runs.
        folder: where to.
    """
    import yaml

    not_taken = {one.trainer: one.not_taken for one in sweep.definition.methods.values()}.get(trainer, [])
    recipe = {name: value for name, value in sweep.definition.recipe.items() if name not in not_taken}
    begin = (
        f"# The base recipe of all runs with `trainer: {trainer}`, as it was at the start. Written by `sampo sweep`.\n"
    )
    text = begin + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    write_atomic(folder / sweep.recipe_of(trainer).name, text)


def _define(request: Request, options: Any, devices: int, swept: Mapping[str, set[str]]) -> Definition:
    """The definition; `swept` are the options of each trainer."""
    own = request.own
    given = {*request.recipe, *(word.split("=")[0].lstrip("-").replace("-", "_") for word in request.words)}
    every = set().union(*swept.values())
    not_taken = {name: sorted(given & every - known) for name, known in swept.items()}
    typed_seed = any(word.split("=")[0] == "--seed" for word in request.words)
    seed = int(options.seed if typed_seed else own.get("seed", options.seed))
    split = options.split_seed if options.split_seed is not None else own.get("split_seed")
    inputs = {"model": hash_model(str(options.model_name_or_path))}
    if options.dataset_name:
        inputs["data"] = hash_data(Path(str(options.dataset_name)))
    return Definition(
        model=str(options.model_name_or_path),
        recipe=json.loads(json.dumps(request.recipe, default=str)),
        words=request.words,
        launch=request.launch,
        inputs={name: digest for name, digest in inputs.items() if digest},
        settings={},
        split_seed=seed if split is None else int(split),
        seed=seed,
        seeds=own["seeds"],
        grid={name: list(dict.fromkeys(request.grid.get(name, [float(getattr(options, name))]))) for name in GRID},
        methods={name: replace(one, not_taken=not_taken[one.trainer]) for name, one in request.methods.items()},
        answer_tokens=1.0,
        prompts=own["prompts"],
        pairs=own["pairs"],
        max_tokens=own["max_tokens"],
        temperature=float(own["temperature"]),
        chat=False,
        judge=split_words("judge", str(own["judge"])),
        devices=devices,
    )


def _words_of(sweep: Sweep, run: Any, recipe: Path) -> list[str]:
    """The options of a run for a parser, with the recipe where it lies now."""
    words = split_options(sweep.train_command(run)[2:])[1]
    written = {
        str(sweep.recipe_of(trainer)): str(recipe.with_name(sweep.recipe_of(trainer).name)) for trainer in TRAINERS
    }
    return [written.get(word, word) for word in words]


def _find_issues_of_runs(
    parser: RecipeParser, sweep: Sweep, recipe: Path, known: Sequence[str], by_name: Callable[[str], str]
) -> list[str]:
    """Issues of the options of each method and grid value; one that all have is named once."""
    found: dict[str, list[str]] = {}
    runs = [run for run in sweep.definition.runs if run.seed == sweep.definition.seed]
    for run in runs:
        for issue in map(by_name, parser.find_issues(_words_of(sweep, run, recipe))[0]):
            found.setdefault(issue, []).append(run.name)
    return [
        issue if len(names) == len(runs) else f"{', '.join(names)}: {issue}"
        for issue, names in found.items()
        if issue not in known
    ]


def _find_base_issues(options: Any, sweep: Sweep) -> list[str]:
    """What the evaluation of the runs needs."""
    others = [name for name, one in sweep.definition.methods.items() if one.trainer != "dpo"]
    table = [
        (
            others and options.truncation_mode != "keep_start",
            f"`truncation_mode` must be keep_start beside {others}, whose trainers cut the end of a response.",
        ),
        (
            str(options.eval_strategy) in ("no", "False", "IntervalStrategy.NO"),
            "`eval_strategy` must evaluate, for a sweep compares runs on held-out pairs, got `no`. Set "
            "`eval_strategy: epoch`, and `eval_fraction` or `dataset_test_split`.",
        ),
        (
            is_adapter(str(options.model_name_or_path)) or options.ref_model_name_or_path is not None,
            "`model_name_or_path` must be a complete model and its own reference in a sweep. `sampo merge` an adapter "
            "first.",
        ),
        (
            options.model_revision not in (None, "main"),
            f"`model_revision` must be main in a sweep, got {options.model_revision}. Download that revision into a "
            "folder.",
        ),
    ]
    return [message for wrong, message in table if wrong]


def _mean_answer_tokens(rows: Any, tokenizer: Any, n: int) -> float:
    """Mean tokens of the responses of the first training pairs, without the template's."""
    texts = []
    for row in rows.select(range(min(n, len(rows)))):
        for side in ("chosen", "rejected"):
            parts = row[side]
            texts.append(parts if isinstance(parts, str) else " ".join(str(one["content"]) for one in parts))
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return round(sum(counts) / len(counts), 1)
