"""Progress of a command other than train: a bar on a terminal, a line now and then elsewhere; on stderr."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

LINE_SECONDS = 10.0


class Report(Protocol):
    """Told how far something is."""

    def __call__(self, done: int, total: int, words: str | None = None, /) -> None:
        """So much of all is done; `words` say what is going on now."""


@contextlib.contextmanager
def progress(words: str) -> Iterator[Report]:
    """Yields a function to be called now and then.

    Args:
        words: what is going on, such as "scoring".
    """
    if not is_live():
        yield _lines(words)
        return
    from rich import progress as parts
    from rich.console import Console
    from rich.table import Column

    console = Console(stderr=True)
    # In a narrow terminal the words are cut, not the numbers.
    narrow = Column(no_wrap=True, overflow="ellipsis", max_width=max(10, console.width - 34))
    words_column = parts.TextColumn("{task.description}", markup=False, table_column=narrow)
    columns = (words_column, parts.BarColumn(bar_width=None), parts.MofNCompleteColumn())
    times = (parts.TimeElapsedColumn(), parts.TimeRemainingColumn())
    # What is printed meanwhile goes through the bar's console, except results that are written to a file or a pipe.
    here = sys.stdout is not None and sys.stdout.isatty()
    live: dict[str, Any] = {"console": console, "transient": True, "redirect_stdout": here}
    with parts.Progress(*columns, *times, expand=True, **live) as bar:
        task = bar.add_task(words, total=None)

        def report(done: int, total: int, words: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=words)

        yield report


def _lines(default: str) -> Report:
    last = time.monotonic()

    def report(done: int, total: int, words: str | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            print(f"{words or default}: {done}/{total}", file=sys.stderr, flush=True)

    return report


def is_live() -> bool:
    """Whether stderr is a terminal on which lines can be redrawn."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def in_notebook() -> bool:
    """Whether this is the kernel of a Jupyter or Colab notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and ("google.colab" in str(type(shell)) or type(shell).__name__ == "ZMQInteractiveShell")
