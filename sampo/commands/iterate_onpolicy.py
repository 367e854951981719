"""`sampo iterate --on_policy`: its options, their checks before anything runs, and what is measured of a round."""

import argparse
from collections.abc import Iterator
from typing import Any

from ..training.onpolicy import OnPolicyPlan
from ..training.rounds import Plan, Round
from .judge_options import check_judge
from .nested_options import parse_nested, split_words
from .options import ON_POLICY_OPTIONS


def add_on_policy_options(parser: argparse.ArgumentParser) -> None:
    """Add the group of options."""
    group = parser.add_argument_group("on-policy rounds")
    group.add_argument(
        "--on_policy",
        action="store_true",
        default=None,
        help="each round answers prompts with its own start model, judges the answers, and trains on pairs of them",
    )
    group.add_argument("--prompts", metavar="FILE", help="to answer, as `--prompts` of `sampo generate`")
    group.add_argument("--eval_prompts", metavar="FILE", help="answered at the end of each round, and judged")
    group.add_argument(
        "--generate",
        metavar="OPTIONS",
        help="of `sampo generate`, as `--samples 5 --temperature 0.8 --max_tokens 512`",
    )
    group.add_argument("--judge", metavar="OPTIONS", help="of the judge, as `reward --model FOLDER`")
    group.add_argument("--pairs", metavar="OPTIONS", help="of `sampo pairs`, as `--choice length_regressed`")


def find_on_policy_issues(own: dict[str, Any], recipe: dict[str, Any], words: list[str]) -> list[str]:
    """Find all issues of these options.

    Args:
        own: options of `sampo iterate`.
        recipe: the YAML file.
        words: the command line without them.
    """
    if not isinstance(own.get("on_policy", False), bool):
        return [f"`on_policy` must be true or false, got {own['on_policy']!r}."]
    if not own.get("on_policy"):
        given = [name for name in ON_POLICY_OPTIONS if own.get(name)]
        return [f"`{name}` goes with `on_policy`. Set it, or leave `{name}` out." for name in given]
    texts = {name: own.get(name) or "" for name in ON_POLICY_OPTIONS[1:]}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        return [f"`{name}` must be one text, got {texts[name]!r}." for name in wrong]
    issues = [
        f"`{name}` must be given with `on_policy`." for name in ("prompts", "generate", "judge") if not texts[name]
    ]
    if "dataset_name" in recipe or any(word.split("=")[0] == "--dataset_name" for word in words):
        issues.append("`dataset_name` is set by each round with `on_policy`, and cannot be given.")
    return issues or list(_find_word_issues(texts))


def _find_word_issues(texts: dict[str, str]) -> Iterator[str]:
    """Issues of the options that `generate`, `judge` and `pairs` hold."""
    for option, check in {"generate": _check_generate, "judge": check_judge, "pairs": _check_pairs}.items():
        try:
            check(option, texts[option])
        except (ValueError, OSError, ImportError) as error:
            yield str(error)


def _check_generate(option: str, text: str) -> None:
    from ..evaluation.answers.generate import Sampling
    from ..evaluation.server_process import MODEL
    from . import generate

    ours = {"": "MODEL", "prompts": "PROMPTS", "out": "OUT", "seed": "0"}
    args = parse_nested(option, generate.make_parser(), ours, split_words(option, text))
    sampling = Sampling(**{field: getattr(args, field) for field in Sampling.__dataclass_fields__})
    if sampling.samples < 2:
        raise ValueError(f"`generate` must have at least two `--samples`, got {sampling.samples}.")
    if args.url and MODEL not in (args.serve or ""):
        raise ValueError(
            f"`generate` with `--url` must start a server of the round's model, as `--serve 'vllm serve {MODEL} "
            f"--port 8000'`, got {f'`--serve {args.serve!r}`' if args.serve else 'no `--serve`'}."
        )


def _check_pairs(option: str, text: str) -> None:
    from . import pairs

    ours = {"answers": "ANSWERS", "out": "OUT", "seed": "0", "judge": "longer"}  # any judge: it is checked by itself
    args = parse_nested(option, pairs.make_parser(), ours, split_words(option, text))
    pairs.choice_settings(args)


def take_fields(own: dict[str, Any], options: Any) -> dict[str, Any]:
    """Take these options out of those of `sampo iterate`; fields of an `OnPolicyPlan`, none without `on_policy`."""
    texts = {name: own.pop(name, None) or "" for name in ON_POLICY_OPTIONS}
    if not texts["on_policy"]:
        return {}
    return {
        "prompts": texts["prompts"],
        "eval_prompts": texts["eval_prompts"],
        "generate": split_words("generate", texts["generate"]),
        "judge": split_words("judge", texts["judge"]),
        "choice": split_words("pairs", texts["pairs"]),
        "on_cpu": bool(options.use_cpu),
    }


# --- what came out of a round --------------------------------------------------------------------------------------


def measure_round(plan: Plan, one: Round) -> dict[str, Any]:
    """Numbers of answers, pairs and held-out answers; nothing for offline rounds."""
    if not isinstance(plan, OnPolicyPlan):
        return {}
    from ..io.journal import read_rows
    from ..io.schemas import read_json

    pairs = plan.file(one.number, "pairs.jsonl")
    rows, prompts = read_rows(pairs), read_rows(pairs.with_suffix(".account.jsonl"))
    longer = [row["chosen_length"] > row["rejected_length"] for row in rows]
    found = {"prompts": len(prompts), "pairs": len(rows), "chosen_longer": sum(longer) / len(longer)}
    found |= {f"answers_{name}": value for name, value in _lengths(read_rows(plan.file(one.number, "answers.jsonl")))}
    if plan.eval_prompts:
        mine, start = (dict(_lengths(read_rows(plan.file(number, "eval.jsonl")))) for number in (one.number, 0))
        found |= {f"eval_{name}": value for name, value in mine.items()}
        found["eval_tokens_ratio"] = mine["tokens"] / start["tokens"]
        summary = plan.file(one.number, "judgements.summary.json")
        found["eval_win_rate"] = read_json(summary, dict[str, Any])["result"]["win_rate"]
    return {"on_policy": found}


def _lengths(answers: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    yield "tokens", sum(row["tokens"] for row in answers) / len(answers)
    yield "cut", sum(row["stop"] == "length" for row in answers) / len(answers)


def describe_measures(metrics: dict[str, Any]) -> list[str]:
    """The same in words."""
    found = metrics.get("on_policy")
    if not found:
        return []
    lines = [
        f"{found['pairs']:,} pairs of {found['prompts']:,} prompts, chosen longer in {found['chosen_longer']:.1%}",
        f"answers of {found['answers_tokens']:.1f} tokens",
    ]
    if "eval_tokens" in found:
        rate = "–" if found["eval_win_rate"] is None else f"{found['eval_win_rate']:.1%}"
        lines.append(
            f"held-out answers of {found['eval_tokens']:.1f} tokens, {found['eval_tokens_ratio']:.2f} times those of "
            f"the start, win rate against it {rate}"
        )
    return lines
