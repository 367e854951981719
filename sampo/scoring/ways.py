"""Which forward computes a batch: packed rows, rows grouped by length, or padded rows as TRL has them.

`pair_stream: auto` computes the first batches by the plain forward over padded rows and by another one: packed rows
where the model allows it, else rows grouped by length. It keeps the other forward as long as it is exact up to
rounding and not slower.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..logs import get_logger
from .attention import StreamRefused, describe_error
from .interface import install, uninstall
from .packing import RowsTooLong, Stream, too_long, why_not

logger = get_logger(__name__)

PACKED, GROUPED, PADDED = "packed rows", "rows grouped by length", "the plain forward over padded rows"
_CLEARLY = 1.25  # times as fast, in which case no further batch is timed
_WARM_UP_SECONDS = 1.0  # on CPU, what the first calls of a process take longer is well below this
_TIMED_BATCHES = 3


class Ways:
    """The way of a run, decided for the models at the start, and by their first batches.

    Attributes:
        way: `PACKED`, `GROUPED` or `PADDED`.
    """

    def __init__(self, mode: str, models: Sequence[Any], *, refuse: str | None = None, may_group: bool = True):
        """Make the models ready.

        Args:
            mode: `auto`, `true` or `false`.
            models: policy and, if there is one, reference; not wrapped.
            refuse: a reason against packing that the caller knows of.
            may_group: rows of these models can be computed in several forwards.

        Raises:
            ValueError: `true`, and there is a reason against packing.
        """
        self.mode, self.way, self._models, self._may_group = mode, PADDED, list(models), may_group
        self._installed = False
        self._start_trials()
        if mode == "false":
            return
        self.way, self._settled = PACKED, mode == "true"
        if reason := refuse or next(filter(None, map(why_not, models)), None):
            self._fall_back(reason)
            return
        for model in models:
            install(model)
        self._installed = True

    def _start_trials(self) -> None:
        self._compared: set[int] = set()  # ids of the models of which a batch agreed
        self._timed: int | None = None  # id of the model that is timed: the first one
        self._n_timed, self._seconds = 0, [0.0, 0.0]  # of the plain forward and of the other
        self._settled = self.way == PADDED

    def settle(self, way: str | None) -> str | None:
        """The way once it is settled, for a checkpoint. Called before the forward passes of a step.

        Args:
            way: the way of the checkpoint from which the run goes on, if any. It is taken without timing it again, so
                that the resumed run has the same arithmetic.
        """
        if way is not None and not self._settled:
            self._settled = True
            if way == PADDED:
                self.way = PADDED
        if self._installed and self.way != PACKED:  # not earlier: a backward pass can compute packed rows again
            for model in self._models:
                uninstall(model)
            self._installed = False
        return self.way if self._settled else None

    def is_on_trial(self, model: Any) -> bool:
        """Whether the next batch of this model is to be computed both ways."""
        if self.way == PADDED:
            return False
        return id(model) not in self._compared or (not self._settled and id(model) == self._timed)

    def of(self, model: Any, stream: Callable[[], Stream]) -> str:
        """The way of a batch; the plain one if a model computes rows of its length differently.

        Args:
            model: one of the models.
            stream: gives the batch as packed rows.

        Raises:
            ValueError: `true`, and the batch cannot be packed.
        """
        if self.way != PACKED:
            return self.way if id(model) in self._compared else PADDED
        reason = next(filter(None, (too_long(each.config, stream()) for each in self._models)), None)
        if reason and self.mode == "true":
            raise ValueError(
                f"`pair_stream: true` must be exact for every batch, but {reason}. Set a smaller `max_length`, or use "
                "`auto`, which takes the plain forward for such batches."
            )
        return PADDED if reason else PACKED

    def compare(
        self,
        model: Any,
        other: Callable[[], Tensor],
        padded: Callable[[], Tensor],
        *,
        tolerance: float,
        largest: Callable[[Tensor], list[float]],
        tokens: tuple[int, int],
    ) -> None:
        """Keep the other way if both agree on a batch. A batch with rows that are too long is skipped.

        Args:
            model: one of the models.
            other: computes the log-probs of the batch's completion tokens by the other forward, `(M,)` nats.
            padded: and by the plain forward, in the same order.
            tolerance: largest mean difference of a token. The largest difference is not informative: in bf16 a rare
                token can differ by 0.3 because of rounding alone.
            largest: of each number of a tensor, the largest over all processes, so that all decide alike. Called
                exactly once.
            tokens: of the plain forward and of the other.

        Raises:
            ValueError: `true`, and the ways do not agree, or the packed forward fails.
        """
        expected, padded_seconds = _timed(padded)
        difference, seconds, failure = expected.new_tensor(-1.0), 0.0, None
        try:
            found, seconds = _timed(other)
            difference = (found - expected).abs().mean()
        except RowsTooLong:
            padded()  # other processes may have run the other forward: all run the same number of forwards
        except AssertionError:
            raise  # a bug in packing, not in the model
        except Exception as error:  # the plain forward ran, so the model cannot take such rows
            difference, failure = expected.new_tensor(math.inf), error
        numbers = torch.stack([difference.float(), *difference.new_tensor([padded_seconds, seconds]).float()])
        mean, *both = largest(numbers)
        if mean < 0:
            return
        if failure is not None or not mean <= tolerance:
            self._fall_back(_reason(mean, tolerance, failure), failure)
            return
        self._report(mean, tolerance, tokens, first=not self._compared)
        self._compared.add(id(model))
        self._timed = self._timed or id(model)
        if not self._settled and self._timed == id(model):
            self._judge_seconds(both, on_cpu=expected.device.type == "cpu")

    def _report(self, difference: float, tolerance: float, tokens: tuple[int, int], *, first: bool) -> None:
        log = logger.info if first else logger.debug
        log(
            f"pair_stream: {self.way}. This batch has {tokens[1]:,} tokens instead of {tokens[0]:,}; its log-probs "
            f"differ from those of the plain forward by {difference:.1g} nats a token, which is rounding (the bound "
            f"is {tolerance:g})."
        )

    def _judge_seconds(self, seconds: list[float], *, on_cpu: bool) -> None:
        """Settle the way once it is clearly faster, or after some batches. Batch 1 warms up and is not timed."""
        self._n_timed += 1
        if self._n_timed == 1 and not (on_cpu and min(seconds) > _WARM_UP_SECONDS):
            return
        self._seconds = [a + b for a, b in zip(self._seconds, seconds, strict=True)]
        padded, other = self._seconds
        if other * _CLEARLY < padded:
            self._settled = True
        elif self._n_timed > _TIMED_BATCHES:
            self._settled = True
            if other > padded:
                logger.info(
                    f"pair_stream: auto takes {PADDED}, which took {padded:.3g} s for {_TIMED_BATCHES} batches; "
                    f"{self.way} took {other:.3g} s."
                )
                self.way = PADDED

    def _fall_back(self, reason: str, cause: Exception | None = None) -> None:
        """From packed rows to rows grouped by length, from these to padded ones."""
        if self.mode == "true":
            raise ValueError(
                f"`pair_stream: true` must be exact for this model, but {reason}. Use `auto`, which takes another "
                "forward then, or `false`."
            ) from cause
        self.way = GROUPED if self.way == PACKED and self._may_group else PADDED
        self._start_trials()
        logger.warning(f"pair_stream: auto takes {self.way}, because {reason}.")


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result, and the seconds until it was there."""
    began = time.perf_counter()
    result = run()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result, time.perf_counter() - began


