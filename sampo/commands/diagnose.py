"""`sampo diagnose --policy P … [--reference R] --data D`: length bias of a model, from forward passes alone."""

import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from .. import plugins
from ..io.command_line import format_arguments
from ..io.names import readable_name
from .diagnose_setup import DiagnosisSetup, prepare_diagnosis
from .lazy_model import LazyModel
from .next_steps import after_diagnose, show_next
from .pair_options import add_treatment
from .shown import say

logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo diagnose",
        allow_abbrev=False,
        description="Length pressure of every weighting, before or after training, and, with a reference, how the "
        "learned rewards depend on length. Results are kept in `--out`: a killed run continues.",
    )
    parser.add_argument("--policy", required=True, nargs="+", metavar="MODEL", help="folders, hub ids, or adapters")
    parser.add_argument("--reference", metavar="MODEL", help="the base where all policies are adapters of one")
    parser.add_argument("--data", required=True, help="preference pairs: as `dataset_name` of `sampo train`")
    parser.add_argument("--split", help="of the data, such as `test[:500]`")
    parser.add_argument("--on_bad_rows", default="error", choices=("error", "drop"), help="pairs that cannot be used")
    add_treatment(parser)
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="COLUMN", help="pressure for each value of a column too"
    )
    parser.add_argument(
        "--quality",
        nargs="+",
        metavar="COLUMN",
        help="known quality: one column, of the chosen minus the rejected, or two, of chosen and of rejected",
    )
    parser.add_argument("--out", type=Path, default=Path("diagnosis"), help="folder for Parquet and records")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over prompts (1000)")
    training = parser.add_argument_group("as in training; defaults are those of `sampo train`")
    training.add_argument("--beta", type=float, help="of the implicit reward")
    training.add_argument("--max_length", type=int, help="tokens of prompt and response; 0 truncates nothing")
    training.add_argument("--truncation_mode", choices=("keep_start", "keep_end"), default="keep_start")
    training.add_argument("--decay_gamma", type=float, help="of the weighting `decay`")
    training.add_argument("--ld_tail_weight", type=float, help="of the weighting `ld`")
    training.add_argument(
        "--token_totals",
        type=int,
        nargs=2,
        metavar=("W", "L"),
        help="sums of T_w and T_l of the training data, for `token_budget: dataset` (those of these pairs)",
    )
    training.add_argument("--seed", type=int, help="of the subsets")
    training.add_argument("--chat_template", help="Jinja text, or a file with it")
    training.add_argument("--ref_cache_dir", help="folder where per-token reference log-probs are read and written")
    training.add_argument("--ref_cache_dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    model = parser.add_argument_group("model")
    model.add_argument("--batch_size", type=int, default=8, help="pairs at a time (8)")
    model.add_argument("--pair_stream", default="auto", choices=("auto", "true", "false"))
    model.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    model.add_argument("--bf16", action="store_true", help="compute in bfloat16, as training with `bf16: true` does")
    model.add_argument("--use_cpu", action="store_true")
    model.add_argument("--trust_remote_code", action="store_true")
    plugins.add_option(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Compute what is missing, and print the findings."""
    from ..data.issues import PreferenceDataError
    from ..io.locks import alone_in
    from ..reference_cache.store import RefCacheError

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sampo").setLevel(logging.INFO)
    try:
        command = format_arguments(make_parser(), args)
        _fill_defaults(args)
        with alone_in(args.out):
            _diagnose(args, command)
    except (PreferenceDataError, RefCacheError, ValueError, OSError) as error:
        raise SystemExit(f"sampo diagnose: error: {error}") from None


def _diagnose(args: argparse.Namespace, command: str) -> None:
    import datasets
    import transformers
    from accelerate import PartialState

    from ..diagnostics.findings import findings, read_scores
    from ..io import records as results
    from .diagnose_page import Checkpoint, show_page

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    PartialState(cpu=args.use_cpu)
    setup = prepare_diagnosis(args)
    page = []
    for policy, name in zip(setup.policies, _names(args.policy), strict=True):
        paths, digest = _score(args, setup, policy, name)
        found = findings(
            read_scores(paths),
            beta=args.beta,
            by=setup.by,
            quality=setup.quality,
            resamples=args.resamples,
            seed=args.seed,
        )
        page.append(Checkpoint(name, found))
        known = {(record.name, record.key) for record in results.read(args.out / "records.jsonl")}
        records = [_record(args, command, policy.name, digest, finding) for finding in found]
        results.append(args.out / "records.jsonl", [r for r in records if (r.name, r.key) not in known])
        say(f"{name}: {len(setup.pairs):,} pairs in {paths[0].parent}")
    show_page(page)
    say(f"Written: {args.out / 'records.jsonl'}")
    show_next(*after_diagnose(args))


def _fill_defaults(args: argparse.Namespace) -> None:
    """Set the defaults of training, and check the ranges."""
    from ..config import SamPOConfig
    from ..config_checks import are_token_totals

    for name in ("beta", "max_length", "decay_gamma", "ld_tail_weight", "seed"):
        if getattr(args, name) is None:
            setattr(args, name, SamPOConfig.__dataclass_fields__[name].default)
    issues = [
        f"`{name}` must be {what}, got {getattr(args, name)}."
        for name, what, right in (
            ("beta", "above 0", args.beta > 0),
            (
                "max_length",
                "at least 2 tokens, or 0 to truncate nothing",
                args.max_length == 0 or args.max_length >= 2,
            ),
            ("decay_gamma", "in (0, 1]", 0 < args.decay_gamma <= 1),
            ("ld_tail_weight", "in [0, 1]", 0 <= args.ld_tail_weight <= 1),
            (
                "token_totals",
                "two whole numbers of at least 1",
                args.token_totals is None or are_token_totals(args.token_totals),
            ),
            ("batch_size", "at least 1", args.batch_size >= 1),
            ("resamples", "at least 100 for an interval", args.resamples >= 100),
            ("out", "a folder, or a name that is free", not args.out.exists() or args.out.is_dir()),
            ("quality", "one column or two", args.quality is None or len(args.quality) <= 2),
            ("policy", "named once each", len(set(args.policy)) == len(args.policy)),
        )
        if not right
    ]
    if issues:
        raise ValueError(" ".join(issues))


def _names(policies: list[str]) -> list[str]:
    """Short names of the checkpoints, each its own, that can also be names of folders."""
    readable = [readable_name(name) for name in policies]
    last = [Path(name).name for name in readable]
    again = Counter(last)
    parts = [Path(name).parts[-2:] for name in (r if "@" in r else p for r, p in zip(readable, policies, strict=True))]
    return [short if again[short] == 1 else "-".join(two) for short, two in zip(last, parts, strict=True)]


def _score(args: argparse.Namespace, setup: DiagnosisSetup, policy: LazyModel, name: str) -> tuple[list[Path], str]:
    """The shards of a policy, and the digest of their key."""
    from ..data.end_tokens import most_common_end_token
    from ..diagnostics.pair_scores import ScoreKey, score_pairs
    from .progress import progress

    key = ScoreKey(
        policy=policy.file_identity() or policy.identity(),
        reference=setup.reference,
        data=setup.data,
        weights=setup.weights,
        max_length=args.max_length or None,
        truncation_mode=args.truncation_mode,
        end_ids=setup.end_ids,
        end_id=most_common_end_token(setup.pairs, setup.end_ids),
        seed=args.seed,
        gamma=args.decay_gamma,
        tail_weight=args.ld_tail_weight,
        token_totals=setup.token_totals,
        other_ends=setup.other_ends,
    )
    with progress(name) as advance:
        paths = score_pairs(
            setup.pairs,
            args.out / "pairs" / f"{name}-{key.digest}",
            key,
            policy.scorer,
            pad_id=setup.pad_id,
            ref_dtype=args.ref_cache_dtype,
            batch_size=args.batch_size,
            progress=advance,
        )
    policy.free()
    return paths, key.digest


def _record(args: argparse.Namespace, command: str, policy: str, digest: str, finding: Any) -> Any:
    from ..io.records import Record, provenance

    settings = {name: getattr(args, name) for name in ("reference", "data", "split", "beta", "dtype", "bf16", "seed")}
    settings |= {"max_length": args.max_length, "truncation_mode": args.truncation_mode}
    settings |= {"resamples": args.resamples, "quality": args.quality}
    return Record(
        name=f"diagnose/{finding.quantity}",
        value=finding.estimate.value,
        n=finding.estimate.n,
        interval=finding.estimate.interval,
        seed=args.seed,
        config={**settings, "policy": policy, "pairs": digest, **finding.labels},
        command=command,
        **provenance(),
    )
