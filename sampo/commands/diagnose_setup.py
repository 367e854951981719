"""What `sampo diagnose` checks and loads before its first forward pass."""

import argparse
import logging
from dataclasses import dataclass
from typing import Any

from ..io.names import readable_name
from .lazy_model import LazyModel
from .pair_options import treatment_of
from .shown import say

logger = logging.getLogger(__name__)


@dataclass
class DiagnosisSetup:
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


def prepare_diagnosis(args: argparse.Namespace) -> DiagnosisSetup:
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
        say(f"{len(dataset) - len(pairs):,} of {len(dataset):,} pairs are omitted: their prompt fills `max_length`.")
    counts = _count_tokens(pairs, tokenizer, args)
    _check_tokens(pairs, tokenizer, [*policies, *([reference] if reference else [])])
    setup = DiagnosisSetup(
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
        say(f"reference: {readable_name(base)}, the base of the adapter.")
        return LazyModel(base, args)
    say("No `reference`: the length pressure alone is measured, as before training.")
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


def _add_reference(args: argparse.Namespace, setup: DiagnosisSetup, reference: LazyModel) -> None:
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
    there = "all there" if found.missing() == [] else "to be computed"
    say(f"reference {readable_name(reference.name)}: log-probs {there}, in {found.folder}")
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
