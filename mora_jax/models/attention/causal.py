"""Grouped-query attention with its own backward: it keeps q, k, v, the output and one number a row, no `[T, S]` matrix.

Queries are taken in blocks. In a row that attends to itself a block looks only at the keys up to its own end (and,
with a fixed window, from its window's start), so the masked half of the scores is never computed, and the largest
array is one block of scores. Backward recomputes the probabilities (Dao et al., 2022, arXiv 2205.14135, without tiles
of keys). For long rows a block of scores is large itself: there keys are taken in tiles too (flash.py), by
loops, so that neither memory nor the program grows with the number of blocks. Rows that are sharded over devices go
through a ring (ring.py); accelerators have kernels of their own (kernels.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from mora_jax.adapters.products.matmul import dot32_tn
from mora_jax.backend import backend, untransposed
from mora_jax.models.attention.flash import MASKED, TILE, Tiling, product, scores_of, sink_gradient, tiled_attention
from mora_jax.models.layer_scan import checkpointed

if TYPE_CHECKING:
    from mora_jax.models.attention.flash import Scoring
    from mora_jax.models.config import DecoderConfig
    from mora_jax.models.partitioning import Partitioner


NO_WINDOW = 2**30  # stands for "sees everything" where layers differ and the window has to be an array
LONG = 4096  # tokens of a row from which keys are taken in tiles


class Kernel(Protocol):
    """An implementation of attention of rows with themselves, where places are indices. Hashable."""

    def attention(self, query: Array, key: Array, value: Array, **scoring: Unpack[Scoring]) -> Array:
        """`[B, T, G, N, H]`, of arguments as those of `attention`."""


@dataclass(frozen=True)
class Rows:
    """What attention is needed for.

    Attributes:
        config: of the model.
        dtype: of the computation.
        rows, length: of the batch; 0 where that isn't known yet.
        partitioner: how arrays are laid over the devices of a mesh; None without one.
        packed: whether a row may hold anything but one example and padding behind it.
    """

    config: DecoderConfig
    dtype: Any
    rows: int = 0
    length: int = 0
    partitioner: Partitioner | None = None
    packed: bool = True

    def ring(self) -> Kernel | None:
        """What computes attention where rows are shared along `mesh.context`; None where they are whole."""
        return None if self.partitioner is None else self.partitioner.ring(self.rows)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Those of the layers, each once."""
        return tuple(dict.fromkeys(self.config.windows))


@dataclass(frozen=True)
class _Options:
    """The static part: hashable, so that it can be an argument of a function with its own derivative."""

    scale: float
    softcap: float | None
    window: int | None
    by_index: bool
    block: int


def query_block() -> int:
    """Queries a block: what fits the caches of a CPU, or keeps a matrix unit busy elsewhere."""
    return 128 if backend() == "cpu" else 512


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    q_segments: Array,
    kv_segments: Array,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    window: int | Array | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
    kernel: Kernel | None = None,
) -> Array:
    """Causal attention inside segments.

    A query sees a key if both have the same non-zero segment, the key doesn't come later, and it is less than `window`
    places back. Places are indices in the row when no positions are given (then T = S), else the positions.

    Args:
        query: `[B, T, G, N, H]`, N query heads for each of G key/value heads.
        key, value: `[B, S, G, H]`.
        q_segments, kv_segments: int `[B, T]` and `[B, S]`; 0 is padding.
        q_positions, kv_positions: int `[B, T]` and `[B, S]`, both or neither.
        window: how many places back a query sees, itself included; None for all. May be traced (one a layer).
        scale: factor on the scores.
        softcap: scores become `softcap · tanh(scores / softcap)`; None for no cap.
        sinks: `[G, N]`, a score of each head that takes part in the softmax and gives nothing; None without.
        kernel: computes rows without positions (see kernels.py), and without sinks; None for XLA's blocks.

    Returns:
        `[B, T, G, N, H]` in the dtype of `query`; rows that see no key are 0.

    Raises:
        ValueError: positions are missing although T and S differ, or only one of the two is given.
    """
    if (q_positions is None) != (kv_positions is None):
        raise ValueError("give both q_positions and kv_positions, or neither")
    by_index = q_positions is None
    if by_index and query.shape[1] != key.shape[1]:
        raise ValueError(f"without positions T and S must agree, not {query.shape[1]} and {key.shape[1]}")
    if by_index and kernel is not None:
        if sinks is not None:
            raise ValueError("attention sinks are computed by XLA's blocks alone")
        return kernel.attention(query, key, value, segments=q_segments, window=window, scale=scale, softcap=softcap)
    if by_index:
        index = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
        q_positions = kv_positions = index
    fixed = window if isinstance(window, int) else None
    moving = None if window is None or fixed is not None else jnp.asarray(window, jnp.int32)
    # [B, G, N, T, H] and [B, G, S, H]: batch axes in front, as the products want them.
    query, key, value = query.transpose(0, 2, 3, 1, 4), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    if by_index and query.shape[3] > LONG:
        tiling = Tiling(float(scale), softcap, fixed, TILE, TILE)
        out = tiled_attention(tiling, query, key, value, q_segments, moving, sinks)
    else:
        static = _Options(float(scale), softcap, fixed, by_index, query_block())
        places = (q_segments, kv_segments, q_positions, kv_positions, moving)
        out = _attention(static, query, untransposed(key), untransposed(value), sinks, places)
    return out.transpose(0, 3, 1, 2, 4)


