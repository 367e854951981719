"""`sampo judge --system A.jsonl --baseline B.jsonl --judge …`: which answers are better, in both orders."""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation import human_judge, judges, rule_judges, templates
from ..evaluation.journal import write_whole
from . import endpoints

INCOMPLETE, STOPPED = 3, 4  # exit codes: some judgements failed; the run was given up and can be gone on with
PAID_CONTROL = 25  # prompts of the control with an empty answer, where requests may cost money


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo judge",
        allow_abbrev=False,
        description="Judge the answers of a system against those of a baseline, both orders of each pair. Exit code "
        f"{INCOMPLETE}: some judgements failed; {STOPPED}: given up; run it again to go on. No reply is paid twice.",
    )
    parser.add_argument("--system", required=True, type=Path, help="answers: ours, JSONL, or AlpacaEval's JSON")
    parser.add_argument("--baseline", required=True, type=Path, help="answers to compare with")
    parser.add_argument("--judge", required=True, choices=list(JUDGES), help="who judges")
    parser.add_argument("--out", type=Path, default=Path("judgements.jsonl"), help="one row per prompt and order")
    parser.add_argument("--n", type=int, help="judge so many prompts, drawn by a hash of `--seed`")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument(
        "--control_n",
        type=int,
        help=f"prompts of the control with an empty answer ({PAID_CONTROL} for `endpoint`, else all)",
    )
    parser.add_argument("--matched_only", action="store_true", help="leave out prompts that one file lacks")
    parser.add_argument("--annotation_sheet", type=Path, metavar="CSV", help="write a sheet for people, and stop")
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
    asked.add_argument("--cache", type=Path, default=Path("judge-replies.jsonl"), help="replies, kept for ever")
    asked.add_argument("--attempts", type=int, default=2, help="ask again for a reply that cannot be read (2 in all)")
    asked.add_argument("--temperature", type=float, default=0.0, help="of the judge (0)")
    asked.add_argument(
        "--top_logprobs", type=int, default=20, help="with a template that reads log-probabilities (20)"
    )
    asked.add_argument("--dry_run", action="store_true", help="say what would be asked for, and ask nothing")
    asked.add_argument("--price_in", type=float, metavar="PRICE", help="of a million tokens that the judge reads")
    asked.add_argument("--price_out", type=float, metavar="PRICE", help="of a million tokens that it writes")
    endpoints.add_options(parser)
    other = parser.add_argument_group("other judges")
    other.add_argument("--annotations", type=Path, metavar="CSV", help="for `human`")
    other.add_argument("--lab_seed", type=int, default=0, help="for `lab`: seed of its world (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Judge and say what was found."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sampo").setLevel(logging.INFO)
    try:
        pairs = _pairs(args)
        if args.annotation_sheet:
            human_judge.write_sheet(args.annotation_sheet, pairs, args.seed)
            print(f"{args.annotation_sheet}: {len(pairs)} pairs; fill in `preferred` with A, B or tie.")
            return
        judge = JUDGES[args.judge](args)
        with ExitStack() as stack:
            stack.callback(getattr(judge, "close", lambda: None))
            code = _dry_run(args, judge, pairs) if args.dry_run else _judge(args, judge, pairs)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"sampo judge: error: {error}") from None
    if code:
        raise SystemExit(code)


def _pairs(args: argparse.Namespace) -> list[judges.Pair]:
    from ..evaluation.answers import read_answers

    matching = judges.match(read_answers(args.system), read_answers(args.baseline))
    lacking = (
        f"{matching.system_only} answers only in {args.system} and {matching.baseline_only} only in {args.baseline}"
    )
    if not matching.pairs:
        raise ValueError(f"The two files must have prompts in common, got {lacking}.")
    if matching.system_only or matching.baseline_only:
        if not args.matched_only:
            raise ValueError(
                f"The two files must answer the same prompts, got {lacking}. To go on, set `matched_only`."
            )
        print(f"Left out: {lacking}.")
    pairs = judges.draw(matching.pairs, args.n, args.seed)
    prompts = len({pair.system.prompt_id for pair in pairs})
    if args.n is not None and prompts < args.n:
        raise ValueError(f"`n` must be at most the number of prompts, got {args.n} for {prompts}.")
    print(f"{len(pairs)} pairs of answers to {prompts} prompts, {len(matching.pairs) - len(pairs)} not drawn.")
    return pairs


# --- who judges ----------------------------------------------------------------------------------------------------


def _needs(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name)
    if value is None:
        raise ValueError(f"`{name}` must be given for `judge` {args.judge}.")
    return value


def _endpoint(args: argparse.Namespace) -> Any:
    from ..evaluation.endpoint_judge import EndpointJudge

    endpoint = endpoints.build(args, _needs(args, "model"))
    return EndpointJudge(
        endpoint,
        templates.load(args.template),
        args.cache,
        temperature=args.temperature,
        top_logprobs=args.top_logprobs,
        attempts=args.attempts,
        options=args.options,
    )


def _reward(args: argparse.Namespace) -> Any:
    from ..evaluation.model_judges import RewardJudge

    return RewardJudge(_needs(args, "model"), batch_size=args.batch_size, device=args.device)


def _implicit(args: argparse.Namespace) -> Any:
    from ..evaluation.model_judges import ImplicitJudge

    return ImplicitJudge(
        _needs(args, "model"), args.ref_model, beta=args.beta, batch_size=args.batch_size, device=args.device
    )


JUDGES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "endpoint": _endpoint,
    "reward": _reward,
    "implicit": _implicit,
    "longer": lambda args: rule_judges.longer_judge(),
    "exact": lambda args: rule_judges.exact_judge(),
    "contains": lambda args: rule_judges.contains_judge(),
    "lab": lambda args: rule_judges.lab_judge(args.lab_seed),
    "human": lambda args: human_judge.HumanJudge(_needs(args, "annotations")),
}


