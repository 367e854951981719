"""Attention of a packed row, by the first way that works.

The ways are a model's own flash kernels, FlexAttention, PyTorch's varlen kernels, and part by part. On CPU it is the
last. On CUDA, a way that fails is followed by the next, with one line in the log. Each way runs
forward and backward once for each shape of heads before it is used, because the first batch is compared without
gradient, and a kernel that fails must fail there.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..logs import get_logger
from .flex import attend_by_flex, has_flash_backend
from .segments import Segments, Softmax, attend_by_parts
from .varlen import attend_by_own, attend_by_torch, can_attend_by_torch

logger = get_logger(__name__)

Way = Callable[[Segments, Tensor, Tensor, Tensor, Softmax], Tensor]
# bf16 differs by about 0.01 for values of order 1
_SAME = 0.05
_works: dict[tuple, bool] = {}  # of (way, shape of heads): whether it has run forward and backward, or failed


class StreamRefused(RuntimeError):
    """The model needs something that the packed forward cannot compute exactly; `reason` names it."""

    def __init__(self, reason: str):
        super().__init__(f"A pair stream must be exact, but {reason}. Set `pair_stream: false`.")
        self.reason = reason


def attend(
    segments: Segments,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: Softmax,
    own: Callable | None = None,
) -> Tensor:
    """Attention of a packed row.

    Args:
        segments: the parts.
        query: `(1, heads, N, d)`.
        key: `(1, key heads, N, d)`.
        value: `(1, key heads, N, e)`.
        softmax: what is computed.
        own: the model's own function if it is a flash implementation, see `attend_by_own`.

    Returns:
        `(1, N, heads, e)`.
    """
    for name, way in _ways(query, value, softmax, own).items():
        if _is_usable(name, way, segments, query, key, value, softmax):
            return way(segments, query, key, value, softmax)
    return attend_by_parts(segments, query, key, value, softmax)


def _ways(query: Tensor, value: Tensor, softmax: Softmax, own: Callable | None) -> dict[str, Way]:
    """The kernels that could compute it, best first."""
    ways: dict[str, Way] = {}
    if own is not None and softmax.reach.chunk is None:
        ways["the model's own flash attention"] = lambda segments, q, k, v, _: attend_by_own(segments, q, k, v, own)
    if query.device.type == "cuda":
        if has_flash_backend(query.device):
            ways[_FLASH_BACKEND] = partial(attend_by_flex, kernel_options={"BACKEND": "FLASH"})
        ways["FlexAttention"] = attend_by_flex
        if can_attend_by_torch(query, value, softmax):
            ways["varlen_attn"] = attend_by_torch
    return ways


_FLASH_BACKEND = "the flash backend of FlexAttention"


def _is_usable(
    name: str, way: Way, segments: Segments, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax
) -> bool:
    """Whether a way runs, forward and backward, for heads of this shape."""
    shape = (query.size(1), key.size(1), query.size(3), value.size(3), query.dtype, query.device.type)
    kind = (softmax.reach, softmax.softcap, softmax.sinks is not None)
    if (name, shape, kind) not in _works:
        try:
            found = _run(way, segments, query, key, value, softmax)
            if name == _FLASH_BACKEND:  # it has computed wrong gradients without an error (pytorch#188322)
                _require_same(found, _run(attend_by_flex, segments, query, key, value, softmax))
            _works[name, shape, kind] = True
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # errors of a compiler have no common type
            logger.warning(f"pair_stream: {name} is not used, because it failed with {describe_error(error)}.")
            _works[name, shape, kind] = False
    return _works[name, shape, kind]


@torch.enable_grad()
def _run(way: Way, segments: Segments, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> list[Tensor]:
    """Result and gradients, apart from the graph of the model."""
    q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
    found = way(segments, q, k, v, softmax)
    return [found.detach(), *torch.autograd.grad(found.float().pow(2).sum(), (q, k, v))]


def _require_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        difference = ((mine - theirs).float().norm() / theirs.float().norm()).item()
        if not difference <= _SAME:
            raise ArithmeticError(f"it differs from the default kernels by {difference:.2g} of the norm")


def describe_error(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
