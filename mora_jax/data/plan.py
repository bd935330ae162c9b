"""Which examples make up which batch: a pure function of seed and step, so that resuming is exact."""

from __future__ import annotations

import math

import numpy as np


class BatchPlan:
    """Epochs of shuffled examples, cut into batches.

    Every epoch is a new order of all examples; its last batch may be short. Nothing is remembered between
    calls: `indices(step)` depends on the arguments below and on the step alone.

    Args:
      num_examples: how many there are, at least 1.
      batch_size: examples a batch, at least 1.
      seed: of the shuffling.
      steps: how many batches in all; wins over `epochs`.
      epochs: how many passes over the examples (may be a fraction); 1 if neither is given.
      shuffle: False keeps the order of the data.

    Attributes:
      steps: how many batches in all.
      steps_per_epoch: batches in a pass over the examples.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int = 0,
        steps: int | None = None,
        epochs: float | None = None,
        *,
        shuffle: bool = True,
    ):
        if num_examples < 1 or batch_size < 1:
            raise ValueError(f"num_examples={num_examples} and batch_size={batch_size} must be at least 1")
        if (steps is not None and steps < 0) or (epochs is not None and epochs < 0):
            raise ValueError(f"steps={steps} and epochs={epochs} must not be negative")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = math.ceil(num_examples / batch_size)
        passes = 1.0 if epochs is None else epochs
        self.steps = math.ceil(passes * self.steps_per_epoch - 1e-9) if steps is None else steps
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.steps

    def epoch(self, step: int) -> int:
        """The pass over the data that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """The examples of a batch.

        Args:
          step: from 0, below `steps`.

        Returns:
          `[B]` int64 with B at most `batch_size`.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside the plan's {self.steps} steps")
        start = step % self.steps_per_epoch * self.batch_size
        return self._epoch_order(self.epoch(step))[start : start + self.batch_size]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_examples)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
            self._order = (epoch, order)
        return self._order[1]