def _reason(difference: float, tolerance: float, failure: Exception | None) -> str:
    if failure is not None:
        return failure.reason if isinstance(failure, StreamRefused) else f"it failed with {describe_error(failure)}"
    if difference == math.inf:
        return "it failed in another process"
    return (
        f"the log-probs of the first batch differ from those of the plain forward by {difference:.2g} nats a "
        f"token, which is more than rounding (the bound is {tolerance:g})"
    )


def group_rows(lengths: Sequence[int], n_groups: int) -> list[list[int]]:
    """Rows in groups of like length, such that padding each group to its longest row takes the fewest tokens.

    Args:
        lengths: tokens of each row.
        n_groups: number of groups; all of them have a row.

    Returns:
        Indices of the rows of each group.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    # best[n]: fewest tokens of the n shortest rows in the groups so far, with the borders of these groups
    best: list[tuple[float, list[int]]] = [(0, [])] + [(math.inf, [])] * len(order)
    for _ in range(n_groups):
        best = [(math.inf, [])] + [
            min((best[m][0] + (n - m) * lengths[order[n - 1]], [*best[m][1], n]) for m in range(n))
            for n in range(1, len(order) + 1)
        ]
    borders = best[-1][1]
    return [order[start:stop] for start, stop in zip([0, *borders], borders, strict=False)]
