"""What transformers is given: an attention function and a mask function for packed rows.

transformers lets a library register both, so no model code is changed. In the forward of a packed row the mask
function does not make a mask. It returns a mark, which reaches the attention in the place of the mask: the number of
the packed row, and how far back tokens attend. Families differ in which layers have a window, in whether the attention
is told, and in which keyword arguments reach it, but all of them pass the mask on. Calls without a packed row use the
model's own implementation.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .attention import StreamRefused, attend
from .segments import Reach, Segments, Softmax

NAME = "sampo_pair_stream"
# arguments of some models' attention that change its result, and that no way implements
_UNSUPPORTED = ("sinks", "position_bias", "indices", "block_indices")

_own: dict[str, str] = {}  # of the names that are registered: the implementation that each stands in for
_numbers = count(1)
_rows: WeakValueDictionary[int, Segments] = WeakValueDictionary()  # packed rows; a backward pass can need them too
_current = 0  # number of the packed row whose forward is running


def own_implementation(name: str) -> str:
    """The model's own attention implementation, of the name in its config."""
    return _own.get(name, name)


def takes_marks(model: Any) -> bool:
    """Whether a model takes its attention from transformers' interface; the code of some older families does not."""
    return model._can_set_attn_implementation()


def is_installed(config: Any) -> bool:
    """Whether the attention for packed rows is registered with the model of this config."""
    return config._attn_implementation in _own


def install(model: Any) -> None:
    """Register the attention for packed rows with a model. Calls without a packed row do not change."""
    if takes_marks(model):
        model.set_attn_implementation(_register(own_implementation(model.config._attn_implementation)))


def uninstall(model: Any) -> None:
    """Undo `install`."""
    if takes_marks(model):
        model.set_attn_implementation(own_implementation(model.config._attn_implementation))


def _register(own: str) -> str:
    """The name of the attention that stands in for an implementation."""
    for name, known in _own.items():
        if known == own:
            return name
    name = f"{NAME}_{len(_own)}"  # without the implementation's name, in which transformers would look for `flash`
    _own[name] = own
    AttentionInterface.register(name, partial(_attention, own))
    AttentionMaskInterface.register(name, partial(_mask, own))
    return name


@contextmanager
def marks_for_masks(segments: Segments) -> Iterator[None]:
    """Within, models make marks of a packed row instead of masks."""
    global _current
    _current = next(_numbers)
    _rows[_current] = segments
    try:
        yield
    finally:
        _current = 0


def _mask(own: str, *args: Any, **kwargs: Any) -> Any:
    """The registered mask function: `(1, 1, 1, 3)` int64, packed row, window and chunk of the mask, 0 for none."""
    if not _current:
        return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, **kwargs)
    size, sees = kwargs.get("local_size") or 0, kwargs["mask_function"]
    if kwargs.get("use_vmap"):
        raise StreamRefused("the model adds a pattern of its own to the mask of its attention")
    zero, one = torch.tensor(0), torch.tensor(1)
    if sees(zero, zero, zero, one):
        raise StreamRefused("the model's attention uses tokens after the query")
    # a window of n tokens that ends at position n has position 1, and the chunk of n positions that starts there not
    is_window = size and bool(sees(zero, zero, torch.tensor(size), one))
    return torch.tensor([_current, size if is_window else 0, 0 if is_window else size])[None, None, None]


def _read(mark: Any) -> tuple[Segments, Reach] | None:
    """The inverse of `_mask`; None for a real mask."""
    if mark is None or mark.shape != (1, 1, 1, 3) or mark.dtype != torch.int64:
        return None
    row, window, chunk = mark.flatten().tolist()
    return _rows[row], Reach(window or None, chunk or None)


def _attention(
    own: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered function of each layer; `query` is `(1, heads, N, d)`, the result `(1, N, heads, d)`."""
    read = _read(attention_mask)
    if read is None:
        if _current:
            raise StreamRefused("the model computes the mask of its attention in a way of its own")
        return _call_own(own, module, query, key, value, attention_mask, **kwargs)
    _refuse(kwargs)
    if torch.is_autocast_enabled(query.device.type):  # SDPA would do so too; FlexAttention and its like do not
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (each.to(dtype) for each in (query, key, value))
    segments, reach = read
    segments.calls += 1
    scale, flash = kwargs.get("scaling"), None
    if is_flash_attention_requested(requested_attention_implementation=own):  # it has the window as an argument only
        reach = Reach(kwargs.get("sliding_window"), reach.chunk)
        passed = {name: kwargs[name] for name in ("scaling", "softcap", "s_aux", "sliding_window") if name in kwargs}
        flash = partial(_call_own, own, module, **passed)
    softmax = Softmax(
        scale=query.size(-1) ** -0.5 if scale is None else scale,
        reach=reach,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return attend(segments, query, key, value, softmax, flash), None


def _call_own(own: str, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The model's own attention. Some implementations read their name in the config."""
    # an eager attention is a function of the family's module, and not registered
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function, config = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager), module.config
    installed = config._attn_implementation
    config._attn_implementation_internal = own
    try:
        return function(module, *args, **kwargs)
    finally:
        config._attn_implementation_internal = installed


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raise if a layer needs what `attend` does not implement."""
    asked = [f"`{name}`" for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if kwargs.get("is_causal") is False:
        asked.append("tokens after the query")
    if kwargs.get("dropout"):
        asked.append(f"dropout of {kwargs['dropout']}")
    if asked:
        raise StreamRefused(f"the model's attention uses {', '.join(asked)}")
