"""MoRA on several matrices with one input, computed together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax.adapters.methods.mora_maps import SHARED, Map, Sides, rotated_squares
from mora_jax.adapters.products.fused import FusedLayout
from mora_jax.adapters.products.matmul import added, dot32, dot32_nt, dot32_tn, wide
from mora_jax.backend import untransposed

Array = jax.Array


class _Group(NamedTuple):
    """Parts whose M multiply the same numbers: one product.

    Attributes:
        inner: from the input to those.
        summed: whether they are sums, which are kept for the backward pass; else the input is.
        rotated: whether each block has its own rotation of M.
        blocks: of q features.
        parts: numbers of the parts, each with its map to the output.
    """

    inner: Map
    summed: bool
    rotated: bool
    blocks: int
    parts: tuple[tuple[int, Map], ...]

    def held(self, x: Array) -> Array:
        """What is kept of the input."""
        return self.inner(x).astype(x.dtype) if self.summed else x

    def inputs(self, held: Array) -> Array:
        """`[N, blocks · q]` of what is kept."""
        return held if self.summed else self.inner(held)

    def matrix(self, squares: list[Array], dtype: Any) -> Array:
        """The Mᵀ of the parts side by side, `[q, parts · q]`; one a block, `[blocks, …]`, where they are rotated."""
        turned = [rotated_squares(m, self.blocks) if self.rotated else m.T for m in squares]
        return untransposed(jnp.concatenate(turned, axis=-1).astype(dtype))

    def product(self, x: Array, w: Array, *, back: bool = False) -> Array:
        """`[N, blocks, …]` by `w`, or with `back` by its transpose: float32 `[N, blocks, …]`."""
        if w.ndim == 2:
            z = (dot32_nt if back else dot32)(x.reshape(-1, x.shape[-1]), w)
            return z.reshape(*x.shape[:2], z.shape[-1])
        dims = (((2,), (2 if back else 1,)), ((1,), (0,)))
        return lax.dot_general(x, w, dims, preferred_element_type=wide(x.dtype)).transpose(1, 0, 2)

    def gradient(self, x: Array, dz: Array) -> Array:
        """That of the matrix, float32 in its shape."""
        if not self.rotated:
            return dot32_tn(x.reshape(-1, x.shape[-1]), dz.reshape(-1, dz.shape[-1]))
        return lax.dot_general(x, dz, (((0,), (0,)), ((1,), (1,))), preferred_element_type=wide(x.dtype))

    def squares(self, dw: Array) -> list[Array]:
        """The gradients of each M from that of the matrix."""
        parts = jnp.split(dw, len(self.parts), axis=-1)
        if not self.rotated:
            return [part.T for part in parts]
        like = jax.ShapeDtypeStruct(dw.shape[1:2] * 2, dw.dtype)
        back = jax.linear_transpose(lambda m: rotated_squares(m, self.blocks), like)
        return [back(part)[0] for part in parts]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Width:
    """The number of input features, which what is kept of the input doesn't tell."""

    features: int


