"""`sampo generate MODEL --prompts FILE --out FILE`: one answer to each prompt, a JSON record each."""

import argparse
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.columns import read_columns
from ..data.issues import ON_BAD_ROWS
from ..data.subsets import shard_of_prompt
from ..evaluation.answers.generate import Sampling
from ..evaluation.texts import FORMATS
from ..io.locks import end_with_launcher
from . import endpoints
from .endpoints import INCOMPLETE, STOPPED
from .launch import launch_command
from .launched import become_launcher, end_process_group, is_first, is_one_of_several, wait_for_first
from .next_steps import after_generating, show_next
from .option_checks import read_shard
from .pair_options import COLUMNS_HELP
from .shown import say

if TYPE_CHECKING:
    from ..evaluation.answers.generate import Sampling
    from ..evaluation.answers.prompts import Question
    from ..evaluation.texts import Texts

BACKENDS = ("transformers", "endpoint")


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo generate",
        allow_abbrev=False,
        description="Answer prompts with a model. Answers are written as they come; a further run adds those that are "
        f"missing. Exit code {INCOMPLETE}: some are missing; {STOPPED}: stopped early, run it again to continue.",
    )
    parser.add_argument(
        "model", help="folder or hub id of a model or an adapter; with `--url` the name of the model there"
    )
    parser.add_argument(
        "--prompts", required=True, help="JSONL, AlpacaEval's JSON, HH transcripts, Parquet, or a hub id"
    )
    parser.add_argument("--out", required=True, type=Path, help="JSONL file of answers")
    parser.add_argument("--split", help="of the prompts, such as `test[:100]`")
    parser.add_argument("--prompt_shard", metavar="K/N", help="part K of N of the prompts, by a hash of each prompt")
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=COLUMNS_HELP)
    parser.add_argument("--on_bad_rows", default="error", choices=ON_BAD_ROWS, help="rows without a prompt")
    parser.add_argument(
        "--text_as_messages", action="store_true", help="a prompt of text becomes a message of the user"
    )
    parser.add_argument("--on_long_prompts", default="error", choices=ON_BAD_ROWS, help="that leave no room to answer")
    parser.add_argument("--alpaca_eval", type=Path, metavar="FILE", help="write AlpacaEval's `model_outputs` too")
    drawing = parser.add_argument_group("sampling")
    defaults = Sampling()
    for name, text in (
        ("max_tokens", "tokens after which an answer is cut off"),
        ("temperature", "0 takes the most likely token each time"),
        ("top_p", "draw from the most likely tokens that together have this probability"),
        ("top_k", "draw from this many of the most likely tokens; 0: from all"),
        ("seed", "of the draws"),
        ("samples", "answers per prompt"),
    ):
        value = getattr(defaults, name)
        drawing.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} ({value})")
    local = parser.add_argument_group("model")
    local.add_argument(
        "--backend", type=_backend_name, choices=BACKENDS, help="`endpoint` with `--url`, else `transformers`"
    )
    local.add_argument("--adapter", help="folder or hub id of an adapter for the model")
    local.add_argument("--revision", help="of the model on the hub")
    local.add_argument("--format", default="auto", choices=FORMATS, help="`auto`: the chat template if there is one")
    local.add_argument("--chat_template", type=Path, help="file with a template that replaces the tokenizer's")
    local.add_argument(
        "--stop_tokens", nargs="+", default=[], metavar="TOKEN", help="further tokens that end an answer"
    )
    local.add_argument("--batch_size", type=int, default=32, help="prompts at a time (32)")
    local.add_argument("--device", help="the first accelerator, else the CPU")
    local.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    local.add_argument("--trust_remote_code", action="store_true")
    local.add_argument(
        "--num_processes",
        type=int,
        help="processes that answer together, each with a copy of the model on its own GPU; the answers are those of "
        "one process. Without it and without `--device`: one for each GPU",
    )
    local.add_argument("--gpu_ids", help="GPUs to use, as `0,1`")
    endpoints.add_options(parser)
    return parser


def _backend_name(name: str) -> str:
    if name == "vllm":
        raise argparse.ArgumentTypeError(
            "vLLM runs as a server: start `vllm serve MODEL` and give `--url http://localhost:8000/v1` instead"
        )
    return name


def run(argv: list[str]) -> int:
    """Generate, in this process or in several."""
    args = make_parser().parse_args(argv)
    try:
        launcher = None if "WORLD_SIZE" in os.environ else _launcher(args)
    except ValueError as error:
        raise SystemExit(f"sampo generate: error: {error}") from None
    if launcher is not None:
        become_launcher(launcher, "sampo.cli", ["generate", *argv])
    end_with_launcher()
    main(args)
    return 0


def _launcher(args: argparse.Namespace) -> list[str] | None:
    """The command that starts the processes; None where this one can do the work itself.

    Raises:
        ValueError: so many cannot be started.
    """
    options = {name: str(getattr(args, name)) for name in ("num_processes", "gpu_ids") if getattr(args, name)}
    if args.num_processes is not None and args.num_processes < 1:
        raise ValueError(f"`num_processes` must be at least 1, got {args.num_processes}.")
    if args.url and options:
        raise ValueError(f"`{next(iter(options))}` goes with a model of this machine; of a server set `concurrency`.")
    if args.url or (args.device and not options) or args.num_processes == 1:
        return None
    if args.device == "cpu" and "gpu_ids" not in options:
        return launch_command({"accelerate_config": "cpu_ddp", **options}, [])
    if args.device:
        raise ValueError(f"`device` names one device for one process, got {args.device} and {options}. Leave it out.")
    import torch

    devices = torch.accelerator.device_count()
    wanted = args.num_processes or (len(args.gpu_ids.split(",")) if args.gpu_ids else devices)
    if options and wanted > devices:
        raise ValueError(
            f"`num_processes` must be at most the number of GPUs that torch can use, {devices}, got {wanted}. On the "
            "CPU set `device` to cpu."
        )
    return launch_command({**options, "num_processes": str(wanted)}, []) if wanted > 1 or args.gpu_ids else None


