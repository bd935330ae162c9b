"""Flax NNX layers with an adapter beside their kernel.

Each is a subclass of the layer that it adapts and keeps that layer's variables, so state paths, checkpoints and
`isinstance` checks go on working; `attach` turns a layer into its adapted form in place.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.base import Adapter, params_of
from mora_jax.adapters.matrices import einsum_matrix, matrix_of, stack_of
from mora_jax.adapters.products.adapted_matmul import adapted_product
from mora_jax.adapters.products.around import ProductView, transformed_input, view_by_axes, with_adapter
from mora_jax.adapters.products.explicit_mesh import explicit_axes, placed_like
from mora_jax.adapters.products.fused import FusedLayout
from mora_jax.adapters.products.matmul import widened
from mora_jax.adapters.stacks import stacked_dropout
from mora_jax.environment import check_versions

check_versions()  # every method's module comes this way

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

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None) -> None:
        """Adds `adapter` to a layer that has none."""
        self.adapter = adapter
        rate = adapter.config.dropout
        self.adapter_dropout = stacked_dropout(rate, rngs, stack_of(self)) if rate > 0 else None

    def take_adapter(self) -> Adapter:
        """Removes and returns the adapter; the layer is of its plain class again."""
        adapter = self.adapter
        del self.adapter, self.adapter_dropout
        self.__class__ = plain_class(type(self))
        return adapter

    @property
    def dropping(self) -> bool:
        """Whether the adapter has a dropout that is on."""
        return self.adapter_dropout is not None and not self.adapter_dropout.deterministic

    def _on_mesh(self, plain: Callable[[Array], Array], again: Callable[[Any, Array], Array], x: Array) -> Array:
        """A call on a mesh with Explicit axes: placed as the plain layer's output, computed with the axes Auto.

        Args:
            plain: the plain layer's call, which says how the output is sharded.
            again: the adapted layer's call, `(layer, x)`.
            x: the input.
        """
        graphdef, state = nnx.split(self)

        def run(state: nnx.State, x: Array) -> Array:
            return again(nnx.merge(graphdef, state), x)

        y = placed_like(jax.eval_shape(plain, x), run, state, x)
        if self.adapter_dropout is not None and self.dropping:
            # Only the copy has drawn a key; behind it, since the copy's state holds these same variables.
            self.adapter_dropout.rngs()
        return y

    def _product(self, x: Array, matrix: Array, bias: Array | None, stored: Callable[[], Array]) -> Array:
        """The adapted product: `x [..., in]`, `matrix [in, out]` and `bias [out]` in one dtype → `[..., out]`.

        The bias is added to the rounded product, as Flax's layers add it. `stored` gives the matrix as it is stored.
        """
        adapter = self.adapter
        _refuse_complex(x)
        layout = FusedLayout((adapter.out_features,), 0, (adapter.out_features,))
        dropout = self.adapter_dropout
        drop = (lambda _, x: dropout(x)) if dropout is not None and self.dropping else None
        y = adapted_product(layout, (adapter,), x.reshape(-1, x.shape[-1]), matrix, None, drop, stored)
        if bias is not None:
            change = None if adapter.additive else adapter.added_bias(adapter.config, params_of(adapter), bias)
            y = (y + bias if change is None or hasattr(adapter, "bias") else widened(y) + bias + change).astype(x.dtype)
        return y.reshape(*x.shape[:-1], adapter.out_features)

    def _around(
        self,
        view: ProductView,
        call: Callable[[Array], Array],
        inputs: Array,
        kernel: Callable[[], Array],
        bias: Array | None = None,
    ) -> Array:
        """The adapter around a product that the layer keeps: `call` computes it, `view` says how it is one."""
        adapter, params = self.adapter, params_of(self.adapter)
        _refuse_complex(inputs)
        own = type(adapter), adapter.config, params, view
        inputs = transformed_input(*own, inputs)
        drop = (lambda x: x) if self.adapter_dropout is None else self.adapter_dropout
        return with_adapter(*own, call(inputs), inputs, kernel, bias, adapter.out_features, drop)


def refuse_stack(layer: Any) -> None:
    """Raises `ValueError` where a layer's arrays are those of several."""
    if stack := stack_of(layer):
        raise ValueError(f"this layer is a stack of {list(stack)} layers: call it inside nnx.scan or nnx.vmap")


