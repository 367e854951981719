"""Win rate and verbosity as `evaluate` modules, for pipelines that use that library (extra `metrics`).

    from sampo.evaluation.results.metrics import WinRate
    WinRate().compute(predictions=[1.0, 0.5, None], prompt_ids=["a", "b", "c"])

The classes are in `evaluate_metrics`, which is imported when one of them is asked for: only then `evaluate` is needed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate_metrics import LengthControlledWinRate, Verbosity, WinRate

__all__ = ["LengthControlledWinRate", "Verbosity", "WinRate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`; it has {__all__}.")
    try:
        from . import evaluate_metrics
    except ImportError as error:
        raise ImportError(
            f"`{__name__}` needs the package `evaluate`. Run `pip install 'sampo-dpo[metrics]'`."
        ) from error
    return getattr(evaluate_metrics, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
