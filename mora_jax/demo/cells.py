"""The cells of the demo's table: one method and one loss mode each, trained from the same start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mora_jax.adapters.config import FullConfig, LoRAConfig, MoRAConfig
from mora_jax.demo import model_path
from mora_jax.training.display import RunInfo, Silent
from mora_jax.training.finetune import FinetuneResult, finetune

RANK = 8
BATCH_SIZE = 32
#: Tokens; no question with its answer has more.
MAX_LENGTH = 32
WATCH_EVERY = 30
MODES = ("masked", "unmasked")


@dataclass(frozen=True)
class Method:
    """A way to fine-tune, and the rate, of four a factor of 2 apart, with the least validation loss of both modes."""

    name: str
    config: Any
    learning_rate: float


# LoRA and MoRA of the same rank: MoRA's square matrix holds about as many numbers as LoRA's two.
METHODS = (
    Method("LoRA", LoRAConfig(rank=RANK, alpha=2.0 * RANK), 8e-3),
    Method("MoRA sharing", MoRAConfig(rank=RANK, kind="sharing"), 6e-3),
    Method("MoRA rotation", MoRAConfig(rank=RANK, kind="rotation"), 6e-3),
    Method("full", FullConfig(), 2e-3),
)


#: Told the steps of a cell that are done, and what is going on.
Watch = Callable[[int, str], None]


class _Watched(Silent):
    """A display that shows nothing itself, but tells how far the run is."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch, self._step = watch, 0

    def loading(self, words: str) -> None:
        """Before the first step, or between two."""
        self._watch(self._step, words)

    def start(self, info: RunInfo) -> None:
        """The first step is compiled next."""
        self._watch(0, "compiling")

    def step(self, row: Mapping[str, Any]) -> None:
        """A step was logged."""
        self._step = row["step"]
        self._watch(self._step, "training")

    def progress(self, words: str, done: int, total: int) -> None:
        """How far something between steps is."""
        self._watch(self._step, words)


def train_cell(
    method: Method,
    mode: str,
    rows: Sequence[dict[str, Any]],
    held_out: Sequence[dict[str, Any]],
    *,
    steps: int,
    seed: int,
    watch: Watch = lambda step, words: None,
) -> FinetuneResult:
    """Fine-tunes the embedded model.

    Args:
      method: what is trained.
      mode: the loss mode.
      rows: chat messages to train on.
      held_out: chat messages for validation, whose answers are scored every `WATCH_EVERY` steps and at the end.
      steps: optimiser steps.
      seed: of initial adapters and of the order of the data.
      watch: told the steps done, and what is going on.

    Raises:
      KeyboardInterrupt: the training was stopped.
    """
    result = finetune(
        model_path(),
        rows,
        method.config,
        loss=mode,
        eval_rows=held_out,
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=method.learning_rate,
        config={
            "seed": seed,
            "model.dtype": "float32",
            "data.max_length": MAX_LENGTH,
            "optimizer.warmup_steps": min(10, steps),
            "train.eval_every": WATCH_EVERY,
            "train.eval_on_start": False,  # the base is scored once for all cells
            "mesh.data": 1,
        },
        display=_Watched(watch),
    )
    if result.interrupted:
        raise KeyboardInterrupt
    return result


@dataclass(frozen=True)
class Curve:
    """The validation loss, on the held-out answers, while a cell was trained, in nats a token."""

    steps: list[int]
    held_out_loss: list[float]

    @classmethod
    def of(cls, metrics: Sequence[dict[str, Any]], perplexity_before: float) -> Curve:
        """The evaluations of a run whose base model, like a fresh adapter on it, has that perplexity."""
        seen = [(row["step"], row["eval_loss"]) for row in metrics if "eval_loss" in row]
        steps, losses = zip((0, math.log(perplexity_before)), *seen, strict=True)
        return cls(list(steps), list(losses))
