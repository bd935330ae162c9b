"""Which examples make up which batch: a pure function of seed and step, so that resuming is exact."""

import math
import threading
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

# Examples among which the best fit is sought: many, for full rows, yet few enough that rows stay a random mix.
WINDOW = 8192


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs items by best-fit decreasing: the longest first, each into the fullest pack that has room.

    Args:
      lengths: `[N]`, each at most `capacity`.
      capacity: tokens of a pack.

    Returns:
      Packs of item numbers; every item is in one.
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number = len(packs)
            packs.append([item])
            room = capacity - length
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(place)
            packs[number].append(item)
            room -= length
        if room > 0:
            if not by_room.get(room):
                insort(rooms, room)
                by_room[room] = []
            by_room[room].append(number)
    return packs


def pack(lengths: np.ndarray, order: np.ndarray, capacity: int, window: int = WINDOW) -> list[np.ndarray]:
    """Packs examples in a given order, by best fit among those that are near each other in it.

    Args:
      lengths: `[N]`, tokens of every example.
      order: examples to pack.
      capacity: tokens of a pack.
      window: how many examples are packed together.

    Returns:
      Packs of example numbers.
    """
    packs = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        packs += [part[items] for items in best_fit(lengths[part], capacity)]
    return packs


# Batches among whose examples those of like length are brought together.
_BUCKET_WINDOW = 64
#: Lengths that rows are padded to are multiples of this.
LENGTH_STEP = 64


