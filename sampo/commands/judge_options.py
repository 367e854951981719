"""Who judges: the options of every judge, and the judges that they describe, for each command that asks one."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..evaluation.judging import human_judge, judges, rule_judges, templates
from . import endpoints
from .endpoints import INCOMPLETE, STOPPED
from .nested_options import parse_nested, split_words
from .shown import say

PAID_CONTROL = 25  # prompts of the control with an empty answer, where requests may cost money


def add_judges(parser: argparse.ArgumentParser) -> None:
    """Add `--judge`, `--control_n` and the groups of options of all judges."""
    parser.add_argument("--judge", required=True, choices=list(JUDGES), help="who judges")
    parser.add_argument(
        "--control_n",
        type=int,
        help=f"prompts of the control with an empty answer ({PAID_CONTROL} for `endpoint`, else all)",
    )
    model = parser.add_argument_group("judges that are models")
    model.add_argument("--model", help="the judge; for `implicit` the policy")
    model.add_argument("--ref_model", help="for `implicit`: the reference, if the policy is no adapter")
    model.add_argument("--beta", type=float, default=0.1, help="for `implicit`: the β of the training (0.1)")
    model.add_argument("--batch_size", type=int, default=8, help="answers at a time (8)")
    model.add_argument("--device", help="the first accelerator, else the CPU")
    asked = parser.add_argument_group("endpoint")
    asked.add_argument(
        "--template", default="helpfulness", help=f"one of {', '.join(templates.names())}, or a YAML file"
    )
    asked.add_argument("--cache", type=Path, default=Path("judge-replies.jsonl"), help="file of all replies")
    asked.add_argument("--attempts", type=int, default=2, help="ask again for a reply that cannot be read (2 in all)")
    asked.add_argument("--temperature", type=float, default=0.0, help="of the judge (0)")
    asked.add_argument(
        "--top_logprobs", type=int, default=20, help="with a template that reads log-probabilities (20)"
    )
    asked.add_argument("--dry_run", action="store_true", help="report what would be asked for, and ask nothing")
    asked.add_argument("--batch", action="store_true", help="ask by the server's batch API, and wait for the results")
    asked.add_argument("--poll_seconds", type=float, default=60.0, help="between two looks at a batch (60)")
    endpoints.add_options(parser)
    other = parser.add_argument_group("other judges")
    other.add_argument("--annotations", type=Path, metavar="CSV", help="for `human`")
    other.add_argument("--lab_seed", type=int, default=0, help="for `lab`: seed of its world (0)")


def _needs(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name)
    if value is None:
        raise ValueError(f"`{name}` must be given for `judge` {args.judge}.")
    return value


def _endpoint(args: argparse.Namespace) -> Any:
    from ..evaluation.judging.batch_judge import BatchJudge
    from ..evaluation.judging.endpoint_judge import EndpointJudge

    endpoint = endpoints.build(args, _needs(args, "model"))
    make = partial(BatchJudge, poll_seconds=args.poll_seconds) if args.batch else EndpointJudge
    return make(
        endpoint,
        templates.load(args.template),
        args.cache,
        temperature=args.temperature,
        top_logprobs=args.top_logprobs,
        attempts=args.attempts,
        options=args.options,
    )


def _reward(args: argparse.Namespace) -> Any:
    from ..evaluation.judging.model_judges import RewardJudge

    return RewardJudge(_needs(args, "model"), batch_size=args.batch_size, device=args.device)


def _implicit(args: argparse.Namespace) -> Any:
    from ..evaluation.judging.model_judges import ImplicitJudge

    return ImplicitJudge(
        _needs(args, "model"), args.ref_model, beta=args.beta, batch_size=args.batch_size, device=args.device
    )


def _lab(args: argparse.Namespace) -> Any:
    from ..lab.judge import lab_judge

    return lab_judge(args.lab_seed)


JUDGES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "endpoint": _endpoint,
    "reward": _reward,
    "implicit": _implicit,
    "longer": lambda args: rule_judges.longer_judge(),
    "exact": lambda args: rule_judges.exact_judge(),
    "contains": lambda args: rule_judges.contains_judge(),
    "lab": _lab,
    "human": lambda args: human_judge.HumanJudge(_needs(args, "annotations")),
}


def _check_endpoint(args: argparse.Namespace) -> None:
    endpoints.build(args, _needs(args, "model"))
    templates.load(args.template)


def _check_reward(args: argparse.Namespace) -> None:
    from ..models.inference import check_reward

    check_reward(_needs(args, "model"))


def _check_implicit(args: argparse.Namespace) -> None:
    from ..evaluation.judging.model_judges import check_implicit

    check_implicit(_needs(args, "model"), args.ref_model, beta=args.beta)


_CHECKS = {"endpoint": _check_endpoint, "reward": _check_reward, "implicit": _check_implicit}


def check_judge(option: str, text: str) -> None:
    """Check a judge that `sampo judge` will ask much later: no weights are read, and no server is asked.

    Args:
        option: that holds the judge.
        text: its name, then options of `sampo judge`.

    Raises:
        ValueError: with the issue.
    """
    from . import judge  # imports this module

    words, known = split_words(option, text), [name for name in JUDGES if name != "human"]
    if not words or words[0] not in known:
        raise ValueError(f"`{option}` must begin with one of {known}, got {text!r}.")
    files = {"system": "SYSTEM", "baseline": "BASELINE", "out": "OUT.jsonl"}
    args = parse_nested(option, judge.make_parser(), files, ["--judge", *words])
    _check_combinations(args)
    if args.judge in _CHECKS:
        _CHECKS[args.judge](args)


def make_judge(args: argparse.Namespace) -> Any:
    """The judge that the options describe.

    Raises:
        ValueError: an option is missing, or goes with another judge.
    """
    _check_combinations(args)
    return JUDGES[args.judge](args)


def _check_combinations(args: argparse.Namespace) -> None:
    judges.check_batch_size(args.batch_size)
    for name in ("batch", "serve"):
        if getattr(args, name) and args.judge != "endpoint":
            raise ValueError(f"`{name}` goes with `judge` endpoint, got {args.judge}, which makes no requests.")
    if args.batch and args.serve:
        raise ValueError("`batch` goes with a server that runs on, got `serve` as well. Leave one of them out.")


# --- what is asked, and what it costs ------------------------------------------------------------------------------


def control_pairs(args: argparse.Namespace, pairs: Sequence[judges.AnswerPair]) -> list[judges.AnswerPair]:
    """The pairs of the control with an empty answer; people are not asked for it."""
    if args.judge == "human":
        return []
    n = args.control_n
    if n is None and args.judge == "endpoint":
        n = PAID_CONTROL
    return judges.empty_answers(pairs, n, args.seed)


def comparisons_of(pairs: Sequence[judges.AnswerPair]) -> list[judges.Comparison]:
    """Both orders of each pair."""
    return [pair.comparison(order) for pair in pairs for order in judges.ORDERS]


def cost_of(judge: Any, shown: Sequence[judges.Comparison] = ()) -> dict[str, Any] | None:
    """Requests, tokens and price of this run, and of all replies about `shown`; None if no server was asked."""
    endpoint = getattr(judge, "endpoint", None)
    if endpoint is None:
        return None
    cost = {"requests": endpoint.requests, **endpoint.spending.row()}
    return {**cost, "all_runs": judge.paid(shown)} if shown else cost


def say_cost(cost: Mapping[str, Any] | None) -> None:
    """Print what `cost_of` has found."""
    if cost:
        say(endpoints.cost_sentence(cost["requests"], cost))
        every = cost.get("all_runs", cost)
        if every["tokens_in"] > cost["tokens_in"]:
            say(f"with earlier runs: {endpoints.cost_sentence(every['replies'], every)}")


def say_estimate(args: argparse.Namespace, judge: Any, shown: Sequence[judges.Comparison]) -> None:
    """Print what `--dry_run` asks for.

    Raises:
        ValueError: the judge makes no requests.
    """
    if args.judge != "endpoint":
        raise ValueError(f"`dry_run` goes with `judge` endpoint, got {args.judge}, which makes no requests.")
    estimate = judge.estimate(shown)
    say(
        f"{estimate.kept} replies are kept, {estimate.requests} are missing ({estimate.requests_at_most} "
        f"requests at most if replies cannot be read): about {estimate.tokens_in} tokens to read, at most "
        f"{estimate.tokens_out_at_most} to write"
    )
    price = judge.endpoint.spending.price(estimate.tokens_in, estimate.tokens_out_at_most)
    if price is not None:
        say(f"price: at most about {price:.2f}, without second attempts")


def say_failures(judge: Any, failures: Mapping[str, int]) -> int:
    """Print whether the same command helps; the exit code: 0, incomplete or stopped."""
    endpoint = getattr(judge, "endpoint", None)
    if endpoint is not None and endpoint.why_stopped:
        say(f"Given up: {endpoint.why_stopped}. {endpoints.what_helps(endpoint)}")
        return STOPPED
    if failures and endpoint is not None:
        passing = sum(failures.get(reason, 0) for reason in endpoints.PASSING)
        say(
            f"{passing} of {sum(failures.values())} failed judgements may succeed if the same command is run again"
            + ("." if passing else "; the others need a higher `attempts`, another template or another judge.")
        )
    return INCOMPLETE if failures else 0
