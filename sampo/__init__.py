"""Preference optimisation without training for length: SamPO and related methods, on TRL's `DPOTrainer`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .audit.audit import Audit, audit_preferences
    from .checkpointing.files import CheckpointNotSavedError
    from .checkpointing.resume import ResumeRefusedError, WeightsNotFiniteError
    from .checkpointing.signals import Preempted
    from .config import SamPOConfig
    from .data.issues import PreferenceDataError
    from .data.load import load_preferences
    from .io.locks import FolderInUseError
    from .models.load import ModelError
    from .reference_cache.store import RefCacheError
    from .trainer import SamPOTrainer
    from .weighting import WEIGHTINGS, PairTokens, Weighting, register_weighting

# name -> module. Loaded on first use, so that `import sampo` and `sampo --help` do not wait for torch.
_PUBLIC = {
    "SamPOConfig": "config",
    "SamPOTrainer": "trainer",
    "WEIGHTINGS": "weighting",
    "PairTokens": "weighting",
    "Weighting": "weighting",
    "register_weighting": "weighting",
    "PreferenceDataError": "data.issues",
    "load_preferences": "data.load",
    "Audit": "audit.audit",
    "audit_preferences": "audit.audit",
    # what a trainer raises
    "CheckpointNotSavedError": "checkpointing.files",
    "FolderInUseError": "io.locks",
    "ModelError": "models.load",
    "Preempted": "checkpointing.signals",
    "RefCacheError": "reference_cache.store",
    "ResumeRefusedError": "checkpointing.resume",
    "WeightsNotFiniteError": "checkpointing.resume",
}
__all__ = [
    "WEIGHTINGS",
    "Audit",
    "CheckpointNotSavedError",
    "FolderInUseError",
    "ModelError",
    "PairTokens",
    "Preempted",
    "PreferenceDataError",
    "RefCacheError",
    "ResumeRefusedError",
    "SamPOConfig",
    "SamPOTrainer",
    "Weighting",
    "WeightsNotFiniteError",
    "audit_preferences",
    "load_preferences",
    "register_weighting",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module `sampo` has no attribute `{name}`; it has {sorted(_PUBLIC)}.")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
