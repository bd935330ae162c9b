"""The matrix in a plain Flax NNX layer: its sizes, its values, its bias, and the way back into the layer.

Layers made by `nnx.vmap` hold their arrays stacked along axes in front, `[L, …]` or `[L, M, …]`, while their attributes
speak of one of them. Everything here takes and gives arrays with those axes, written `*stack`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx

from mora_jax.adapters.matching.forms import bias_param, equation_of, form_of, kernel_of
from mora_jax.adapters.products.explicit_mesh import cut_like, whole
from mora_jax.adapters.products.matmul import widened

Array = jax.Array


def einsum_axes(spec: str | None, kernel_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Contracted and free axes of an einsum's kernel, or None where it is no product with a matrix."""
    if spec is None:
        return None
    spec = spec.replace(" ", "")
    operands, _, output = spec.partition("->")
    left, _, right = operands.partition(",")
    if "..." in right or len(set(right)) != len(right) or len(right) != len(kernel_shape):
        return None
    contracted = tuple(i for i, label in enumerate(right) if label in left and label not in output)
    free = tuple(i for i, label in enumerate(right) if label not in left and label in output)
    if len(contracted) + len(free) != len(right) or not contracted or not free:
        return None
    return contracted, free


def einsum_matrix(spec: str, kernel_shape: tuple[int, ...], ndim: int):
    """How to see an einsum as `[..., in] @ [in, out]`.

    Returns:
        The input's transposition (kept axes, then contracted ones in the kernel's order), the kernel's (contracted,
        free) axes, and the transposition of `[kept..., free...]` to the output; None where it is no such product.
    """
    axes = einsum_axes(spec, kernel_shape)
    if axes is None:
        return None
    contracted, free = axes
    operands, _, output = spec.partition("->")
    left, _, right = operands.partition(",")
    if "..." in left:
        # Stand-in labels for the axes under the ellipsis; upper code points can't collide with letters.
        hidden = "".join(chr(0x1000 + i) for i in range(ndim - len(left.replace("...", ""))))
        left, output = left.replace("...", hidden), output.replace("...", hidden)
    if len(left) != ndim or len(set(left)) != len(left):
        return None
    in_labels = [right[a] for a in contracted]
    kept = [label for label in left if label not in in_labels]
    if any(label not in output for label in kept):
        return None
    result = kept + [right[a] for a in free]
    return (
        [left.index(label) for label in kept + in_labels],
        (contracted, free),
        [result.index(label) for label in output],
    )


def weight_of(layer: Any) -> nnx.Variable:
    """The variable that holds the matrix."""
    return layer.embedding if isinstance(layer, nnx.Embed) else kernel_of(layer)


def stack_of(layer: Any) -> tuple[int, ...]:
    """The axes in front of the kernel that `nnx.vmap` made, `()` without any."""
    weight = weight_of(layer)
    return tuple(weight.shape[: max(0, len(weight.shape) - _plain_ndim(layer))])


def _plain_ndim(layer: Any) -> int:
    if isinstance(layer, nnx.LinearGeneral):
        return len(layer.in_features) + len(layer.out_features)
    if form_of(layer) is not None:
        right = (equation_of(layer) or "").partition("->")[0].partition(",")[2]
        return len(right) if right and "..." not in right else len(kernel_of(layer).shape)
    return 2


def stacked_in_front(layer: Any) -> bool:
    """Whether what follows the leading axes is the layer that its attributes speak of."""
    weight = weight_of(layer)
    own = weight.shape[len(stack_of(layer)) :]
    if isinstance(layer, nnx.Linear):
        return own == (layer.in_features, layer.out_features)
    if isinstance(layer, nnx.Embed):
        return own == (layer.num_embeddings, layer.features)
    if isinstance(layer, nnx.LinearGeneral):
        return own == (*layer.in_features, *layer.out_features)
    return not isinstance(layer, nnx.Einsum) or own == tuple(layer.kernel_shape)


def _own_shape(layer: Any) -> tuple[int, ...]:
    """The shape of one kernel."""
    return tuple(weight_of(layer).shape[len(stack_of(layer)) :])


def matrix_shape(layer: nnx.Module) -> tuple[int, int] | None:
    """`(in_features, out_features)` of the matrix in a plain layer, or None where it holds no single matrix."""
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.Embed):
        return layer.num_embeddings, layer.features
    if isinstance(layer, nnx.LinearGeneral):
        if layer.batch_axis:
            return None
        return math.prod(layer.in_features), math.prod(layer.out_features)
    if form_of(layer) is not None:
        shape = _own_shape(layer)
        axes = einsum_axes(equation_of(layer), shape)
        if axes is None:
            return None
        contracted, free = axes
        return math.prod(shape[a] for a in contracted), math.prod(shape[a] for a in free)
    return None