def padded_length(longest: int, limit: int) -> int:
    """A multiple of `LENGTH_STEP` that holds `longest` tokens, at most `limit`."""
    return min(-(-longest // LENGTH_STEP) * LENGTH_STEP, limit)


def _bucket(longest: int, fixed: int) -> int:
    """The smallest of few lengths, up to `fixed`, that holds so many tokens: the step is compiled once for each."""
    length = LENGTH_STEP
    while length < longest:
        length *= 2
    return min(length, fixed)


class BatchPlan:
    """Epochs of shuffled examples, cut into batches.

    Every epoch is a new order of all examples; its last batch may be short. A row of a batch is one example, or a
    pack of several. Nothing is remembered between calls: `rows(step)` depends on the arguments below and on the step
    alone.

    Args:
      examples: how many there are, at least 1, or the length of each.
      batch_size: rows a batch, at least 1.
      seed: of the shuffling.
      steps: how many batches in all; wins over `epochs`.
      epochs: how many passes over the examples (may be a fraction); 1 if neither is given.
      shuffle: False keeps the order of the data.
      max_length: no example is longer; needed for packs and buckets.
      packing: whether rows are packed, by `pack`.
      bucketing: whether the examples of a batch are of like length.

    Attributes:
      steps: how many batches in all.
      steps_per_epoch: batches in the first pass over the examples; packs of other passes can be a few more or less.
    """

    def __init__(
        self,
        examples: int | Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int = 0,
        steps: int | None = None,
        epochs: float | None = None,
        *,
        shuffle: bool = True,
        max_length: int | None = None,
        packing: bool = False,
        bucketing: bool = False,
    ):
        self.num_examples = examples if isinstance(examples, int) else len(examples)
        if self.num_examples < 1 or batch_size < 1:
            raise ValueError(f"num_examples={self.num_examples} and batch_size={batch_size} must be at least 1")
        if (steps is not None and steps < 0) or (epochs is not None and epochs < 0):
            raise ValueError(f"steps={steps} and epochs={epochs} must not be negative")
        if packing and bucketing:
            raise ValueError("packs are of one length already: choose packing or bucketing")
        self._lengths = np.zeros(examples, np.int32) if isinstance(examples, int) else np.asarray(examples)
        if packing or bucketing:
            if isinstance(examples, int) or max_length is None:
                raise ValueError("packing and bucketing need the examples' lengths and max_length")
            if self._lengths.max() > max_length:
                raise ValueError(f"an example has {self._lengths.max()} tokens, more than max_length={max_length}")
        self._max_length = max_length or 0
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.packing, self.bucketing = packing, bucketing
        # Threads that make batches ahead share what is found out about epochs.
        self._lock = threading.RLock()
        # Where each epoch begins, as far as is known.
        self._starts = [0]
        self._rows: dict[int, list[np.ndarray] | np.ndarray] = {}
        self.steps_per_epoch = self._start_of(1)
        self.steps = self._count(1.0 if epochs is None else epochs) if steps is None else steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, step: int) -> int:
        """The pass over the data that a step belongs to.

        Args:
          step: from 0.

        Returns:
          The pass, from 0.
        """
        if not self.packing:
            return step // self.steps_per_epoch
        epoch = 0
        while self._start_of(epoch + 1) <= step:
            epoch += 1
        return epoch

    def rows(self, step: int) -> list[np.ndarray]:
        """The rows of a batch.

        Args:
          step: from 0, below `steps`.

        Returns:
          At most `batch_size` rows, each the numbers of its examples.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside the plan's {self.steps} steps")
        epoch = self.epoch(step)
        start = (step - self._start_of(epoch)) * self.batch_size
        return [np.atleast_1d(row) for row in self._epoch_rows(epoch)[start : start + self.batch_size]]

    def indices(self, step: int) -> np.ndarray:
        """All examples of a batch.

        Args:
          step: from 0.

        Returns:
          Their numbers, int64 `[E]`.
        """
        return np.concatenate(self.rows(step))

    def length(self, step: int, fixed: int) -> int:
        """The tokens that the rows of a batch are padded to.

        Args:
          step: from 0.
          fixed: the length where no buckets are asked for, and the longest with buckets.

        Returns:
          `fixed`, or with buckets the smallest of few lengths that holds the longest example.
        """
        if not self.bucketing:
            return fixed
        return _bucket(int(self._lengths[self.indices(step)].max()), fixed)

    def lengths(self, fixed: int) -> dict[int, int]:
        """The lengths that `length` gives in the first pass over the examples.

        Args:
          fixed: see `length`.

        Returns:
          The first step of each, in the order of these steps.
        """
        if not self.bucketing:
            return {fixed: 0}
        in_order = self._lengths[np.asarray(self._epoch_rows(0))]
        longest = np.maximum.reduceat(in_order, range(0, len(in_order), self.batch_size))[: self.steps]
        steps = dict[int, int]()
        for step, tokens in enumerate(longest.tolist()):
            steps.setdefault(_bucket(tokens, fixed), step)
        return steps

    def padding(self, fixed: int, steps: int = 256) -> float:
        """The share of padding in the first steps' tokens.

        Args:
          fixed: see `length`.
          steps: how many steps are looked at.
        """
        looked_at = range(min(steps, self.steps))
        used = sum(int(self._lengths[self.indices(step)].sum()) for step in looked_at)
        room = sum(len(self.rows(step)) * self.length(step, fixed) for step in looked_at)
        return 1.0 - used / room if room else 0.0

    def __str__(self) -> str:
        kind = "packs of" if self.packing else "rows of like length, of" if self.bucketing else "rows of"
        return f"{self.steps} steps of {self.batch_size} {kind} {self.num_examples} examples"

    def _count(self, epochs: float) -> int:
        passes = math.floor(epochs)
        part = (epochs - passes) * (self._start_of(passes + 1) - self._start_of(passes)) if epochs > passes else 0.0
        return self._start_of(passes) + math.ceil(part - 1e-9)

    def _start_of(self, epoch: int) -> int:
        """The first step of an epoch."""
        if not self.packing:
            return epoch * math.ceil(self.num_examples / self.batch_size)
        with self._lock:
            while len(self._starts) <= epoch:
                rows = len(self._epoch_rows(len(self._starts) - 1))
                self._starts.append(self._starts[-1] + math.ceil(rows / self.batch_size))
            return self._starts[epoch]

    def _epoch_rows(self, epoch: int) -> list[np.ndarray] | np.ndarray:
        with self._lock:
            if epoch not in self._rows:
                # Two epochs are kept, because threads that make batches ahead are on both sides of a boundary.
                latest = dict(list(self._rows.items())[-1:])
                self._rows = {**latest, epoch: self._make_rows(epoch)}
            return self._rows[epoch]

    def _make_rows(self, epoch: int) -> list[np.ndarray] | np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self.num_examples) if self.shuffle else np.arange(self.num_examples)
        if self.packing:
            packs = pack(self._lengths, order, self._max_length)
            # A window's packs come out by length: mix them, or batches would be of long or of short examples.
            return [packs[i] for i in random.permutation(len(packs))] if self.shuffle else packs
        return self._by_length(order, random) if self.bucketing else order

    def _by_length(self, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Sorts within windows of many batches, then mixes the batches; a short batch stays the last."""
        window = _BUCKET_WINDOW * self.batch_size
        parts = [order[start : start + window] for start in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in parts])
        full = len(order) // self.batch_size
        batches = order[: full * self.batch_size].reshape(full, self.batch_size)
        if self.shuffle:
            batches = batches[random.permutation(full)]
        return np.concatenate([batches.reshape(-1), order[full * self.batch_size :]])
