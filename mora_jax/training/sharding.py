"""Where arrays live: the mesh, the table from logical axes to mesh axes, and the two ways to run a step on it."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax.errors import InputError
from mora_jax.training.config import MeshConfig
from mora_jax.training.state import Arrays, TrainState
from mora_jax.training.step import Batch, StepFunction, StepMetrics

# Logical axis of an array → mesh axis. Weights are on every device so far; rows of a batch are spread.
RULES: dict[str, str | None] = {
    "batch": "data",
    "layers": None,
    "embed": None,
    "vocab": None,
    "heads": None,
    "kv_heads": None,
    "q_per_kv": None,
    "head_dim": None,
    "mlp": None,
    "gate_up": None,
    "rank": None,
    "square_in": None,
    "square_out": None,
}


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of an array with these logical axes; None for an axis that is never spread."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def device_count(config: MeshConfig, batch_rows: int) -> int:
    """How many devices share a micro-batch.

    Args:
        config: the section `mesh`.
        batch_rows: rows of a micro-batch.

    Raises:
        InputError: more devices asked for than there are, or rows that they can't share evenly.
    """
    available = jax.device_count()
    count = available if config.data == -1 else config.data
    if count > available:
        raise InputError(f"mesh.data={count} asks for more devices than the {available} there are")
    if batch_rows % count:
        if config.data == -1:
            # Nobody asked for a number: the most devices that share the rows evenly.
            return max(n for n in range(1, available + 1) if batch_rows % n == 0)
        raise InputError(
            f"mesh.data={count} devices can't share {batch_rows} rows of a micro-batch evenly; "
            f"change train.batch_size, train.micro_batch_size or mesh.data"
        )
    return count


def make_mesh(count: int) -> Mesh:
    """A mesh of `count` devices along `data`; the axes for weights have length 1."""
    devices = np.array(jax.devices()[:count]).reshape(count, 1, 1)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


class Runner:
    """A step with the cache of its compiled forms, one for each set of shapes."""

    def __init__(self, step: Any):
        self._step = step
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Runs the step, compiling it first for a batch shape that is new. `state` is donated."""
        signature = tuple((name, value.shape) for name, value in batch.items())
        compiled = self._compiled.get(signature)
        if compiled is None:
            start = time.perf_counter()
            compiled = self._compiled[signature] = self._step.lower(state, frozen, batch).compile()
            self.compile_seconds += time.perf_counter() - start
        return compiled(state, frozen, batch)

    @property
    def compilations(self) -> int:
        """How often the step was traced and compiled: the size of its cache. A compiled step can't trace again."""
        return len(self._compiled)


class JitRunner(Runner):
    """The step under `jax.jit` over a mesh: rows spread along `data`, everything else on every device."""

    def __init__(self, step: StepFunction, mesh: Mesh):
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._rows = NamedSharding(mesh, spec(None, "batch"))
        jitted = jax.jit(
            step,
            donate_argnums=(0,),
            in_shardings=(self._whole, self._whole, self._rows),
            out_shardings=(self._whole, self._whole),
        )
        super().__init__(jitted)

    def place(self, tree: Any) -> Any:
        """State or frozen arrays, on every device."""
        return jax.device_put(tree, self._whole)

    def place_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """A batch `[micro-batches, rows, …]`, its rows spread over the devices."""
        return jax.device_put(batch, self._rows)

    def whole(self, tree: Any) -> Any:
        """The tree without what `place` added: nothing, arrays of `jit` are whole."""
        return tree


class PmapRunner(Runner):
    """The same pure step under `jax.pmap`: every array has a leading device axis.

    For code that is built around `pmap`. `jit` over a mesh does the same and more; choose it for anything new.
    """

    def __init__(self, step: StepFunction, count: int):
        self.count = count
        self._devices = jax.devices()[:count]
        mesh = Mesh(np.array(self._devices), ("data",), axis_types=(AxisType.Auto,))
        self._sharding = NamedSharding(mesh, PartitionSpec("data"))
        super().__init__(jax.pmap(step, axis_name="data", devices=self._devices, donate_argnums=(0,)))

    def place(self, tree: Any) -> Any:
        """State or frozen arrays, one copy a device along a new leading axis."""

        def copies(x):
            return jax.device_put(jnp.broadcast_to(x[None], (self.count, *x.shape)), self._sharding)

        return jax.tree.map(copies, tree)

    def place_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """A batch `[micro-batches, rows, …]` → `[devices, micro-batches, rows / devices, …]`."""

        def split(x):
            micro, rows, *rest = x.shape
            return x.reshape(micro, self.count, rows // self.count, *rest).swapaxes(0, 1)

        return jax.device_put({name: split(value) for name, value in batch.items()}, self._sharding)

    def __call__(self, state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, StepMetrics]:
        state, metrics = super().__call__(state, frozen, batch)
        return state, self.whole(metrics)

    def whole(self, tree: Any) -> Any:
        """The tree without the device axis: every device holds the same."""
        return jax.tree.map(lambda x: x[0], tree)
