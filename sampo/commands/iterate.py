"""`sampo iterate`: Iterative SamPO, several rounds of `sampo train`, each from the model of the round before.

The command takes all options of `sampo train`, from the YAML file and the command line, and three more from
both. Each round is a separate launch; see `sampo.training.rounds`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import plugins
from ..io.locks import FolderInUseError
from ..training.onpolicy import OnPolicyPlan
from ..training.round_results import hash_data, hash_model
from ..training.rounds import (
    DATA,
    OF_THE_MACHINE,
    REFERENCES,
    Plan,
    RefusedIteration,
    Round,
    RoundFailed,
    iterate,
)
from . import iterate_onpolicy
from .launch import split_options
from .option_checks import is_adapter
from .options import ITERATE_OPTIONS, OF_TRAIN
from .options import make_parser as make_train_parser

DEFAULTS: dict[str, Any] = {"reference": "previous", "remove_old_caches": False}
ON_ONE_MACHINE = {"accelerate_config", "num_processes", *OF_THE_MACHINE}  # of the launcher's options
SET_BY_US = (
    *("ref_model_name_or_path", "ref_model_revision", "prompt_shard", "split_seed"),
    *("resume", "resume_from_checkpoint"),
)


def make_parser() -> argparse.ArgumentParser:
    """Parser of the options that `sampo train` does not have."""
    parser = argparse.ArgumentParser(
        prog="sampo iterate",
        allow_abbrev=False,
        epilog=OF_TRAIN,
        description="Several rounds of `sampo train`, each from the model of the round before. All options of `sampo "
        "train` are accepted too. Finished rounds are not run again; an interrupted one continues.",
    )
    parser.add_argument("--rounds", type=int, help="number of rounds")
    parser.add_argument(
        "--data",
        choices=DATA,
        help="`full` (default): each round trains on all pairs. `shards`: each round trains on another part of the "
        "prompts, and all rounds together use each pair once per epoch. With `on_policy` the prompts are meant, and "
        "`shards` is the default",
    )
    parser.add_argument(
        "--reference",
        choices=REFERENCES,
        help="`previous` (default): the model that the round starts from. `initial`: the one that round 1 starts from",
    )
    parser.add_argument(
        "--remove_old_caches",
        action="store_true",
        default=None,
        help="delete the cache of reference log-probs (`precompute_ref_log_probs`) that a round has made when no "
        "later round can use it",
    )
    iterate_onpolicy.add_on_policy_options(parser)
    plugins.add_option(parser)
    return parser


def run(argv: list[str]) -> int:
    """Run the rounds; returns the exit status."""
    own, rest = make_parser().parse_known_args(argv)
    try:
        plan, cleans = make_plan({name: value for name, value in vars(own).items() if value is not None}, rest)
        rounds = iterate(plan, _say, after=cleans, measure=lambda one: iterate_onpolicy.measure_round(plan, one))
    except (RefusedIteration, FolderInUseError, RoundFailed) as error:
        print(f"sampo iterate: error: {error}", file=sys.stderr)
        return error.status if isinstance(error, RoundFailed) else 2
    for one in rounds:
        _say(summarise_round(one))
    _say(f"The model after {plan.rounds} rounds: {plan.model_after(plan.rounds)}")
    return 0


def make_plan(own: dict[str, Any], argv: list[str]) -> tuple[Plan, Callable[[Round], None] | None]:
    """Make the plan, and the function to call after each round.

    Args:
        own: options of `sampo iterate` on the command line.
        argv: all other arguments: options of `sampo train` and of the launcher.

    Raises:
        RefusedIteration: options are wrong; all issues in one message.
        SystemExit: unknown options, or issues that `sampo train` finds.
    """
    launch, rest = split_options(argv)
    parser = make_train_parser(prog="sampo iterate")
    parser.not_ours = set(ITERATE_OPTIONS)
    recipe = parser.config_of(rest)
    own = {**DEFAULTS, **{key: recipe[key] for key in ITERATE_OPTIONS if key in recipe}, **own}
    on_policy = own.get("on_policy") or False
    own.setdefault("data", "shards" if on_policy else "full")
    options = parser.read([*rest, *(["--dataset_name", "pairs.jsonl"] if on_policy else [])])[1]
    issues = _find_issues(own, launch, options)
    if issues := [*issues, *iterate_onpolicy.find_on_policy_issues(own, recipe, rest)]:
        raise RefusedIteration(" ".join(issues))
    removes = own.pop("remove_old_caches")
    further = iterate_onpolicy.take_fields(own, options)
    make: Callable[..., Plan] = OnPolicyPlan if on_policy else Plan
    plan = make(
        **own,
        **further,
        output_dir=options.output_dir,
        model=options.model_name_or_path,
        revision=options.model_revision,
        seed=options.seed,
        dtype=options.dtype,
        use_peft=options.use_peft,
        quantization=_quantization_words(options),
        recipe={key: value for key, value in recipe.items() if key not in ITERATE_OPTIONS},
        words=_without_config(rest),
        launch=launch,
        inputs=_hash_inputs(options, further),
    )
    if not (removes and options.precompute_ref_log_probs):
        return plan, None
    return plan, lambda one: _remove_caches(plan, one, options.ref_cache_dir)


def _remove_caches(plan: Plan, one: Round, folder: str | None) -> None:
    """Delete the caches that a round has made; with one reference for all rounds, only after the last round."""
    if plan.reference == "initial" and one.number < plan.rounds:
        return
    from ..reference_cache.store import RefCacheError, cache_folders, cache_root, read_cache_manifest, remove_cache

    made_by = {str(plan.round_folder(number)) for number in range(1, one.number + 1)}
    for path in cache_folders(cache_root(folder)):
        try:
            manifest = read_cache_manifest(path / "manifest.json")
            if manifest is not None and manifest.about.output_dir in made_by:
                remove_cache(path)
                _say(f"deleted the cache of reference log-probs {path}")
        except RefCacheError as error:
            _say(f"left alone: {error}")


def _find_issues(own: dict[str, Any], launch: dict[str, str], options: Any) -> list[str]:
    rounds = own.get("rounds")
    table = [
        (
            not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1,
            f"`rounds` must be a number of at least 1, got {rounds!r}.",
        ),
        (
            not isinstance(own["remove_old_caches"], bool),
            f"`remove_old_caches` must be true or false, got {own['remove_old_caches']!r}.",
        ),
        (own["data"] not in DATA, f"`data` must be one of {list(DATA)}, got {own['data']!r}."),
        (
            own["reference"] not in REFERENCES,
            f"`reference` must be one of {list(REFERENCES)}, got {own['reference']!r}.",
        ),
        (
            is_adapter(options.model_name_or_path),
            f"`model_name_or_path` must be a complete model, got the adapter in {options.model_name_or_path}. `sampo "
            "merge` it first.",
        ),
        (
            options.hub_token is not None,
            "`hub_token` would be written into the state file. Set the environment variable HF_TOKEN in its place.",
        ),
        (
            own["data"] == "shards" and (options.dataset_streaming or options.streaming),
            "`data: shards` needs all rows, got a stream. Load the data without streaming.",
        ),
        *(
            (getattr(options, name) is not None, f"`{name}` is set by each round, and cannot be given.")
            for name in SET_BY_US
        ),
    ]
    issues = [message for wrong, message in table if wrong]
    if others := sorted(launch.keys() - ON_ONE_MACHINE):
        issues.append(f"`sampo iterate` runs on one machine, got {others}. Run the commands of the rounds by hand.")
    return issues


def _quantization_words(options: Any) -> list[str]:
    """The options of `sampo merge` that repeat the quantisation of the training."""
    if options.load_in_8bit:
        return ["--load_in_8bit"]
    if not options.load_in_4bit:
        return []
    nested = ["--use_bnb_nested_quant"] if options.use_bnb_nested_quant else []
    return ["--load_in_4bit", "--bnb_4bit_quant_type", options.bnb_4bit_quant_type, *nested]


def _without_config(arguments: list[str]) -> list[str]:
    """Remove `--config FILE` from the arguments; a copy of the recipe is read instead."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--config" and not argument.startswith("--config="):
            kept.append(argument)
        skip = argument == "--config"
    return kept


def _hash_inputs(options: Any, further: dict[str, Any]) -> dict[str, str]:
    """Hash the first model and the data, or the prompts, where they are local."""
    found = {"model": hash_model(options.model_name_or_path)}
    data = {name: further[name] for name in ("prompts", "eval_prompts")} if further else {"data": options.dataset_name}
    found |= {name: hash_data(Path(path)) for name, path in data.items() if path}
    return {name: digest for name, digest in found.items() if digest}


def summarise_round(one: Round) -> str:
    """One line with the results of a round."""
    words = [f"round {one.number}: {one.metrics['steps']} steps"]
    for name, title in (("last", "training"), ("eval", "evaluation")):
        entry, prefix = one.metrics.get(name), "eval_" if name == "eval" else ""
        if entry is not None:
            loss, margin = entry.get(f"{prefix}loss"), entry.get(f"{prefix}rewards/margins")
            words.append(f"{title} loss {loss:.4f}" + (f", margin {margin:.4f}" if margin is not None else ""))
    return "; ".join([*words, *iterate_onpolicy.describe_measures(one.metrics)])


def _say(line: str) -> None:
    print(line, flush=True)
