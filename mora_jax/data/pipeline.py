"""Batches, made ahead of the training step by threads. Built on grain."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grain
import numpy as np

from mora_jax.batch import Batch
from mora_jax.data.batch_plan import BatchPlan
from mora_jax.data.dataset import EncodedDataset
from mora_jax.data.preferences import PreferenceDataset


@dataclass(frozen=True)
class BatchSource:
    """The batches of a plan, by step: a random-access source for grain.

    Attributes:
      dataset: the examples.
      plan: which of them make up which batch.
      micro_batch: rows computed at once, over all processes; divides the plan's batch.
      normalize: see `normalize`.
      extra: see `EncodedDataset.batch`.
      rows: this process's share: which rows of each micro-batch it makes, ascending; None for all.
    """

    dataset: EncodedDataset | PreferenceDataset
    plan: BatchPlan
    micro_batch: int
    normalize: str = "token"
    extra: Mapping[str, str] | None = None
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.plan.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch={self.micro_batch} must divide the batch of {self.plan.batch_size} rows")
        if self.rows is not None and not all(0 <= row < self.micro_batch for row in self.rows):
            raise ValueError(f"rows {self.rows} are not all in a micro-batch of {self.micro_batch}")

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> Batch:
        """The arrays of a step, `[micro-batches, rows of this process, ...]`."""
        length = self.plan.length(step, self.length)
        micros = self.plan.batch_size // self.micro_batch
        share = np.arange(self.micro_batch) if self.rows is None else np.array(self.rows)
        mine = np.arange(self.plan.batch_size).reshape(micros, self.micro_batch)[:, share]
        rows = self.plan.rows(step)
        empty = np.zeros(0, np.int64)
        chosen = [rows[i] if i < len(rows) else empty for i in mine.ravel().tolist()]
        batch: Any = self.dataset.batch(chosen, len(chosen), length, how=self.normalize, extra=self.extra)
        split = {name: value.reshape(micros, len(share), *value.shape[1:]) for name, value in batch.items()}
        return cast(Batch, split)

    @property
    def length(self) -> int:
        """Tokens a row: of a pack the limit, else what the longest example needs."""
        return self.dataset.max_length if self.plan.packing else self.dataset.batch_length


class BatchIterator(Iterator[Any]):
    """Batches in the order of the steps, a few made ahead.

    Args:
      source: the batches.
      start: the first step.
      place: what the threads do with each batch besides, such as sending it to the devices: then the loop doesn't
        have to, and a copy that takes long runs beside the step before.
      threads: how many make batches at the same time.
      ahead: how many batches may wait.
    """

    def __init__(
        self,
        source: BatchSource,
        start: int = 0,
        *,
        place: Callable[[Batch], Any] | None = None,
        threads: int = 2,
        ahead: int = 4,
    ):
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        batches = grain.MapDataset.source(source)
        if place is not None:
            batches = batches.map(place)
        self._inner = iter(batches.to_iter_dataset(options))
        self.set_state({"next_index": start})

    def __next__(self) -> Any:
        return next(self._inner)

    def get_state(self) -> dict[str, Any]:
        """The position: the number of the next step. Any number of processes can continue from it.

        Returns:
            What `set_state` takes.
        """
        return self._inner.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position.

        Args:
            state: what `get_state` returned.
        """
        self._inner.set_state(state)

    def close(self) -> None:
        """Ends the threads."""
        self._inner.close()
