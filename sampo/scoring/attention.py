"""Attention over packed pairs: each token attends to its prompt and, causally, to its own branch.

There are two implementations. On CPU, `segments`: PyTorch's SDPA once for a prompt with its first branch and once for
each further branch. On CUDA, `flex`: FlexAttention once for the full stream, compiled once a process for all lengths.
The second was tested on CPU only (its mask, and its forward pass with and without compilation; FlexAttention has no
backward pass there), and its speed was not measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128  # tokens on a side of FlexAttention's blocks, the size that its kernels are made for
_flex_has_run: set[tuple] = set()  # shapes of heads for which FlexAttention has run forward and backward


class StreamRefused(RuntimeError):
    """The model needs something that the packed forward cannot compute exactly; `reason` names it."""

    def __init__(self, reason: str):
        super().__init__(f"A pair stream must be exact, but {reason}. Set `pair_stream: false`.")
        self.reason = reason


@dataclass
class Segments:
    """Which tokens of a stream attend to which.

    Attributes:
        borders: one per prompt with its first branch, then one per further branch: (start, stop, prompt start, prompt
            stop). The tokens start:stop attend causally to themselves, and all of them to the prompt's. They are in
            the order of the stream, without gaps.
        device: where the stream is.
        way: `segments` or `flex`.
        calls: number of calls of the attention.
    """

    borders: list[tuple[int, int, int, int]]
    device: torch.device
    way: Literal["segments", "flex"] = field(init=False)
    calls: int = 0
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.way = "flex" if self.device.type == "cuda" else "segments"

    @property
    def longest(self) -> int:
        """The largest number of tokens that one token attends to, itself included."""
        return max(
            stop - start + (prompt_stop - prompt_start) * (start != prompt_start)
            for start, stop, prompt_start, prompt_stop in self.borders
        )

    def mask(self, n_prompt: int, n_branch: int) -> Tensor:
        """`(n_branch, n_prompt + n_branch)` bool: all of the prompt, and the branch causally."""
        key = (n_prompt, n_branch)
        if key not in self._masks:
            ones = torch.ones(n_branch, n_prompt + n_branch, dtype=torch.bool, device=self.device)
            self._masks[key] = ones.tril(diagonal=n_prompt)
        return self._masks[key]

    @cached_property
    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(N,)` each: token q attends to the tokens first … q, and to second … third − 1."""
        borders = torch.tensor(self.borders, device=self.device)
        start, _, prompt_start, prompt_stop = borders.repeat_interleave(borders[:, 1] - borders[:, 0], dim=0).unbind(1)
        # a prompt and its first branch are one causal segment: the second range is empty
        return start.contiguous(), prompt_start.contiguous(), torch.minimum(prompt_stop, start)

    @cached_property
    def block_mask(self) -> BlockMask:
        """`(1, 1, N, N)`. Built from the views, because `create_block_mask` would allocate N × N tensors."""
        start, prompt_start, prompt_stop = self.views
        query = torch.arange(len(start), device=self.device)
        low = torch.arange(0, len(start), _BLOCK, device=self.device)  # keys low … high
        high = low + _BLOCK - 1
        own, prompt = (query, start), (prompt_stop - 1, prompt_start)
        touched, covered = (
            torch.zeros(len(start), len(low), dtype=torch.bool, device=self.device) for _ in range(2)
        )  # (N, N / 128): does the token attend to any, and to all, of a block's keys
        for last, first in (own, prompt):
            last, first = last[:, None], first[:, None]
            touched |= (low <= last) & (high >= first) & (first <= last)
            covered |= (low >= first) & (high <= last)
        padding = (0, 0, 0, -len(start) % _BLOCK)
        some = F.pad(touched, padding).view(len(low), _BLOCK, len(low)).any(dim=1)  # (N / 128, N / 128)
        full = F.pad(covered, padding).view(len(low), _BLOCK, len(low)).all(dim=1)
        return BlockMask.from_kv_blocks(
            *_listed(some & ~full),
            *_listed(full),
            BLOCK_SIZE=_BLOCK,
            mask_mod=sees(*self.views),
            seq_lengths=(len(start), len(start)),
        )


def sees(start: Tensor, prompt_start: Tensor, prompt_stop: Tensor) -> Callable:
    """`Segments.views` as FlexAttention takes it: (batch, head, query, key) → bool."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key >= start[query]) & (key <= query)
        return own | ((key >= prompt_start[query]) & (key < prompt_stop[query]))

    return mask_mod


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`(Q, K)` bool as `(1, 1, Q)` numbers and `(1, 1, Q, K)` indices of the blocks in each row, in order."""
    indices = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], indices.int()[None, None]


def attend(segments: Segments, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Softmax attention of a stream.

    Args:
        segments: which tokens attend to which.
        query: `(1, heads, N, d)`.
        key: `(1, key heads, N, d)`.
        value: `(1, key heads, N, d)`.
        scale: of the scores; None for 1/√d.

    Returns:
        `(1, heads, N, d)`.
    """
    settings = {"scale": scale, "enable_gqa": query.size(1) != key.size(1)}
    if segments.way == "flex":
        return _by_flex_attention(segments, query, key, value, settings)
    return _by_segments(segments, query, key, value, settings)


def _by_segments(segments: Segments, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Tensor:
    parts = []
    for start, stop, prompt_start, prompt_stop in segments.borders:
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        n_prompt = 0 if start == prompt_start else prompt_stop - prompt_start
        if n_prompt:
            k, v = (torch.cat((x[:, :, prompt_start:prompt_stop], y), dim=2) for x, y in ((key, k), (value, v)))
            mask = segments.mask(n_prompt, stop - start)
            parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings))
        else:
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings))
    return torch.cat(parts, dim=2)


def _by_flex_attention(
    segments: Segments, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]
) -> Tensor:
    flex = _flex_attention(query.device.type)
    settings = settings | {"block_mask": segments.block_mask}
    shape = (query.size(1), key.size(1), query.size(3), query.dtype)
    try:
        if query.is_cuda and shape not in _flex_has_run:
            # The first batch is compared without gradient; a kernel that fails to compile must fail there.
            with torch.enable_grad():
                copies = [x.detach().requires_grad_() for x in (query, key, value)]
                flex(*copies, **settings).sum().backward()
            _flex_has_run.add(shape)
        return flex(query, key, value, **settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # errors of the compiler have no common type
        raise StreamRefused(f"FlexAttention failed with {describe_error(error)}") from error


@cache
def _flex_attention(device_type: str) -> Callable:
    """Compiled for all lengths at once; not compiled on CPU, where only tests use it."""
    if device_type == "cuda":
        return torch.compile(flex_attention, dynamic=True)
    return flex_attention


def describe_error(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
