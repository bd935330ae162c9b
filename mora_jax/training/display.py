"""What a run shows: plain lines, or on a terminal a panel, its first example with the trained tokens marked, and a bar.

Everything goes to stderr; stdout belongs to results.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TextIO

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from mora_jax.display.progress import LINE_SECONDS, in_notebook, is_live

# An example's tokens: text, and the weight of predicting it.
Pieces = Sequence[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What is known before the first step.

    Attributes:
        facts: model, method and the like, by name, in words.
        steps: steps of the whole run.
        first_step: steps that are already done, more than 0 when a run is resumed.
        first_example: the first example's tokens.
        notes: remarks such as rows that were dropped.
    """

    facts: Mapping[str, str]
    steps: int
    first_step: int = 0
    first_example: Pieces = ()
    notes: Sequence[str] = ()


class Display(contextlib.AbstractContextManager["Display"]):
    """Plain lines without control codes, one a logged step. A context manager; `close` can come any time."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Writes to `stream`, by default the stderr of the moment."""
        self.stream = sys.stderr if stream is None else stream
        self.steps = 0
        self._spoke = -math.inf

    def __exit__(self, *exception: object) -> None:
        """Leaves the terminal as it was."""
        self.close()

    def loading(self, words: str) -> None:
        """Says what happens before the start or between steps; between steps where that can be taken away again."""
        if not self.steps:
            self.note(printable(words))

    def waiting(self, words: str) -> None:
        """Says what the steps wait for; "" when they go on."""
        if words:
            self.note(words)

    def progress(self, words: str, done: int, total: int) -> None:
        """Says how far something between steps is, now and then where that can't be taken away again."""
        now = time.monotonic()
        if done < total and now - self._spoke >= LINE_SECONDS:
            self._spoke = now
            self.note(f"{words} {done:,}/{total:,}")

    def start(self, info: RunInfo) -> None:
        """Shows what is about to be trained."""
        self.steps = info.steps
        for name, fact in info.facts.items():
            self.note(f"{name:8}{printable(fact)}")
        for note in info.notes:
            self.note(f"note: {printable(note)}")
        self.note("compiling the training step")

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a logged step: a row of metrics.jsonl, with `seconds_left` of the whole run."""
        text = f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  {speed_words(row)}"
        text += f"  lr {row['learning_rate']:.2e}" if "learning_rate" in row else ""
        self.note(f"step {row['step']}/{self.steps}  {text}{left_words(row)}")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Shows an evaluation: a row of metrics.jsonl."""
        self.note(f"step {row['step']}/{self.steps}  {_evaluation_words(row)}")

    def note(self, text: str) -> None:
        """Shows one line; where the terminal is gone or the disk full, nothing, which is no reason to end a run."""
        try:
            self.stream.write(f"{text}\n")
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Shows how the run ended: the content of summary.json."""
        self.close()
        self.note(f"done: {summary_words(summary)}")
        for name, fact in summary_facts(summary).items():
            self.note(f"{name}: {fact}")

    def close(self) -> None:
        """Ends whatever is live."""


class Silent(Display):
    """The display of processes other than the first."""

    def note(self, text: str) -> None:
        """Shows nothing."""


def printable(text: str) -> str:
    """Returns `text` with control characters, which a terminal would obey, in a visible form."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def duration(seconds: float) -> str:
    """Returns seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def summary_words(summary: Mapping[str, Any]) -> str:
    """Returns one line about a finished run, of whatever the summary holds."""
    formats = (
        ("final_loss", "loss {:.4f}"),
        ("eval_perplexity", "eval perplexity {:.3f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    )
    parts = [template.format(summary[name]) for name, template in formats if summary.get(name) is not None]
    if summary.get("wall_seconds") is not None:
        compiling = summary.get("compile_seconds")
        share = f" ({duration(compiling)} compiling)" if compiling is not None else ""
        since = f" from step {summary['resumed_after']:,} on" if summary.get("resumed_after") else ""
        parts.append(f"took {duration(summary['wall_seconds'])}{since}{share}")
    return ", ".join(parts)


def speed_words(row: Mapping[str, Any]) -> str:
    """Returns a step's speed: tokens a second and, of devices whose peak is known, their utilisation."""
    speed = f"{row['tokens_per_second']:,.0f} tokens/s"
    return speed if row.get("mfu") is None else f"{speed} (MFU {row['mfu']:.0%})"


