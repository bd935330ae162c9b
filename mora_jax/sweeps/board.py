"""What a sweep says while it goes: one line a step, or on a terminal a table of its runs that is redrawn in place."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mora_jax.display.progress import in_notebook, is_live
from mora_jax.training.display import Display, RunInfo, left_words, printable


@dataclass
class RunState:
    """What is known of a run.

    Attributes:
        steps: of the whole run.
        step: done so far.
        loss, eval_loss: the last ones.
        words: waiting, training, done, or why it ended.
        tokens_per_second: its own.
        seconds_left: of its group, where known.
    """

    steps: int = 0
    step: int = 0
    loss: float = math.nan
    eval_loss: float | None = None
    words: str = "waiting"
    tokens_per_second: float = 0.0
    seconds_left: float | None = None


class Board(Display):
    """Plain lines about all runs; `of` gives the display of one of them."""

    def __init__(self, stream: Any = None) -> None:
        """Writes to `stream`, by default the stderr of the moment."""
        super().__init__(stream)
        self.runs: dict[str, RunState] = {}
        #: What is shown of a whole that the sweep is a part of.
        self.whole: Callable[[], str] = str
        #: The runs that train now.
        self.together: Sequence[str] = ()
        self._said: dict[str, list[str]] = {}
        self._shown: list[int] = []

    def begin(self, names: Sequence[str]) -> None:
        """The sweep's runs, in order."""
        self.runs = {name: RunState() for name in names}
        self.together, self._shown = (), []

    def group(self, names: Sequence[str]) -> None:
        """The runs that train now."""
        self.round()
        self.together = names
        for name in names:
            self.runs[name].words = "training"
        self.note(f"{len(names)} runs train together" if len(names) > 1 else f"run {names[0]} trains by itself")

    def of(self, name: str) -> Display:
        """The display of a run."""
        return _RunDisplay(self, name)

    def ended(self, name: str, outcome: str) -> None:
        """A run is done, or failed."""
        self.runs[name].words = outcome

    def said(self, name: str, text: str) -> None:
        """A line about a run; what all say is shown once, at the end of the round."""
        self._said.setdefault(text, []).append(name)

    def round(self) -> None:
        """All runs that train together have made a step."""
        said, self._said = self._said, {}
        for text, names in said.items():
            self.note(text if set(names) >= set(self.together) else f"{', '.join(dict.fromkeys(names))}: {text}")
        steps = [self.runs[name].step for name in self.together]
        if steps != self._shown:
            self._shown = steps
            self.show()

    def show(self) -> None:
        """Shows where the runs are."""
        states = {name: self.runs[name] for name in self.together if self.runs[name].words in ("training", "done")}
        losses = {name: state.loss for name, state in states.items() if math.isfinite(state.loss)}
        if not losses:
            return
        lowest = min(losses, key=lambda name: losses[name])
        first = states[lowest]
        speed = sum(state.tokens_per_second for state in states.values())
        left = left_words({"seconds_left": first.seconds_left})
        several = f" ({lowest}) to {max(losses.values()):.4f}" if len(states) > 1 else ""
        line = f"step {first.step}/{first.steps}  loss {first.loss:.4f}{several}  {speed:,.0f} tokens/s{left}"
        self.note(line + self.whole())


class _RunDisplay(Display):
    """What a run says, on a board."""

    def __init__(self, board: Board, name: str) -> None:
        super().__init__(board.stream)
        self._board, self._name = board, name

    @property
    def _state(self) -> RunState:
        return self._board.runs[self._name]

    def loading(self, words: str) -> None:
        """Shows nothing."""

    def progress(self, words: str, done: int, total: int) -> None:
        """Shows nothing."""

    def start(self, info: RunInfo) -> None:
        """What the run is about to train; said once for runs that train together."""
        self._state.steps, self._state.step = info.steps, info.first_step
        for head, fact in info.facts.items():
            if head != "out" and self._name == self._board.together[0]:
                self._board.note(f"{head:8}{printable(fact)}")
        for note in info.notes:
            self.note(f"note: {note}")

    def step(self, row: Mapping[str, Any]) -> None:
        state = self._state
        state.step, state.loss = row["step"], row["loss"]
        state.tokens_per_second, state.seconds_left = row["tokens_per_second"], row.get("seconds_left")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._state.eval_loss = row.get("eval_loss")

    def note(self, text: str) -> None:
        self._board.said(self._name, text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._board.ended(self._name, "done")


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
