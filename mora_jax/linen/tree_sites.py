"""The places of a tree of arrays where an adapter can stand: Linen's variables, or any other tree.

What `adapters.sites.Site` is for layers of Flax NNX, `TreeSite` is for arrays: nothing is written in place, the values
with the adapter in them are given to whoever holds the tree.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mora_jax.adapters.base import over_layers
from mora_jax.adapters.matrices import Matrix
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.adapters.products.matmul import widened
from mora_jax.adapters.sites import numbered

Arrays = dict[str, Array]
Path = tuple[str, ...]


@dataclass(frozen=True)
class TreeSite:
    """An array of a tree that is, or may be, a layer's matrix.

    Attributes:
        path: the layer's module path.
        matrix: how the array is one.
        array, bias: what the layer holds, with axes in front, out of any box; the bias may be None.
        key, bias_key: where the tree has them.
        lifts: behind how many components of the path the number of each axis in front is written in files.
        why: where the shape alone doesn't say how it is a matrix, what to say; else empty.
        config: the method's configuration for this path; None before it was picked.
    """

    path: Path
    matrix: Matrix
    array: Any
    key: Any
    bias: Any = None
    bias_key: Any = None
    lifts: tuple[int, ...] = ()
    why: str = ""
    config: Any = None

    @property
    def name(self) -> str:
        """The path with dots."""
        return ".".join(self.path)

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes in front."""
        return tuple(self.array.shape[: self.array.ndim - len(self.matrix.shape)])

    def kernel(self) -> Array:
        """The base's matrix, `[*stack, in, out]`."""
        return self.matrix.take(jnp.asarray(self.array))

    def bias_rows(self) -> Array | None:
        """The base's bias, `[*stack, out]`, or None."""
        return None if self.bias is None else self.matrix.take_bias(jnp.asarray(self.bias), len(self.stack))

    def merged(self, params: Arrays) -> Array:
        """The array with its adapter in it."""
        return self.matrix.put(merged_kernels(self.config, self.kernel(), params))

    def merged_bias(self, params: Arrays) -> Array | None:
        """The bias with what the adapter does to it, one that it makes where there is none, or None."""

        def one(params: Arrays, bias: Array | None) -> Array | None:
            change = adapter_class(self.config).added_bias(self.config, params, bias)
            if change is None or bias is None:
                return bias if change is None else change.astype(self.array.dtype)
            return (widened(bias) + change).astype(bias.dtype)

        for _ in self.stack:
            one = jax.vmap(one)
        rows = one(params, self.bias_rows())
        if rows is None:
            return None
        bias = self.matrix.put_bias(rows)
        return bias if self.bias is None else bias.reshape(self.bias.shape)

    def described(self) -> dict[str, Any]:
        """What a folder has to say of it: how its array is a matrix, and where the numbers of stacked layers belong."""
        return asdict(self.matrix) | {"lifts": self.lifts}

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """The path in files of each layer, with its place in the axes in front."""
        return numbered(self.path, self.lifts, self.stack)


def scaled(config: Any, arrays: Arrays, stack: tuple[int, ...] = ()) -> Arrays:
    """The arrays of an adapter as its class takes them."""
    dtype = jnp.result_type(jnp.float32, *arrays.values())
    return dict(arrays) | {"scaling": jnp.full(stack, adapter_class(config).scale(config), dtype)}


def merged_kernels(config: Any, kernel: Array, params: Arrays) -> Array:
    """Matrices `[*stack, in, out]` with their adapter in them.

    The backward pass makes the update again, and keeps none.
    """

    def one(params: Arrays, kernel: Array) -> Array:
        return adapter_class(config).merged_kernel(config, params, kernel).astype(kernel.dtype)

    run = jax.checkpoint(lambda *operands: over_layers(kernel.ndim - 2, one, operands))
    return run(params, kernel)
