"""The two ways to run a step on several devices: `jax.jit` over a mesh, and `jax.pmap`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax.batch import Batch
from mora_jax.training.observe.compile_log import AHEAD, Compilation, differences, shape_words
from mora_jax.training.sharding.mesh import put, put_rows, rows_here, with_all_axes
from mora_jax.training.sharding.rules import RULES
from mora_jax.training.state import Arrays, TrainState, moments_on_host
from mora_jax.training.step import StepFunction, StepMetrics

Array = jax.Array


class RowShare(NamedTuple):
    """A process's share of every batch.

    Attributes:
        rows: which rows of each micro-batch it makes, ascending; None for all.
        place: puts a batch `[micro-batches, those rows, …]` on the devices.
    """

    rows: tuple[int, ...] | None
    place: Callable[[Any], Batch]


class Runner:
    """A step with the cache of its compiled forms, one for each set of shapes.

    Attributes:
        devices: those that it runs on, of all processes.
        compilation_log: every compilation of a step that ran, in the order of their first steps.
    """

    devices: list[jax.Device]

    def __init__(self) -> None:
        self._compiled: dict[Any, Any] = {}
        self._ahead: dict[Any, Future[Compilation]] = {}
        self._compilers = max((os.cpu_count() or 1) // 2, 1)  # a compiler has work for about two cores
        self._threads = ThreadPoolExecutor(self._compilers, AHEAD)
        self.compilation_log: list[Compilation] = []

    def lower(self, state: TrainState, frozen: Arrays, batch: Batch) -> Any:
        """The step, traced for these arguments (arrays, or shapes with shardings) and not compiled yet."""
        raise NotImplementedError  # abstract: each way to run a step defines it

    def share(self, rows: int) -> RowShare:
        """What this process has to make of micro-batches of so many rows, and what places it."""
        raise NotImplementedError  # abstract: each way to run a step defines it

    def place_batch(self, batch: Any) -> Batch:
        """A whole batch `[micro-batches, rows, …]`, which every process has, on the devices."""
        share = self.share(batch["input_ids"].shape[1])
        if share.rows is not None:
            batch = {name: value[:, list(share.rows)] for name, value in batch.items()}
        return share.place(batch)

    def __call__(
        self,
        state: TrainState,
        frozen: Arrays,
        batch: Batch,
        compiling: Callable[[int], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> tuple[TrainState, StepMetrics]:
        """Runs the step; `state` is donated.

        For a batch shape that is new it is compiled first, or waited for, within what `compiling` gives for the tokens
        of a row.
        """
        signature = _signature(batch)
        compiled = self._compiled.get(signature)
        if compiled is None:
            ahead = self._ahead.get(signature)
            ready = ahead is not None and ahead.done()
            with contextlib.nullcontext() if ready else compiling(batch["input_ids"].shape[-1]):
                start, log = time.perf_counter(), self.compilation_log
                one = self._compile(*self._traced(state, frozen, batch)) if ahead is None else ahead.result()
                changed = differences(log[-1].shapes, one.shapes) if log else []
                log.append(dataclasses.replace(one, changed=changed, waited=time.perf_counter() - start))
                compiled = self._compiled[signature] = one.compiled
        # Devices of a CPU share one pool of threads, in which each of them waits for the others at a collective. With
        # several such programs under way the threads may all be taken by some of the devices: then nobody gets on.
        alone = len(self.devices) > 1 and self.devices[0].platform == "cpu"
        if alone:
            jax.block_until_ready((state, frozen, batch))
        result = compiled(state, frozen, batch)
        return jax.block_until_ready(result) if alone else result

    def read(self, metrics: StepMetrics) -> tuple[StepMetrics, float]:
        """Waits for a step's metrics: numbers on the host, and when they were there, by `time.perf_counter`."""
        return jax.device_get(metrics), time.perf_counter()

    def compile_ahead(self, state: TrainState, frozen: Arrays, batches: Iterator[Batch]) -> None:
        """Begins with the next compilation, in a thread beside the steps, where not as many as pay are under way.

        Tracing is done before this returns: what a program computes may depend on settings of jax that each thread has
        for itself.

        Args:
            state, frozen: as for a step; only their shapes and places matter.
            batches: one of each shape that will come; those up to the next new one are taken from it.
        """
        if self._under_way < self._compilers:
            known = self._compiled.keys() | self._ahead.keys()
            batch = next((batch for batch in batches if _signature(batch) not in known), None)
            if batch is not None:
                traced = self._traced(state, frozen, batch)
                self._ahead[_signature(batch)] = self._threads.submit(self._compile, *traced)

    def close(self, waiting: Callable[[str], Any]) -> None:
        """Waits for what is being compiled: a compiler can't be interrupted.

        Args:
            waiting: gets words for the user then.
        """
        if self._under_way:
            waiting("waiting for the compiler")
        self._threads.shutdown()

    @property
    def _under_way(self) -> int:
        return sum(not one.done() for one in self._ahead.values())

    def _traced(self, state: TrainState, frozen: Arrays, batch: Batch) -> tuple[Any, float, dict[str, str]]:
        """The step, lowered for these arguments, the seconds that it took, and the batch's shapes."""
        start = time.perf_counter()
        lowered = self.lower(state, frozen, batch)
        return lowered, time.perf_counter() - start, {name: shape_words(value) for name, value in batch.items()}

    def _compile(self, lowered: Any, seconds: float, shapes: dict[str, str]) -> Compilation:
        started, start = time.time(), time.perf_counter()
        compiled = lowered.compile()
        return Compilation(started - seconds, seconds, time.perf_counter() - start, shapes, compiled)

    @property
    def compiled(self) -> list[Any]:
        """The compiled forms, oldest first; each tells its memory, its cost and its text."""
        return list(self._compiled.values())

    @property
    def compilations(self) -> int:
        """How often the step was traced and compiled: the size of its cache. A compiled step can't trace again."""
        return len(self._compiled)


