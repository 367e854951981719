"""Preparation of a data set: tokenise it with TRL, count its tokens, and refuse data that cannot be trained on."""

from collections.abc import Callable
from typing import Any, NamedTuple

from datasets import Dataset

from ..config import SamPOConfig
from ..data.end_tokens import ResponseEnds, end_token_ids
from ..data.lengths import TokenCounts, count_tokens
from ..data.tokenize import rows_with_other_ends, tokenize_by_trl
from ..data.weight_columns import check_weights
from ..logs import get_logger
from .preflight import refuse_endless_responses

logger = get_logger(__name__)


class Prepared(NamedTuple):
    """A tokenised data set.

    Attributes:
        dataset: with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        counts: what truncation does to it; None for streamed data.
        other_ends: fingerprints of rows whose end tokens end other turns.
    """

    dataset: Any
    counts: TokenCounts | None = None
    other_ends: list[int] = []


def prepare_dataset(
    trl_prepares: Callable[..., Any], dataset: Any, name: str, tokenizer: Any, args: SamPOConfig
) -> Prepared:
    """Let TRL tokenise a data set, and report what truncation does to it.

    Args:
        trl_prepares: `DPOTrainer._prepare_dataset`.
        dataset: the data that it is given.
        name: `train`, or that of an evaluation set.
        tokenizer: of the policy.
        args: of the run.

    Raises:
        ValueError: a completion without tokens, weights that are wrong, or options about the end token where no
            response ends.
    """
    prepared, note = tokenize_by_trl(trl_prepares, dataset, tokenizer, args, name)
    if note is not None:
        logger.warning(f"{name} data: {note}")
    if not isinstance(prepared, Dataset):
        logger.info(f"{name} data: streamed, so dropped and truncated pairs are not counted.")
        return Prepared(prepared)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ends = ResponseEnds(tokenizer, end_token_ids(tokenizer))  # there is no model yet
    counts = count_tokens(prepared, args.max_length, args.truncation_mode, ends)
    counts.dropped = len(dataset) - len(prepared)
    if counts.empty_rows:
        raise ValueError(
            f"Each completion must have at least one token, got {len(counts.empty_rows)} pairs without in "
            f"the {name} data, first at rows {counts.empty_rows[:10]} of the tokenised set. Remove "
            "them, or load the data with `sampo.load_preferences(..., on_bad_rows='drop')`."
        )
    check_weights(prepared, args.weight_columns, name)
    other_ends = rows_with_other_ends(prepared, counts, args.max_length, args.truncation_mode)
    refuse_endless_responses(counts, args, name)
    log = logger.warning if counts.dropped or counts.identical else logger.info
    log(f"{name} data: {counts.describe(args.max_length)}")
    return Prepared(prepared, counts, other_ends)