@dataclass(frozen=True)
class FusedMoRA:
    """MoRA on several matrices with one input: parts that sum alike share their sums and one product.

    The backward is written out: what autodiff makes of sums and repetitions passes over wide arrays once for each of
    their slices.
    """

    layout: FusedLayout
    kinds: tuple[str | None, ...]  # None for a bare part

    def _groups(self, width: int, params) -> list[_Group]:
        found: dict[tuple[int, _Group], list[tuple[int, Map]]] = {}
        for i, (kind, p) in enumerate(zip(self.kinds, params, strict=True)):
            if kind is not None and p is not None:
                q = p["m"].shape[0]
                inner, outer, blocks = Sides.of(kind, width, self.layout.part_features(i), q)
                rotated = kind == "rotation" and blocks > 1
                alone = _Group(inner, kind in SHARED, rotated, blocks, ())
                found.setdefault((q, alone), []).append((i, outer))
        return [group._replace(parts=tuple(parts)) for (_, group), parts in found.items()]

    def _matrices(self, groups: list[_Group], params, dtype, name: str = "m") -> list[Array]:
        return [
            group.matrix([params[i][name] * params[i]["scaling"] for i, _ in group.parts], dtype) for group in groups
        ]

    def _output(self, groups: list[_Group], held, matrices: list[Array]) -> Array:
        """float32 `[N, features]`."""
        parts: dict[int, Array] = {}
        for group, kept, w in zip(groups, held, matrices, strict=True):
            x = group.inputs(kept)
            z = group.product(_in_blocks(x, group.blocks), w)
            for (i, outer), own in zip(group.parts, jnp.split(z, len(group.parts), axis=-1), strict=True):
                parts[i] = outer(_flat(own))
        rows, dtype = len(held[0]), wide(held[0].dtype)
        bare = [
            jnp.zeros((rows, self.layout.part_features(i)), dtype) for i in range(len(self.kinds)) if i not in parts
        ]
        left = iter(bare)
        return self.layout.join([parts[i] if i in parts else next(left) for i in range(len(self.kinds))])

    def forward(self, x: Array, params):
        """As `Delta.forward`."""
        groups = self._groups(x.shape[1], params)
        held = tuple(group.held(x) for group in groups)
        return self._output(groups, held, self._matrices(groups, params, x.dtype)), (held, params, _Width(x.shape[1]))

    def moved(self, dparams):
        """As `Delta.moved`: the squares."""
        return tuple(None if d is None else dict.fromkeys(d) | {"m": d["m"]} for d in dparams)

    def tangent(self, residuals, dx: Array | None, dparams) -> Array | None:
        """As `Delta.tangent`."""
        held, params, width = residuals
        groups, dtype = self._groups(width.features, params), held[0].dtype
        terms = []
        if dx is not None:
            moved = [group.held(dx) for group in groups]
            terms.append(self._output(groups, moved, self._matrices(groups, params, dtype)))
        squares = [None if d is None else d["m"] for d in dparams]
        if any(square is not None for square in squares):
            changed = [
                None if p is None else p | {"m": jnp.zeros_like(p["m"]) if square is None else square}
                for p, square in zip(params, squares, strict=True)
            ]
            terms.append(self._output(groups, held, self._matrices(groups, changed, dtype)))
        return added(*terms) if terms else None

    def backward(self, residuals, dy: Array):
        """As `Delta.backward`."""
        held, params, width = residuals
        groups = self._groups(width.features, params)
        gradients: list[Any] = [None if p is None else dict.fromkeys(p) for p in params]
        slopes = []
        for group, kept, w in zip(groups, held, self._matrices(groups, params, dy.dtype), strict=True):
            taken = [outer.transpose(self._part(dy, i)).astype(dy.dtype) for i, outer in group.parts]
            dz = jnp.concatenate([_in_blocks(part, group.blocks) for part in taken], axis=-1)
            da = _flat(group.product(dz, w, back=True))
            slopes.append(group.inner.transpose(da))
            x = _in_blocks(group.inputs(kept), group.blocks)
            for (i, _), square in zip(group.parts, group.squares(group.gradient(x, dz)), strict=True):
                gradients[i]["m"] = square * params[i]["scaling"]
        return added(*slopes), tuple(gradients)

    def _part(self, dy: Array, index: int) -> Array:
        return self.layout.take(dy.reshape(len(dy), *self.layout.out_shape), index)


def _in_blocks(x: Array, blocks: int) -> Array:
    """`[N, blocks · q]` as `[N, blocks, q]`, for no rows too."""
    return x.reshape(len(x), blocks, x.shape[1] // blocks)


def _flat(x: Array) -> Array:
    """`[N, blocks, q]` as `[N, blocks · q]`."""
    return x.reshape(len(x), x.shape[1] * x.shape[2])
