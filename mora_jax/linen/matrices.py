"""Which Linen layers hold a matrix that can carry an adapter, and how their arrays are laid out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

from mora_jax.adapters.matrices import einsum_matrix
from mora_jax.adapters.products.around import ProductView, view_by_axes

Array = jax.Array

# Where an adapter goes: on the product that these classes' own methods compute, a subclass's by way of `super()`.
KINDS: tuple[type[nn.Module], ...] = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Embed)
_AUTO_NAME = re.compile(r"(LoRADense|MoRADense|Dense|DenseGeneral|Einsum|Embed)_\d+")


@dataclass(frozen=True)
class Matrix:
    """The matrix in a layer.

    Attributes:
        array: its name in `params`, "kernel" or "embedding".
        shape: of that array, without axes that `nn.scan` or `nn.vmap` put in front.
        contracted, free: the array's axes that are summed over, and the others, in the order of the matrix.
        bias_axes: of the free axes, by number in `free`, which comes when in the bias.
    """

    array: str
    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    bias_axes: tuple[int, ...]

    @classmethod
    def plain(cls, array: str, shape: Sequence[int], inputs: int = 1) -> Matrix:
        """An array whose first `inputs` axes are contracted."""
        axes = tuple(range(len(shape)))
        return cls(array, tuple(shape), axes[:inputs], axes[inputs:], tuple(range(len(shape) - inputs)))

    @property
    def in_features(self) -> int:
        """Inputs of the layer, the contracted axes flattened."""
        return math.prod(self.shape[axis] for axis in self.contracted)

    @property
    def out_features(self) -> int:
        """Outputs of the layer, the other axes flattened."""
        return math.prod(self.shape[axis] for axis in self.free)

    @property
    def is_embedding(self) -> bool:
        """Whether the matrix is an embedding table."""
        return self.array == "embedding"

    def take(self, array: Array) -> Array:
        """The layer's array, with any axes in front, as matrices `[..., in, out]`."""
        lead = array.ndim - len(self.shape)
        order = [*range(lead), *(lead + axis for axis in (*self.contracted, *self.free))]
        return array.transpose(order).reshape(*array.shape[:lead], self.in_features, self.out_features)

    def put(self, matrix: Array) -> Array:
        """The inverse of `take`."""
        lead, order = matrix.ndim - 2, (*self.contracted, *self.free)
        shaped = matrix.reshape(*matrix.shape[:lead], *(self.shape[axis] for axis in order))
        return shaped.transpose([*range(lead), *(lead + order.index(axis) for axis in range(len(order)))])

    def take_bias(self, bias: Array) -> Array:
        """The layer's bias, with any axes in front, as `[..., out]` in the order of the matrix."""
        lead = bias.ndim - len(self.bias_axes)
        order = [*range(lead), *(lead + self.bias_axes.index(axis) for axis in range(len(self.free)))]
        return bias.transpose(order).reshape(*bias.shape[:lead], self.out_features)

    def put_bias(self, bias: Array) -> Array:
        """The inverse of `take_bias`."""
        lead = bias.ndim - 1
        shaped = bias.reshape(*bias.shape[:lead], *(self.shape[axis] for axis in self.free))
        return shaped.transpose([*range(lead), *(lead + axis for axis in self.bias_axes)])


@dataclass(frozen=True)
class Product:
    """One call of a layer, seen as a product with its matrix.

    Attributes:
        matrix: the layer's.
        view: where its axes are in the call's input and output.
    """

    matrix: Matrix
    view: ProductView = ProductView()


def product_of(module: nn.Module, inputs: Array, einsum_str: str | None) -> Product | str:
    """How a layer of one of `KINDS` computes its output from `inputs`, or in words why that is no single product."""
    if isinstance(module, nn.Dense):
        return Product(Matrix.plain("kernel", (inputs.shape[-1], module.features)))
    if isinstance(module, nn.DenseGeneral):
        return _general(module, inputs)
    if isinstance(module, nn.Einsum):
        return _einsum(module, inputs, einsum_str or module.einsum_str or "")
    assert isinstance(module, nn.Embed), "one of KINDS"
    return Product(Matrix.plain("embedding", (module.num_embeddings, module.features)))


def _general(module: nn.DenseGeneral, inputs: Array) -> Product | str:
    if _sizes(module.batch_dims):
        return "batch_dims make it a matrix for each entry of a batch"
    axes = [axis % inputs.ndim for axis in _sizes(module.axis)]
    kept = [axis for axis in range(inputs.ndim) if axis not in axes]
    features = _sizes(module.features)
    matrix = Matrix.plain("kernel", (*(inputs.shape[axis] for axis in axes), *features), len(axes))
    return Product(matrix, view_by_axes(inputs, [*kept, *axes], len(kept), features))


def _einsum(module: nn.Einsum, inputs: Array, einsum_str: str) -> Product | str:
    spec, shape = einsum_str.replace(" ", ""), tuple(module.shape)
    found = einsum_matrix(spec, shape, inputs.ndim)
    if found is None:
        return f"{spec!r} is no product with one matrix"
    to_in, (contracted, free), permutation = found
    kept = inputs.ndim - len(contracted)
    bias_axes = tuple(axis - kept for axis in permutation if axis >= kept)
    view = view_by_axes(inputs, to_in, kept, [shape[axis] for axis in free], permutation)
    return Product(Matrix("kernel", shape, contracted, free, bias_axes), view)


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def layer_number(path: str) -> int | None:
    """The number of the layer that a Linen module is in: the first in its path, 3 in `h.3`, `layers_3` or `Block_3`.

    The number in a layer's own automatic name (`Dense_0`) counts layers of one class, so it is none.
    """
    *above, own = path.split(".")
    names = above if _AUTO_NAME.fullmatch(own) else [*above, own]
    numbers = (re.fullmatch(r"(?:.*_)?(\d+)", name) for name in names)
    return next((int(found[1]) for found in numbers if found), None)
