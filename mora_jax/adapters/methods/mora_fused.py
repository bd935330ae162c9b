"""MoRA on several matrices with one input, computed together."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from mora_jax.adapters.methods.mora_maps import SHARED, CyclicMap, FeatureMaps, Form, Map, rotated_squares
from mora_jax.adapters.products.matmul import FusedLayout, added, dot32, dot32_nt, dot32_tn, wide, widened
from mora_jax.backend import untransposed


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

    def residual(self, x: Array) -> Array:
        """What the backward pass needs of the input: its sums where there are any, else itself."""
        return self.inner(x).astype(x.dtype) if self.summed else x

    def inputs(self, residual: Array) -> Array:
        """`[N, blocks · q]` of a residual."""
        return residual if self.summed else self.inner(residual)

    def matrix(self, squares: list[Array], dtype: Any) -> Array:
        """The Mᵀ of the parts side by side, `[q, parts · q]`; one a block, `[blocks, …]`, where they are rotated."""
        turned = [rotated_squares(m, self.blocks) if self.rotated else m.T for m in squares]
        return untransposed(jnp.concatenate(turned, axis=-1).astype(dtype))

    def product(self, x: Array, w: Array) -> list[Array]:
        """`[N, blocks · q]` by the matrix: `[N, blocks · q]` for each part."""
        if self._one_by_one:
            parts = [self._split(dot32(block, self._of(w, k)).astype(x.dtype)) for k, block in enumerate(self._cut(x))]
            return [jnp.concatenate(blocks, axis=1) for blocks in zip(*parts, strict=True)]
        return [_flat(z) for z in self._split(self._multiplied(self._blocks(x), w, 1))]

    def product_back(self, dz: list[Array], w: Array) -> Array:
        """The parts' `[N, blocks · q]` by the transposed matrix: `[N, blocks · q]`."""
        if self._one_by_one:
            joined = enumerate(self._joined_by_block(dz))
            return jnp.concatenate([dot32_nt(block, self._of(w, k)).astype(block.dtype) for k, block in joined], axis=1)
        return _flat(self._multiplied(self._joined(dz), w, 2))

    def gradient(self, x: Array, dz: list[Array]) -> Array:
        """That of the matrix, float32 in its shape, of the input `[N, blocks · q]` and the parts' `[N, blocks · q]`."""
        if self._one_by_one:
            gradients = [dot32_tn(*pair) for pair in zip(self._cut(x), self._joined_by_block(dz), strict=True)]
            return jnp.stack(gradients) if self.rotated else added(*gradients)
        x, joined = self._blocks(x), self._joined(dz)
        if not self.rotated:
            return dot32_tn(x.reshape(-1, x.shape[-1]), joined.reshape(-1, joined.shape[-1]))
        return lax.dot_general(x, joined, (((0,), (0,)), ((1,), (1,))), preferred_element_type=wide(x.dtype))

    @property
    def _one_by_one(self) -> bool:
        """Whether each block of features is a product of its own."""
        return self.blocks > 1 and isinstance(self.inner, CyclicMap) and self.inner.form is Form.SLICES

    def _cut(self, x: Array) -> list[Array]:
        """`[N, blocks · q]` as `blocks` of `[N, q]`."""
        return jnp.split(x, self.blocks, axis=1)

    def _of(self, w: Array, block: int) -> Array:
        """The matrix of a block, `[q, parts · q]`."""
        return w[block] if self.rotated else w

    def _blocks(self, x: Array) -> Array:
        """`[N, blocks · q]` as `[N, blocks, q]`, for no rows too."""
        return x.reshape(len(x), self.blocks, x.shape[1] // self.blocks)

    def _split(self, z: Array) -> list[Array]:
        """`[..., parts · q]` as `parts` of `[..., q]`."""
        return jnp.split(z, len(self.parts), axis=-1)

    def _joined(self, dz: list[Array]) -> Array:
        """The parts' `[N, blocks · q]` as `[N, blocks, parts · q]`."""
        return jnp.concatenate([self._blocks(part) for part in dz], axis=-1)

    def _joined_by_block(self, dz: list[Array]) -> list[Array]:
        """The parts' `[N, blocks · q]` as `blocks` of `[N, parts · q]`."""
        return [jnp.concatenate(parts, axis=1) for parts in zip(*map(self._cut, dz), strict=True)]

    def _multiplied(self, x: Array, w: Array, axis: int) -> Array:
        """`[N, blocks, …]` by the matrix, or with `axis` 2 by its transpose: `[N, blocks, …]`."""
        if not self.rotated:
            z = (dot32 if axis == 1 else dot32_nt)(x.reshape(-1, x.shape[-1]), w)
            return z.astype(x.dtype).reshape(*x.shape[:2], z.shape[-1])
        dims = (((2,), (axis,)), ((1,), (0,)))
        z = lax.dot_general(x, w, dims, preferred_element_type=wide(x.dtype))
        return z.astype(x.dtype).transpose(1, 0, 2)

    def squares(self, dw: Array) -> list[Array]:
        """The gradients of each M from that of the matrix."""
        parts = self._split(dw)
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
    their slices. What is repeated is repeated in the compute dtype, half the bytes: rounded once, as LoRA's inner
    product is, which leaves the update as exact as LoRA's.
    """

    layout: FusedLayout
    kinds: tuple[str | None, ...]  # None for a bare part

    def _groups(self, width: int, params) -> list[_Group]:
        by_group: dict[tuple[int, _Group], list[tuple[int, Map]]] = {}
        for i, (kind, p) in enumerate(zip(self.kinds, params, strict=True)):
            if kind is not None and p is not None:
                q = p["m"].shape[0]
                inner, outer, blocks = FeatureMaps.of(
                    kind, width, self.layout.part_features(i), q, sharded=self.layout.sharded
                )
                rotated = kind == "rotation" and blocks > 1
                alone = _Group(inner, kind in SHARED, rotated, blocks, ())
                by_group.setdefault((q, alone), []).append((i, outer))
        return [group._replace(parts=tuple(parts)) for (_, group), parts in by_group.items()]

    def _matrices(self, groups: list[_Group], params, dtype) -> list[Array]:
        return [
            group.matrix([params[i]["m"] * params[i]["scaling"] for i, _ in group.parts], dtype) for group in groups
        ]

    def _output(self, groups: list[_Group], residuals, matrices: list[Array]) -> Array:
        """float32 `[N, features]`."""
        parts: dict[int, Array] = {}
        for group, residual, w in zip(groups, residuals, matrices, strict=True):
            for (i, outer), z in zip(group.parts, group.product(group.inputs(residual), w), strict=True):
                parts[i] = outer(z)
        for i in set(range(len(self.kinds))) - parts.keys():
            parts[i] = jnp.zeros((len(residuals[0]), self.layout.part_features(i)), residuals[0].dtype)
        return widened(self.layout.join_tokens([parts[i] for i in range(len(self.kinds))]))

    def forward(self, x: Array, params):
        """As `Delta.forward`."""
        groups = self._groups(x.shape[1], params)
        residuals = tuple(group.residual(x) for group in groups)
        y = self._output(groups, residuals, self._matrices(groups, params, x.dtype))
        return y, (residuals, params, _Width(x.shape[1]))

    def backward(self, residuals, dy: Array):
        """As `Delta.backward`."""
        by_group, params, width = residuals
        groups = self._groups(width.features, params)
        gradients: list[Any] = [None if p is None else dict.fromkeys(p) for p in params]
        dx = []
        for group, residual, w in zip(groups, by_group, self._matrices(groups, params, dy.dtype), strict=True):
            dz = [outer.transpose(self.layout.take_flat(dy, i)).astype(dy.dtype) for i, outer in group.parts]
            dx.append(widened(group.inner.transpose(group.product_back(dz, w))))
            dw = group.gradient(group.inputs(residual), dz)
            for (i, _), square in zip(group.parts, group.squares(dw), strict=True):
                gradients[i]["m"] = square * params[i]["scaling"]
        return added(*dx), tuple(gradients)


def _flat(x: Array) -> Array:
    """`[N, blocks, q]` as `[N, blocks · q]`, for no rows too."""
    return x.reshape(len(x), x.shape[1] * x.shape[2])
