"""Run a stack of layers with a backward of its own, which never copies what it can read again.

`jax.lax.scan` differentiated by JAX stacks every residual of a layer, the layer's own frozen weights among them: a
copy of the whole base model in every step. Here the forward pass keeps only what a layer computed; weights, and what
all layers share, are read again in the backward pass from where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

Body = Callable[[Array, Any, Any, Any], Array]

SAVED = "saved"  # the name of what `checkpointed` marks
_SAVE_MARKED = jax.checkpoint_policies.save_only_these_names(SAVED)


def checkpointed(arrays: Any) -> Any:
    """A pytree of arrays, marked as what `remat="dots"` saves of a layer besides its input; the same values.

    These are the results of its projections and of its attention, marked where they are made, rounded to the compute
    dtype. A policy that goes by operations would save the float32 sums inside a projection instead, the base product's
    and the adapter's each, which is more than `remat="none"` saves.
    """
    return jax.tree.map(lambda array: checkpoint_name(array, SAVED), arrays)


class Places(NamedTuple):
    """Where the leaves of one layer lie on a mesh; None for a leaf that nobody places.

    Attributes:
        stored: their sharding in the stack, and that of their gradients.
        used: their sharding while the layer computes. They are gathered layer by layer, forward and backward.
        output_axes: the axis that the layer wants in the place of axis 1; 1 for leaves that it takes as they are.
    """

    stored: tuple[Any, ...]
    used: tuple[Any, ...]
    output_axes: tuple[int, ...]

    def gather(self, layer: list[Any]) -> list[Any]:
        """The leaves of a layer as it uses them."""
        leaves = zip(layer, self.used, self.output_axes, strict=True)
        return [_moved(_constrained(leaf, sharding), axis, 1) for leaf, sharding, axis in leaves]

    def scatter(self, gradients: list[Any], active: tuple[bool, ...]) -> list[Any]:
        """Gradients of the active leaves, back to where the leaves are stored."""
        places = [place for *place, on in zip(self.stored, self.output_axes, active, strict=True) if on]
        leaves = zip(gradients, places, strict=True)
        return [_constrained(_moved(leaf, 1, axis), sharding) for leaf, (sharding, axis) in leaves]


def _constrained(leaf: Any, sharding: Any) -> Any:
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)


def _moved(leaf: Any, source: int, target: int) -> Any:
    return leaf if source == target else jnp.moveaxis(leaf, source, target)


@jax.tree_util.register_static
class _Plan:
    """How one layer's pullback is put together again: found while the forward pass is traced, used in the backward.

    Attributes:
        layers: structure of the layers.
        active: which of their leaves something differentiates.
        tree: structure of the pullback.
        sources: for each of its leaves ("saved", i), ("layer", i) or ("shared", i).
    """

    def __init__(self, layers: Any, active: tuple[bool, ...]) -> None:
        self.layers, self.active = layers, active
        self.tree: Any = None
        self.sources: tuple[tuple[str, int], ...] = ()

    def take_apart(self, pullback: Any, layer: list[Any], shared: list[Any]) -> list[Array]:
        """The leaves that have to be saved; the others are the layer's or the shared arrays themselves."""
        known = {id(leaf): ("shared", i) for i, leaf in enumerate(shared)}
        known |= {id(leaf): ("layer", i) for i, leaf in enumerate(layer)}
        leaves, self.tree = jax.tree.flatten(pullback)
        saved: list[Array] = []
        sources = []
        for leaf in leaves:
            if id(leaf) not in known:
                known[id(leaf)] = ("saved", len(saved))
                saved.append(leaf)
            sources.append(known[id(leaf)])
        self.sources = tuple(sources)
        return saved

    def put_together(self, saved: list[Array], layer: list[Any], shared: list[Any]) -> Any:
        """The pullback."""
        parts = {"saved": saved, "layer": layer, "shared": shared}
        return jax.tree.unflatten(self.tree, [parts[name][i] for name, i in self.sources])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def run_stack(
    body: Body, remat: str, x: Array, layers: Any, shared: Any, given: Any = (), places: Places | None = None
) -> Array:
    """`x`, an array or a pytree of some, through `body(x, layer, shared, given)` for each layer in turn.

    Args:
        body: one layer, a pure function of its arguments.
        remat: "none" saves what the layers' backward needs, "full" only each layer's input, "dots" also what
            the layer marks (`checkpointed`); "offload" only each layer's input, and that in the host's memory.
        x: the input of the first layer; every layer keeps its shape and dtype.
        layers: any pytree of arrays `[L, …]`; arrays that nothing differentiates get no gradient.
        shared: any pytree of arrays that every layer reads; they get no gradient.
        given: the same of arrays that get one, which layers before these have computed.
        places: where the leaves of `layers` lie on a mesh, in their order; None without one.

    Returns:
        The output of the last layer.
    """
    leaves, tree = jax.tree.flatten(layers)

    def step(x: Array, layer: list[Any]) -> tuple[Array, None]:
        return body(x, jax.tree.unflatten(tree, _gathered(places, layer)), shared, given), None

    return jax.lax.scan(step, x, leaves)[0]


