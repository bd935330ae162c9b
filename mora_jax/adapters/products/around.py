"""An adapter around a layer's own call, for layers that compute their product themselves.

`y = call(T(x))` stays the layer's; the change of the kernel, the update, the gain and the bias are added to it:
`y + (gain - 1) ⊙ (y - b) + gain ⊙ (x (K(W) - W) + delta(x)) + added bias`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mora_jax.adapters.products.adapted_matmul import update_of
from mora_jax.adapters.products.matmul import widened

Array = jax.Array


def _same(x: Array) -> Array:
    return x


@dataclass(frozen=True)
class ProductView:
    """One call of a layer, seen as a product with a matrix `[in, out]`.

    Attributes:
        flat: the call's input as `[..., in]`.
        unflat: the inverse of `flat`.
        shaped: `[..., out]`, in the order of the matrix, as the call's output.
    """

    flat: Callable[[Array], Array] = _same
    unflat: Callable[[Array], Array] = _same
    shaped: Callable[[Array], Array] = _same


def view_by_axes(
    inputs: Array, order: Sequence[int], kept: int, sizes: Sequence[int], permutation: Sequence[int] | None = None
) -> ProductView:
    """The view of a call that contracts some axes of its input.

    Args:
        inputs: the input.
        order: its axes, those that stay first.
        kept: how many stay.
        sizes: of the new axes of the output, in the order of the matrix.
        permutation: of the axes that stay and those, as the output has them; None where it has them so.
    """
    shape = [inputs.shape[axis] for axis in order]

    def flat(x: Array) -> Array:
        return x.transpose(*order).reshape(*shape[:kept], math.prod(shape[kept:]))

    def shaped(y: Array) -> Array:
        y = y.reshape(*y.shape[:-1], *sizes)
        return y if permutation is None else y.transpose(*permutation)

    return ProductView(flat, lambda x: x.reshape(shape).transpose(*np.argsort(order)), shaped)


def transformed_input(method: Any, config: Any, params: dict[str, Array], view: ProductView, inputs: Array) -> Array:
    """What the layer's own call is given in place of its inputs."""
    flat = view.flat(inputs)
    found = method.transform_input(config, params, flat.reshape(-1, flat.shape[-1]))
    return inputs if found is None else view.unflat(found.reshape(flat.shape))


def with_adapter(
    method: Any,
    config: Any,
    params: dict[str, Array],
    view: ProductView,
    y: Array,
    inputs: Array,
    kernel: Callable[[], Array],
    bias: Array | None,
    out_features: int,
    drop: Callable[[Array], Array] = _same,
) -> Array:
    """What an adapted layer gives.

    Args:
        method, config, params: of its adapter.
        view: how its call is a product.
        y: what its own call gives for `inputs`.
        inputs: as `transformed_input` gave them.
        kernel: gives its matrix `[in, out]`.
        bias: `[out]`, in the order of the matrix, or None.
        out_features: columns of the matrix.
        drop: dropout on the adapter's input `[..., in]`.

    Returns:
        As `y`.
    """
    total, rank = widened(y), view.flat(inputs).ndim

    def spread(vector: Array) -> Array:
        return view.shaped(vector.reshape(*[1] * (rank - 1), -1))

    gain = method.output_gain(config, params, kernel)
    if gain is not None:
        gain = spread(gain)
        # As a change, so that a gain of 1 changes no bit.
        total = total + (gain - 1.0) * (total if bias is None else total - spread(widened(bias)))
    if method.additive or method.transforms_kernel:
        x = drop(view.flat(inputs.astype(y.dtype)))
        update = update_of(method, config, params, x.reshape(-1, x.shape[-1]), out_features, kernel)
        assert update is not None, "there is one"
        update = view.shaped(update.reshape(*x.shape[:-1], out_features))
        total = total + (update if gain is None else update * gain)
    more = method.added_bias(config, params, bias)
    return (total if more is None else total + spread(more)).astype(y.dtype)
