"""Fine-tunes the embedded model: one method, one loss mode, from the same start."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.attach import attach, partition
from mora_jax.adapters.config import FullConfig, LoRAConfig, MoRAConfig
from mora_jax.data import BatchPlan, EncodedDataset
from mora_jax.demo import model_path
from mora_jax.demo.options import STEPS
from mora_jax.interop import load_pretrained
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.state import Arrays, Structure, flat_arrays, initial_state
from mora_jax.training.step import make_step

RANK = 8
BATCH_SIZE = 32
MODES = ("masked", "unmasked")


@dataclass(frozen=True)
class Method:
    """A way to fine-tune, with a learning rate that works for it.

    A few rates were tried for each on the held-out questions, so the figures are a little optimistic.
    """

    name: str
    config: Any
    learning_rate: float


# LoRA and MoRA of the same rank: MoRA's square matrix holds about as many numbers as LoRA's two.
METHODS = (
    Method("LoRA", LoRAConfig(rank=RANK, alpha=2.0 * RANK), 4e-3),
    Method("MoRA sharing", MoRAConfig(rank=RANK, kind="sharing"), 3e-3),
    Method("MoRA rotation", MoRAConfig(rank=RANK, kind="rotation"), 3e-3),
    Method("full", FullConfig(), 1e-3),
)


@dataclass
class Curve:
    """What was seen while a cell was trained, for the plot."""

    steps: list[int] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)


@dataclass
class Trained:
    """A fine-tuned model and how the training went.

    Attributes:
      model: the decoder, adapters attached.
      tokens_per_second: tokens that are not padding, over the steps after the first
        (the first of a method's cells compiles in it).
    """

    model: Any
    trainable: int
    tokens_per_second: float
    curve: Curve


class Trainer:
    """One method: attached once, its step compiled once, trained from the same start in each mode."""

    def __init__(self, method: Method, *, steps: int = STEPS, seed: int = 0) -> None:
        self.method, self.steps, self.seed = method, steps, seed
        model, self.tokenizer = load_pretrained(model_path(), dtype="float32")
        attach(model, method.config, rngs=nnx.Rngs(seed))
        graphdef, trainable, frozen = partition(model)
        self._structure = Structure(graphdef, trainable, frozen)
        self._start, self._frozen = flat_arrays(trainable), flat_arrays(frozen)
        settings = OptimizerConfig(learning_rate=method.learning_rate, schedule="linear", warmup_steps=min(10, steps))
        self._optimizer = make_optimizer(settings, steps)
        step = make_step(self._structure, self._optimizer, make_schedule(settings, steps))
        self._step = jax.jit(step, donate_argnums=0)

    @property
    def trainable(self) -> int:
        """The number of trained parameters."""
        return sum(array.size for array in self._start.values())

    def run(
        self,
        dataset: EncodedDataset,
        *,
        held_out_loss: Callable[[Any], float],
        watch_every: int = 30,
        report: Callable[[int], None] = lambda step: None,
    ) -> Trained:
        """Trains on `dataset` and watches the loss on the held-out answers.

        Args:
          dataset: encoded with the loss mode.
          held_out_loss: model -> mean negative log-likelihood of the held-out answers.
          watch_every: steps between two looks at it.
          report: called with the number of steps done.
        """
        plan = BatchPlan(len(dataset), BATCH_SIZE, seed=self.seed, steps=self.steps)
        length = padded_length(dataset)
        # The step takes its state's buffers for the next one; the start is needed again.
        state = initial_state(_copies(self._start), self._optimizer, self.seed)
        curve, tokens, seconds = Curve(), 0, 0.0
        for number in range(self.steps):
            if number % watch_every == 0:
                self._watch(curve, number, state.adapters, held_out_loss)
            batch = dataset.batch(plan.indices(number), BATCH_SIZE, length)
            begun = time.perf_counter()
            state, metrics = self._step(state, self._frozen, {k: v[None] for k, v in batch.items()})
            jax.block_until_ready(metrics)
            if number > 0:
                seconds += time.perf_counter() - begun
                tokens += int(np.count_nonzero(batch["segment_ids"]))
            report(number + 1)
        self._watch(curve, self.steps, state.adapters, held_out_loss)
        return Trained(
            self._model(state.adapters), self.trainable, tokens / seconds if seconds else float("nan"), curve
        )

    def _watch(self, curve: Curve, step: int, adapters: Arrays, loss: Callable[[Any], float]) -> None:
        curve.steps.append(step)
        curve.held_out_loss.append(loss(self._model(adapters)))

    def _model(self, adapters: Arrays) -> Any:
        return self._structure.model(_copies(adapters), _copies(self._frozen))


def _copies(arrays: Arrays) -> Arrays:
    return {name: jnp.array(array, copy=True) for name, array in arrays.items()}


def padded_length(dataset: EncodedDataset) -> int:
    """The longest example, rounded up to a multiple of 8."""
    return -(-int(dataset.lengths.max()) // 8) * 8
