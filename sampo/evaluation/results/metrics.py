"""Win rate and verbosity as `evaluate` modules, for pipelines that speak that library (extra `metrics`).

    from sampo.evaluation.metrics import WinRate
    WinRate().compute(predictions=[1.0, 0.5, None], prompt_ids=["a", "b", "c"])

Thin adapters: the numbers are those of `win_rate`, `length_control` and `verbosity`. `evaluate` is imported when a
class is asked for, not before. Each `_compute` takes what belongs to other modules too, because `evaluate.combine`
hands every keyword to all of them. Optional columns do not exist in that library, so each class names all it needs.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...stats.intervals import Estimate
from .length_control import length_controlled
from .verbosity import System, verbosity
from .verdicts import Verdicts, compare_orders
from .win_rate import win_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = ("LengthControlledWinRate", "Verbosity", "WinRate")
__all__ = ["LengthControlledWinRate", "Verbosity", "WinRate"]  # noqa: F822  made by __getattr__ on first use


def __getattr__(name: str):
    if name in NAMES:
        return _classes()[name]
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`; it has {list(NAMES)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES])


def _flat(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _numbers(values: "Sequence[float | None]") -> np.ndarray:
    """A failed verdict arrives as None."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _of_win_rate(predictions, prompt_ids, confidence: float) -> dict[str, Any]:
    ids = list(prompt_ids)
    verdicts = Verdicts(prompt=ids, sample=range(len(ids)), preference=_numbers(predictions))
    found = win_rate(compare_orders(verdicts), confidence=confidence)
    counts = {"prompts": found.rate.n, "wins": found.wins, "ties": found.ties, "losses": found.losses}
    return _flat("win_rate", found.rate) | counts | {"failed": found.failed}


def _of_length_control(predictions, prompt_ids, lengths, baseline_lengths, confidence, allow) -> dict[str, Any]:
    verdicts = Verdicts(
        prompt=list(prompt_ids),
        sample=range(len(prompt_ids)),
        preference=_numbers(predictions),
        system_length=_numbers(lengths),
        baseline_length=_numbers(baseline_lengths),
    )
    found = length_controlled(compare_orders(verdicts), confidence=confidence, allow_extrapolation=allow)
    return _flat("win_rate_at_equal_length", found.rate) | {"win_rate": found.raw, "overlap": found.overlap.share}


@cache
def _classes() -> dict[str, type]:
    try:
        import evaluate
        from datasets import Features, Value
    except ImportError as error:
        raise ImportError(
            "`sampo.evaluation.results.metrics` needs the package `evaluate`. Run `pip install 'sampo-dpo[metrics]'`."
        ) from error

    def info(description: str | None, **columns: str) -> "evaluate.MetricInfo":
        return evaluate.MetricInfo(
            description=description or "",
            citation="",
            inputs_description="One row per verdict or answer; see docs/evaluation.md.",
            features=Features({name: Value(kind) for name, kind in columns.items()}),
        )

    class WinRate(evaluate.Metric):
        """Win rate over prompts: `predictions` in [0, 1] of the system (None: failed) and `prompt_ids`.

        One row per pair of answers, both orders averaged beforehand (None where one of them failed); several samples
        of a prompt share its id and are averaged.
        """

        __qualname__ = "WinRate"  # so that pickle finds it in the module

        def _info(self):
            return info(self.__doc__, predictions="float64", prompt_ids="string")

        def _compute(self, *, predictions, prompt_ids, confidence=0.95, **_others):
            return _of_win_rate(predictions, prompt_ids, confidence)

    class LengthControlledWinRate(evaluate.Metric):
        """Win rate at equal length; not AlpacaEval's. Rows as for `WinRate`, with both lengths."""

        __qualname__ = "LengthControlledWinRate"

        def _info(self):
            numbers = dict.fromkeys(("predictions", "lengths", "baseline_lengths"), "float64")
            return info(self.__doc__, prompt_ids="string", **numbers)

        def _compute(
            self,
            *,
            predictions,
            prompt_ids,
            lengths,
            baseline_lengths,
            confidence=0.95,
            allow_extrapolation=False,
            **_others,
        ):
            return _of_length_control(
                predictions, prompt_ids, lengths, baseline_lengths, confidence, allow_extrapolation
            )

    class Verbosity(evaluate.Measurement):
        """Lengths and repetition of `data`, one text per prompt."""

        __qualname__ = "Verbosity"

        def _info(self):
            return info(self.__doc__, data="string")

        def _compute(self, *, data, confidence=0.95, **_others):
            if not len(data):
                return {}
            system = System(name="data", prompt=range(len(data)), text=list(data))
            found = verbosity(system, confidence=confidence)
            return {name: value for name, value in found.row().items() if value is not None and name != "notes"}

    classes: dict[str, type] = {
        "LengthControlledWinRate": LengthControlledWinRate,
        "Verbosity": Verbosity,
        "WinRate": WinRate,
    }
    for made in classes.values():
        made.__module__ = __name__
    return classes
