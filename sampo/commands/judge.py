"""`sampo judge --system A.jsonl --baseline B.jsonl --judge …`: which answers are better, in both orders."""

import argparse
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..evaluation.judging import human_judge, judges, rule_judges, templates
from ..io.locks import alone_at
from . import endpoints
from .endpoints import INCOMPLETE, STOPPED
from .next_steps import after_judging, show_next
from .shown import say, show

PAID_CONTROL = 25  # prompts of the control with an empty answer, where requests may cost money


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo judge",
        allow_abbrev=False,
        description="Judge the answers of a system against those of a baseline, both orders of each pair. Exit code "
        f"{INCOMPLETE}: some judgements failed; {STOPPED}: stopped early, the output says how to continue. No "
        "request is sent twice.",
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
    parser.add_argument(
        "--length_unit", default="characters", choices=("characters", "words", "tokens"), help="of all lengths"
    )
    parser.add_argument("--matched_only", action="store_true", help="omit prompts that one file lacks")
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
    asked.add_argument("--cache", type=Path, default=Path("judge-replies.jsonl"), help="file of all replies")
    asked.add_argument("--attempts", type=int, default=2, help="ask again for a reply that cannot be read (2 in all)")
    asked.add_argument("--temperature", type=float, default=0.0, help="of the judge (0)")
    asked.add_argument(
        "--top_logprobs", type=int, default=20, help="with a template that reads log-probabilities (20)"
    )
    asked.add_argument("--dry_run", action="store_true", help="report what would be asked for, and ask nothing")
    asked.add_argument("--price_in", type=float, metavar="PRICE", help="of a million tokens that the judge reads")
    asked.add_argument("--price_out", type=float, metavar="PRICE", help="of a million tokens that it writes")
    endpoints.add_options(parser)
    other = parser.add_argument_group("other judges")
    other.add_argument("--annotations", type=Path, metavar="CSV", help="for `human`")
    other.add_argument("--lab_seed", type=int, default=0, help="for `lab`: seed of its world (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Judge, and report the result."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sampo").setLevel(logging.INFO)
    try:
        pairs, files = _pairs(args)
        if args.annotation_sheet:
            human_judge.write_sheet(args.annotation_sheet, pairs, args.seed)
            long = sum(max(p.system.chars, p.baseline.chars) > human_judge.LONGEST for p in pairs)
            if long:
                say(f"{long} pairs have an answer above {human_judge.LONGEST:,} characters: Excel cuts such a cell.")
            say(f"{args.annotation_sheet}: {len(pairs)} pairs; fill in `preferred` with A, B or tie.")
            return
        judge = JUDGES[args.judge](args)
        with ExitStack() as stack:
            stack.enter_context(alone_at(args.out))
            stack.callback(getattr(judge, "close", lambda: None))
            code = _dry_run(args, judge, pairs) if args.dry_run else _judge(args, judge, pairs, files)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"sampo judge: error: {error}") from None
    if code:
        raise SystemExit(code)


def _pairs(args: argparse.Namespace) -> tuple[list[judges.AnswerPair], tuple[Any, Any]]:
    """The pairs to judge, and the two files that they are from."""
    from ..evaluation.answers.answers import read_answers
    from ..evaluation.results.judged import AnswerFile

    system, baseline = read_answers(args.system), read_answers(args.baseline)
    matching = judges.match(system, baseline)
    lacking = (
        f"{matching.system_only} answers only in {args.system} and {matching.baseline_only} only in {args.baseline}"
    )
    if near := judges.nearly_matched(system, baseline):
        lacking += f". {near} of them differ by blanks around the prompt alone: make the prompts the same"
    if not matching.pairs:
        raise ValueError(f"The two files must have prompts in common, got {lacking}.")
    if matching.system_only or matching.baseline_only:
        if not args.matched_only:
            raise ValueError(
                f"The two files must answer the same prompts, got {lacking}. To omit the others, set `matched_only`."
            )
        say(f"Left out: {lacking}.")
    pairs = judges.draw_pairs(matching.pairs, args.n, args.seed)
    prompts = len({pair.system.prompt_id for pair in pairs})
    say(f"{len(pairs)} pairs of answers to {prompts} prompts, {len(matching.pairs) - len(pairs)} not drawn.")
    return pairs, (AnswerFile.of(args.system, system), AnswerFile.of(args.baseline, baseline))


# --- who judges ----------------------------------------------------------------------------------------------------


def _needs(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name)
    if value is None:
        raise ValueError(f"`{name}` must be given for `judge` {args.judge}.")
    return value


