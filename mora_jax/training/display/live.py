"""The display of a run on a terminal: a panel, the first example with its trained tokens marked, a bar."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from mora_jax.training.display.example import example_panel
from mora_jax.training.display.plain import Display, RunInfo, left_words, printable, speed_words, summary_words
from mora_jax.training.display.summary import summary_rows


class LiveDisplay(Display):
    """Shows a run on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        """Draws on `console`, by default the terminal behind stderr."""
        super().__init__()
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.bar: Progress | None = None
        self.status: Status | None = None
        self._words = ""  # of the last step

    def loading(self, words: str) -> None:
        """Shows a line with a spinner until the start; after it, words at the bar until the next step."""
        if self.bar is not None:
            self.bar.update(self.task, words=words)
            return
        self.close()
        self.status = self.console.status(Text(printable(words)))
        self.status.start()

    def start(self, info: RunInfo) -> None:
        """Draws the panel and starts the bar."""
        self.close()
        self.steps = info.steps
        self.console.print(Panel(_facts(info.rows()), title="mora-jax train", title_align="left", border_style="cyan"))
        if info.first_example:
            self.console.print(example_panel(info.first_example, "first example", self.console))
        for words in info.notes:
            self.console.print(Text(f"note: {printable(words)}", style="yellow"))
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[place]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[words]}"),
            console=self.console,
            expand=True,
            transient=True,
        )
        place = f"step {info.first_step}/{self.steps}"
        self.task = self.bar.add_task("", total=self.steps, completed=info.first_step, place=place, words="compiling")
        self.bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Moves the bar."""
        step = row["step"]
        self._words = f"loss {row['loss']:.4f}  {speed_words(row)}{left_words(row)}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, place=f"step {step}/{self.steps}", words=self._words)

    def waiting(self, words: str) -> None:
        """Says it at the bar, which then is the steps' again."""
        if self.bar is not None:
            self.bar.update(self.task, words=words or self._words)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Prints an evaluation above the bar, which is the steps' again."""
        super().evaluation(row)
        self.waiting("")

    def progress(self, words: str, done: int, total: int) -> None:
        """Says at the bar how far something is."""
        if self.bar is not None:
            self.bar.update(self.task, words=f"{words} {done:,}/{total:,}")

    def note(self, text: str) -> None:
        """Prints a line above the bar; on a terminal that is gone nothing, which is no reason to end a run."""
        with contextlib.suppress(OSError):
            self.console.print(Text(text))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Takes the bar away and says how the run ended."""
        self.close()
        self.console.print(Text.assemble(("done ", "bold green"), summary_words(summary)))
        if rows := summary_rows(summary):
            self.console.print(_facts(rows))

    def close(self) -> None:
        """Takes the bar away and shows the cursor again."""
        (status, bar), self.status, self.bar = (self.status, self.bar), None, None
        with contextlib.suppress(OSError):
            if status is not None:
                status.stop()
            if bar is not None:
                bar.stop()


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, words in rows:
        table.add_row(name, Text(printable(words)))
    return table