def _einsum_axes_of(layer: nnx.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axes = einsum_axes(equation_of(layer), _own_shape(layer))
    assert axes is not None, "only products with a matrix get adapters"
    return axes


def _free_order(layer: Any) -> list[int]:
    """The axes of one kernel, contracted ones first."""
    if form_of(layer) is None:
        return list(range(len(_own_shape(layer))))
    contracted, free = _einsum_axes_of(layer)
    return [*contracted, *free]


def _transposed(array: Array, order: list[int], stack: tuple[int, ...]) -> Array:
    """The axes behind the stack in another order."""
    return array.transpose(*range(len(stack)), *(len(stack) + axis for axis in order))


def _inverse(order: list[int]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]


def matrix_of(layer: Any) -> Array:
    """The matrix `[*stack, in, out]` of a layer that has one, in the layer's dtype."""
    weight = weight_of(layer)[...]
    if isinstance(layer, nnx.Embed | nnx.Linear):
        return weight
    shape, stack = matrix_shape(layer), stack_of(layer)
    assert shape is not None, "only products with a matrix get adapters"
    return _transposed(whole(weight), _free_order(layer), stack).reshape(*stack, *shape)


def put_matrix(layer: Any, matrix: Array) -> None:
    """Writes the matrix of a layer, laid out as `matrix_of` gives it."""
    weight = weight_of(layer)
    order, shape, stack = _free_order(layer), _own_shape(layer), stack_of(layer)
    if not isinstance(layer, nnx.Embed | nnx.Linear):
        matrix = _transposed(matrix.reshape(*stack, *(shape[a] for a in order)), _inverse(order), stack)
    weight[...] = cut_like(matrix, weight[...])


def add_to_bias(layer: Any, change: Array) -> None:
    """Adds `change [*stack, out]`, in the order of `matrix_of`, to a layer's bias; makes one where there is none."""
    own_bias, stack = bias_param(layer), stack_of(layer)
    if form_of(layer) is not None:
        free, own = _einsum_axes_of(layer)[1], _own_shape(layer)
        change = change.reshape(*stack, *(own[axis] for axis in free))
        change = _transposed(change, _output_order(layer, free), stack)
    elif isinstance(layer, nnx.LinearGeneral):
        change = change.reshape(*stack, *layer.out_features)
    if own_bias is None:
        layer.bias = nnx.Param(change.astype(kernel_of(layer).dtype))
        _say_bias(layer, change.shape[len(stack) :])
        return
    bias = own_bias[...]
    total = widened(whole(bias)) + whole(change).reshape(bias.shape)
    own_bias[...] = cut_like(total.astype(bias.dtype), bias)


def bias_of(layer: Any) -> Array | None:
    """The bias `[*stack, out]` of a layer, in the order of `matrix_of`."""
    own_bias, stack = bias_param(layer), stack_of(layer)
    if own_bias is None:
        return None
    bias = own_bias[...]
    if form_of(layer) is not None:
        free, own = _einsum_axes_of(layer)[1], _own_shape(layer)
        order = _output_order(layer, free)
        bias = _transposed(whole(bias).reshape(*stack, *(own[free[i]] for i in order)), _inverse(order), stack)
    if bias.ndim == len(stack) + 1:
        return bias
    return whole(bias).reshape(*stack, math.prod(bias.shape[len(stack) :]))


def _output_order(layer: nnx.Module, free: tuple[int, ...]) -> list[int]:
    """Which of the kernel's free axes comes when in the output."""
    right, _, output = (equation_of(layer) or "").partition(",")[2].partition("->")
    return sorted(range(len(free)), key=lambda i: output.index(right[free[i]]))


def drop_bias(layer: Any) -> None:
    """Takes away a bias that `add_to_bias` made."""
    layer.bias = nnx.data(None)
    _say_bias(layer, None)


def _say_bias(layer: Any, shape: tuple[int, ...] | None) -> None:
    """Keeps what a layer says about its bias true."""
    if isinstance(layer, nnx.Einsum):
        layer.bias_shape = shape
    elif hasattr(layer, "use_bias"):
        layer.use_bias = shape is not None
