"""Runs of one shape as one compiled step: what differs between them is stacked, the frozen base is there once.

`jax.vmap` over the runs leaves the base without their axis, so each product with a frozen matrix is one product of the
tokens of all runs. Learning rate, weight decay and the norm to clip to are data, as are a run's rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mora_jax.training.build_step import Assembly
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.observe.compile_log import Compilation
from mora_jax.training.optimizer import make_schedule, scheduled
from mora_jax.training.sharding.runner import JitRunner, RowShare
from mora_jax.training.state import Arrays, TrainState
from mora_jax.training.step import StepFunction, StepMetrics, make_step

Array = jax.Array
Reading = Callable[[], tuple[StepMetrics, float]]


def stacked_step(made: Assembly, optimizer: OptimizerConfig, own: frozenset[str]) -> StepFunction:
    """The step of several runs: as `make_step`, with every array of state, batch and metrics `[runs, …]`.

    Args:
        made: one of the runs.
        optimizer: its section; rate, decay and norm come with each batch instead (`hyperparameters`).
        own: the frozen arrays that each run has for itself, `[runs, …]` too.
    """

    settings = dataclasses.replace(made.settings, mapped=True)

    def one(state: TrainState, frozen: Arrays, batch: Any) -> tuple[TrainState, StepMetrics]:
        given = {name: batch[name] for name in hyperparameters(optimizer, 0)}
        rows: Any = {name: value for name, value in batch.items() if name not in given}
        rate = given.pop("learning_rate")
        update = scheduled(dataclasses.replace(optimizer, **given), lambda step: rate, made.rates)
        if made.budget is not None:
            update = made.budget.around(update)
        return make_step(made.structure, update, lambda step: rate, settings)(state, frozen, rows)

    def step(state: TrainState, frozen: Arrays, batch: Any) -> tuple[TrainState, StepMetrics]:
        return jax.vmap(one, in_axes=(0, {name: 0 if name in own else None for name in frozen}, 0))(
            state, frozen, batch
        )

    return step


def hyperparameters(optimizer: OptimizerConfig, rate: float) -> dict[str, np.float32]:
    """What of the optimizer goes with each batch of a run: numbers by the names of their keys."""
    values = {"learning_rate": rate, "weight_decay": optimizer.weight_decay, "clip_norm": optimizer.clip_norm}
    return {name: np.float32(value) for name, value in values.items() if value is not None}


class Stack:
    """Runs that step together. They join one after the other, then every `step` takes a batch of each.

    Args:
        mesh: of one device.

    Attributes:
        runner: compiles and runs the step; None before the first.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._made: list[Assembly] = []
        self._optimizers: list[OptimizerConfig] = []
        self._rates: list[np.ndarray] = []
        self._members: list[Member] = []
        self._slice: Callable[[Any, Any], Any] = jax.jit(lambda tree, index: jax.tree.map(lambda x: x[index], tree))
        self._done = np.zeros(0, int)
        self._batches: list[Any] = []
        self.runner: JitRunner | None = None
        self._state: TrainState | None = None
        self._frozen: Arrays = {}

    def join(self, made: Assembly, optimizer: OptimizerConfig, steps: int) -> Member:
        """Takes a run in.

        Args:
            made: its step; of the same structure as the others'.
            optimizer: its section of the configuration.
            steps: of the run.
        """
        schedule = make_schedule(optimizer, steps)
        self._made.append(made)
        self._optimizers.append(optimizer)
        self._rates.append(np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps))))
        self._members.append(Member(self, len(self._members), list(self._mesh.devices.flat)))
        return self._members[-1]

    def step(self, states: Mapping[int, Any], batches: Mapping[int, Any]) -> dict[int, tuple[Slot, Reading]]:
        """One step of the runs that have a batch. The others keep their place, and what becomes of them is no matter.

        Args:
            states: of the runs, by number: as they were when they joined, or as the step before gave them.
            batches: of the runs that go on, by number.

        Returns:
            For these the state after it, and what waits for its metrics (`Member.read`).
        """
        if self._state is None:
            self._start(states)
            some = next(iter(batches.values()))  # for runs that have come to their end already
            self._batches = [batches.get(index, some) for index in range(len(self._made))]
        for index, batch in batches.items():
            self._batches[index] = batch
        assert self.runner is not None and self._state is not None, "they are there from the first step on"
        placed = jax.device_put(self._joined(), self._mesh.devices.flat[0])
        self._state, metrics = self.runner(self._state, self._frozen, placed)
        self._done += 1
        shared = _Metrics(metrics)
        return {index: (Slot(self, index), functools.partial(shared.read, index)) for index in batches}

    def _start(self, states: Mapping[int, Any]) -> None:
        """Stacks the states, and what else the runs don't share."""
        first = self._made[0]
        own: dict[str, Array] = {}
        shared: dict[str, Array] = {}
        for name, array in first.frozen.items():
            others = [made.frozen[name] for made in self._made[1:]]
            if all(other is array or bool(jnp.array_equal(other, array)) for other in others):
                shared[name] = array
            else:
                own[name] = jnp.stack([array, *others])
        step = stacked_step(first, self._optimizers[0], frozenset(own))
        self.runner = JitRunner(step, self._mesh)
        self.runner.while_compiling = self._compiling
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(states[index] for index in range(len(self._made))))
        self._done = np.array(jax.device_get(stacked.step))
        self._state, self._frozen = self.runner.place(stacked), self.runner.place(shared | own)

    def _joined(self) -> dict[str, np.ndarray]:
        """The batches with what else each run brings along, padded to one length."""
        longest = max(batch["input_ids"].shape[-1] for batch in self._batches)
        columns: dict[str, list[Any]] = {}
        for batch, optimizer, rates, done in zip(self._batches, self._optimizers, self._rates, self._done, strict=True):
            length = batch["input_ids"].shape[-1]
            for name, value in batch.items():
                if value.ndim == 3 and length < longest:
                    value = np.pad(value, ((0, 0), (0, 0), (0, longest - length)))
                columns.setdefault(name, []).append(value)
            for name, value in hyperparameters(optimizer, rates[min(done, len(rates) - 1)]).items():
                columns.setdefault(name, []).append(value)
        return {name: np.stack(values) for name, values in columns.items()}

    @contextlib.contextmanager
    def _compiling(self, length: int) -> Iterator[None]:
        with contextlib.ExitStack() as watched:
            for member in self._members:
                watched.enter_context(member.while_compiling(length))
            yield

    def state_of(self, index: int) -> TrainState:
        """A run's part of the stacked state, as a run alone would have it."""
        return self._slice(self._state, index)


