"""The decoder's slot for the matrices of experts: one a row of the input, each with an adapter of its own or without.

Kernels are `[L, E, in, *out]`, adapters have the same axes in front. Gate and up are seen as two matrices or as one,
as targets name them: one LoRA on both shares its A, which is what PEFT makes of transformers' `gate_up_proj`.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax import Array

from mora_jax.adapters.base import params_of
from mora_jax.adapters.products.grouped import grouped_dot
from mora_jax.adapters.products.matmul import wide, widened
from mora_jax.adapters.projection import Part, Projection, TokenDropout, joined


class Groups(NamedTuple):
    """Which expert each of R rows has, which are sorted by it.

    Attributes:
        sizes: int32 `[E]`, the rows of each expert.
        owner: int32 `[R]`, the expert of each row; E for rows of none, which come last and give 0.
    """

    sizes: Array
    owner: Array


class ExpertProjection(Projection):
    """`y = x W[e] + b[e] + updates` for rows that have an expert e each.

    Args:
        parts: the named matrices of an expert.
        whole: what all of them together are called.
        layer_path: the end of the path of a layer's experts in transformers, where each matrix is a parameter for all.
        seen_whole: whether they are one matrix for adapters where targets don't say it.
        *args, **making: as for `Projection`, with `experts`.
    """

    def __init__(
        self, parts: tuple[Part, ...], *args: Any, whole: str, layer_path: str, seen_whole: bool = False, **making: Any
    ):
        super().__init__(parts, *args, **making)
        self.matrices = self.parts
        self.whole, self.layer_path = whole, layer_path
        self._default = seen_whole
        self.see(whole=None)

    def see(self, *, whole: bool | None) -> None:
        """Makes the matrices of an expert one for adapters, or as many as there are; None: as `seen_whole` said."""
        whole = self._default if whole is None else whole
        sizes = tuple(part.size for part in self.matrices)
        self.parts = (Part(self.whole, sum(sizes)),) if whole else self.matrices
        self.layout = replace(self.layout, sizes=tuple(part.size for part in self.parts))

    @property
    def seen_whole(self) -> bool:
        """Whether several matrices are one for adapters."""
        return len(self.parts) < len(self.matrices)

    @property
    def local_experts(self) -> int:
        """How many experts a device has, on leaves without layer axis."""
        return len(jax.tree.leaves(self.kernel.get_value())[0])

    @property
    def parameter(self) -> str:
        """The end of the path that the parameter for all experts of a layer has in transformers."""
        return f"{self.layer_path}.{'gate_up_proj' if len(self.matrices) > 1 else 'down_proj'}"

    def names(self, part: str) -> tuple[str, ...]:
        """How targets may call a part for all experts of a layer: as its path does, and as Llama does."""
        llama = ("gate_proj", "up_proj") if len(self.matrices) > 1 else ("down_proj",)
        plain = {matrix.name: name for matrix, name in zip(self.matrices, llama, strict=True)}.get(part, part)
        return tuple(f"{self.layer_path}.{name}" for name in dict.fromkeys((part, plain)))

    def named_by(self, says: Callable[[str], bool]) -> bool | None:
        """Whether a rule for paths and names says what all matrices together are called; None: neither, or both."""

        def said(part: str) -> bool:
            return any(map(says, (self.module_path(part, 0, 0), *self.names(part))))

        together, each = said(self.whole), any(said(matrix.name) for matrix in self.matrices)
        return None if together == each else together

    def matrix_slices(self) -> list[tuple[Part, tuple[slice, ...]]]:
        """The matrices of an expert, each with its index in `[..., *out_shape]`, however adapters see them."""
        starts = itertools.accumulate((matrix.size for matrix in self.matrices), initial=0)
        return [(m, self.slice_of(start, m.size)) for m, start in zip(self.matrices, starts, strict=False)]

    def __call__(self, x: Array, groups: Groups, *, token_dropout: TokenDropout | None = None) -> Array:  # type: ignore[override]
        """`x [R, in]` → `[R, *out_shape]` in the dtype of `x`, on leaves without layer axis.

        Args:
            x: rows sorted by expert, in the compute dtype.
            groups: whose they are.
            token_dropout: turns the adapters' dropout on, for tokens of these rows.
        """
        kernel = jax.tree.map(lambda array: array.reshape(*array.shape[:2], -1), self.kernel.get_value())
        y = grouped_dot(x, kernel, groups.sizes)
        updates = [self._update(i, x, groups, token_dropout) for i in range(len(self.parts))]
        if (update := joined(self.layout, updates, wide(x.dtype), len(x))) is not None:
            y = y + update
        if self.bias is not None:
            bias = self.bias.get_value().reshape(len(groups.sizes), -1).at[groups.owner]
            y = y + widened(bias.get(mode="fill", fill_value=0))
        return y.astype(x.dtype).reshape(len(x), *self.layout.out_shape)

    def _update(self, index: int, x: Array, groups: Groups, token_dropout: TokenDropout | None) -> Array | None:
        adapter = self.adapters.get(self.parts[index].name)
        if adapter is None:
            return None
        if token_dropout is not None and adapter.config.dropout:
            x = token_dropout.fold(index).drop(x, adapter.config.dropout)

        def product(rows: Array, w: Array) -> Array:
            return grouped_dot(rows, w, groups.sizes * (len(rows) // len(x)))

        return adapter.grouped(adapter.config, self.layout.part_features(index), x, params_of(adapter), product)