def _refuse_complex(x: Array) -> None:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"adapters have no complex form, and the input of an adapted layer is {x.dtype}")


def plain_class(adapted: type) -> type:
    """The class of the plain layer under an adapted one."""
    return next(base for base in adapted.__mro__ if not issubclass(base, Adapted))


class AdaptedLinear(nnx.Linear, Adapted):
    """`nnx.Linear` with an adapter: `y = x W + b + update(x)`."""

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        refuse_stack(self)
        if explicit_axes(inputs, self.kernel[...]):
            plain = functools.partial(nnx.Linear.__call__, self, out_sharding=out_sharding)
            return self._on_mesh(plain, AdaptedLinear.__call__, inputs)
        custom = self.precision is not None or self.dot_general is not jax.lax.dot_general
        if custom or out_sharding is not None or self.preferred_element_type is not None:
            call = functools.partial(nnx.Linear.__call__, self, out_sharding=out_sharding)
            bias = None if self.bias is None else self.bias[...]
            return self._around(ProductView(), call, inputs, lambda: self.kernel[...], bias)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return self._product(x, kernel, bias, lambda: self.kernel[...])


class AdaptedLinearGeneral(nnx.LinearGeneral, Adapted):
    """`nnx.LinearGeneral` with an adapter on the matrix that its contracted and its new axes form."""

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        refuse_stack(self)
        if explicit_axes(inputs, self.kernel[...]):
            plain = functools.partial(nnx.LinearGeneral.__call__, self, out_sharding=out_sharding)
            return self._on_mesh(plain, AdaptedLinearGeneral.__call__, inputs)
        axes = [a % inputs.ndim for a in self.axis]
        kept = [a for a in range(inputs.ndim) if a not in axes]
        view = view_by_axes(inputs, [*kept, *axes], len(kept), self.out_features)
        if self.adapter.only_adds:
            call = functools.partial(nnx.LinearGeneral.__call__, self, out_sharding=out_sharding)
            return self._around(view, call, inputs, lambda: matrix_of(self))
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        x, bias = view.flat(x), None if bias is None else bias.reshape(-1)
        y = self._product(x, kernel.reshape(x.shape[-1], -1), bias, lambda: matrix_of(self))
        return y.reshape(*x.shape[:-1], *self.out_features)


class AdaptedEinsum(nnx.Einsum, Adapted):
    """`nnx.Einsum` with an adapter, where the einsum is a product with a matrix (see `einsum_matrix`)."""

    def __call__(self, inputs: Array, einsum_str: str | None = None, out_sharding=None) -> Array:
        refuse_stack(self)
        spec = self.einsum_str.replace(" ", "")
        if einsum_str is not None and einsum_str.replace(" ", "") != spec:
            raise ValueError(
                f"the adapter on this nnx.Einsum is for {spec!r}, and merges for it; with {einsum_str!r}, given at the "
                "call, it would be another"
            )
        if explicit_axes(inputs, self.kernel[...]):
            plain = functools.partial(nnx.Einsum.__call__, self, out_sharding=out_sharding)
            return self._on_mesh(plain, AdaptedEinsum.__call__, inputs)
        found = einsum_matrix(spec, self.kernel.shape, inputs.ndim)
        if found is None:
            raise ValueError(f"einsum {spec!r} is no product with a matrix, so it can't carry an adapter")
        to_in, (contracted, free), permutation = found
        sizes = [self.kernel.shape[a] for a in free]
        view = view_by_axes(inputs, to_in, inputs.ndim - len(contracted), sizes, permutation)
        if self.adapter.only_adds:
            call = functools.partial(nnx.Einsum.__call__, self, out_sharding=out_sharding)
            return self._around(view, call, inputs, lambda: matrix_of(self))
        x, kernel = self.promote_dtype((inputs, self.kernel[...]), dtype=self.dtype)
        x, matrix = view.flat(x), kernel.transpose(*contracted, *free).reshape(-1, math.prod(sizes))
        bias = _einsum_bias(self, x.ndim - 1, permutation, sizes)
        bias = None if bias is None else bias.astype(x.dtype)
        return view.shaped(self._product(x, matrix, bias, lambda: matrix_of(self)))


