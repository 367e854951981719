"""FlexAttention over a packed row: one kernel for all parts, compiled once a process for all lengths.

It was not run on a GPU: its mask was tested on CPU, and so was its forward pass, with and without compilation;
FlexAttention has no backward pass there. Its speed was not measured.
"""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from .segments import Reach, Segments, Softmax

_BLOCK = 128  # tokens on a side of FlexAttention's blocks, the size that its kernels are made for


def make_block_mask(segments: Segments, reach: Reach) -> BlockMask:
    """`(1, 1, N, N)`. Built from intervals, because `create_block_mask` would allocate N × N tensors."""
    start, prompt_start, prompt_stop = segments.intervals(reach)
    query = torch.arange(len(start), device=segments.device)
    low = torch.arange(0, len(start), _BLOCK, device=segments.device)  # keys low … high
    high = low + _BLOCK - 1
    own, prompt = (query, start), (prompt_stop - 1, prompt_start)
    touched, covered = (
        torch.zeros(len(start), len(low), dtype=torch.bool, device=segments.device) for _ in range(2)
    )  # (N, N / 128): does the token attend to any, and to all, of a block's keys
    for last, first in (own, prompt):
        last, first = last[:, None], first[:, None]
        touched |= (low <= last) & (high >= first) & (first <= last)
        covered |= (low >= first) & (high <= last)
    # a block across the end of a prompt and the start of its first branch
    adjacent = (start == prompt_stop)[:, None]
    covered |= adjacent & (low >= prompt_start[:, None]) & (high <= query[:, None])
    padding = (0, 0, 0, -len(start) % _BLOCK)
    some = F.pad(touched, padding).view(len(low), _BLOCK, len(low)).any(dim=1)  # (N / 128, N / 128)
    full = F.pad(covered, padding).view(len(low), _BLOCK, len(low)).all(dim=1)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full),
        *_listed(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees(start, prompt_start, prompt_stop),
        seq_lengths=(len(start), len(start)),
    )


def sees(start: Tensor, prompt_start: Tensor, prompt_stop: Tensor) -> Callable:
    """`Segments.intervals` as FlexAttention takes them: (batch, head, query, key) → bool."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key >= start[query]) & (key <= query)
        return own | ((key >= prompt_start[query]) & (key < prompt_stop[query]))

    return mask_mod


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`(Q, K)` bool as `(1, 1, Q)` numbers and `(1, 1, Q, K)` indices of the blocks in each row, in order."""
    indices = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], indices.int()[None, None]


def attend_by_flex(
    segments: Segments,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: Softmax,
    kernel_options: FlexKernelOptions | None = None,
) -> Tensor:
    """Attention of a packed row: arguments and result as those of `attend_by_parts`.

    A sink takes its share of each softmax: its result is multiplied by sigmoid(log-sum-exp of the scores − sink).
    """
    name = ("block mask", softmax.reach)
    if name not in segments.cache:
        segments.cache[name] = make_block_mask(segments, softmax.reach)
    found, aux = _compiled(query.device.type)(
        query,
        key,
        value,
        score_mod=None if softmax.softcap is None else _capped(softmax.softcap),
        block_mask=segments.cache[name],
        scale=softmax.scale,
        enable_gqa=query.size(1) != key.size(1),
        kernel_options=kernel_options,
        return_aux=AuxRequest(lse=softmax.sinks is not None),
    )
    if softmax.sinks is not None:
        share = torch.sigmoid(aux.lse - softmax.sinks.float()[:, None])  # (1, heads, N)
        found = found * share[..., None].to(found.dtype)
    return found.transpose(1, 2).contiguous()


@cache
def _capped(softcap: float) -> Callable:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@cache
def _compiled(device_type: str) -> Callable:
    """Compiled for all lengths at once; not compiled on CPU, where only tests use it."""
    if device_type == "cuda":
        return torch.compile(flex_attention, dynamic=True)
    return flex_attention


def has_flash_backend(device: torch.device) -> bool:
    """Whether FlexAttention can use the kernels of FlashAttention 4, which are made for Hopper and later."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and "BACKEND" in FlexKernelOptions.__annotations__
        and importlib.util.find_spec("flash_attn") is not None
        and importlib.util.find_spec("flash_attn.cute") is not None
    )
