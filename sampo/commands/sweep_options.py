"""The options of `sampo sweep`, and the definition of a sweep that follows from them, with all issues of all runs."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import plugins
from ..io.schemas import read_yaml, typed
from ..methods import METHOD_OPTIONS, find_method
from ..sweep.plan import GRID, Definition, RefusedSweep, Sweep, SweptMethod
from ..training.rounds import hash_data, hash_model
from .launch import split_options
from .option_checks import is_adapter
from .options import OF_TRAIN, RecipeParser, listed
from .options import make_parser as make_train_parser
from .recipes import find_recipe

DEFAULTS: dict[str, Any] = {
    **{"seeds": 1, "prompts": 100, "pairs": 500, "max_tokens": 256, "temperature": 1.0, "judge": "", "jobs": 1},
    **{"launcher": "local", "slurm": [], "keep_checkpoints": False},
}
IN_YAML = ("recipe", "methods", "out", *DEFAULTS)  # beside the options of `sampo train` and lists for the grid
SET_BY_SWEEP = (
    *("output_dir", "seed", "split_seed", "resume", "resume_from_checkpoint", "precompute_ref_log_probs"),
    *("ref_cache_dir", "prompt_shard"),
)
NEEDED = ("model_name_or_path", "max_length", "truncation_mode", "dtype", "use_cpu", "bf16", "trust_remote_code")


def make_parser() -> argparse.ArgumentParser:
    """Parser of the options that `sampo train` does not have, or for which it takes one value."""
    parser = argparse.ArgumentParser(
        prog="sampo sweep",
        allow_abbrev=False,
        epilog=OF_TRAIN,
        description="Train several methods on the same pairs with the same budget, and say what came out. All options "
        "of `sampo train` are accepted too. Finished runs are not run again; an interrupted one continues.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with these options and those of `sampo train`")
    parser.add_argument("--recipe", metavar="RECIPE", help="base recipe: a YAML file or the name of a packaged one")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="names of methods, as `dpo sampo onesided rdpo=0.01`"
    )
    parser.add_argument("--seeds", type=int, help="number of seeds, from `seed` of the recipe on (1)")
    parser.add_argument("--learning_rate", nargs="+", type=float, metavar="VALUE", help="one or several")
    parser.add_argument("--beta", nargs="+", type=float, metavar="VALUE", help="one or several")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the runs and the results")
    parser.add_argument("--dry_run", action="store_true", help="print runs, steps, time and disk; write nothing")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--prompts", type=int, help="held-out prompts that each run answers (100)")
    evaluation.add_argument("--max_tokens", type=int, help="tokens after which an answer is cut off (256)")
    evaluation.add_argument(
        "--temperature", type=float, help="of the answers (1, which the KL needs); 0 takes the most likely token"
    )
    evaluation.add_argument("--pairs", type=int, help="at most so many held-out pairs are scored (500)")
    evaluation.add_argument(
        "--judge", metavar="OPTIONS", help="options of `sampo judge`, as `reward --model FOLDER`; none without"
    )
    running = parser.add_argument_group("running")
    running.add_argument("--jobs", type=int, help="runs at a time, each with its share of the GPUs or threads (1)")
    running.add_argument("--launcher", choices=("local", "slurm"), help="`slurm` submits each run as a job (local)")
    running.add_argument(
        "--slurm", nargs="+", metavar="NAME=VALUE", help="parameters of submitit, as `slurm_partition=gpu`"
    )
    running.add_argument(
        "--keep_checkpoints", action="store_true", default=None, help="of finished runs; their model is always kept"
    )
    plugins.add_option(parser)
    return parser


@dataclass
class Request:
    """What was asked for, before anything is checked.

    Attributes:
        own: options of the sweep.
        grid: options of `GRID` with the values that were given.
        methods: name -> method.
        recipe: options of all runs from the files, without those that a method sets.
        words: options of all runs from the command line.
        launch: options for the launcher.
        file: name of the file for messages.
        issues: found so far.
    """

    own: dict[str, Any]
    grid: dict[str, list[float]]
    methods: dict[str, SweptMethod]
    recipe: dict[str, Any]
    words: list[str]
    launch: dict[str, str]
    file: str
    issues: list[str] = field(default_factory=list)


def read_request(argv: list[str]) -> Request:
    """Read the command line and the files.

    Raises:
        RefusedSweep: a file cannot be read.
    """
    given, rest = make_parser().parse_known_args(argv)
    own = {name: value for name, value in vars(given).items() if value is not None}
    launch, words = split_options(rest)
    file = _read_file(own["config"], "config") if "config" in own else {}
    own = {name: file.pop(name) for name in IN_YAML if name in file} | own
    grid = {name: file.pop(name) for name in GRID if isinstance(file.get(name), list)}
    grid |= {name: own.pop(name) for name in GRID if name in own}
    base = _read_file(own["recipe"], "recipe") if "recipe" in own else {}
    issues: list[str] = []
    try:
        grid = {name: typed(list[float], [float(value) for value in values]) for name, values in grid.items()}
    except (TypeError, ValueError):
        issues.append(f"Values of the grid must be numbers, got {grid}.")
        grid = {}
    recipe = {name: value for name, value in {**base, **file}.items() if name not in (*METHOD_OPTIONS, *SET_BY_SWEEP)}
    seeds: dict[str, Any] = {
        name: {**base, **file}[name] for name in ("seed", "split_seed") if name in {**base, **file}
    }
    request = Request(
        own={**DEFAULTS, **seeds, **own},
        grid=grid,
        methods=_read_methods(own.get("methods"), issues),
        recipe=recipe,
        words=words,
        launch=launch,
        file=str(own.get("config") or own.get("recipe") or "the command line"),
        issues=issues,
    )
    request.issues += _find_own_issues(request)
    return request


def _read_file(name: Any, option: str) -> dict[str, Any]:
    try:
        path = Path(str(name)) if Path(str(name)).is_file() else find_recipe(str(name))
        found: dict[str, Any] = read_yaml(path, dict[str, Any])
    except (OSError, ValueError) as error:
        raise RefusedSweep(f"`{option}` must be a YAML file or {error}") from None
    return found


def _read_methods(given: Any, issues: list[str]) -> dict[str, SweptMethod]:
    """Methods by name; in a YAML file one may also be a mapping from its own name to its options."""
    found: dict[str, SweptMethod] = {}
    if not isinstance(given, list) or not given:
        issues.append(f"`methods` must name at least one method, got {given!r}.")
        return found
    for item in given:
        try:
            for name, options in item.items() if isinstance(item, dict) else [(str(item), None)]:
                if options is not None:
                    options = typed(dict[str, str | int | float | bool], options, field=f"methods: {name}")
                    found[name] = SweptMethod(name, options)
                    continue
                method = find_method(name)
                if method.rounds > 1:
                    raise ValueError(f"`{name}` is trained in rounds: use `sampo iterate`.")
                found[name] = SweptMethod(method.title, method.options, method.beta_per_token)
        except ValueError as error:
            issues.append(str(error))
    if wrong := [name for name in found if not name.replace("=", "").replace("_", "").replace(".", "").isalnum()]:
        issues.append(f"Names of methods must be letters, digits and `_`, got {wrong}.")
    return found


def _find_own_issues(request: Request) -> list[str]:
    own = request.own
    least = {"seeds": 1, "jobs": 1, "prompts": 2, "pairs": 2, "max_tokens": 1}
    whole = {name: isinstance(own[name], int) and not isinstance(own[name], bool) for name in least}
    issues = [
        f"`{name}` must be a whole number of at least {low}, got {own[name]!r}."
        for name, low in least.items()
        if not whole[name] or own[name] < low
    ]
    if not isinstance(own["temperature"], int | float) or not own["temperature"] >= 0:
        issues.append(f"`temperature` must be a number of at least 0, got {own['temperature']!r}.")
    if own.get("out") is None:
        issues.append("`out` must name the folder of the sweep.")
    given = [word.split("=")[0].lstrip("-").replace("-", "_") for word in request.words if word.startswith("--")]
    for name in dict.fromkeys(given):
        if name in METHOD_OPTIONS:
            issues.append(f"`{name}` is set by `methods`, and cannot be given.")
        elif name in SET_BY_SWEEP and name not in ("seed", "split_seed"):
            issues.append(f"`{name}` is set by each run, and cannot be given.")
        elif name == "hub_token":
            issues.append("`hub_token` would be written into the state file. Set the variable HF_TOKEN in its place.")
    if request.launch.get("gpu_ids") and own["jobs"] != 1:
        issues.append("`gpu_ids` goes with one job. Set the environment variable CUDA_VISIBLE_DEVICES in its place.")
    return [*issues, *_find_judge_issues(str(own["judge"]))]


def _find_judge_issues(judge: str) -> list[str]:
    from .judge import JUDGES

    words = shlex.split(judge)
    known = [name for name in JUDGES if name != "human"]
    if words and words[0] not in known:
        return [f"`judge` must begin with one of {known}, got {words[0]!r}."]
    return []


# --- the definition --------------------------------------------------------------------------------------------------


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

    def refuse(issues: Sequence[str]) -> None:
        if issues:
            texts = [issue.replace(str(recipe), request.file) for issue in dict.fromkeys(issues)]
            raise RefusedSweep(listed(texts))

    refuse(request.issues)
    parser = make_train_parser(prog="sampo sweep")
    first = ["--config", str(recipe), *request.words, "--output_dir", str(request.own["out"])]
    issues, options, _ = parser.find_issues(first)
    definition = _define(request, options, devices)
    sweep = Sweep(Path(request.own["out"]), definition)
    issues += _find_issues_of_runs(parser, sweep, recipe, issues)
    command = _words_of(sweep, definition.runs[0], recipe)
    issues += find_issues(parser, command)
    issues += _find_base_issues(options)
    refuse(issues)
    _, options, built = parser.find_issues(command)
    script, training, model, mixture = built
    processor = load_processor(script, training, model)
    data = load_data(script, training, mixture, processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    settings = {name: getattr(options, name) for name in NEEDED if hasattr(options, name)}
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


def _define(request: Request, options: Any, devices: int) -> Definition:
    own = request.own
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
        methods=request.methods,
        answer_tokens=1.0,
        prompts=own["prompts"],
        pairs=own["pairs"],
        max_tokens=own["max_tokens"],
        temperature=float(own["temperature"]),
        chat=False,
        judge=shlex.split(str(own["judge"])),
        devices=devices,
    )


def _words_of(sweep: Sweep, run: Any, recipe: Path) -> list[str]:
    """The options of a run for a parser, with the recipe where it lies now."""
    words = split_options(sweep.train_command(run)[2:])[1]
    return [str(recipe) if word == str(sweep.recipe) else word for word in words]


def _find_issues_of_runs(parser: RecipeParser, sweep: Sweep, recipe: Path, known: Sequence[str]) -> list[str]:
    """Issues of the options of each method and grid value; one that all have is named once."""
    found: dict[str, list[str]] = {}
    runs = [run for run in sweep.definition.runs if run.seed == sweep.definition.seed]
    for run in runs:
        for issue in parser.find_issues(_words_of(sweep, run, recipe))[0]:
            found.setdefault(issue, []).append(run.name)
    return [
        issue if len(names) == len(runs) else f"{', '.join(names)}: {issue}"
        for issue, names in found.items()
        if issue not in known
    ]


def _find_base_issues(options: Any) -> list[str]:
    """What the evaluation of the runs needs."""
    table = [
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
