"""Which runs share a compiled step, and that step: what differs between them is stacked, the frozen base is there once.

`jax.vmap` over the runs leaves the base without their axis, so each product with a frozen matrix is one product of the
tokens of all runs. Learning rate, weight decay and the norm to clip to are data, as are a run's rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from mora_jax.sweeps.grid import SweepRun
from mora_jax.training.build_step import Assembly
from mora_jax.training.config.schema import Config, MeshConfig, OptimizerConfig
from mora_jax.training.hooks import Runner
from mora_jax.training.observe.compile_log import Compilation
from mora_jax.training.optimizer import make_schedule, scheduled
from mora_jax.training.sharding.runner import JitRunner, RowShare
from mora_jax.training.state import Arrays, TrainState
from mora_jax.training.step import StepFunction, StepMetrics, make_step

# What goes into the step as data, by section.
_OPTIMIZER = ("learning_rate", "schedule", "min_ratio", "warmup_steps", "weight_decay")
_LOSS = ("mode", "prompt_weight", "roles", "end_of_turn", "headers")


def stackable(config: Config) -> bool:
    """Whether a run can share a step with others: its base stays frozen, and its state on one device."""
    changes = config.adapter.config_class.changes_base
    alone = config.optimizer.offload or config.model.remat == "offload" or config.mesh != MeshConfig(data=1)
    return not changes and not alone


def base_of(run: SweepRun) -> object:
    """What is the same for runs on one base: one that changes its base has it to itself."""
    return run.config.model if stackable(run.config) else run.name


def shape_of(config: Config, *, masked: bool) -> Config:
    """What runs of one group have in common: the configuration without what is data in the step.

    Args:
        config: of a run.
        masked: whether anything draws masks of dropout.
    """
    usual = OptimizerConfig()
    optimizer = {name: getattr(usual, name) for name in _OPTIMIZER}
    if config.optimizer.clip_norm is not None:
        optimizer["clip_norm"] = 1.0
    changes: dict[str, object] = {"out": None, "optimizer": dataclasses.replace(config.optimizer, **optimizer)}
    if not masked:
        # Masks of dropout go by a token's place in the step: with it a batch has to be of the run's own length.
        loss = {name: getattr(type(config.loss)(), name) for name in _LOSS}
        if config.loss.normalize != "constant":
            loss["normalize"] = None
        changes["loss"] = dataclasses.replace(config.loss, **loss)
        changes["data"] = dataclasses.replace(config.data, train=None, eval=None)
    if not masked or not (config.data.bucketing or config.data.eval_fraction):
        changes["seed"] = 0
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def groups_of(runs: Sequence[SweepRun], at_once: int | None = None, *, masked: bool = False) -> list[list[SweepRun]]:
    """The runs in groups that train together, in the order of their first ones; those of one base follow each other.

    Args:
        runs: of the sweep.
        at_once: the most runs of a group; None for no limit.
        masked: whether the model itself draws masks of dropout.
    """
    by_base: dict[object, dict[object, list[SweepRun]]] = {}
    for run in runs:
        shape = shape_of(run.config, masked=masked or run.config.adapter.dropout > 0)
        by_base.setdefault(base_of(run), {}).setdefault(shape, []).append(run)
    groups = [group for groups in by_base.values() for group in groups.values()]
    size = at_once or len(runs)
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def stacked_step(assembly: Assembly, optimizer: OptimizerConfig, per_run: frozenset[str]) -> StepFunction:
    """The step of several runs: as `make_step`, with every array of state, batch and metrics `[runs, …]`.

    Args:
        assembly: of one of the runs.
        optimizer: its section; rate, decay and norm come with each batch instead (`hyperparameters`).
        per_run: the frozen arrays that each run has for itself, `[runs, …]` too.
    """

    settings = dataclasses.replace(assembly.settings, mapped=True)

    def one(state: TrainState, frozen: Arrays, batch: Any) -> tuple[TrainState, StepMetrics]:
        given = {name: batch[name] for name in hyperparameters(optimizer, 0)}
        rows: Any = {name: value for name, value in batch.items() if name not in given}
        rate = given.pop("learning_rate")
        update = scheduled(dataclasses.replace(optimizer, **given), lambda step: rate, assembly.rates)
        if assembly.budget is not None:
            update = assembly.budget.around(update)
        return make_step(assembly.structure, update, lambda step: rate, settings)(state, frozen, rows)

    def step(state: TrainState, frozen: Arrays, batch: Any) -> tuple[TrainState, StepMetrics]:
        return jax.vmap(one, in_axes=(0, {name: 0 if name in per_run else None for name in frozen}, 0))(
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
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._members: list[Member] = []
        self._slice: Callable[[Any, Any], Any] = jax.jit(lambda tree, index: jax.tree.map(lambda x: x[index], tree))
        self._done = np.zeros(0, int)
        self._batches: list[Any] = []
        self._runner: JitRunner | None = None  # from the first step on
        self._state: TrainState | None = None
        self._frozen: Arrays = {}

    def join(self, assembly: Assembly, optimizer: OptimizerConfig, steps: int) -> Member:
        """Takes a run in.

        Args:
            assembly: its step; of the same structure as the others'.
            optimizer: its section of the configuration.
            steps: of the run.
        """
        rates = np.asarray(jax.jit(jax.vmap(make_schedule(optimizer, steps)))(jnp.arange(steps)))
        self._members.append(Member(self, len(self._members), assembly, optimizer, rates))
        return self._members[-1]

    def step(
        self,
        states: Sequence[Any],
        batches: Mapping[int, Any],
        compiling: Callable[[int], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> dict[int, tuple[Any, Any]]:
        """One step of the runs that have a batch. The others keep their place, and nobody reads what it then holds.

        Args:
            states: of all runs: as they were when they joined, or as the step before gave them.
            batches: of the runs that go on, by number.
            compiling: entered around a compilation.

        Returns:
            For these the state after it, and what their `read` takes.
        """
        if self._state is None:
            self._start(states)
            some = next(iter(batches.values()))  # for runs that have come to their end already
            self._batches = [batches.get(index, some) for index in range(len(self._members))]
        for index, batch in batches.items():
            self._batches[index] = batch
        assert self._runner is not None and self._state is not None, "they are there from the first step on"
        placed = jax.device_put(self._joined(), self.device)
        self._state, metrics = self._runner(self._state, self._frozen, placed, compiling)
        self._done += 1
        # Fetched from the device when the first of the runs reads them: at one time for all, however late they are.
        fetched = functools.cache(lambda: (jax.device_get(metrics), time.perf_counter()))
        return {index: (self._members[index], fetched) for index in batches}

    def _start(self, states: Sequence[Any]) -> None:
        """Stacks the states, and what else the runs don't share."""
        first, *others = (member.assembly for member in self._members)
        per_run: dict[str, Array] = {}
        shared: dict[str, Array] = {}
        for name, array in first.frozen.items():
            theirs = [assembly.frozen[name] for assembly in others]
            if all(other is array or bool(jnp.array_equal(other, array)) for other in theirs):
                shared[name] = array
            else:
                per_run[name] = jnp.stack([array, *theirs])
        self._runner = JitRunner(stacked_step(first, self._members[0].optimizer, frozenset(per_run)), self._mesh)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        self._done = np.array(jax.device_get(stacked.step))
        self._state, self._frozen = self._runner.place(stacked), self._runner.place(shared | per_run)

    def _joined(self) -> dict[str, np.ndarray]:
        """The batches with what else each run brings along, padded to one shape."""
        columns: dict[str, list[Any]] = {}
        for batch, member, done in zip(self._batches, self._members, self._done, strict=True):
            rate = member.rates[min(done, len(member.rates) - 1)]
            for name, value in (batch | hyperparameters(member.optimizer, rate)).items():
                columns.setdefault(name, []).append(value)
        return {name: np.stack(_padded(values)) for name, values in columns.items()}

    @property
    def device(self) -> jax.Device:
        """The one that all is on."""
        return self._mesh.devices.flat[0]

    @property
    def compilation_log(self) -> list[Compilation]:
        """Every compilation of the runs' step, oldest first."""
        return [] if self._runner is None else self._runner.compilation_log

    def state_of(self, index: int) -> TrainState:
        """A run's part of the stacked state, as a run alone would have it."""
        return self._slice(self._state, index)


