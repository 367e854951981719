"""Where the time of a pass goes, by groups of operations."""

from collections.abc import Callable

import torch

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::_addmm_activation")
LAYOUT = ("index", "gather", "scatter", "cat", "copy", "clone", "fill", "zero", "masked", "slice", "select", "nonzero")
VOCABULARY_TILE = 32768  # chunk size of TRL's head


def profile_pass(side, run_pass: Callable) -> tuple[dict[str, float], str]:
    """Seconds of each group in one pass, and PyTorch's own table of the largest operations."""
    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    side.activate()
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        run_pass(side)
    model = side.policy
    vocab = model.get_output_embeddings().weight.size(0)
    widths = {vocab, min(vocab, VOCABULARY_TILE), vocab % VOCABULARY_TILE or vocab}
    inner = {size for name, p in model.base_model.named_parameters() if "embed" not in name for size in p.shape}
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    groups: dict[str, float] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type == torch.autograd.DeviceType.CPU:  # kernels are counted with the operation that ran them
            group = group_of(event.key, event.input_shapes, inner=inner, widths=widths)
            groups[group] = groups.get(group, 0.0) + getattr(event, time_of) / 1e6
    return groups, profiler.key_averages().table(sort_by=time_of, row_limit=12)


def group_of(name: str, shapes: list, *, inner: set[int], widths: set[int]) -> str:
    """The group of an operation.

    Args:
        name: as the profiler has it.
        shapes: of its inputs.
        inner: sizes of the backbone's weights.
        widths: sizes of what the head multiplies by: the vocabulary, or its tiles.
    """
    shapes = [shape for shape in shapes if shape]
    name_only = name.lower()
    if "attention" in name_only or "flash" in name_only:
        return "attention"
    if name in PRODUCTS:
        if any(len(shape) > 2 for shape in shapes):
            return "attention"
        sizes = {size for shape in shapes for size in shape}
        # of rows x inner by inner x inner, only the number of rows is no size of a weight
        return "LM head" if sizes & widths and len(sizes - inner) > 1 else "linear layers"
    if any(widths & set(shape if len(shape) == 2 else shape[2:]) for shape in shapes):
        return "LM head"
    if "embedding" in name_only:
        return "embedding"
    if any(word in name_only for word in LAYOUT):
        return "copies and layout"
    return "norms, activations, positions and the rest"