def _einsum_bias(layer: nnx.Einsum, kept: int, permutation: list[int], sizes: list[int]) -> Array | None:
    """The bias `[out]` in the order of the kernel's free axes; in the layer it has the order of the output."""
    if layer.bias is None:
        return None
    order = [axis - kept for axis in permutation if axis >= kept]
    bias = layer.bias[...].reshape([sizes[axis] for axis in order])
    return bias.transpose([order.index(axis) for axis in range(len(order))]).reshape(-1)


class AdaptedEmbed(nnx.Embed, Adapted):
    """`nnx.Embed` with an adapter: row v of the table becomes `gain ⊙ (E[v] + update[v])`.

    As in PEFT, LoRA's A starts at zero and its B is normal, and dropout does not act on token ids. `attend` (a tied
    output head) uses the adapted table too, so that lookup, head and a merged table agree.
    """

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None) -> None:
        """Adds `adapter` to a table that has none; dropout doesn't act on token ids."""
        self.adapter = adapter
        self.adapter_dropout = None

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        refuse_stack(self)
        if explicit_axes(inputs, self.embedding[...]):
            plain = functools.partial(super().__call__, out_sharding=out_sharding)
            return self._on_mesh(plain, lambda layer, ids: layer(ids), inputs)
        y = super().__call__(inputs, out_sharding)
        adapter, p = self.adapter, params_of(self.adapter)
        total = widened(y) + adapter.rows(inputs, y.dtype, p)
        gain = adapter.output_gain(adapter.config, p, lambda: self.embedding[...])
        return (total if gain is None else total * gain).astype(y.dtype)

    def attend(self, query: Array, out_sharding=None) -> Array:
        """The table as an output head: `[..., features]` → `[..., num_embeddings]`."""
        refuse_stack(self)
        if explicit_axes(query, self.embedding[...]):
            plain = functools.partial(super().attend, out_sharding=out_sharding)
            return self._on_mesh(plain, lambda layer, query: layer.attend(query), query)
        adapter, p = self.adapter, params_of(self.adapter)
        gain = adapter.output_gain(adapter.config, p, lambda: self.embedding[...])
        query = query if gain is None else (query * gain).astype(query.dtype)
        y = super().attend(query, out_sharding)
        return (y + adapter.scores(query.astype(y.dtype), p)).astype(y.dtype)

    def table(self) -> Array:
        """The adapted table, float32 `[V, D]`."""
        return self.adapter.merged_kernel(self.adapter.config, params_of(self.adapter), self.embedding[...])


ADAPTED: dict[type, type] = {
    nnx.Linear: AdaptedLinear,
    nnx.LinearGeneral: AdaptedLinearGeneral,
    nnx.Einsum: AdaptedEinsum,
    nnx.Embed: AdaptedEmbed,
}


_FLAX = tuple(ADAPTED)


@functools.cache
def adapted_class(plain: Any) -> type | None:
    """The adapted form of a layer class, or None.

    A subclass of one of Flax's layers has one where its own call, if it has any, goes on to `super().__call__`: the
    adapter then stands beside the product in there, as a merged kernel would. One that computes the product itself
    would pass the adapter by.
    """
    if plain in ADAPTED:
        return ADAPTED[plain]
    base = next((one for one in plain.__mro__ if one in _FLAX), None)
    if base is None:
        return None
    if base is nnx.Embed:
        return types.new_class(f"Adapted{plain.__name__}", (AdaptedEmbed, plain))
    between = plain.__mro__[: plain.__mro__.index(base)]
    if not all(_goes_on(vars(one)["__call__"]) for one in between if "__call__" in vars(one)):
        return None
    return types.new_class(f"Adapted{plain.__name__}", (plain, ADAPTED[base]))


def _goes_on(call: Any) -> bool:
    """Whether a method's code names `super` and `__call__`; it can't be run here to see."""
    code = getattr(inspect.unwrap(call), "__code__", None)
    return code is not None and {"super", "__call__"} <= set(code.co_names)


def to_adapted_class(layer: Any) -> None:
    """Makes a plain layer, in place, one of the adapted class, which is still to be given its adapter."""
    kind: Any = type(layer)
    form = adapted_class(kind)
    if form is None:
        raise TypeError(f"{kind.__name__} has no adapted form")
    layer.__class__ = form
