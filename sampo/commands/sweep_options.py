"""The options of `sampo sweep`, from the command line and from YAML files."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import plugins
from ..io.schemas import read_yaml, typed
from ..methods import METHOD_OPTIONS, canonical_name, find_method
from ..sweep.plan import GRID, RefusedSweep, SweptMethod
from .judge_options import check_judge
from .launch import split_options
from .options import OF_TRAIN, TRAINERS, listed
from .recipes import find_recipe

SWEEP_DEFAULTS: dict[str, Any] = {
    **{"seeds": 1, "prompts": 100, "pairs": 500, "max_tokens": 256, "temperature": 1.0, "judge": "", "jobs": 1},
    **{"launcher": "local", "slurm": [], "keep_checkpoints": False},
}
LAUNCHERS = ("local", "slurm")
IN_YAML = ("recipe", "methods", "out", *SWEEP_DEFAULTS)  # beside the options of `sampo train` and lists for the grid
_OF_EACH_RUN = (
    "output_dir",
    "seed",
    "split_seed",
    "resume",
    "resume_from_checkpoint",
    "ref_cache_dir",
    "prompt_shard",
)
SET_BY_SWEEP = (*_OF_EACH_RUN, "precompute_ref_log_probs")  # by a method too, if it needs a live reference
NOT_OF_A_METHOD = (  # what all methods share
    *_OF_EACH_RUN,
    *("model_name_or_path", "ref_model_name_or_path", "dataset_name", "max_length", "learning_rate", "max_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
)


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
        "--methods", nargs="+", metavar="METHOD", help="names of methods, as `dpo sampo recommended rdpo=0.01`"
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
    running.add_argument("--launcher", choices=LAUNCHERS, help="`slurm` submits each run as a job (local)")
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
    """

    own: dict[str, Any]
    grid: dict[str, list[float]]
    methods: dict[str, SweptMethod]
    recipe: dict[str, Any]
    words: list[str]
    launch: dict[str, str]
    file: str


def read_request(argv: list[str]) -> Request:
    """Read the command line and the files.

    Raises:
        RefusedSweep: a file cannot be read, or with all issues of these options.
    """
    given, rest = make_parser().parse_known_args(argv)
    own = {name: value for name, value in vars(given).items() if value is not None}
    launch, words = split_options(rest)
    file = _read_file(own["config"], "config") if "config" in own else {}
    in_file = {name: file.pop(name) for name in IN_YAML if name in file}
    own = {name: value for name, value in in_file.items() if value is not None} | own
    grid = {name: file.pop(name) for name in GRID if isinstance(file.get(name), list)}
    grid |= {name: own.pop(name) for name in GRID if name in own}
    base = _read_file(own["recipe"], "recipe") if "recipe" in own else {}
    issues: list[str] = []
    grid = {name: _read_grid(name, values, issues) for name, values in grid.items()}
    recipe = {name: value for name, value in {**base, **file}.items() if name not in (*METHOD_OPTIONS, *SET_BY_SWEEP)}
    seeds: dict[str, Any] = {
        name: {**base, **file}[name] for name in ("seed", "split_seed") if name in {**base, **file}
    }
    request = Request(
        own={**SWEEP_DEFAULTS, **seeds, **own},
        grid=grid,
        methods=_read_methods(own.get("methods"), issues),
        recipe=recipe,
        words=words,
        launch=launch,
        file=str(own.get("config") or own.get("recipe") or "the command line"),
    )
    if issues := [*issues, *_find_own_issues(request)]:
        raise RefusedSweep(listed(issues))
    return request


def _read_file(name: Any, option: str) -> dict[str, Any]:
    try:
        path = Path(str(name)) if Path(str(name)).is_file() else find_recipe(str(name))
    except ValueError as error:
        raise RefusedSweep(f"`{option}` must be a YAML file or {error}") from None
    try:
        found: dict[str, Any] = read_yaml(path, dict[str, Any])
    except (OSError, ValueError) as error:
        raise RefusedSweep(f"`{option}`: {error}") from None
    return found


