"""The options of commands that ask an OpenAI-compatible server."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ..evaluation.endpoint import Endpoint, key_from_environment
from ..evaluation.server_process import ServerProcess
from ..evaluation.spending import Spending

INCOMPLETE, STOPPED = (
    3,
    4,
)  # exit codes: some answers or judgements are missing; the run was stopped early


def add_options(parser: argparse.ArgumentParser) -> None:
    """A group of options; a key is never one of them."""
    group = parser.add_argument_group("OpenAI-compatible server")
    group.add_argument(
        "--url", help="such as https://api.openai.com/v1 or http://localhost:8000/v1; no other is asked"
    )
    group.add_argument(
        "--serve",
        metavar="COMMAND",
        help="start this server before the first request and end it after the last, as `vllm serve {model} --port "
        "8000`; `{model}` is the name of the model. Its output is written beside `--out`",
    )
    group.add_argument(
        "--api_key_env",
        metavar="VARIABLE",
        help="environment variable that holds the key; OPENAI_API_KEY for OpenAI's own URL, none for others",
    )
    group.add_argument("--concurrency", type=int, default=8, help="requests at a time (8)")
    group.add_argument("--max_requests", type=int, help="make at most so many, further attempts included")
    group.add_argument("--price_in", type=float, metavar="PRICE", help="of a million tokens that the model reads")
    group.add_argument("--price_out", type=float, metavar="PRICE", help="of a million tokens that it writes")
    group.add_argument(
        "--max_cost", type=float, metavar="PRICE", help="make no request that may bring this run's price above it"
    )
    group.add_argument("--retries", type=int, default=5, help="further attempts at a request that failed (5)")
    group.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of one request (120)")
    group.add_argument("--proxy", metavar="URL", help="a proxy; those in the environment are not used")
    group.add_argument(
        "--options",
        type=_json_object,
        default={},
        metavar="JSON",
        help='further fields of a request: \'{"reasoning_effort": "low"}\'; null takes a field out',
    )


PASSING = ("timeout", "connection", "rate_limited", "server_error", "not_asked")  # failures that may pass


def what_helps(endpoint: Endpoint) -> str:
    """What to do when a run was stopped: the same command continues it if the reason was temporary."""
    if endpoint.stopped_for_good:
        return "Correct `url`, `model`, the key or the quota first; answered requests are kept and not sent again."
    return "Run the same command again to continue."


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def build(args: argparse.Namespace, model: str) -> Endpoint:
    """The endpoint that the options describe."""
    if not args.url:
        raise ValueError(
            "`url` must name the server, such as http://localhost:8000/v1; it is not read from anywhere else."
        )
    return Endpoint(
        args.url,
        model,
        api_key=key_from_environment(args.url, args.api_key_env),
        timeout=args.timeout,
        retries=args.retries,
        max_requests=args.max_requests,
        concurrency=args.concurrency,
        proxy=args.proxy,
        spending=Spending(args.price_in, args.price_out, max_cost=args.max_cost),
        server=ServerProcess(args.serve, model, args.out.with_suffix(".server.log")) if args.serve else None,
    )


def cost_sentence(requests: int, cost: Mapping[str, Any]) -> str:
    """Requests, tokens and price for a reader; `cost` is `Spending.row()`."""
    price = "" if cost["price"] is None else f", price {cost['price']:.4f}"
    return f"{requests} requests; {cost['tokens_in']} tokens read, {cost['tokens_out']} written{price}"