def _spans(options: _Options, queries: int, keys: int) -> list[tuple[slice, slice]]:
    """Blocks of queries with the keys that any of them can see."""
    spans = []
    for start in range(0, queries, options.block):
        stop = min(start + options.block, queries)
        low, high = 0, keys
        if options.by_index:
            high = stop
            if options.window is not None:
                low = max(0, start - options.window + 1) // options.block * options.block
        spans.append((slice(start, stop), slice(low, high)))
    return spans


def _visible(options: _Options, places, queries: slice, keys: slice) -> Array:
    """bool `[B, 1, 1, queries, keys]`."""
    q_segments, kv_segments, q_positions, kv_positions, moving = places
    q_seg, kv_seg = q_segments[:, queries, None], kv_segments[:, None, keys]
    back = q_positions[:, queries, None] - kv_positions[:, None, keys]
    seen = (q_seg == kv_seg) & (q_seg > 0) & (back >= 0)
    if options.window is not None:
        seen &= back < options.window
    if moving is not None:
        seen &= back < moving
    return seen[:, None, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, query: Array, key: Array, value: Array, sinks: Array | None, places) -> Array:
    return _forward(options, query, key, value, sinks, places)[0]


def _forward(options, query, key, value, sinks, places):
    b, g, n, _, h = query.shape
    outs, sums = [], []
    for rows, columns in _spans(options, query.shape[3], key.shape[2]):
        scores = scores_of(options, query[:, :, :, rows], key[:, :, columns])
        scores = jnp.where(_visible(options, places, rows, columns), scores, MASKED)
        top = jnp.max(scores, axis=-1, keepdims=True)
        if sinks is not None:
            sink = sinks.astype(jnp.float32)[..., None, None]
            top = jnp.maximum(top, sink)
        weights = jnp.where(scores > 0.5 * MASKED, jnp.exp(scores - top), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(sink - top)
        flat = weights.astype(query.dtype).reshape(b, g, -1, weights.shape[-1])
        mixed = product(flat, value[:, :, columns], 3, 2).reshape(b, g, n, -1, h)
        outs.append((mixed / jnp.maximum(total, 1e-30)).astype(query.dtype))
        # log-sum-exp of a row; huge where nothing is visible, which makes its probabilities 0 in the backward.
        sums.append(jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -MASKED)[..., 0])
    out, sums = checkpointed((outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=3), sums))
    return out, (query, key, value, sinks, out, sums, places)


def _backward(options, saved, dout):
    query, key, value, sinks, out, sums, places = saved
    b, g, n, _, h = query.shape
    keys = key.shape[2]
    dqueries = []
    dkey = jnp.zeros(key.shape, jnp.float32)
    dvalue = jnp.zeros(value.shape, jnp.float32)
    dsinks: Any = None if sinks is None else jnp.zeros(sinks.shape, jnp.float32)
    for (rows, columns), log_sum in zip(_spans(options, query.shape[3], keys), sums, strict=True):
        q, k, v = query[:, :, :, rows], key[:, :, columns], value[:, :, columns]
        do = dout[:, :, :, rows]
        scores = scores_of(options, q, k)
        seen = _visible(options, places, rows, columns)
        p = jnp.where(seen, jnp.exp(scores - log_sum[..., None]), 0.0)
        do_flat = do.reshape(b, g, -1, h)
        p_flat = p.astype(query.dtype).reshape(b, g, -1, p.shape[-1])
        dp = product(do_flat, v, 3, 3).reshape(p.shape)
        mean = jnp.sum(do.astype(jnp.float32) * out[:, :, :, rows].astype(jnp.float32), axis=-1, keepdims=True)
        if sinks is not None:
            dsinks = dsinks + sink_gradient(sinks, log_sum, mean[..., 0])
        ds = p * (dp - mean) * options.scale
        if options.softcap is not None:
            ds = ds * (1.0 - jnp.square(scores / options.softcap))
        ds_flat = ds.astype(query.dtype).reshape(b, g, -1, ds.shape[-1])
        dqueries.append(product(ds_flat, k, 3, 2).reshape(q.shape).astype(query.dtype))
        dk = dot32_tn(ds_flat, q.reshape(b, g, -1, h))
        dv = dot32_tn(p_flat, do_flat)
        if columns == slice(0, keys):
            dkey, dvalue = dkey + dk, dvalue + dv
        else:
            dkey = dkey.at[:, :, columns].add(dk)
            dvalue = dvalue.at[:, :, columns].add(dv)
    dquery = dqueries[0] if len(dqueries) == 1 else jnp.concatenate(dqueries, axis=3)
    dsinks = None if sinks is None else dsinks.astype(sinks.dtype)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), dsinks, None


_attention.defvjp(_forward, _backward)
