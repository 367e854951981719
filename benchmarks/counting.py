"""What a pass costs beside time: tokens through backbone and head, memory, and the arithmetic that it needs."""

import copy
import ctypes
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


class Counter(TorchDispatchMode):
    """Counts, inside its `with` block, the tokens that models push through their backbone and their head.

    Forward passes only: a head that does not keep its logits computes them again in the backward pass.

    Attributes:
        backbone: ids that entered an embedding.
        head: rows that were multiplied by an LM head's weight; tiles of the vocabulary count by their share.
    """

    def __init__(self, models: list):
        super().__init__()
        self.backbone, self._tiles, self._inside = 0, 0, False
        self._vocab = models[0].get_output_embeddings().weight.size(0)
        # by address: a head that works in tiles multiplies by views of its weight. One that is gone counts no more:
        # its address may be another tensor's
        weights = [model.get_output_embeddings().weight for model in models]
        self._weights = {_address(weight): weakref.ref(weight) for weight in weights}
        for model in models:
            model.get_input_embeddings().register_forward_pre_hook(self._count_ids)

    @property
    def head(self) -> int:
        if self._tiles % self._vocab:
            raise RuntimeError(f"The number of rows of the head must be an integer, got {self._tiles / self._vocab}.")
        return self._tiles // self._vocab

    def __enter__(self):
        self._inside = True
        return super().__enter__()

    def __exit__(self, *error):
        self._inside = False
        return super().__exit__(*error)

    def _count_ids(self, module, args):
        if self._inside:
            self.backbone += args[0].numel()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS and torch._C._current_graph_task_id() == -1:  # not in a backward pass
            left, right = args[-2:]
            if self._is_head(left) or self._is_head(right):
                self._tiles += left.size(0) * right.size(1)
        return func(*args, **(kwargs or {}))

    def _is_head(self, tensor) -> bool:
        weight = self._weights.get(_address(tensor))
        return weight is not None and weight() is not None


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class Memory:
    """GiB: on CPU of the process's resident set, on GPU of what the allocator has handed out."""

    before: float = 0.0
    peak: float = 0.0


@contextmanager
def peak_memory() -> Iterator[Memory]:
    """Memory before the block, and its peak inside. On CPU this needs Linux."""
    memory = Memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        memory.before = torch.cuda.memory_allocated() / GIB
        yield memory
        memory.peak = torch.cuda.max_memory_allocated() / GIB
        return
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not this block's
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
    memory.before = _status("VmRSS")
    yield memory
    memory.peak = _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / GIB


def useful_flops(side, counter: Counter) -> float:
    """Operations that a pass over the side's batches cannot avoid.

    Convention: each prompt once, no padding; the head for the tokens that the method counts; forward and backward are
    three forwards, and a live reference is a fourth; causal attention. So a side that computes padding or prompts
    twice has a low utilisation, and not a high one of useless work.
    """
    rows = torch.cat([batch["attention_mask"].sum(dim=1) for batch in side.batches]).double()  # tokens of a row
    labelled = sum(int(batch["completion_mask"].sum()) for batch in side.batches)
    prompts = sum(
        int((batch["attention_mask"] - batch["completion_mask"]).chunk(2)[1].sum()) for batch in side.batches
    )
    n_models = 2 if side.live_reference else 1
    return flops(
        side.policy.config,
        tokens=int(rows.sum()) - prompts,
        scored=min(counter.head // n_models, labelled),
        row_length=round((rows.square().sum() / rows.sum()).item()),  # as a token sees it
        live_reference=side.live_reference,
    )


def flops(config, *, tokens: int, scored: int, row_length: int, live_reference: bool) -> float:
    """TRL's count, with the head apart, because it sees fewer tokens than the backbone."""
    from trl.trainer.utils import adjusted_mfu, compute_flops_per_token

    backbone = copy.copy(config)
    backbone.vocab_size = 0
    per_token = compute_flops_per_token(backbone, row_length) * adjusted_mfu(1.0, backbone, row_length)
    trained = tokens * per_token + scored * 6 * config.vocab_size * config.hidden_size
    return trained * (4 / 3 if live_reference else 1)
