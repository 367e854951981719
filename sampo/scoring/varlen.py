"""Attention of a packed row by kernels for sequences of different lengths: each part is one sequence of queries.

Its keys are those of its prompt and its own, gathered by one index, so there are more keys than queries, and the
causal mask is aligned at the end of both. Not run on a GPU: the indices were tested on CPU with a function of the same
signature.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .segments import Segments, Softmax


class Sequences(NamedTuple):
    """The parts of a packed row as sequences.

    Attributes:
        keys: `(K,)` stream index of each key, part after part.
        cu_seqlens_q: `(parts + 1,)` int32, where the queries of each part start, and the end.
        cu_seqlens_k: `(parts + 1,)` int32, and its keys.
        max_seqlen_q: queries of the longest part.
        max_seqlen_k: and its keys.
    """

    keys: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def make_sequences(segments: Segments) -> Sequences:
    """The parts as sequences; made once for each packed row."""
    if ("sequences",) not in segments.cache:
        indices = torch.arange(sum(segments.sizes)).split(segments.sizes)
        keys = [
            own if part.prompt is None else torch.cat((indices[part.prompt], own))
            for part, own in zip(segments.parts, indices, strict=True)
        ]
        n_keys = [len(each) for each in keys]

        def starts(sizes: list[int]) -> Tensor:
            return torch.tensor([0, *sizes]).cumsum(dim=0).int().to(segments.device)

        sequences = (torch.cat(keys).to(segments.device), starts(segments.sizes), starts(n_keys))
        segments.cache["sequences",] = Sequences(*sequences, max(segments.sizes), max(n_keys))
    return segments.cache["sequences",]


def can_attend_by_torch(query: Tensor, value: Tensor, softmax: Softmax) -> bool:
    """Whether PyTorch's function computes this; it knows neither soft-capping nor sinks nor chunks."""
    plain = softmax.softcap is None and softmax.sinks is None and softmax.reach.chunk is None
    return plain and query.dtype in (torch.float16, torch.bfloat16) and query.size(3) == value.size(3)


def attend_by_torch(
    segments: Segments,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: Softmax,
    varlen_attn: Callable = varlen_attn,
) -> Tensor:
    """PyTorch's `varlen_attn`: arguments and result as those of `attend_by_parts`."""
    at = make_sequences(segments)
    found = varlen_attn(
        query[0].transpose(0, 1),
        *(x[0].index_select(1, at.keys).transpose(0, 1) for x in (key, value)),  # (K, key heads, d)
        at.cu_seqlens_q,
        at.cu_seqlens_k,
        at.max_seqlen_q,
        at.max_seqlen_k,
        scale=softmax.scale,
        window_size=(-1 if softmax.reach.window is None else softmax.reach.window - 1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    return found[None]


def attend_by_own(segments: Segments, query: Tensor, key: Tensor, value: Tensor, own: Callable) -> Tensor:
    """A flash implementation that transformers has loaded for the model.

    Args:
        segments: the parts.
        query: `(1, heads, N, d)`.
        key: `(1, key heads, N, d)`.
        value: `(1, key heads, N, e)`.
        own: the model's function, with everything bound that does not depend on the packed row.
    """
    at = make_sequences(segments)
    found, _ = own(
        query,
        *(x.index_select(2, at.keys) for x in (key, value)),
        None,
        is_causal=True,
        cu_seq_lens_q=at.cu_seqlens_q,
        cu_seq_lens_k=at.cu_seqlens_k,
        max_length_q=at.max_seqlen_q,
        max_length_k=at.max_seqlen_k,
    )
    return found