class Member:
    """In the place of a run's `Runner` while it is in a stack; see there."""

    def __init__(self, stack: Stack, index: int, devices: list[jax.Device]):
        self._stack, self.index, self.devices = stack, index, devices
        self.while_compiling: Callable[[int], contextlib.AbstractContextManager[None]] = lambda length: (
            contextlib.nullcontext()
        )

    @property
    def compilation_log(self) -> list[Compilation]:
        """Every compilation of the stack's step, oldest first."""
        return [] if self._stack.runner is None else self._stack.runner.compilation_log

    @property
    def compile_seconds(self) -> float:
        """What all of them took."""
        return 0.0 if self._stack.runner is None else self._stack.runner.compile_seconds

    @property
    def compilations(self) -> int:
        """How many there were."""
        return 0 if self._stack.runner is None else self._stack.runner.compilations

    def place(self, tree: Any) -> Any:
        """The tree: the stack places it."""
        return tree

    def whole(self, tree: Any) -> Any:
        """The tree without what the stack added: its own state in place of a slot."""
        return self._stack.state_of(tree.index) if isinstance(tree, Slot) else tree

    def read(self, reading: Reading) -> tuple[StepMetrics, float]:
        """Waits for a step's metrics, as `Runner.read` does."""
        return reading()

    def share(self, rows: int) -> RowShare:
        """All rows, left where they are."""
        return RowShare(None, lambda batch: batch)


@dataclasses.dataclass(frozen=True)
class Slot:
    """The state of one run, which lies in the stack."""

    stack: Stack
    index: int


class _Metrics:
    """The metrics of a step of all runs, fetched from the device when the first of them is read."""

    def __init__(self, metrics: StepMetrics):
        self._metrics, self._there = metrics, 0.0

    def read(self, index: int) -> tuple[StepMetrics, float]:
        """Those of one run, and when they were there: the same for all, however late they are read."""
        if not self._there:
            self._metrics, self._there = jax.device_get(self._metrics), time.perf_counter()
        return StepMetrics(*(field[index] for field in self._metrics)), self._there