# --- judge and tell ------------------------------------------------------------------------------------------------


def _control_n(args: argparse.Namespace, pairs: Sequence[judges.Pair]) -> int | None:
    """Prompts of the control with an empty answer; None for all."""
    if args.control_n is not None:
        return args.control_n
    return PAID_CONTROL if args.judge == "endpoint" else None


def _judge(args: argparse.Namespace, judge: Any, pairs: list[judges.Pair]) -> int:
    from .progress import progress

    with progress("judgements") as advance:
        rows = judges.judge_pairs(judge, pairs, advance)
    judges.write_judgements(args.out, rows)
    with progress("control") as advance:
        n = 0 if args.judge == "human" else _control_n(args, pairs)
        control = judges.controls(judge, pairs, rows, n=n, seed=args.seed, progress=advance)
    endpoint = getattr(judge, "endpoint", None)
    summary = {
        "system": str(args.system),
        "baseline": str(args.baseline),
        "judge": {"name": judge.name, **judge.about},
        "n": args.n,
        "seed": args.seed,
        **counts(rows),
        "controls": asdict(control),
        "cost": _cost(args, judge) if endpoint is not None else None,
        "stopped": endpoint.why_stopped if endpoint is not None else None,
    }
    path = args.out.with_suffix(".summary.json")
    write_whole(path, json.dumps(summary, indent=2) + "\n")
    _show(summary, control, rows)
    print(f"Written: {args.out}, {path}")
    if summary["stopped"]:
        print(f"Given up: {summary['stopped']}. Run the same command again to go on.")
        return STOPPED
    return INCOMPLETE if summary["failures"] or control.empty_failures else 0


def counts(rows: Sequence[judges.Judgement]) -> dict[str, Any]:
    """What can be counted without statistics."""
    means = judges.mean_preferences(rows)
    by_order: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row.preference is not None:
            by_order.setdefault((row.prompt_id, row.sample), []).append(row.preference)
    both = [values for values in by_order.values() if len(values) == len(judges.ORDERS)]
    same = sum((a > 0.5) == (b > 0.5) and (a < 0.5) == (b < 0.5) for a, b in both)
    return {
        "judgements": len(rows),
        "failures": dict(Counter(row.failure for row in rows if row.failure)),
        "pairs_judged": len(means),
        "pairs_failed": len({(row.prompt_id, row.sample) for row in rows}) - len(means),
        "wins": sum(mean > 0.5 for mean in means.values()),
        "losses": sum(mean < 0.5 for mean in means.values()),
        "ties": sum(mean == 0.5 for mean in means.values()),
        "mean_preference": sum(means.values()) / len(means) if means else None,
        "consistent": same / len(both) if both else None,
    }


def _cost(args: argparse.Namespace, judge: Any) -> dict[str, Any]:
    price = None
    if args.price_in is not None and args.price_out is not None:
        price = (judge.tokens_in * args.price_in + judge.tokens_out * args.price_out) / 1e6
    return {
        "requests": judge.endpoint.requests,
        "tokens_in": judge.tokens_in,
        "tokens_out": judge.tokens_out,
        "price": price,
    }


def _show(summary: dict[str, Any], control: judges.Controls, rows: Sequence[judges.Judgement]) -> None:
    print(
        f"{summary['pairs_judged']} pairs judged in both orders: {summary['wins']} wins, {summary['ties']} ties, "
        f"{summary['losses']} losses, mean preference {_share(summary['mean_preference'])}; the two orders agree on "
        f"{_share(summary['consistent'])}"
    )
    for reason, count in summary["failures"].items():
        detail = next((row.detail for row in rows if row.failure == reason and row.detail), "no details")
        print(f"failed: {count} judgements, {reason} (the first: {' '.join(detail.split())[:200]})")
    print(
        f"control, an empty answer: win rate {_share(control.empty_win_rate)} on {control.empty_n} prompts, should be "
        f"near 0; {control.empty_failures} judgements failed"
    )
    print(
        f"control, the longer one wins: win rate {_share(control.longer_win_rate)}; the judge's winner is the longer "
        f"one in {_share(control.longer_agreement)} of {control.longer_n} pairs of different lengths"
    )
    if cost := summary["cost"]:
        price = "" if cost["price"] is None else f", price {cost['price']:.4f}"
        print(f"{cost['requests']} requests; {cost['tokens_in']} tokens read, {cost['tokens_out']} written{price}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _dry_run(args: argparse.Namespace, judge: Any, pairs: list[judges.Pair]) -> int:
    if args.judge != "endpoint":
        raise ValueError(f"`dry_run` goes with `judge` endpoint, got {args.judge}, which makes no requests.")
    from dataclasses import replace

    empty = [
        judges.Pair(replace(pair.system, answer=""), pair.baseline)
        for pair in judges.draw(pairs, _control_n(args, pairs), args.seed)
    ]
    shown = [pair.comparison(order) for pair in [*pairs, *empty] for order in judges.ORDERS]
    estimate = judge.estimate(shown)
    print(
        f"{estimate.kept} replies are there, {estimate.requests} are to be asked for ({estimate.requests_at_most} "
        f"requests at most if replies cannot be read): about {estimate.tokens_in} tokens to read, at most "
        f"{estimate.tokens_out_at_most} to write"
    )
    if args.price_in is not None and args.price_out is not None:
        price = (estimate.tokens_in * args.price_in + estimate.tokens_out_at_most * args.price_out) / 1e6
        print(f"price: at most about {price:.2f}, without second attempts")
    return 0
