"""Shared by all tests. Helper modules (`tiny`, `oracles`, …) lie in `support/` and are imported by name."""

import atexit
import functools
import gc
import importlib.metadata
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it in its processes, and our tables would take that width

if "SAMPO_CACHE" not in os.environ:  # no test may touch the user's
    os.environ["SAMPO_CACHE"] = tempfile.mkdtemp(prefix="sampo-tests-")
    atexit.register(shutil.rmtree, os.environ["SAMPO_CACHE"], ignore_errors=True)

import torch

torch.set_num_threads(1)

# accelerate asks for the same packages in every trainer that is made, and each time a file is parsed
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def pytest_collection_finish() -> None:
    """Spare the collector what was imported: every `Trainer.train` runs it, which takes longer than a tiny run."""
    gc.collect()
    gc.freeze()
