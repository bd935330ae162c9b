"""Run a stack of layers with a backward of its own, which never copies what it can read again.

`jax.lax.scan` differentiated by JAX stacks every residual of a layer, the layer's own frozen weights among them: a
copy of the whole base model in every step. Here the forward pass keeps only what a layer computed; weights, and what
all layers share, are read again in the backward pass from where they are. When every layer is unrolled (the default
on CPU) there is no loop and nothing is stacked at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from mora_jax.backend import backend, false_after

Array = jax.Array
Body = Callable[[Array, Any, Any], Array]

SAVED = "saved"  # the name of what `checkpointed` marks
_SAVE_MARKED = jax.checkpoint_policies.save_only_these_names(SAVED)


def checkpointed(arrays: Any) -> Any:
    """A pytree of arrays, marked as what `remat="dots"` saves of a layer besides its input; the same values.

    These are the results of its projections and of its attention, marked where they are made, rounded to the compute
    dtype. A policy that goes by operations would save the float32 sums inside a projection instead, the base product's
    and the adapter's each, which is more than `remat="none"` saves.
    """
    return jax.tree.map(lambda array: checkpoint_name(array, SAVED), arrays)


@jax.tree_util.register_pytree_node_class
class Unstacked:
    """An array `[L, …]` as one array a layer, for `run_stack` without a loop.

    XLA on CPUs copies each layer out of a stack in every step; a stack of layers that a program is given apart it makes
    first, in float32 where they are bfloat16.

    Attributes:
        arrays: of the layers.
    """

    def __init__(self, arrays: Iterable[Array]):
        self.arrays = tuple(arrays)

    def __getitem__(self, layer: int) -> Array:
        return self.arrays[layer]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        return (len(self.arrays), *self.arrays[0].shape)

    @property
    def ndim(self) -> int:
        """Of the stack."""
        return self.arrays[0].ndim + 1

    @property
    def dtype(self) -> Any:
        """Of every layer."""
        return self.arrays[0].dtype

    def tree_flatten(self) -> tuple[tuple[Array, ...], None]:
        """The arrays, and nothing beside them."""
        return self.arrays, None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: Iterable[Array]) -> Unstacked:
        """The same around other arrays."""
        return cls(arrays)


def _flatten(layers: Any) -> tuple[list[Any], Any]:
    """The leaves `[L, …]` of a stack, arrays and `Unstacked`, and the structure around them."""
    return jax.tree.flatten(layers, is_leaf=lambda node: isinstance(node, Unstacked))


class Places(NamedTuple):
    """Where the leaves of one layer lie on a mesh; None for a leaf that nobody places.

    Attributes:
        stored: their sharding in the stack, and that of their gradients.
        used: their sharding while the layer computes. They are gathered layer by layer, forward and backward.
        leads: the axis that the layer wants in the place of axis 1; 1 for leaves that it takes as they are.
    """

    stored: tuple[Any, ...]
    used: tuple[Any, ...]
    leads: tuple[int, ...]

    def gather(self, layer: list[Any]) -> list[Any]:
        """The leaves of a layer as it uses them."""
        leaves = zip(layer, self.used, self.leads, strict=True)
        return [_moved(_constrained(leaf, sharding), lead, 1) for leaf, sharding, lead in leaves]

    def scatter(self, gradients: list[Any], active: tuple[bool, ...]) -> list[Any]:
        """Gradients of the active leaves, back to where the leaves are stored."""
        places = [place for *place, on in zip(self.stored, self.leads, active, strict=True) if on]
        leaves = zip(gradients, places, strict=True)
        return [_constrained(_moved(leaf, 1, lead), sharding) for leaf, (sharding, lead) in leaves]


def _constrained(leaf: Any, sharding: Any) -> Any:
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)


def _moved(leaf: Any, source: int, target: int) -> Any:
    return leaf if source == target else jnp.moveaxis(leaf, source, target)


def _gathered(places: Places | None, x: Array, layer: list[Any], *, unrolled: bool) -> tuple[Array, list[Any]]:
    """The leaves as the layer uses them. Without a loop a barrier on `x` keeps them from being gathered all at once,
    or in the forward pass for the backward."""
    if places is None:
        return x, layer
    if unrolled:
        x, layer = jax.lax.optimization_barrier((x, layer))
    return x, places.gather(layer)


class _Plan:
    """How one layer's pullback is put together again: found while the forward pass is traced, used in the backward.

    Attributes:
        tree: structure of the pullback.
        sources: for each of its leaves ("saved", i), ("layer", i) or ("shared", i).
    """

    def __init__(self) -> None:
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


def run_stack(
    body: Body, unroll: int, remat: str, x: Array, layers: Any, shared: Any, places: Places | None = None
) -> Array:
    """`x` through `body(x, layer, shared)` for each layer in turn.

    Args:
        body: one layer, a pure function of its arguments.
        unroll: layers an iteration of the loop; all of them for no loop.
        remat: "none" keeps what the layers' backward needs, "full" only each layer's input, "dots" also what
            the layer marks (`checkpointed`); "offload" only each layer's input, and that in the host's memory.
        x: the input of the first layer; every layer keeps its shape and dtype.
        layers: any pytree of arrays `[L, …]`, without a loop also `Unstacked` ones, which nothing may differentiate;
            arrays that nothing differentiates get no gradient.
        shared: any pytree of arrays that every layer reads; they get no gradient.
        places: where the leaves of `layers` lie on a mesh, in their order; None without one.

    Returns:
        The output of the last layer.
    """
    return _run(body, unroll, remat, places, x, layers, shared)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _run(body: Body, unroll: int, remat: str, places: Places | None, x: Array, layers: Any, shared: Any) -> Array:
    leaves, tree = _flatten(layers)
    count = leaves[0].shape[0]
    unrolled = unroll >= count

    def step(x: Array, layer: list[Any]) -> tuple[Array, None]:
        x, layer = _gathered(places, x, layer, unrolled=unrolled)
        return body(x, jax.tree.unflatten(tree, layer), shared), None

    if unrolled:
        for i in range(count):
            x, _ = step(x, [leaf[i] for leaf in leaves])
        return x
    return jax.lax.scan(step, x, leaves, unroll=unroll)[0]


def _forward(
    body: Body, unroll: int, remat: str, places: Places | None, x: Any, layers: Any, shared: Any
) -> tuple[Array, Any]:
    primals, tree = _flatten(layers)
    active = tuple(any(primal.perturbed for primal in jax.tree.leaves(leaf)) for leaf in primals)
    x, leaves, shared = jax.tree.map(lambda primal: primal.value, (x, primals, shared))
    count = leaves[0].shape[0]
    unrolled = unroll >= count
    layer_fn = _pullback_of(body, remat, tree, active, unrolled=unrolled)
    plan = _Plan()

    def step(x: Array, layer: list[Array]) -> tuple[Array, list[Array]]:
        x, layer = _gathered(places, x, layer, unrolled=unrolled)
        if remat in ("full", "offload"):
            kept = x if remat == "full" else jax.device_put(x, jax.memory.Space.Host)
            return body(x, jax.tree.unflatten(tree, layer), shared), [kept]
        y, pullback = layer_fn(x, layer, shared)
        return y, plan.take_apart(pullback, layer, jax.tree.leaves(shared))

    if unrolled:
        saved: Any = []
        for i in range(count):
            x, kept = step(x, [leaf[i] for leaf in leaves])
            saved.append(kept)
    else:
        x, saved = jax.lax.scan(step, x, leaves, unroll=unroll)
    return x, (_Static((plan, tree, active)), saved, leaves, shared)


def _backward(
    body: Body, unroll: int, remat: str, places: Places | None, residuals: Any, dy: Any
) -> tuple[Any, Any, None]:
    static, saved, leaves, shared = residuals
    plan, tree, active = static.value
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    count = leaves[0].shape[0]
    unrolled = unroll >= count
    layer_fn = _pullback_of(body, remat, tree, active, unrolled=unrolled)

    def step(dy: Array, kept: list[Array], layer: list[Array]) -> tuple[Array, list[Array]]:
        dy, layer = _gathered(places, dy, layer, unrolled=unrolled)
        if remat in ("full", "offload"):
            if remat == "offload":
                kept = [jax.device_put(kept[0], jax.memory.Space.Device)]
            # The barrier keeps the compiler from sharing this with the forward pass and saving it after all.
            (x,) = kept if not unrolled else jax.lax.optimization_barrier(tuple(kept))
            pullback = layer_fn(x, layer, shared)[1]
        else:
            if unrolled and places is None and backend() == "cpu":
                kept = _not_before(dy, kept)
            pullback = plan.put_together(kept, layer, jax.tree.leaves(shared))
        dx, gradients = pullback(dy)
        return dx, gradients if places is None else places.scatter(gradients, active)

    if unrolled:
        columns: list[list[Array]] = []
        for i in reversed(range(count)):
            dy, gradients = step(dy, saved[i], [leaf[i] for leaf in leaves])
            columns.append(gradients)
        stacked = [jnp.stack(column) for column in zip(*reversed(columns), strict=True)]
    else:
        dy, stacked = jax.lax.scan(lambda dy, pair: step(dy, *pair), dy, (saved, leaves), reverse=True, unroll=unroll)
    found = iter(stacked)
    return dy, jax.tree.unflatten(tree, [next(found) if on else None for on in active]), None


def _not_before(dy: Array, arrays: list[Array]) -> list[Array]:
    """The arrays, as values that nobody has before `dy`.

    What the forward and the backward pass of unrolled layers have in common XLA on CPUs would compute once and keep:
    all activations in float32, several times over.
    """
    never = false_after(dy)
    return [jnp.where(never, jnp.zeros_like(array), array) for array in arrays]


def _pullback_of(body: Body, remat: str, tree: Any, active: tuple[bool, ...], *, unrolled: bool) -> Callable[..., Any]:
    """A layer as `(x, leaves, shared) → (y, pullback)`, differentiated by `x` and the active leaves."""

    def layer_fn(x: Array, layer: list[Array], shared: Any) -> Any:
        def on_active(x: Array, trained: list[Array]) -> Array:
            values = iter(trained)
            merged = [next(values) if on else leaf for on, leaf in zip(active, layer, strict=True)]
            return body(x, jax.tree.unflatten(tree, merged), shared)

        if remat == "dots":
            # A loop's backward can't share anything with its forward; elsewhere the compiler has to be kept from it.
            on_active = jax.checkpoint(on_active, policy=_SAVE_MARKED, prevent_cse=unrolled)
        trained = [leaf for on, leaf in zip(active, layer, strict=True) if on]
        return jax.vjp(on_active, x, trained)

    return layer_fn


@jax.tree_util.register_pytree_node_class
class _Static:
    """Carries Python values from the forward to the backward pass, beside the arrays."""

    def __init__(self, value: Any):
        self.value = value

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        return (), self.value

    @classmethod
    def tree_unflatten(cls, value: Any, children: tuple[()]) -> _Static:
        return cls(value)


_run.defvjp(_forward, _backward, symbolic_zeros=True)
