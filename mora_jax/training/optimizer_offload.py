"""Adam whose moments lie in the host's memory: they visit the device a layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

Array = jax.Array


class OnHost(optax.ScaleByAdamState):
    """Adam's state with its moments in the host's memory: fields `count`, `mu` and `nu`, the latter by name."""

    __slots__ = ()
    chosen_by_update = True  # see `state.chosen`


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
        found: dict[str, Array] = {}
        mu, nu = {}, {}
        for name, gradient in updates.items():
            each = _updating(adam, state.count, name, taken)
            leaves = gradient, state.mu[name], state.nu[name]
            stacked = name.startswith("layers.")
            found[name], mu[name], nu[name] = _by_layer(each, leaves) if stacked else each(*leaves)
        return found, OnHost(jnp.where(taken, optax.safe_increment(state.count), state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _updating(
    adam: optax.GradientTransformation, count: Array, name: str, taken: Array
) -> Callable[[Array, Array, Array], tuple[Array, Array, Array]]:
    def each(gradient: Array, mu: Array, nu: Array) -> tuple[Array, Array, Array]:
        """The update of one array, and its moments, which come from the host and go back there."""
        mu, nu = jax.device_put((mu, nu), jax.memory.Space.Device)
        out, new = adam.update({name: gradient}, optax.ScaleByAdamState(count, {name: mu}, {name: nu}))
        kept = jnp.where(taken, new.mu[name], mu), jnp.where(taken, new.nu[name], nu)
        return out[name], *jax.device_put(kept, jax.memory.Space.Host)

    return each


def _by_layer(each: Any, leaves: tuple[Array, ...]) -> Any:
    return lax.scan(lambda carry, layer: (carry, each(*layer)), None, leaves)[1]


def moments_on_device(state: Any) -> Any:
    """A state, under a trace, whose moments have left the host's memory."""

    def fetched(node: Any) -> Any:
        if not isinstance(node, OnHost):
            return node
        return OnHost(node.count, *jax.device_put((node.mu, node.nu), jax.memory.Space.Device))

    return jax.tree.map(fetched, state, is_leaf=lambda node: isinstance(node, OnHost))


def moments_on_host(shardings: Any) -> Any:
    """Shardings of a state, those of moments that `streamed` updates in the host's memory."""

    def place(node: Any) -> Any:
        if not isinstance(node, OnHost):
            return node
        moved = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), (node.mu, node.nu))
        return OnHost(node.count, *moved)

    return jax.tree.map(place, shardings, is_leaf=lambda node: isinstance(node, OnHost))
