"""Which Linen layers hold a matrix that can carry an adapter, and how their calls are products with it."""

import re
from collections.abc import Sequence
from typing import Any

from flax import linen as nn
from jax import Array

from mora_jax.adapters.matrices import KERNELS, MASKED, TRANSPOSED, Matrix, Product

# Where an adapter goes: on the product that these classes' own methods compute, a subclass's by way of `super()`.
KINDS: tuple[type[nn.Module], ...] = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.Embed)
#: Why layers of other classes carry none.
REASONS: dict[type[nn.Module], str] = {
    nn.ConvTranspose: TRANSPOSED,
    nn.ConvLocal: "a kernel for each place",
    nn.recurrent.DenseParams: "nn.OptimizedLSTMCell joins its products; nn.LSTMCell takes the same params and adapters",
}
_AUTO_NAME = re.compile(r"(LoRADense|MoRADense|Dense|DenseGeneral|Einsum|Conv|Embed)_\d+")


def adapter_path(path: tuple[str, ...], array: str) -> tuple[str, ...]:
    """Where the adapter of an array lies: at its module's path, behind which comes the name of an array of its own.

    That tells modules of one scope apart, such as the two products of a feed-forward layer under `nn.share_scope`.
    """
    return path if array in KERNELS else (*path, array)


def array_path(path: tuple[str, ...], array: str) -> tuple[str, ...]:
    """The path in `params` of the array whose adapter lies at `path`."""
    return (*path, array) if array in KERNELS else path


def product_of(module: nn.Module, inputs: Array, einsum_str: str | None) -> Product | str:
    """How a layer of one of `KINDS` computes its output from `inputs`, or in words why that is no single product."""
    if isinstance(module, nn.Dense):
        return Product(Matrix.plain("kernel", (inputs.shape[-1], module.features)))
    if isinstance(module, nn.DenseGeneral):
        if _sizes(module.batch_dims):
            return "batch_dims make it a matrix for each entry of a batch"
        axes, features = sorted(axis % inputs.ndim for axis in _sizes(module.axis)), _sizes(module.features)
        matrix = Matrix.plain("kernel", (*(inputs.shape[axis] for axis in axes), *features), len(axes))
        return Product.of_axes(matrix, inputs, axes, features)
    if isinstance(module, nn.Einsum):
        spec, shape = (einsum_str or module.einsum_str or "").replace(" ", ""), tuple(module.shape)
        return einsum_product("kernel", spec, shape, inputs)
    if isinstance(module, nn.Conv):
        if module.mask is not None:
            return MASKED
        return Product.of_convolution(module, inputs.shape[-1], module.features)
    assert isinstance(module, nn.Embed), "one of KINDS"
    return Product(Matrix.plain("embedding", (module.num_embeddings, module.features)))


def einsum_product(array: str, spec: str, shape: tuple[int, ...], inputs: Array) -> Product | str:
    """How an einsum of `inputs` with an array is a product, or in words why it is none."""
    product = Product.of_einsum(Matrix.of_einsum(array, spec, shape), spec, inputs)
    return f"{spec!r} is no product with one matrix" if product is None else product


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def layer_number(path: str) -> int | None:
    """The number of the layer that a Linen module is in: the first in its path, 3 in `h.3`, `layers_3` or `Block_3`.

    The number in a layer's own automatic name (`Dense_0`) counts layers of one class, so it is none.
    """
    *above, module_name = path.split(".")
    names = above if _AUTO_NAME.fullmatch(module_name) else [*above, module_name]
    numbers = (re.fullmatch(r"(?:.*_)?(\d+)", name) for name in names)
    return next((int(match[1]) for match in numbers if match), None)