def main(args: argparse.Namespace) -> None:
    """Generate, and report what was written; of several processes the first one does so."""
    from ..evaluation.answers.generate import Sampling

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sampo").setLevel(logging.INFO if is_first() else logging.WARNING)
    status = 0
    try:
        sampling = Sampling(**{name: getattr(args, name) for name in Sampling.__dataclass_fields__})
        if args.url and is_one_of_several():
            raise ValueError("A server must be asked by one process, got several. Set `concurrency` instead.")
        if is_first():
            status = _generate(args, sampling)
        else:
            _local_backend(args).assist(sampling)
    except (ValueError, OSError, ImportError) as error:
        wait_for_first()
        raise SystemExit(f"sampo generate: error: {error}") from None
    if is_one_of_several():
        end_process_group(wait=True)
    if status:
        raise SystemExit(status)


def _generate(args: argparse.Namespace, sampling: "Sampling") -> int:
    """Answer the prompts; the exit code."""
    from ..evaluation.answers.generate import generate
    from ..evaluation.answers.prompts import load_prompts
    from .progress import progress

    questions = load_prompts(
        args.prompts,
        split=args.split,
        on_bad_rows=args.on_bad_rows,
        columns=read_columns(args.columns),
        text_as_messages=args.text_as_messages,
    )
    if args.prompt_shard:
        shard, shards = read_shard(args.prompt_shard)
        questions = [one for one in questions if shard_of_prompt(one.prompt, shards) == shard]
    questions, backend, endpoint = _backend(args, questions)
    with ExitStack() as stack:
        advance = stack.enter_context(progress("answers"))
        stack.callback(getattr(endpoint, "close", lambda: None))
        report = generate(
            questions, backend, sampling, args.out, on_long_prompts=args.on_long_prompts, progress=advance
        )
    if args.alpaca_eval:
        _export(args.out, args.alpaca_eval)
    mean = f", {report.tokens / report.counted:.1f} tokens on average" if report.counted else ""
    say(f"{args.out}: {report.answers} answers, {report.reused} of them there before{mean}; {report.cut} cut off")
    for reason, count in report.failures.items():
        say(f"{count} answers are missing: {reason} (the first: {report.details[reason]})")
    if endpoint is not None:
        say(endpoints.cost_sentence(endpoint.requests, endpoint.spending.row()))
    if endpoint is not None and endpoint.why_stopped:
        say(f"Given up: {endpoint.why_stopped}. {endpoints.what_helps(endpoint)}")
        return STOPPED
    if report.failures:
        return INCOMPLETE
    show_next(*after_generating(args.out))
    return 0


def _export(answers: Path, path: Path) -> None:
    from ..evaluation.answers.answers import read_answers, write_alpaca_eval

    write_alpaca_eval(path, read_answers(answers))


def _backend(args: argparse.Namespace, questions: list["Question"]) -> tuple[list["Question"], Any, Any]:
    """(prompts that can be asked, backend, endpoint if it is one)."""
    from ..evaluation.answers import backends
    from ..evaluation.answers.prompts import check_prompts

    kind = args.backend or ("endpoint" if args.url else "transformers")
    if (kind == "endpoint") != bool(args.url):
        raise ValueError(f"`url` goes with `backend` endpoint and with no other, got `backend` {kind}.")
    if args.serve and not args.url:
        raise ValueError("`serve` must go with the `url` at which that server answers, and has none.")
    if kind == "endpoint":
        endpoint = endpoints.build(args, args.model)
        return questions, backends.EndpointBackend(endpoint, args.options), endpoint
    texts = _texts(args)
    questions = check_prompts(questions, texts.find_issue, args.on_bad_rows)
    return questions, _local_backend(args, texts), None


def _texts(args: argparse.Namespace) -> "Texts":
    from ..evaluation.texts import Texts
    from ..models.load import load_tokenizer

    template = args.chat_template.read_text(encoding="utf-8") if args.chat_template else None
    return Texts(load_tokenizer(args.model, **_source(args)), args.format, template)


def _source(args: argparse.Namespace) -> dict[str, Any]:
    return {"adapter": args.adapter, "revision": args.revision, "trust_remote_code": args.trust_remote_code}


def _local_backend(args: argparse.Namespace, texts: "Texts | None" = None) -> Any:
    """The model in this process, or in each of several."""
    import transformers

    from ..evaluation.answers.backends import TransformersBackend
    from ..models.inference import default_device, load_causal

    transformers.utils.logging.disable_progress_bar()
    device = args.device or default_device()
    if is_one_of_several():
        from accelerate import PartialState

        device = str(PartialState(cpu=args.device == "cpu").device)
    backend = TransformersBackend(
        args.model if args.adapter is None else args.adapter,
        load_causal(args.model, device=device, dtype=args.dtype, **_source(args)),
        texts or _texts(args),
        batch_size=args.batch_size,
        stop_tokens=args.stop_tokens,
    )
    if not is_one_of_several():
        return backend
    from ..evaluation.answers.parallel import ParallelBackend

    return ParallelBackend(backend)
