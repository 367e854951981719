"""Progress of a command: a bar on a terminal, about ten lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, of)."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, of: bar.update(task, completed=done, total=of)
        return

    began, shown = time.perf_counter(), -1

    def line(done: int, of: int) -> None:
        nonlocal shown
        tenth = 10 * done // of if of else 10
        if tenth > shown:
            shown = tenth
            print(f"{title}: {done} of {of}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    yield line
