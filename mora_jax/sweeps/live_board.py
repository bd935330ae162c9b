"""A sweep on a terminal: a table of its runs that is redrawn in place."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mora_jax.display.progress import in_notebook, is_live
from mora_jax.sweeps.board import Board
from mora_jax.training.display.plain import left_words, printable


class LiveBoard(Board):
    """Shows a sweep on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        """Draws on `console`, by default the terminal behind stderr."""
        super().__init__()
        self.console = console or Console(stderr=not in_notebook(), highlight=False)
        self._live: Live | None = None

    def group(self, names: Any) -> None:
        super().group(names)
        if self._live is None:
            self._live = Live(self._table(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def show(self) -> None:
        if self._live is not None:
            self._live.update(self._table())

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.console.print(Text(printable(text)))

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()

    def _table(self) -> Table:
        table = Table(title=self._title(), title_justify="left")
        for head in ("run", "step", "loss", "eval loss", ""):
            table.add_column(head, justify="left" if head in ("run", "") else "right", overflow="fold")
        # A terminal shows no more lines than it has: first those that train.
        order = sorted(self.runs.items(), key=lambda item: item[1].words != "training")
        for name, state in order:
            loss = f"{state.loss:.4f}" if math.isfinite(state.loss) else "-"
            scored = "-" if state.eval_loss is None else f"{state.eval_loss:.4f}"
            place = f"{state.step}/{state.steps}" if state.steps else "-"
            table.add_row(name, place, loss, scored, Text(state.words))
        return table

    def _title(self) -> str:
        states = [state for state in self.runs.values() if state.words == "training"]
        done = sum(state.words == "done" for state in self.runs.values())
        speed = sum(state.tokens_per_second for state in states)
        left = left_words({"seconds_left": max((s.seconds_left or 0.0 for s in states), default=None)})
        return (
            f"{done} of {len(self.runs)} runs done, {len(states)} training, {speed:,.0f} tokens/s{left}{self.whole()}"
        )


def make_board() -> Board:
    """The board that suits stderr: live on a terminal and in a notebook, plain lines elsewhere."""
    return LiveBoard() if in_notebook() or is_live() else Board()
