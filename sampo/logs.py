"""Logging of the library: on the first process only, without a prefix, and visible without a logging setup.

accelerate's logger puts `[RANK 0]` before each line, on one process too, and fails where accelerate has no state.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState

ROOT = "sampo"


def _is_news(record: logging.LogRecord) -> bool:
    """Drop DeepSpeed's message at import that there is no GPU, which also comes in runs without DeepSpeed."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


logging.getLogger("DeepSpeed").addFilter(_is_news)


def _without_rank(record: logging.LogRecord) -> bool:
    """Remove the rank from messages of a run with one process."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        record.msg = str(record.msg).removeprefix("[RANK 0] ")
    return True


for _name in ("trl.trainer.dpo_trainer", "trl.trainer.utils", "accelerate.accelerator", "accelerate.checkpointing"):
    logging.getLogger(_name).addFilter(_without_rank)


def _is_first_process(record: logging.LogRecord) -> bool:
    if PartialState._shared_state:
        return PartialState().is_main_process
    return os.environ.get("RANK", "0") == "0"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; it logs on the first process only."""
    logger = logging.getLogger(name)
    logger.addFilter(_is_first_process)
    return logger


def show_logs(level: int = logging.INFO) -> None:
    """Add a handler where neither the root logger nor ours has one, as transformers does for itself.

    An existing logging setup is not changed.

    Args:
        level: Lowest level to show, if no level has been set.
    """
    root = logging.getLogger(ROOT)
    if root.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(handler)
    root.propagate = False  # a root that is set up later would show messages twice
    if root.level == logging.NOTSET:
        root.setLevel(level)


@contextmanager
def silenced(name: str, beginning: str) -> Iterator[None]:
    """Drop the messages of a logger that start with this text."""
    logger = logging.getLogger(name)

    def keeps(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)
