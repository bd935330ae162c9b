"""Products of rows with the matrix of their group, of which each row has one: what experts compute.

Rows stand sorted by group. The first `sizes[0]` of them are multiplied by the first matrix, and so on; rows behind the
last group give 0. The rule of differentiation is that of `matmul.py`: operands in the compute dtype, sums in float32,
and no gradient of a kernel that nothing differentiates.

On TPUs and GPUs it is `jax.lax.ragged_dot`. On CPUs that multiplies every row by every matrix and leaves out what it
doesn't want; here blocks of rows of one group are multiplied one after the other instead. Quantised matrices become
dense block by block there, and all those of one product before it elsewhere, forward and again backward.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from mora_jax.adapters.products.matmul import differentiated, primals, wide
from mora_jax.adapters.products.quantization import Quantized
from mora_jax.backend import backend

SHORT = 256  # sums of fewer numbers, as a rank's, take another form on TPUs
BLOCKS = (8, 64)  # the fewest and the most rows a block on CPUs; a group fills up its last one with zeros

_INPUTS = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))  # x @ w
_OUTPUTS = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))  # x @ w.T
_ROWS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())  # x.T @ y of each group


def grouped_dot(x: Array, w: Array | Quantized, sizes: Array) -> Array:
    """`x [R, in]` by the matrix of each row's group.

    Args:
        x: in the compute dtype, sorted by group.
        w: `[E, in, out]`, in the compute dtype, or a float32 master or quantised, which is used in the dtype of `x`.
        sizes: int32 `[E]`, the rows of each group, R together or less.

    Returns:
        `[R, out]`, float32, or float64 where `x` is.
    """
    return _grouped(x.dtype, x, w, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(dtype: Any, x: Array, w: Array | Quantized, sizes: Array) -> Array:
    return _by_group(x, w, sizes, _INPUTS)


def _grouped_fwd(dtype, *operands):
    x, w, sizes = primals(operands)
    return _by_group(x, w, sizes, _INPUTS), (x if differentiated(operands[1]) else None, w, sizes)


def _grouped_bwd(dtype, saved, dy):
    x, w, sizes = saved
    if isinstance(dy, SymbolicZero):
        return None, None, None
    dy = dy.astype(dtype)
    dx = _by_group(dy, w, sizes, _OUTPUTS).astype(dtype)
    dw = None if x is None else _of_groups(x, dy, sizes).astype(w.dtype)
    return dx, dw, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd, symbolic_zeros=True)


def _by_group(x: Array, w: Array | Quantized, sizes: Array, how: lax.RaggedDotDimensionNumbers) -> Array:
    w = w if isinstance(w, Quantized) else w.astype(x.dtype)
    if backend() != "cpu":
        # Not before x is there: see `Quantized.after`.
        dense = lax.optimization_barrier((w, x))[0].dense(x.dtype, 1) if isinstance(w, Quantized) else w
        if backend() == "tpu":
            x, dense, how = _for_tpu(x, dense, how)
        return lax.ragged_dot_general(x, dense, sizes, how, preferred_element_type=wide(x.dtype))
    blocks = _Blocks(sizes, len(x))
    contracted = how.dot_dimension_numbers[0][1][0] - 1

    def product(block: tuple[Array, Array]) -> Array:
        rows, group = block
        dimensions = (((1,), (contracted,)), ((), ()))
        matrix: Any = jax.tree.map(lambda array: array[group], w)
        matrix = matrix.after(rows).astype(x.dtype) if isinstance(matrix, Quantized) else matrix
        return lax.dot_general(rows, matrix, dimensions, preferred_element_type=wide(x.dtype))

    return blocks.rows(lax.map(product, (blocks.of(x), blocks.group)))


def _for_tpu(
    x: Array, w: Array, how: lax.RaggedDotDimensionNumbers
) -> tuple[Array, Array, lax.RaggedDotDimensionNumbers]:
    """The same product, by sums along the last axis of `w` where these or the results are as short as a rank.

    Other short sums run out of the chip's fast memory (libtpu 0.0.52, E1001), such as `[131072, 8]` by `[16, 8, 1536]`,
    and so do sums of 65 to 255 numbers. For short results all of A would be copied into tiles of 128 ranks.
    """
    summed = x.shape[1]
    if how is _INPUTS and min(summed, w.shape[2]) < SHORT:
        w, how = jnp.swapaxes(w, 1, 2), _OUTPUTS
    if 64 < summed < SHORT:
        filling = ((0, 0), (0, SHORT - summed))
        x, w = jnp.pad(x, filling), jnp.pad(w, ((0, 0), *filling))
    return x, w, how


def _of_groups(x: Array, y: Array, sizes: Array) -> Array:
    """`x [R, in].T @ y [R, out]` over the rows of each group, float32 `[E, in, out]`."""
    if backend() != "cpu":
        if y.shape[1] < SHORT <= x.shape[1]:  # arrays whose last axis is a rank take up to 16 times as much on TPUs
            return jnp.swapaxes(_of_groups(y, x, sizes), 1, 2)
        return lax.ragged_dot_general(x, y, sizes, _ROWS, preferred_element_type=wide(x.dtype))
    blocks = _Blocks(sizes, len(x))

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        left, right, group = block
        product = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype)
        return total.at[group].add(product, mode="drop"), None

    zeros = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), wide(x.dtype))
    return lax.scan(add, zeros, (blocks.of(x), blocks.of(y), blocks.group))[0]


class _Blocks:
    """Rows sorted by group, cut into blocks of one group each.

    Attributes:
        group: int32 `[blocks]`; the number of groups for a block that holds none.
    """

    def __init__(self, sizes: Array, rows: int):
        self.height = min(max(BLOCKS[0], min(BLOCKS[1], rows // len(sizes))), rows)
        self.count = min(rows // self.height + len(sizes), rows)  # each group may have one that isn't full
        ends = jnp.cumsum(sizes)
        blocks = -(-sizes // self.height)
        block_ends = jnp.cumsum(blocks)
        number = jnp.arange(self.count, dtype=jnp.int32)
        self.group = jnp.searchsorted(block_ends, number, side="right").astype(jnp.int32)
        first = (ends - sizes)[self.group] + (number - (block_ends - blocks)[self.group]) * self.height
        source = first[:, None] + jnp.arange(self.height, dtype=jnp.int32)  # [blocks, height]
        inside = (source < ends[self.group][:, None]) & (self.group < len(sizes))[:, None]
        self._source = jnp.where(inside, source, rows)
        row = jnp.arange(rows, dtype=jnp.int32)
        owner = jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
        target = (block_ends - blocks)[owner] * self.height + row - (ends - sizes)[owner]
        self._target = jnp.where(row < ends[-1], target, self.count * self.height)

    def of(self, x: Array) -> Array:
        """`x [R, …]` as `[blocks, height, …]`, filled up with zeros."""
        return x.at[self._source].get(mode="fill", fill_value=0)

    def rows(self, y: Array) -> Array:
        """The inverse of `of`; 0 for rows of no group."""
        return y.reshape(-1, *y.shape[2:]).at[self._target].get(mode="fill", fill_value=0)
