"""Flax NNX layers with an adapter beside their kernel.

Each is a subclass of the layer that it adapts and keeps that layer's variables, so state paths, checkpoints and
`isinstance` checks go on working; `attach` turns a layer into its adapted form in place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.adapter import Adapter, Layout, PartwiseDelta
from mora_jax.adapters.dense import adapted_dot

Array = jax.Array


class Adapted:
    """Mixin: an adapter, its dropout, and the way back to the plain layer.

    Attributes:
        adapter: the arrays of the update.
        adapter_dropout: acts on the input of the adapter path only; None without dropout.
    """

    # A mixin without slots, listed after the plain class: the layouts agree, so a layer can change between the two.
    if not TYPE_CHECKING:
        __slots__ = ()
    adapter: Any  # an Adapter, with arrays named by its method
    adapter_dropout: nnx.Dropout | None
    kernel: Any  # the plain layer's

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None) -> None:
        """Adds `adapter` to a layer that has none."""
        self.adapter = adapter
        rate = adapter.config.dropout
        self.adapter_dropout = nnx.Dropout(rate, rngs=rngs) if rate > 0 else None

    def take_adapter(self) -> Adapter:
        """Removes and returns the adapter; the layer is of its plain class again."""
        adapter = self.adapter
        del self.adapter, self.adapter_dropout
        self.__class__ = plain_class(type(self))
        return adapter

    def update(self, x: Array) -> Array:
        """What the adapter adds for `x [..., in]`: float32 `[..., out]`."""
        adapter = self.adapter
        if self.adapter_dropout is not None:
            x = self.adapter_dropout(x)
        flat = x.reshape(-1, adapter.in_features)
        y = adapter.delta(adapter.config, adapter.out_features, flat, adapter.params())
        return y.reshape(*x.shape[:-1], adapter.out_features)

    @property
    def dropping(self) -> bool:
        return self.adapter_dropout is not None and not self.adapter_dropout.deterministic

    def add_to_kernel(self, delta: Array) -> None:
        """Adds a float32 update `[in, out]` to the kernel: summed in float32, rounded once."""
        kernel = self.kernel[...]
        self.kernel[...] = (kernel.astype(jnp.float32) + delta.reshape(kernel.shape)).astype(kernel.dtype)


def plain_class(adapted: type) -> type:
    """The class of the plain layer under an adapted one."""
    return next(base for base in adapted.__mro__ if not issubclass(base, Adapted))


class AdaptedLinear(nnx.Linear, Adapted):
    """`nnx.Linear` with an adapter: `y = x W + b + update(x)`."""

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        custom = self.precision is not None or self.dot_general is not jax.lax.dot_general
        if custom or out_sharding is not None or self.preferred_element_type is not None or self.dropping:
            # A layer with a product of its own keeps it.
            y = nnx.Linear.__call__(self, inputs, out_sharding)
            return (y + self.update(inputs.astype(y.dtype))).astype(y.dtype)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        adapter = self.adapter
        layout = Layout((self.out_features,), 0, (self.out_features,))
        delta = adapter.fuse(layout, (adapter.config,)) or PartwiseDelta(layout, (type(adapter),), (adapter.config,))
        y = adapted_dot(delta, x.reshape(-1, x.shape[-1]), kernel, bias, (adapter.params(),))
        return y.reshape(*x.shape[:-1], self.out_features)


class AdaptedLinearGeneral(nnx.LinearGeneral, Adapted):
    """`nnx.LinearGeneral` with an adapter on the matrix that its contracted and its new axes form."""

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        y = nnx.LinearGeneral.__call__(self, inputs, out_sharding)
        axes = [a % inputs.ndim for a in self.axis]
        kept = [a for a in range(inputs.ndim) if a not in axes]
        x = inputs.astype(y.dtype).transpose(*kept, *axes)
        x = x.reshape(*(inputs.shape[a] for a in kept), -1)
        return (y + self.update(x).reshape(y.shape)).astype(y.dtype)


class AdaptedEinsum(nnx.Einsum, Adapted):
    """`nnx.Einsum` with an adapter, where the einsum is a product with a matrix (see `einsum_matrix`)."""

    def __call__(self, inputs: Array, einsum_str: str | None = None, out_sharding=None) -> Array:
        y = nnx.Einsum.__call__(self, inputs, einsum_str, out_sharding)
        spec = (einsum_str or self.einsum_str).replace(" ", "")
        matrix = einsum_matrix(spec, self.kernel.shape, inputs.ndim)
        if matrix is None:
            raise ValueError(f"einsum {spec!r} is no product with a matrix, so it can't carry an adapter")
        to_in, to_out, permutation = matrix
        x = inputs.astype(y.dtype).transpose(*to_in)
        leading = x.shape[: x.ndim - len(to_out[0])]
        kernel_out = [self.kernel.shape[a] for a in to_out[1]]
        update = self.update(x.reshape(*leading, -1)).reshape(*leading, *kernel_out)
        return (y + update.transpose(*permutation)).astype(y.dtype)

    def add_to_kernel(self, delta: Array) -> None:
        axes = einsum_axes(self.einsum_str, self.kernel.shape)
        assert axes is not None, "only products with a matrix get adapters"
        contracted, free = axes
        order = (*contracted, *free)
        kernel = self.kernel[...]
        shaped = delta.reshape([kernel.shape[a] for a in order])
        inverse = [order.index(a) for a in range(kernel.ndim)]
        self.kernel[...] = (kernel.astype(jnp.float32) + shaped.transpose(*inverse)).astype(kernel.dtype)


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


class AdaptedEmbed(nnx.Embed, Adapted):
    """`nnx.Embed` with LoRA: row v of the table becomes `E[v] + scaling · A[v] B`.

    As in PEFT, A starts at zero and B is normal. `attend` (a tied output head) uses the adapted table too, so that
    lookup, head and a merged table agree.
    """

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        y = nnx.Embed.__call__(self, inputs)
        p = self.adapter.params()
        rows = jnp.take(p["lora_a"], inputs, axis=0)
        if self.dropping:
            raise ValueError("dropout has no meaning on token ids; use dropout=0 for embeddings")
        return (y + (rows @ p["lora_b"]) * p["scaling"]).astype(y.dtype)

    def attend(self, query: Array, out_sharding=None) -> Array:
        y = nnx.Embed.attend(self, query)
        p = self.adapter.params()
        return (y + ((query @ p["lora_b"].T) @ p["lora_a"].T) * p["scaling"]).astype(y.dtype)

    def add_to_kernel(self, delta: Array) -> None:
        table = self.embedding[...]
        self.embedding[...] = (table.astype(jnp.float32) + delta).astype(table.dtype)


ADAPTED: dict[type, type] = {
    nnx.Linear: AdaptedLinear,
    nnx.LinearGeneral: AdaptedLinearGeneral,
    nnx.Einsum: AdaptedEinsum,
    nnx.Embed: AdaptedEmbed,
}


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
    if isinstance(layer, nnx.Einsum):
        axes = einsum_axes(layer.einsum_str, layer.kernel.shape)
        if axes is None:
            return None
        contracted, free = axes
        shape = layer.kernel.shape
        return math.prod(shape[a] for a in contracted), math.prod(shape[a] for a in free)
    return None
