"""Types of the functions that report progress."""

from collections.abc import Callable
from contextlib import AbstractContextManager

Progress = Callable[[int, int], None]  # (done, of)
OpenProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # (title, steps) -> sets steps done