def left_words(row: Mapping[str, Any]) -> str:
    """Returns the time that is left, where it is known."""
    return "" if row.get("seconds_left") is None else f"  {duration(row['seconds_left'])} left"


def _evaluation_words(row: Mapping[str, Any]) -> str:
    texts = []
    if "eval_loss" in row:
        texts.append(f"eval loss {row['eval_loss']:.4f}")
    if "eval_perplexity" in row:
        texts.append(f"perplexity {row['eval_perplexity']:.3f}")
    known = ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_tokens", "eval_prompt_loss")
    for name, value in row.items():
        if name.startswith("eval_") and name not in known and not name.endswith("_stderr"):
            error = row.get(f"{name}_stderr")
            texts.append(f"{name.removeprefix('eval_')} {value:.4g}" + ("" if error is None else f" ± {error:.2g}"))
    return "  ".join(texts)


def summary_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """Where time and memory went, and what opens what was written, by name: whatever a summary holds of it."""
    facts: dict[str, str] = {}
    if "step_seconds" in summary:
        steps, compiling = summary["step_seconds"], summary["compile_seconds"]
        others = summary["other_compile_seconds"]
        rest = max(summary["wall_seconds"] - steps - compiling - others, 0.0)
        facts["time"] = (
            f"steps {steps:,.1f} s, compiling {compiling + others:,.1f} s (the step {compiling:,.1f} s), "
            f"evaluating, saving and other {rest:,.1f} s"
        )
    if total := summary.get("step_seconds"):
        waits = {"device": "waiting for the device", "data_wait": "waiting for data", "host": "the loop itself"}
        facts["steps"] = ", ".join(f"{summary[f'{part}_seconds'] / total:.1%} {of}" for part, of in waits.items())
    if summary.get("flops_per_token") and summary["tokens_per_second"]:
        flops = summary["flops_per_token"] * summary["tokens_per_second"]
        facts["compute"] = f"{flops / 1e12:,.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.3g} GFLOP/s"
        if summary.get("mfu") is None:
            facts["compute"] += "; no MFU, as this device's peak isn't known"
        else:
            facts["compute"] += f", MFU {summary['mfu']:.1%} ({summary['mfu_convention']})"
    if "peak_memory_of" in summary:
        facts["memory"] = f"at most {bytes_words(summary['peak_memory_bytes'])} in this {summary['peak_memory_of']}"
        if planned := summary.get("step_memory_bytes"):
            facts["memory"] += f"; the compiled step takes {bytes_words(planned['total'])} a device"
    if summary.get("result"):
        facts["result"] = summary["result"]
    return facts | summary.get("open", {})


