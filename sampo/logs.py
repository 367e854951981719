"""What the library has to say: by the first process alone, without a prefix, and shown where nobody set logging up.

accelerate's logger puts `[RANK 0]` before each line, on one process too, and fails where accelerate has no state.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState

ROOT = "sampo"


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed says at its import that there is no GPU, in runs on the CPU that nobody meant for it, too."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


logging.getLogger("DeepSpeed").addFilter(_is_news)


def _without_rank(record: logging.LogRecord) -> bool:
    """On one process nobody asks which one speaks."""
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
    """The logger of a module; it is heard on the first process."""
    logger = logging.getLogger(name)
    logger.addFilter(_is_first_process)
    return logger


def show_logs(level: int = logging.INFO) -> None:
    """As transformers does for itself: a handler of our own where neither root nor we have one.

    Whoever has set logging up decides, and is not overruled.

    Args:
        level: From which on, if no level has been set.
    """
    root = logging.getLogger(ROOT)
    if root.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(handler)
    root.propagate = False  # a root that is set up later would say all twice
    if root.level == logging.NOTSET:
        root.setLevel(level)


@contextmanager
def silenced(name: str, beginning: str) -> Iterator[None]:
    """Drop what a logger says in messages of this beginning."""
    logger = logging.getLogger(name)

    def keeps(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)