def _padded(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Arrays of one shape, with zeros behind what is shorter: of rows, and of the examples that share one."""
    shape = tuple(map(max, zip(*(array.shape for array in arrays), strict=True)))
    widths = ([(0, most - size) for most, size in zip(shape, array.shape, strict=True)] for array in arrays)
    return [
        array if array.shape == shape else np.pad(array, width) for array, width in zip(arrays, widths, strict=True)
    ]


class Member(Runner):
    """A run in a stack. Its state after a step is the member itself, for it lies in the stack."""

    def __init__(
        self, stack: Stack, index: int, assembly: Assembly, optimizer: OptimizerConfig, rates: np.ndarray
    ) -> None:
        self._stack, self._index = stack, index
        self.assembly, self.optimizer, self.rates = assembly, optimizer, rates
        self.devices = [stack.device]

    @property
    def compilation_log(self) -> list[Compilation]:
        return self._stack.compilation_log

    def place(self, tree: Any) -> Any:
        """The tree: the stack places it."""
        return tree

    def unreplicate(self, tree: Any) -> Any:
        """The tree; in place of the member its state."""
        return self._stack.state_of(self._index) if tree is self else tree

    def read(self, fetched: Callable[[], tuple[StepMetrics, float]]) -> tuple[StepMetrics, float]:
        metrics, there = fetched()
        return jax.tree.map(lambda values: values[self._index], metrics), there

    def share(self, rows: int) -> RowShare:
        """All rows, left where they are."""
        return RowShare(None, lambda batch: batch)