def _read_grid(name: str, values: list[Any], issues: list[str]) -> list[float]:
    try:
        found = [float(str(value)) for value in values]  # YAML reads `1e-6` as a text
    except ValueError:
        found = []
    if not found:
        issues.append(f"`{name}` must be a number or a list of at least one, got {values}.")
    return found


def _read_methods(given: Any, issues: list[str]) -> dict[str, SweptMethod]:
    """Methods by name; in a YAML file one may also be a mapping from its own name to its options."""
    found: dict[str, SweptMethod] = {}
    if not isinstance(given, list) or not given:
        issues.append(f"`methods` must be a list with at least one method, got {given!r}.")
        return found
    for item in given:
        try:
            if isinstance(item, dict):
                for name, options in item.items():
                    _add(found, str(name), _own_method(str(name), options))
                continue
            method = find_method(str(item))
            if method.rounds > 1:
                raise ValueError(f"`{item}` is trained in rounds: use `sampo iterate`.")
            swept = SweptMethod(method.title, method.options, method.beta_per_token, method.beta)
            _add(found, canonical_name(str(item)), swept)
        except ValueError as error:
            issues.append(str(error))
    return found


def _add(found: dict[str, SweptMethod], name: str, method: SweptMethod) -> None:
    def content(one: SweptMethod) -> tuple:
        return one.options, one.beta, one.beta_per_token

    if name in found:
        raise ValueError(f"`methods` must have different names, got `{name}` twice.")
    if same := [other for other, one in found.items() if content(one) == content(method)]:
        raise ValueError(f"`methods` must differ, got `{same[0]}` and `{name}` with the same options.")
    found[name] = method


def _own_method(name: str, options: Any) -> SweptMethod:
    """A method from the options that a YAML file gives under its name."""
    if not name.replace("_", "").isalnum():
        raise ValueError(f"Names of methods must be letters, digits and `_`, got {name!r}.")
    options = typed(dict[str, str | int | float | bool], options, field=f"methods: {name}")
    if shared := [f"`{option}`" for option in options if option in NOT_OF_A_METHOD]:
        raise ValueError(f"`methods: {name}` must not set {', '.join(shared)}, which all methods share.")
    trainer = str(options.get("trainer", "dpo"))
    beta = options.pop("beta", find_method(trainer).beta if trainer in TRAINERS else None)
    if isinstance(beta, str | bool):
        raise ValueError(f"`methods: {name}` must have a number as its `beta`, got {beta!r}.")
    return SweptMethod(name, options, beta=None if beta is None else float(beta))


def _find_own_issues(request: Request) -> list[str]:
    own = request.own
    least = {"seeds": 1, "jobs": 1, "prompts": 2, "pairs": 2, "max_tokens": 1}
    whole = {name: isinstance(own[name], int) and not isinstance(own[name], bool) for name in least}
    issues = [
        f"`{name}` must be a whole number of at least {low}, got {own[name]!r}."
        for name, low in least.items()
        if not whole[name] or own[name] < low
    ]
    temperature = own["temperature"]
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        issues.append(f"`temperature` must be a finite number of at least 0, got {temperature!r}.")
    if own["launcher"] not in LAUNCHERS:
        issues.append(f"`launcher` must be one of {list(LAUNCHERS)}, got {own['launcher']!r}.")
    if not isinstance(own["keep_checkpoints"], bool):
        issues.append(f"`keep_checkpoints` must be true or false, got {own['keep_checkpoints']!r}.")
    slurm = own["slurm"]
    if not isinstance(slurm, dict) and not (isinstance(slurm, list) and all("=" in str(one) for one in slurm)):
        issues.append(f"`slurm` must be a list of NAME=VALUE, got {slurm!r}.")
    if slurm and own["launcher"] == "local":
        issues.append("`slurm` goes with `launcher: slurm`. Set it, or leave `slurm` out.")
    if not isinstance(own.get("out"), str | Path):
        issues.append(f"`out` must name the folder of the sweep, got {own.get('out')!r}.")
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
    try:
        if judge.strip():
            check_judge("judge", judge)
    except (ValueError, OSError, ImportError) as error:
        return [str(error)]
    return []
