"""Linear maps that know their transpose, for functions that are differentiated forward and backward.

`jax.custom_vjp` refuses forward mode. `jax.custom_jvp` alone gets its backward pass by transposing what the rule
computes, which promotes bfloat16 products to float32 (see `matmul.py`). A rule that ends in `linear` has both: forward
mode runs the map, reverse mode the given transpose, from the same residuals. `jax.custom_derivatives.linear_call` is
the same idea without `jax.vmap` and second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array


def linear(
    forward: Callable[[Any, Any], Array],
    backward: Callable[[Any, Array], Any],
    residuals: Any,
    tangents: Any,
    like: Array,
) -> Array:
    """`forward(residuals, tangents)`, a map that is linear in `tangents`.

    Args:
        forward: the map.
        backward: its transpose, `(residuals, cotangent of the result)` → cotangents of `tangents`, a tree like them.
            None where there is none; what it has beyond them is left out.
        residuals: any tree of arrays; what it holds, and nothing else, is kept for the backward pass.
        tangents: a tree of arrays; None for what is not differentiated.
        like: an array of the result's type, which saves tracing `forward` where only the transpose is wanted.
    """
    kept_tree: Any
    whole: Any
    kept, kept_tree = jax.tree.flatten(residuals)
    places, whole = jax.tree.flatten(tangents, is_leaf=lambda leaf: leaf is None)
    leaves = [leaf for leaf in places if leaf is not None]
    moved = [leaf is not None for leaf in places]
    types = [jax.typeof(leaf) for leaf in leaves]

    def run(*flat: Array) -> Array:
        values = iter(flat[len(kept) :])
        return forward(
            kept_tree.unflatten(flat[: len(kept)]), whole.unflatten([next(values) if m else None for m in moved])
        )

    def transposed(*flat: Array) -> list[Array]:
        found = whole.flatten_up_to(backward(kept_tree.unflatten(flat[:-1]), flat[-1]))
        values = [value for value, m in zip(found, moved, strict=True) if m]
        pairs = zip(values, types, strict=True)
        return [jnp.zeros(t.shape, t.dtype) if v is None else v.astype(t.dtype) for v, t in pairs]

    return _linear.bind(*kept, *leaves, run=run, transposed=transposed, count=len(kept), type_=jax.typeof(like))


def perturbed(tangents: Any) -> Any:
    """The tangents of a rule with symbolic zeros, None for those that are zero, and those of integers."""

    def one(leaf: Any) -> Any:
        return None if isinstance(leaf, SymbolicZero) or leaf.dtype == jax.dtypes.float0 else leaf

    return jax.tree.map(one, tangents)


def any_perturbed(tangents: Any) -> bool:
    """Whether anything differentiates what `perturbed` gave these for."""
    return bool(jax.tree.leaves(tangents))


_linear = Primitive("linear_with_transpose")


@_linear.def_impl
def _run(*flat, run, transposed, count, type_):
    return run(*flat)


@_linear.def_abstract_eval
def _abstract(*avals, run, transposed, count, type_):
    return jax.make_jaxpr(run)(*avals).out_avals[0] if type_ is None else type_


def _jvp(primals, tangents, *, run, transposed, count, type_):
    if all(type(tangent) is ad.Zero for tangent in tangents[:count]):
        moved = [ad.instantiate_zeros(tangent) for tangent in tangents[count:]]
        params = {"run": run, "transposed": transposed, "count": count, "type_": type_}
        return _linear.bind(*primals, **params), _linear.bind(*primals[:count], *moved, **params)
    return jax.jvp(run, primals, [ad.instantiate_zeros(tangent) for tangent in tangents])


def _transpose(cotangent, *flat, run, transposed, count, type_):
    if type(cotangent) is ad.Zero:
        return [ad.Zero(value.aval) if ad.is_undefined_primal(value) else None for value in flat]
    found = transposed(*flat[:count], cotangent)
    return [None] * count + [c if ad.is_undefined_primal(v) else None for c, v in zip(found, flat[count:], strict=True)]


def _batch(flat, axes, *, run, transposed, count, type_):
    size = next(value.shape[axis] for value, axis in zip(flat, axes, strict=True) if axis is not None)
    moved = []
    for i, (value, axis) in enumerate(zip(flat, axes, strict=True)):
        if axis is not None:
            value = jnp.moveaxis(value, axis, 0)
        elif i >= count:
            value = jnp.broadcast_to(value, (size, *value.shape))
        moved.append(value)
    kept = [None if axis is None else 0 for axis in axes[:count]]
    many = jax.vmap(run, (*kept, *[0] * (len(flat) - count)))
    back = jax.vmap(transposed, (*kept, 0))
    return _linear.bind(*moved, run=many, transposed=back, count=count, type_=None), 0


ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=False))