def _signature(batch: Any) -> Any:
    """What a step is compiled for."""
    return tuple((name, value.shape) for name, value in batch.items())


class JitRunner(Runner):
    """The step under `jax.jit` over a mesh.

    Args:
        step: the pure step, made for `placement` where `shardings` are given.
        mesh: the mesh; rows of a batch are sharded along `data`, `fsdp` and `expert`.
        shardings: of trained and frozen arrays by dotted path (`Placement.table`); what it doesn't name, and with
            None everything, is on every device.
    """

    def __init__(self, step: StepFunction, mesh: Mesh, shardings: dict[str, NamedSharding] | None = None):
        super().__init__()
        self._step = step
        self._shardings = shardings or {}
        mesh = with_all_axes(mesh)
        self.devices = list(mesh.devices.flat)
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._rows = NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))

    def lower(self, state: TrainState, frozen: Arrays, batch: Batch) -> Any:
        return self.trace(state, frozen, batch).lower()

    def trace(self, state: TrainState, frozen: Arrays, batch: Batch) -> Any:
        """The step, traced and not lowered yet: it tells its operations."""
        places = jax.tree.map(lambda array: array.sharding, state)
        jitted = jax.jit(self._step, donate_argnums=(0,), out_shardings=(places, self._whole))
        return jitted.trace(state, frozen, batch)

    def places(self, tree: Any) -> Any:
        """The sharding of every leaf of a state or of a dictionary of arrays (or shapes); see `places`."""
        return moments_on_host(places(tree, self._shardings, self._whole))

    def place(self, tree: Any) -> Any:
        """State or frozen arrays, sharded as the table says."""
        return put(tree, self.places(tree))

    def share(self, rows: int) -> RowShare:
        """What this process has to make of micro-batches of so many rows, and what places it."""
        mine = rows_here(self._rows, rows)
        return RowShare(mine, lambda batch: put_rows(batch, self._rows, mine, rows))

    def unreplicate(self, tree: Any) -> Any:
        """The tree without what `place` added: nothing, arrays of `jit` have their own shapes."""
        return tree


def places(tree: Any, shardings: dict[str, NamedSharding], default: NamedSharding) -> Any:
    """The sharding of every leaf of a state or of a dictionary of arrays (or shapes).

    A leaf of an optimizer's state is sharded like the parameter of the same name if it has its shape.

    Args:
        tree: the state or the arrays.
        shardings: of trained and frozen arrays by dotted path (`Placement.table`).
        default: what the others get.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        sharding = shardings.get(names[-1]) if names else None
        return default if sharding is None or not _fits(sharding, leaf.shape) else sharding

    return jax.tree_util.tree_map_with_path(place, tree)


def _fits(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be sharded so; factored moments, say, have another."""
    if len(sharding.spec) > len(shape):
        return False
    for size, entry in zip(shape, sharding.spec, strict=False):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        if size % int(np.prod([sharding.mesh.shape[axis] for axis in axes], dtype=int)):
            return False
    return True


class PmapRunner(Runner):
    """The same pure step under `jax.pmap`: every array has a leading device axis.

    For code that is built around `pmap`. `jit` over a mesh does the same and more; choose it for anything new.
    """

    def __init__(self, step: StepFunction, count: int):
        super().__init__()
        self.count = count
        self.devices = jax.devices()[:count]
        mesh = Mesh(np.array(self.devices), ("data",), axis_types=(AxisType.Auto,))
        self._sharding = NamedSharding(mesh, PartitionSpec("data"))
        # Every device has the same metrics: one copy comes out.
        self._step = jax.pmap(step, axis_name="data", devices=self.devices, donate_argnums=(0,), out_axes=(0, None))

    def lower(self, state: TrainState, frozen: Arrays, batch: Batch) -> Any:
        return self._step.lower(state, frozen, batch)

    def place(self, tree: Any) -> Any:
        """State or frozen arrays, one copy a device along a new leading axis."""

        def copies(x):
            return jax.device_put(jnp.broadcast_to(x[None], (self.count, *x.shape)), self._sharding)

        return jax.tree.map(copies, tree)

    def share(self, rows: int) -> RowShare:
        """All rows, as there is one process; placed as `[devices, micro-batches, rows / devices, …]`."""

        def split(x: np.ndarray) -> np.ndarray:
            return x.reshape(len(x), self.count, rows // self.count, *x.shape[2:]).swapaxes(0, 1)

        def place(batch: Any) -> Any:
            return jax.device_put({name: split(value) for name, value in batch.items()}, self._sharding)

        return RowShare(None, place)

    def unreplicate(self, tree: Any) -> Any:
        """The tree without the device axis, on the first device: every device holds the same."""
        # Not `x[0]`, which would be a program of all devices for each array.
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)
