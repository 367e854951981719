"""The classes of `metrics`. They need the package `evaluate`; import them from there.

The numbers are those of `win_rate`, `length_controlled` and `verbosity`. Each `_compute` takes what belongs to other
modules too, because `evaluate.combine` hands every keyword to all of them. Optional columns do not exist in that
library, so each class names all it needs.
"""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value

from ...stats.intervals import Estimate
from .length_control import length_controlled
from .verbosity import System, verbosity
from .verdicts import Verdicts, compare_orders
from .win_rate import win_rate


class WinRate(evaluate.Metric):
    """Win rate over prompts: `predictions` in [0, 1] of the system (None: failed) and `prompt_ids`.

    One row per pair of answers, both orders averaged beforehand (None where one of them failed); several samples
    of a prompt share its id and are averaged.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _describe(self.__doc__, predictions="float64", prompt_ids="string")

    def _compute(
        self,
        *,
        predictions: Sequence[float | None],
        prompt_ids: Sequence[str],
        confidence: float = 0.95,
        **_others: Any,
    ) -> dict[str, Any]:
        ids = list(prompt_ids)
        verdicts = Verdicts(prompt=ids, sample=range(len(ids)), preference=_to_array(predictions))
        found = win_rate(compare_orders(verdicts), confidence=confidence)
        counts = {"prompts": found.rate.n, "wins": found.wins, "ties": found.ties, "losses": found.losses}
        return _flatten("win_rate", found.rate) | counts | {"failed": found.failed}


class LengthControlledWinRate(evaluate.Metric):
    """Win rate at equal length; not AlpacaEval's. Rows as for `WinRate`, with both lengths."""

    def _info(self) -> evaluate.MetricInfo:
        numbers = dict.fromkeys(("predictions", "lengths", "baseline_lengths"), "float64")
        return _describe(self.__doc__, prompt_ids="string", **numbers)

    def _compute(
        self,
        *,
        predictions: Sequence[float | None],
        prompt_ids: Sequence[str],
        lengths: Sequence[float],
        baseline_lengths: Sequence[float],
        confidence: float = 0.95,
        allow_extrapolation: bool = False,
        **_others: Any,
    ) -> dict[str, Any]:
        verdicts = Verdicts(
            prompt=list(prompt_ids),
            sample=range(len(prompt_ids)),
            preference=_to_array(predictions),
            system_length=_to_array(lengths),
            baseline_length=_to_array(baseline_lengths),
        )
        found = length_controlled(
            compare_orders(verdicts), confidence=confidence, allow_extrapolation=allow_extrapolation
        )
        numbers = {"win_rate": found.raw, "overlap": found.overlap.share}
        return _flatten("win_rate_at_equal_length", found.rate) | numbers


class Verbosity(evaluate.Measurement):
    """Lengths and repetition of `data`, one text per prompt."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe(self.__doc__, data="string")

    def _compute(self, *, data: Sequence[str], confidence: float = 0.95, **_others: Any) -> dict[str, Any]:
        if not len(data):
            return {}
        system = System(name="data", prompt=range(len(data)), text=list(data))
        found = verbosity(system, confidence=confidence)
        return {name: value for name, value in found.row().items() if value is not None and name != "notes"}


def _describe(description: str | None, **columns: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description or "",
        citation="",
        inputs_description="One row per verdict or answer; see docs/evaluation.md.",
        features=Features({name: Value(kind) for name, kind in columns.items()}),
    )


def _flatten(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _to_array(values: Sequence[float | None]) -> np.ndarray:
    """A failed verdict arrives as None and becomes NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)
