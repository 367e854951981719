"""Answers by several processes of a launcher, each with a copy of the model: a share of the batches each.

The first process reads and writes the file of answers. The batches are those of a single process, so the answers are
the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .backends import Row, TransformersBackend
from .generate import Job, Output, Sampling


class ParallelBackend:
    """A backend of the first process, whose batches all processes answer; the others call `assist`."""

    def __init__(self, own: TransformersBackend):
        self._own = own
        self.about: Mapping[str, Any] = own.about
        self.options: Mapping[str, Any] = own.options

    def check(self, jobs: Sequence[Job], sampling: Sampling) -> dict[int, str]:
        """As one process does it."""
        return self._own.check(jobs, sampling)

    def generate(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[tuple[Job, Output]]]:
        """One batch of each process at a time."""
        yield from self._answer_in_turns(self._own.batches(jobs), sampling)

    def assist(self, sampling: Sampling) -> None:
        """Answer batches of the first process until it has all answers."""
        for _ in self._answer_in_turns([], sampling):
            pass

    def _answer_in_turns(self, batches: list[list[Row]], sampling: Sampling) -> Iterator[list[tuple[Job, Output]]]:
        shared = [batches]
        broadcast_object_list(shared)
        state = PartialState()
        for first in range(0, len(shared[0]), state.num_processes):
            mine = shared[0][first + state.process_index :][:1]  # none in the last turn, perhaps
            yield gather_object([done for batch in mine for done in self._own.answer(batch, sampling)])