def _endpoint(args: argparse.Namespace) -> Any:
    from ..evaluation.judging.endpoint_judge import EndpointJudge

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


# --- judge and report ----------------------------------------------------------------------------------------------


def _judge(args: argparse.Namespace, judge: Any, pairs: list[judges.AnswerPair], files: tuple[Any, Any]) -> int:
    from ..evaluation.results import judged
    from ..io.command_line import format_arguments
    from .progress import progress

    with progress("judgements") as advance:
        rows = judges.judge_pairs(judge, pairs, advance)
    empty: list[judges.Judgement] = []
    if nothing := _control(args, pairs):
        with progress("control") as advance:
            empty = judges.judge_pairs(judge, nothing, advance)
    about = {"name": judge.name, **judge.about}
    run = judged.Judged(
        system=files[0], baseline=files[1], judge=about, n=args.n, seed=args.seed, rows=rows, empty=empty
    )
    found = run.summary(length_unit=args.length_unit)
    endpoint = getattr(judge, "endpoint", None)
    stopped = endpoint.why_stopped if endpoint is not None else None
    cost = _cost(args, judge) if endpoint is not None else None
    written = judged.write(
        args.out, run, found, more={"cost": cost, "stopped": stopped}, command=format_arguments(make_parser(), args)
    )
    _show_summary(found, run, cost)
    say(f"Written: {', '.join(map(str, written))}")
    if stopped and endpoint is not None:
        say(f"Given up: {stopped}. {endpoints.what_helps(endpoint)}")
        return STOPPED
    if run.failures and endpoint is not None:
        passing = sum(run.failures.get(reason, 0) for reason in endpoints.PASSING)
        say(
            f"{passing} of {sum(run.failures.values())} failed judgements may succeed if the same command is run again"
            + ("." if passing else "; the others need a higher `attempts`, another template or another judge.")
        )
    if run.failures or found.empty_failed:
        return INCOMPLETE
    show_next(*after_judging(args.out))
    return 0


def _control(args: argparse.Namespace, pairs: Sequence[judges.AnswerPair]) -> list[judges.AnswerPair]:
    """The pairs of the control with an empty answer; people are not asked for it."""
    if args.judge == "human":
        return []
    n = args.control_n
    if n is None and args.judge == "endpoint":
        n = PAID_CONTROL
    return judges.empty_answers(pairs, n, args.seed)


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


def _show_summary(found: Any, run: Any, cost: dict[str, Any] | None) -> None:
    from ..evaluation.results.summary import summary_table

    show(summary_table([found]))
    say(found.sentence(), *(f"Note: {note}" for note in found.notes))
    for reason, count in run.failures.items():
        detail = next((row.detail for row in run.rows if row.failure == reason and row.detail), "no details")
        say(f"failed: {count} judgements, {reason} (the first: {' '.join(detail.split())[:200]})")
    if found.empty:
        say(
            f"control, an empty answer: wins {_percent(found.empty.rate.value)} of {found.empty.rate.n} prompts, "
            f"should be near 0; {found.empty_failed} pairs failed"
        )
    if found.longer_wins:
        say(
            f"control, the longer one wins: {_percent(found.longer_wins.rate.value)}; the judge's winner is the "
            f"longer one in {_percent(found.winner_is_longer.value)} of {found.winner_is_longer.n} prompts with a "
            "winner and different lengths"
        )
    if cost:
        price = "" if cost["price"] is None else f", price {cost['price']:.4f}"
        say(f"{cost['requests']} requests; {cost['tokens_in']} tokens read, {cost['tokens_out']} written{price}")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _dry_run(args: argparse.Namespace, judge: Any, pairs: list[judges.AnswerPair]) -> int:
    if args.judge != "endpoint":
        raise ValueError(f"`dry_run` goes with `judge` endpoint, got {args.judge}, which makes no requests.")
    shown = [pair.comparison(order) for pair in [*pairs, *_control(args, pairs)] for order in judges.ORDERS]
    estimate = judge.estimate(shown)
    say(
        f"{estimate.kept} replies are kept, {estimate.requests} are missing ({estimate.requests_at_most} "
        f"requests at most if replies cannot be read): about {estimate.tokens_in} tokens to read, at most "
        f"{estimate.tokens_out_at_most} to write"
    )
    if args.price_in is not None and args.price_out is not None:
        price = (estimate.tokens_in * args.price_in + estimate.tokens_out_at_most * args.price_out) / 1e6
        say(f"price: at most about {price:.2f}, without second attempts")
    return 0
