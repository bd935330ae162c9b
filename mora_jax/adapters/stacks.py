"""Layers that `nnx.vmap` made, one module with arrays `[L, …]`: their names, and dropout with a key for each.

Such a stack runs under `nnx.scan` or `nnx.vmap`, which hand each layer its slice of every variable, adapters and keys
too. In files and rules it is named as a list of layers would be.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.matrices import matrix_shape, stack_of


def stacked_paths(model: nnx.Module, path: str, stack: tuple[int, ...]) -> tuple[str, ...]:
    """One path for each layer of a stack, numbers where they would stand if the stack were a list.

    The number of an axis follows the outermost module on the way in which every parameter has that axis: a block made
    by `nnx.vmap` at `blocks`, with a layer `q`, has the paths `blocks.0.q`, `blocks.1.q`, …, like the blocks of
    `nnx.List` at the same place.

    Args:
        model: the whole.
        path: of the layer in it.
        stack: the axes of its arrays in front.
    """
    names = path.split(".") if path else []
    depths = _depths_on_the_way(model, names, stack)
    numbered = []
    for numbers in product(*(range(size) for size in stack)):
        parts: list[str] = []
        done = 0
        for i, depth in enumerate(depths):
            parts += names[i - 1 : i] if i else []
            parts += [str(number) for number in numbers[done:depth]]
            done = max(done, depth)
        numbered.append(".".join(parts))
    return tuple(numbered)


def _depths_on_the_way(model: nnx.Module, names: list[str], stack: tuple[int, ...]) -> list[int]:
    """How many axes of the stack every parameter has in front, in the model and in each node on the path."""
    node: Any = model
    depths = [_depth(node, stack)]
    for name in names:
        node = node[int(name)] if isinstance(node, list | tuple | nnx.List) else _child(node, name)
        depths.append(_depth(node, stack) if isinstance(node, nnx.Module) else depths[-1])
    return [*depths[:-1], len(stack)]


def _child(node: Any, name: str) -> Any:
    if isinstance(node, dict):
        return next(value for key, value in node.items() if str(key) == name)
    return vars(node)[name]


def _depth(node: nnx.Module, stack: tuple[int, ...]) -> int:
    depth = len(stack)
    for leaf in jax.tree.leaves(nnx.state(node, nnx.Param)):
        same = [a == b for a, b in zip(leaf.shape, stack, strict=False)]
        depth = min(depth, same.index(False) if False in same else len(same))
    for _, inner in nnx.iter_graph(node):
        # Shapes may agree by chance; layers say how many axes are their own.
        known = isinstance(inner, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Embed)
        if known and matrix_shape(inner) is not None:
            depth = min(depth, len(stack_of(inner)))
    return depth


def stacked_dropout(rate: float, rngs: nnx.Rngs | None, stack: tuple[int, ...]) -> nnx.Dropout:
    """Dropout for a layer of a stack, `()` for none: each layer draws from a key of its own."""
    dropout = nnx.Dropout(rate, rngs=rngs)
    if stack:
        stream: Any = dropout.rngs
        stream.key.set_value(jax.random.split(stream.key.get_value(), stack))
        stream.count.set_value(jnp.zeros(stack, stream.count.get_value().dtype))
    return dropout