def run_alone(
    body: Callable[..., Any], remat: str, x: Array, layers: Any, shared: Any, places: Places | None = None
) -> Any:
    """`body(x, layer, shared)` for a stack of one layer; it may give other arrays beside the next `x`.

    Args:
        body, remat, x, layers, shared, places: as for `run_stack`.
    """
    leaves, tree = jax.tree.flatten(layers)
    layer = _gathered(places, [leaf[0] for leaf in leaves])
    if remat == "dots":
        body = jax.checkpoint(body, policy=_SAVE_MARKED)
    elif remat != "none":
        body = jax.checkpoint(body)
    return body(x, jax.tree.unflatten(tree, layer), shared)


def _forward(
    body: Body, remat: str, x: Any, layers: Any, shared: Any, given: Any, places: Places | None
) -> tuple[Array, Any]:
    # With symbolic zeros each argument says whether anything differentiates it.
    primals, tree = jax.tree.flatten(layers)
    active = tuple(primal.perturbed for primal in primals)
    x, leaves, shared, given = jax.tree.map(lambda primal: primal.value, (x, primals, shared, given))
    layer_fn = _pullback_of(body, remat, tree, active)
    plan = _Plan(tree, active)

    def step(x: Array, layer: list[Array]) -> tuple[Array, list[Array]]:
        layer = _gathered(places, layer)
        if remat in ("full", "offload"):
            saved = x if remat == "full" else jax.device_put(x, jax.memory.Space.Host)
            return body(x, jax.tree.unflatten(tree, layer), shared, given), [saved]
        y, pullback = layer_fn(x, layer, shared, given)
        return y, plan.take_apart(pullback, layer, jax.tree.leaves((shared, given)))

    x, saved = jax.lax.scan(step, x, leaves)
    return x, (plan, saved, leaves, shared, given)


def _backward(body: Body, remat: str, places: Places | None, residuals: Any, dy: Any) -> tuple[Any, Any, None, Any]:
    plan, saved, leaves, shared, given = residuals
    tree, active = plan.layers, plan.active
    dy = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype) if isinstance(part, SymbolicZero) else part, dy)
    layer_fn = _pullback_of(body, remat, tree, active)

    def step(carry: tuple[Array, Any], of_layer: tuple[list[Array], list[Array]]) -> tuple[Any, list[Array]]:
        (dy, sums), (saved, layer) = carry, of_layer
        layer = _gathered(places, layer)
        if remat in ("full", "offload"):
            x = saved[0] if remat == "full" else jax.device_put(saved[0], jax.memory.Space.Device)
            pullback = layer_fn(x, layer, shared, given)[1]
        else:
            pullback = plan.put_together(saved, layer, jax.tree.leaves((shared, given)))
        dx, gradients, given_gradients = pullback(dy)
        sums = jax.tree.map(jnp.add, sums, given_gradients)
        return (dx, sums), gradients if places is None else places.scatter(gradients, active)

    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.promote_types(array.dtype, jnp.float32)), given)
    (dy, sums), gradients = jax.lax.scan(step, (dy, zeros), (saved, leaves), reverse=True)
    sums = jax.tree.map(lambda total, array: total.astype(array.dtype), sums, given)
    trained = iter(gradients)
    return dy, jax.tree.unflatten(tree, [next(trained) if on else None for on in active]), None, sums


def _gathered(places: Places | None, layer: list[Any]) -> list[Any]:
    return layer if places is None else places.gather(layer)


def _pullback_of(body: Body, remat: str, tree: Any, active: tuple[bool, ...]) -> Callable[..., Any]:
    """A layer as `(x, leaves, shared, given) → (y, pullback)`, differentiated by `x`, the active leaves and `given`."""

    def layer_fn(x: Array, layer: list[Array], shared: Any, given: Any) -> Any:
        def on_active(x: Array, trained: list[Array], given: Any) -> Array:
            values = iter(trained)
            merged = [next(values) if on else leaf for on, leaf in zip(active, layer, strict=True)]
            return body(x, jax.tree.unflatten(tree, merged), shared, given)

        if remat == "dots":
            # A loop's backward can't share anything with its forward, so nothing has to keep the compiler from it.
            on_active = jax.checkpoint(on_active, policy=_SAVE_MARKED, prevent_cse=False)
        trained = [leaf for on, leaf in zip(active, layer, strict=True) if on]
        return jax.vjp(on_active, x, trained, given)

    return layer_fn


run_stack.defvjp(_forward, _backward, symbolic_zeros=True)
