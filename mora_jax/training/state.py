"""What a training step carries, as plain pytrees: flat dictionaries from a dotted path to an array.

Flax state objects are flattened in Python on every call of a compiled function; a dictionary of arrays isn't, and it
is what checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from mora_jax.adapters.base import FullParam
from mora_jax.backend import backend, false_after

Arrays = dict[str, Array]


class Skips(NamedTuple):
    """How many updates were left out, part of the state that checkpoints hold.

    Attributes:
        total: int32, since the run's first step.
        in_row: int32, of the last steps without a break.
    """

    total: Array
    in_row: Array

    @classmethod
    def none(cls) -> Skips:
        """Before the first step; two arrays, since a state is donated and no buffer can be given away twice."""
        return cls(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def after(self, taken: Array) -> Skips:
        """After a step whose update was taken or left out."""
        left_out = jnp.logical_not(taken).astype(jnp.int32)
        return Skips(self.total + left_out, (self.in_row + 1) * left_out)


class TrainState(NamedTuple):
    """Everything that changes in training.

    Attributes:
        step: int32, optimiser steps done.
        adapters: the trainable float32 arrays by path.
        optimizer: optax's state for them.
        key: typed PRNG key; each step folds its number in, so a resumed run draws what an unbroken one would have.
        skips: updates left out because they were not finite.
    """

    step: Array
    adapters: Arrays
    optimizer: Any
    key: Array
    skips: Skips


class Structure:
    """The structure of a split model: turns flat dictionaries of arrays back into a model, under a trace as well."""

    def __init__(self, graphdef: nnx.GraphDef, *states: nnx.State):
        self._graphdef = graphdef
        self._templates = [dict(nnx.to_flat_state(state)) for state in states]

    @property
    def trains_base(self) -> bool:
        """Whether base weights are trained themselves, so that no frozen base is left."""
        return any(isinstance(variable, FullParam) for template in self._templates for variable in template.values())

    def model(self, *arrays: Arrays) -> Any:
        """A model with the given arrays, in the order in which the states were given."""
        states = [
            # Copied, for flax 0.12.0 lets nothing change under a trace what is of another one.
            nnx.from_flat_state({path: one.copy().replace(values[dotted(path)]) for path, one in template.items()})
            for template, values in zip(self._templates, arrays, strict=True)
        ]
        return nnx.merge(self._graphdef, *states)


def dotted(path: tuple[Any, ...]) -> str:
    """`("layers", "mlp", 0)` → `"layers.mlp.0"`."""
    return ".".join(str(part) for part in path)


def flat_arrays(state: nnx.State) -> Arrays:
    """A flat dictionary of the arrays of a state, by dotted path."""
    return {dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def initial_state(adapters: Arrays, optimizer: Any, seed: int) -> TrainState:
    """The state before the first step, in which no array is there twice: steps donate all of it."""
    seen = {id(array) for array in adapters.values()}

    def once(array: Any) -> Any:
        if id(array) in seen:  # of an optimizer that keeps the parameters, such as optax.contrib.prodigy
            return jnp.copy(array)
        seen.add(id(array))
        return array

    step, optimizer_state = jnp.zeros((), jnp.int32), jax.tree.map(once, optimizer.init(adapters))
    return TrainState(step, adapters, optimizer_state, jax.random.key(seed), Skips.none())


def ordered_after(taken: Array, adapters: Arrays) -> Array:
    """`taken`, on a CPU as a value that is there after the new `adapters`.

    These are computed from the optimizer's old state, which the new one is written over. Without an order between the
    two XLA on CPUs copies Adam's moments in every step.
    """
    if backend() != "cpu":
        return taken
    return reduce(lambda taken, array: taken & ~false_after(array), adapters.values(), taken)


def if_taken(taken: Array, new: Any, old: Any) -> Any:
    """`new` where the update is taken, else `old`: trained arrays, or an optax state.

    One infinite or undefined number in a gradient would make every trained weight and every moment of the optimizer
    undefined for good, so the step chooses by one number that all devices share. The choice is elementwise and needs
    the old values and the new ones at once: XLA on CPU takes up to one more copy of what is trained for it. A step that
    is left out still counts as a step: its batch is used up and the learning rate goes on, so a schedule's state is
    always the new one. Weights, moments and the optimizer's own count of updates (Adam's correction of its bias) stay
    as they were. Moments in the host's memory have been chosen already, by `streamed`.
    """

    def is_new(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState | OnHost)

    return jax.tree.map(lambda new, old: new if is_new(new) else jnp.where(taken, new, old), new, old, is_leaf=is_new)


class OnHost(optax.ScaleByAdamState):
    """Adam's state with its moments in the host's memory: fields `count`, `mu` and `nu`, the latter by name."""

    __slots__ = ()


def streamed(adam: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Adam with moments on the host.

    Arrays of stacked layers `[L, ...]` are updated in a loop over the layers, the others whole, one after the other. So
    a device never holds the moments of more than one layer or one such array.

    Args:
        adam: `optax.scale_by_adam`, for a flat dictionary of arrays by dotted path.

    Returns:
        A transformation whose `update` takes `taken`, a bool: without it nothing changes. The moments have to be
        chosen where they are on the device, and the host computes nothing.
    """

    def init(params: Any) -> OnHost:
        return OnHost(*adam.init(params))

    def update(
        updates: dict[str, Array], state: OnHost, params: Any = None, *, taken: Array, **others: Any
    ) -> tuple[dict[str, Array], OnHost]:
        results, moments = {}, OnHost(jnp.where(taken, optax.safe_increment(state.count), state.count), {}, {})
        for name, gradient in updates.items():
            each = partial(_updated, adam, state.count, taken)
            leaves = gradient, state.mu[name], state.nu[name]
            updated = jax.lax.map(each, leaves) if name.startswith("layers.") else each(leaves)
            results[name], moments.mu[name], moments.nu[name] = updated
        return results, moments

    return optax.GradientTransformationExtraArgs(init, update)


def _updated(
    adam: optax.GradientTransformation, count: Array, taken: Array, leaves: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """The update of one array, and its moments, which come from the host and go back there."""
    gradient, *moments = leaves
    mu, nu = jax.device_put(moments, jax.memory.Space.Device)
    out, new = adam.update(gradient, optax.ScaleByAdamState(count, mu, nu))
    moments = [jnp.where(taken, new.mu, mu), jnp.where(taken, new.nu, nu)]
    return out, *jax.device_put(moments, jax.memory.Space.Host)


def moments_on_device(state: Any) -> Any:
    """A state, under a trace, whose moments have left the host's memory."""
    return _with_moments(state, lambda moments: jax.device_put(moments, jax.memory.Space.Device))


def moments_on_host(shardings: Any) -> Any:
    """Shardings of a state, those of moments that `streamed` updates in the host's memory."""
    return _with_moments(shardings, partial(jax.tree.map, lambda sharding: sharding.with_memory_kind("pinned_host")))


def _with_moments(tree: Any, put: Callable[[Any], Any]) -> Any:
    """A state, or its shardings, with the moments of `streamed` put to another place."""

    def replaced(node: Any) -> Any:
        return OnHost(node.count, *put((node.mu, node.nu))) if isinstance(node, OnHost) else node

    return jax.tree.map(replaced, tree, is_leaf=lambda node: isinstance(node, OnHost))
