"""What a training run says while it goes: plain lines here, panels and a live bar in live.py.

Everything goes to stderr; stdout belongs to results.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self, TextIO

from mora_jax.training.display.summary import summary_rows

# Seconds between lines that say how far something is.
LINE_SECONDS = 10.0
# An example's tokens: text, and the weight of predicting it.
Pieces = Sequence[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What is known before the first step.

    Attributes:
        model: path or hub id of the base model.
        dtype: compute dtype.
        attention: what computes attention.
        method: the method with its settings, such as "lora, rank 8, alpha 16".
        matched: number of adapted layers (0 where all parameters are trained).
        trainable: trained parameters.
        total: all parameters.
        loss_mode: which tokens carry loss.
        trained_fraction: share of the tokens that carry loss, in [0, 1].
        examples: training examples.
        padding: share of the rows' tokens that is padding, in [0, 1].
        steps: steps of the whole run.
        first_step: steps that are already done, more than 0 when a run is resumed.
        out: the run directory.
        first_example: the first example's tokens.
        notes: remarks such as rows that were dropped.
    """

    model: str
    dtype: str
    method: str
    matched: int
    trainable: int
    total: int
    loss_mode: str
    trained_fraction: float
    examples: int
    steps: int
    attention: str = ""
    padding: float = 0.0
    first_step: int = 0
    out: str = ""
    first_example: Pieces = ()
    notes: Sequence[str] = ()

    def rows(self) -> list[tuple[str, str]]:
        """Returns the facts as (name, words)."""
        layers = f" on {self.matched:,} layers" if self.matched else ""
        resumed = f", continuing after step {self.first_step:,}" if self.first_step else ""
        return [
            ("model", f"{self.model} ({self.dtype}{f', attention by {self.attention}' if self.attention else ''})"),
            ("method", f"{self.method}{layers}"),
            (
                "trained",
                f"{self.trainable:,} of {self.total:,} parameters ({self.trainable / self.total:.2%})",
            ),
            ("loss", f"{self.loss_mode}: {self.trained_fraction:.1%} of the tokens carry loss"),
            ("data", f"{self.examples:,} examples, {self.steps:,} steps, {self.padding:.1%} padding{resumed}"),
            ("out", self.out),
        ]


class Display:
    """Plain lines without control codes, one a logged step. A context manager; `close` can come any time."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Writes to `stream`, by default the stderr of the moment."""
        self.stream = sys.stderr if stream is None else stream
        self.steps = 0
        self._spoke = -math.inf

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

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
        for name, words in info.rows():
            self.note(f"{name:8}{printable(words)}")
        for words in info.notes:
            self.note(f"note: {printable(words)}")
        self.note("compiling the training step")

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a logged step: a row of metrics.jsonl, with `seconds_left` of the whole run."""
        words = f"{_step_words(row)}  lr {row['learning_rate']:.2e}{left_words(row)}"
        self.note(f"step {row['step']}/{self.steps}  {words}")

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
        for name, words in summary_rows(summary):
            self.note(f"{name}: {words}")

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
    parts = [words.format(summary[name]) for name, words in formats if summary.get(name) is not None]
    if summary.get("wall_seconds") is not None:
        compiling = summary.get("compile_seconds")
        share = f" ({duration(compiling)} compiling)" if compiling is not None else ""
        since = f" from step {summary['resumed_after']:,} on" if summary.get("resumed_after") else ""
        parts.append(f"took {duration(summary['wall_seconds'])}{since}{share}")
    return ", ".join(parts)


def _step_words(row: Mapping[str, Any]) -> str:
    return f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  {speed_words(row)}"


def speed_words(row: Mapping[str, Any]) -> str:
    """Returns a step's speed: tokens a second and, of devices whose peak is known, their utilisation."""
    words = f"{row['tokens_per_second']:,.0f} tokens/s"
    return words if row.get("mfu") is None else f"{words} (MFU {row['mfu']:.0%})"


def left_words(row: Mapping[str, Any]) -> str:
    """Returns the time that is left, where it is known."""
    return "" if row.get("seconds_left") is None else f"  {duration(row['seconds_left'])} left"


def _evaluation_words(row: Mapping[str, Any]) -> str:
    found = []
    if "eval_loss" in row:
        found.append(f"eval loss {row['eval_loss']:.4f}")
    if "eval_perplexity" in row:
        found.append(f"perplexity {row['eval_perplexity']:.3f}")
    known = ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_tokens", "eval_prompt_loss")
    for name, value in row.items():
        if name.startswith("eval_") and name not in known and not name.endswith("_stderr"):
            error = row.get(f"{name}_stderr")
            found.append(f"{name.removeprefix('eval_')} {value:.4g}" + ("" if error is None else f" ± {error:.2g}"))
    return "  ".join(found)
