"""`sampo diagnose --policy P … [--reference R] --data D`: length bias of a model, from forward passes alone."""

import argparse
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.command_line import format_arguments
from .lazy_model import LazyModel
from .pair_options import add_treatment, treatment_of

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
    setup = _prepare(args)
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
        print(f"{name}: {len(setup.pairs):,} pairs in {paths[0].parent}")
    show_page(page)
    print(f"Written: {args.out / 'records.jsonl'}")


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
    last = [Path(name).name for name in policies]
    again = Counter(last)
    return [
        short if again[short] == 1 else "-".join(Path(n).parts[-2:]) for n, short in zip(policies, last, strict=True)
    ]


# --- before the first forward pass ----------------------------------------------------------------------------------


@dataclass
class _Setup:
    """What all policies have in common.

    Attributes:
        policies: the checkpoints.
        pairs: tokenised, with the reference's log-probs if there is one.
        reference: digest of its cache, or None.
        data: hash of the token ids.
        weights: hash of the data's token weights, or None.
        pad_id: of the tokenizer.
        end_ids: tokens that end a response, EOS first.
        other_ends: fingerprints of rows whose end tokens end other turns.
        token_totals: ΣT_w and ΣT_l for `token_budget: dataset`.
        by: column -> `(n,)` values.
        quality: `(n,)` quality of chosen minus rejected, or None.
    """

    policies: list[LazyModel]
    pairs: Any
    reference: str | None
    data: str
    weights: str | None
    pad_id: int
    end_ids: list[int]
    other_ends: list[int]
    token_totals: list[int]
    by: dict[str, Any]
    quality: Any


def _prepare(args: argparse.Namespace) -> _Setup:
    """Check and load everything that needs no forward pass, then add the reference."""
    from ..data.end_tokens import end_token_ids
    from ..data.token_ids import hash_token_ids
    from ..data.tokenize import rows_with_other_ends, tokenize_pairs
    from ..models.load import ModelError, check_model

    given = [("policy", name) for name in args.policy] + [("reference", args.reference)] * bool(args.reference)
    issues = []
    for option, name in given:
        try:
            check_model(name, option=option, trust_remote_code=args.trust_remote_code, tokenizer=True)
        except ModelError as issue:
            issues.append(str(issue))
    if issues:
        raise ModelError(" ".join(issues))
    policies = [LazyModel(name, args) for name in args.policy]
    reference = _reference(args, policies)
    tokenizer = _tokenizer(policies, reference)
    dataset = _load_pairs(args, tokenizer)
    pairs = tokenize_pairs(
        dataset, tokenizer, max_length=args.max_length or None, truncation_mode=args.truncation_mode
    )
    if len(pairs) < len(dataset):
        print(f"{len(dataset) - len(pairs):,} of {len(dataset):,} pairs are omitted: their prompt fills `max_length`.")
    counts = _count_tokens(pairs, tokenizer, args)
    _check_tokens(pairs, tokenizer, [*policies, *([reference] if reference else [])])
    setup = _Setup(
        policies=policies,
        pairs=pairs,
        reference=None,
        data=hash_token_ids(pairs),
        weights=_token_weights(pairs),
        pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        end_ids=end_token_ids(tokenizer, policies[0].generation_config()),
        other_ends=rows_with_other_ends(pairs, counts, args.max_length or None, args.truncation_mode),
        token_totals=args.token_totals or [counts.chosen_tokens, counts.rejected_tokens],
        by={name: pairs.with_format(None)[name][:] for name in args.by},
        quality=_quality(args, pairs),
    )
    if reference is not None:
        _add_reference(args, setup, reference)
    return setup


def _reference(args: argparse.Namespace, policies: list[LazyModel]) -> LazyModel | None:
    bases = {policy.base for policy in policies if policy.adapter}
    if args.reference is not None:
        return LazyModel(args.reference, args)
    if len(bases) == 1 and all(policy.adapter for policy in policies):
        base = bases.pop()
        print(f"reference: {base}, the base of the adapter.")
        return LazyModel(base, args)
    print("No `reference`: the length pressure alone is measured, as before training.")
    return None


def _tokenizer(policies: list[LazyModel], reference: LazyModel | None) -> Any:
    """The tokenizer of the first policy; the others must have the same token ids."""
    from ..models.checks import find_tokenizer_issues

    tokenizer = policies[0].tokenizer()
    issues = find_tokenizer_issues(tokenizer)
    for other in [*policies[1:], *([reference] if reference else [])]:
        if other.tokenizer().get_vocab() != tokenizer.get_vocab():
            issues.append(f"All models must have the vocabulary of {policies[0].name}, got {other.name} with another.")
    if issues:
        raise ValueError(" ".join(issues))
    return tokenizer