def bytes_words(number: float) -> str:
    """`3.2 GB`, `12 MB`: in powers of 1000, as makers of memory count."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def make_display() -> Display:
    """Returns the display that suits stderr: live on a terminal and in a notebook, plain elsewhere."""
    if in_notebook() and find_spec("ipywidgets"):
        return LiveDisplay(Console(highlight=False))
    return LiveDisplay() if is_live() else Display()


class LiveDisplay(Display):
    """Shows a run on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        """Draws on `console`, by default the terminal behind stderr."""
        super().__init__()
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.bar: Progress | None = None
        self._live = contextlib.ExitStack()  # what is drawn at the moment
        self._words = ""  # of the last step

    def loading(self, words: str) -> None:
        """Shows a line with a spinner until the start; after it, words at the bar until the next step."""
        if self.bar is not None:
            self.waiting(words)
            return
        self.close()
        self._live.enter_context(self.console.status(Text(printable(words))))

    def start(self, info: RunInfo) -> None:
        """Draws the panel and starts the bar."""
        self.close()
        self.steps = info.steps
        self.console.print(Panel(_facts(info.facts), title="mora-jax train", title_align="left", border_style="cyan"))
        if info.first_example:
            self.console.print(example_panel(info.first_example, self.console))
        for note in info.notes:
            self.console.print(Text(f"note: {printable(note)}", style="yellow"))
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
        self._live.enter_context(self.bar)

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
        self.waiting(f"{words} {done:,}/{total:,}")

    def note(self, text: str) -> None:
        """Prints a line above the bar; on a terminal that is gone nothing, which is no reason to end a run."""
        with contextlib.suppress(OSError):
            self.console.print(Text(text))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Takes the bar away and says how the run ended."""
        self.close()
        self.console.print(Text.assemble(("done ", "bold green"), summary_words(summary)))
        if facts := summary_facts(summary):
            self.console.print(_facts(facts))

    def close(self) -> None:
        """Takes the bar away and shows the cursor again."""
        self.bar = None
        with contextlib.suppress(OSError):
            self._live.close()


def _facts(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, Text(printable(fact)))
    return table


# Tokens as `mora_jax.data.describe_example` gives them: text, weight and name of the segment.
Described = Sequence[tuple[str, float, str]]

TRAINED = "bold green underline"  # readable without colour too
PARTLY = "yellow underline"
SHOWN_LINES = 16


def token_text(pieces: Pieces) -> Text:
    """Returns tokens as one text in which those that carry loss are marked.

    Args:
        pieces: a weight between 0 and 1 gets its own colour.
    """
    text = Text()
    for piece, weight in pieces:
        style = TRAINED if weight >= 1 else PARTLY if weight > 0 else "dim"
        text.append(printable(piece), style=style)
    return text


def legend(weights: Iterable[float]) -> Text:
    """Returns the key to `token_text` of tokens with these weights; with the colour of a part where one has it."""
    middle = (("carries a part", PARTLY), "  ") if any(0 < weight < 1 for weight in weights) else ()
    return Text.assemble(("carries loss", TRAINED), "  ", *middle, ("carries none", "dim"))


def window(lines: Sequence[Text], size: int = SHOWN_LINES) -> list[Text]:
    """Returns at most `size` of an example's lines, so that the first trained one is among them."""
    marked = (TRAINED, PARTLY)
    trained = [place for place, line in enumerate(lines) if any(span.style in marked for span in line.spans)]
    start = max(0, min(trained[0] - size // 2, len(lines) - size)) if trained else 0
    shown = list(lines[start : start + size])
    if start:
        shown.insert(0, Text(f"... {start} lines before", style="italic"))
    after = len(lines) - start - size
    if after > 0:
        shown.append(Text(f"... {after} lines after", style="italic"))
    return shown


def example_panel(pieces: Pieces, console: Console) -> Panel:
    """Returns a panel with the first example's text, its trained tokens marked.

    Args:
        pieces: the example's tokens.
        console: where it will be printed.
    """
    text = token_text(pieces)
    text.rstrip()
    return Panel(
        Group(*window(list(text.wrap(console, console.width - 4)))),
        title="first example",
        title_align="left",
        subtitle=legend(weight for _, weight in pieces),
        subtitle_align="left",
        border_style="cyan",
    )


def example_lines(described: Described) -> Iterator[str]:
    """Yields an example as plain lines: weight, segment and text of each run of tokens that share both."""
    for (weight, segment), run in itertools.groupby(described, key=lambda piece: piece[1:]):
        yield f"{weight:5.3g}  {segment:12} {''.join(text for text, _, _ in run)!r}"


def example_table(described: Described) -> Table:
    """Returns an example as a table: weight, segment and text of each run of tokens that share both.

    The text is marked by weight; the numbers say the same without colour or underline.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", min_width=5)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for (weight, segment), run in itertools.groupby(described, key=lambda piece: piece[1:]):
        # A line's end is part of its token, and would not be seen at the end of a run.
        text = token_text([(piece.replace("\n", "↵\n"), piece_weight) for piece, piece_weight, _ in run])
        text.rstrip()
        table.add_row(f"{weight:.3g}", segment, text)
    return table


def print_examples(examples: Iterable[tuple[str, Described]], console: Console) -> None:
    """Prints examples: as tables with marked tokens on a terminal, as plain lines elsewhere.

    Args:
        examples: where each comes from, and its tokens.
        console: where to print.
    """
    for number, (source, described) in enumerate(examples, 1):
        trained = sum(weight > 0 for _, weight, _ in described)
        title = f"example {number}: {source or 'a row'}, {len(described)} tokens, {trained} trained"
        if console.is_terminal:
            console.print(Text(f"\n{title}", style="bold"), example_table(described), sep="\n")
            console.print(legend(weight for _, weight, _ in described))
        else:
            print(f"\n{title}", *example_lines(described), sep="\n", file=console.file)