def _load_pairs(args: argparse.Namespace, tokenizer: Any) -> Any:
    from ..data.load import load_preferences

    dataset = load_preferences(
        args.data,
        split=args.split,
        on_bad_rows=args.on_bad_rows,
        chat_template_of=tokenizer,
        **treatment_of(args),
    )
    wrong = [name for name in [*args.by, *(args.quality or [])] if name not in dataset.column_names]
    if wrong:
        raise ValueError(
            f"`by` and `quality` must name columns of the data, got {wrong}; it has {dataset.column_names}."
        )
    numbers = ("int", "uint", "float", "double", "bool")
    kinds = {name: str(getattr(dataset.features[name], "dtype", "list")) for name in args.quality or []}
    wrong = [f"`{name}` of {kind}" for name, kind in kinds.items() if not kind.startswith(numbers)]
    if wrong:
        raise ValueError(f"`quality` must name columns of numbers, got {', '.join(wrong)}.")
    if isinstance(dataset[0]["chosen"], list) and not tokenizer.chat_template:
        raise ValueError(
            "The pairs are messages, and the tokenizer has no chat template to make text of them. Set `chat_template`."
        )
    return dataset


def _count_tokens(pairs: Any, tokenizer: Any, args: argparse.Namespace) -> Any:
    """Count what truncation does; warn where no response has an end token."""
    from ..data.end_tokens import ResponseEnds, end_token_ids
    from ..data.lengths import count_tokens

    ends = ResponseEnds(tokenizer, end_token_ids(tokenizer))
    counts = count_tokens(pairs, args.max_length or None, args.truncation_mode, ends)
    if not counts.has_ends:
        logger.warning(
            "0 of %s responses have an end token after truncation. The pressure below is that on %s, which training "
            "on these pairs would not show; `balance_end_token` and `keep_end_token` are refused there.",
            *(f"{2 * counts.pairs:,}", tokenizer.eos_token),
        )
    return counts


def _token_weights(pairs: Any) -> str | None:
    """Hash of the data's token weights after a check of them, or None if it has none."""
    from ..data.weight_columns import TOKEN_WEIGHT_COLUMNS, check_weights, hash_weight_columns

    if not set(TOKEN_WEIGHT_COLUMNS) & set(pairs.column_names):
        return None
    check_weights(pairs, TOKEN_WEIGHT_COLUMNS, "given")
    return hash_weight_columns(pairs, TOKEN_WEIGHT_COLUMNS)


def _check_tokens(pairs: Any, tokenizer: Any, models: list[LazyModel]) -> None:
    from ..models.checks import find_token_issues, find_vocabulary_issues

    sizes = [getattr(model.config(), "vocab_size", None) for model in models]
    issues = find_token_issues({"given": pairs}, vocabulary=sizes[0], tokenizer=tokenizer)
    for size in sizes[1:]:
        issues += find_vocabulary_issues(sizes[0], size)
    if issues:
        raise ValueError(" ".join(issues))


def _quality(args: argparse.Namespace, pairs: Any) -> Any:
    """`(n,)` quality of the chosen minus that of the rejected response."""
    import numpy as np

    if args.quality is None:
        return None
    columns = [np.array(pairs.with_format(None)[name][:], dtype=float) for name in args.quality]
    values = columns[0] - columns[1] if len(columns) == 2 else columns[0]
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise ValueError(
            f"`quality` must be a finite number in each pair, got none in {len(wrong)} of {len(values)} pairs, first "
            f"at rows {wrong[:10].tolist()}."
        )
    return values


# --- forward passes -------------------------------------------------------------------------------------------------


def _add_reference(args: argparse.Namespace, setup: _Setup, reference: LazyModel) -> None:
    """The pairs with the reference's log-probs, from the cache of a training run if one fits."""
    from ..diagnostics.pair_scores import cached_reference
    from ..reference_cache.key import RefKey
    from ..reference_cache.store import RefCache, cache_root
    from .progress import progress

    def cache(identity: dict[str, Any]) -> RefCache:
        key = RefKey(
            **identity,
            data=setup.data,
            max_length=args.max_length or None,
            truncation_mode=args.truncation_mode,
            storage_dtype=args.ref_cache_dtype,
        )
        return RefCache(cache_root(args.ref_cache_dir), key, len(setup.pairs))

    # A run that starts from the reference names it by its weights, one that is given it as a folder by its files.
    by_files = reference.file_identity()
    found = None if by_files is None else cache(by_files)
    if found is None or found.missing() != []:
        by_weights = cache(reference.identity())
        if found is None or by_weights.missing() == []:
            found = by_weights
    print(f"reference: log-probs in {found.folder}, {'all there' if found.missing() == [] else 'to be computed'}.")
    about = {"data": args.data, "model": reference.name, "output_dir": str(args.out)}
    with progress("reference") as advance:
        setup.pairs = cached_reference(
            setup.pairs,
            found,
            reference.scorer,
            about,
            pad_id=setup.pad_id,
            batch_size=args.batch_size,
            progress=advance,
        )
    setup.reference = found.key.digest
    reference.free()


def _score(args: argparse.Namespace, setup: _Setup, policy: LazyModel, name: str) -> tuple[list[Path], str]:
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
