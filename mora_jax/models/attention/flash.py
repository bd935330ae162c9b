"""Attention between two pieces of a row, tile by tile: memory grows with the length, never with its square.

The softmax is carried from tile to tile (Dao et al., 2022, arXiv 2205.14135). Tiles that no query can see, because they
come later or lie before the window, are never computed. Pieces may come from anywhere in the row, so that a whole row
is one piece with itself, and a ring of devices (ring.py) is many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax import Array, lax

from mora_jax.adapters.products.matmul import dot32_tn
from mora_jax.models.layer_scan import checkpointed

TILE = 512  # queries, and keys, of a tile
MASKED = -1e30  # finite, so that rows without a visible key stay finite


class Scoring(TypedDict):
    """Which keys of its own row a query sees, where places are indices, and how it scores them.

    Attributes:
        segments: int `[B, T]`; 0 is padding.
        window: how many places back a query sees, itself included; None for all. May be traced (one a layer).
        scale, softcap: as in `Tiling`.
    """

    segments: Array
    window: int | Array | None
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Tiling:
    """The static part.

    Attributes:
        scale: factor on the scores.
        softcap: scores become `softcap · tanh(scores / softcap)`; None for no cap.
        window: how many places back a query sees, itself included; None for all, or where it is traced.
        rows, columns: queries and keys a tile.
    """

    scale: float
    softcap: float | None
    window: int | None
    rows: int
    columns: int


class Block(NamedTuple):
    """The position of a piece of a row.

    Attributes:
        start: int32 scalar, the place of its first token.
        segments: int32 `[B, T]`; 0 is padding.
    """

    start: Array
    segments: Array


class SoftmaxState(NamedTuple):
    """A softmax under way, all float32.

    Attributes:
        accumulator: `[B, G, N, T, H]`, values weighted by `exp(score − running_max)`.
        running_max: `[B, G, N, T]`, the largest score so far.
        total: `[B, G, N, T]`, the sum of the weights.
    """

    accumulator: Array
    running_max: Array
    total: Array

    @classmethod
    def empty(cls, query: Array, sinks: Array | None = None) -> SoftmaxState:
        """Nothing seen yet but the sinks `[G, N]`, which weigh 1 and give 0, for `query [B, G, N, T, H]`."""
        row = query.shape[:-1]
        nothing = jnp.zeros(query.shape, jnp.float32)
        if sinks is None:
            return cls(nothing, jnp.full(row, MASKED), jnp.zeros(row, jnp.float32))
        return cls(nothing, jnp.broadcast_to(sinks.astype(jnp.float32)[..., None], row), jnp.ones(row, jnp.float32))

    def finish(self) -> tuple[Array, Array]:
        """The weighted mean of values, float32 `[B, G, N, T, H]`, and log-sum-exp `[B, G, N, T]` for the backward.

        A row that sees nothing gives 0, and a sum so large that its probabilities are 0 in the backward.
        """
        safe = jnp.maximum(self.total, 1e-30)
        return self.accumulator / safe[..., None], jnp.where(self.total > 0, self.running_max + jnp.log(safe), -MASKED)


def attend(
    tiling: Tiling,
    query: Array,
    query_block: Block,
    key: Array,
    value: Array,
    key_block: Block,
    traced_window: Array | None,
    so_far: Any,
) -> Any:
    """Adds what `query [B, G, N, T, H]` sees of `key, value [B, G, S, H]` to a softmax under way.

    Args:
        tiling: the static part; T and S are multiples of its tiles.
        query_block, key_block: where queries and keys lie.
        traced_window: int32 scalar, a traced window; None without.
        so_far: the `SoftmaxState` of the queries.
    """
    b, g, n, _, h = query.shape

    def rows(i: Array, running: SoftmaxState) -> SoftmaxState:
        first = i * tiling.rows
        q = _slice(query, first, tiling.rows, 3)
        queries = Block(query_block.start + first, _slice(query_block.segments, first, tiling.rows, 1))

        def columns(j: Array, tile: SoftmaxState) -> SoftmaxState:
            at = j * tiling.columns
            k, v = _slice(key, at, tiling.columns, 2), _slice(value, at, tiling.columns, 2)
            keys = Block(key_block.start + at, _slice(key_block.segments, at, tiling.columns, 1))
            scores = jnp.where(_visible(tiling, queries, keys, traced_window), scores_of(tiling, q, k), MASKED)
            running_max = jnp.maximum(tile.running_max, jnp.max(scores, axis=-1))
            weights = jnp.where(scores > 0.5 * MASKED, jnp.exp(scores - running_max[..., None]), 0.0)
            correction = jnp.exp(tile.running_max - running_max)
            flat = weights.astype(query.dtype).reshape(b, g, -1, tiling.columns)
            accumulator = product(flat, v, 3, 2).reshape(b, g, n, -1, h)
            total = tile.total * correction + jnp.sum(weights, axis=-1)
            return SoftmaxState(tile.accumulator * correction[..., None] + accumulator, running_max, total)

        tile = jax.tree.map(lambda x: _slice(x, first, tiling.rows, 3), running)
        tile = lax.fori_loop(*_reach(tiling, queries.start, key_block, traced_window), columns, tile)
        return jax.tree.map(lambda x, part: lax.dynamic_update_slice_in_dim(x, part, first, 3), running, tile)

    return lax.fori_loop(0, query.shape[3] // tiling.rows, rows, so_far)


class Gradients(NamedTuple):
    """Derivatives, float32, in the shapes of query, key and value."""

    query: Array
    key: Array
    value: Array


class OutputGradients(NamedTuple):
    """What the backward pass knows of each query.

    Attributes:
        doutput: `[B, G, N, T, H]`, the derivative by the output.
        log_sum: `[B, G, N, T]`, see `SoftmaxState.finish`.
        mean: float32 `[B, G, N, T]`, Σ doutput · output.
    """

    doutput: Array
    log_sum: Array
    mean: Array


def attend_vjp(
    tiling: Tiling,
    query: Array,
    query_block: Block,
    output_grads: OutputGradients,
    key: Array,
    value: Array,
    key_block: Block,
    traced_window: Array | None,
    so_far: Gradients,
) -> Gradients:
    """The way back through `attend`: adds the derivatives of this pair of pieces to those so far.

    Args:
        tiling, query, query_block, key, value, key_block, traced_window: as for `attend`.
        output_grads: of the queries' outputs, with what the forward pass kept of their softmax.
        so_far: what other pairs of pieces gave.
    """
    b, g, n, _, h = query.shape

    def rows(i: Array, grads: Gradients) -> Gradients:
        first = i * tiling.rows
        q = _slice(query, first, tiling.rows, 3)
        do, log_sum, mean = jax.tree.map(lambda x: _slice(x, first, tiling.rows, 3), output_grads)
        do_flat, q_flat = do.reshape(b, g, -1, h), q.reshape(b, g, -1, h)
        queries = Block(query_block.start + first, _slice(query_block.segments, first, tiling.rows, 1))

        def columns(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dkey, dvalue = carry
            at = j * tiling.columns
            k, v = _slice(key, at, tiling.columns, 2), _slice(value, at, tiling.columns, 2)
            keys = Block(key_block.start + at, _slice(key_block.segments, at, tiling.columns, 1))
            scores = scores_of(tiling, q, k)
            p = jnp.where(_visible(tiling, queries, keys, traced_window), jnp.exp(scores - log_sum[..., None]), 0.0)
            dp = product(do_flat, v, 3, 3).reshape(p.shape)
            ds = p * (dp - mean[..., None]) * tiling.scale
            if tiling.softcap is not None:
                ds = ds * (1.0 - jnp.square(scores / tiling.softcap))
            ds = ds.astype(query.dtype).reshape(b, g, -1, tiling.columns)
            p = p.astype(query.dtype).reshape(b, g, -1, tiling.columns)
            dq = dq + product(ds, k, 3, 2).reshape(q.shape)
            return dq, _add(dkey, at, dot32_tn(ds, q_flat)), _add(dvalue, at, dot32_tn(p, do_flat))

        start = _slice(grads.query, first, tiling.rows, 3), grads.key, grads.value
        bounds = _reach(tiling, queries.start, key_block, traced_window)
        dq, dkey, dvalue = lax.fori_loop(*bounds, columns, start)
        return Gradients(lax.dynamic_update_slice_in_dim(grads.query, dq, first, 3), dkey, dvalue)

    return lax.fori_loop(0, query.shape[3] // tiling.rows, rows, so_far)


def _reach(tiling: Tiling, first: Array, key_block: Block, traced_window: Array | None) -> tuple[Array, Array]:
    """The tiles of keys, from and to, of which a tile of queries that starts at place `first` can see anything."""
    count = key_block.segments.shape[1] // tiling.columns
    after = (first + tiling.rows - 1 - key_block.start) // tiling.columns + 1
    window = tiling.window if traced_window is None else traced_window
    before = 0 if window is None else (first - window + 1 - key_block.start) // tiling.columns
    return jnp.clip(before, 0, count).astype(jnp.int32), jnp.clip(after, 0, count).astype(jnp.int32)


def _visible(tiling: Tiling, queries: Block, keys: Block, traced_window: Array | None) -> Array:
    """bool `[B, 1, 1, rows, columns]`."""
    back = queries.start + jnp.arange(tiling.rows)[:, None] - keys.start - jnp.arange(tiling.columns)[None]
    seen = (queries.segments[:, :, None] == keys.segments[:, None]) & (queries.segments[:, :, None] > 0) & (back >= 0)
    window = tiling.window if traced_window is None else traced_window
    if window is not None:
        seen &= back < window
    return seen[:, None, None]


def scores_of(tiling: Any, query: Array, key: Array) -> Array:
    """`[B, G, N, t, H]`, `[B, G, s, H]` → float32 `[B, G, N, t, s]`, scaled and capped as `tiling` says."""
    b, g, n, t, h = query.shape
    raw = product(query.reshape(b, g, n * t, h), key, 3, 3).reshape(b, g, n, t, -1) * tiling.scale
    return raw if tiling.softcap is None else tiling.softcap * jnp.tanh(raw / tiling.softcap)


def product(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Batched product over axes 0 and 1 with float32 accumulation."""
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def sink_gradient(sinks: Array, log_sum: Array, mean: Array) -> Array:
    """The derivative by `sinks [G, N]`, float32: a sink's probability, `exp(sink − log_sum)`, takes from the others.

    Args:
        sinks: as in `attention`.
        log_sum, mean: of all queries, `[B, G, N, T]`, see `OutputGradients`.
    """
    return -jnp.sum(jnp.exp(sinks.astype(jnp.float32)[..., None] - log_sum) * mean, axis=(0, 3))


def _slice(array: Array, start: Array, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(array, start, size, axis)


def _add(array: Array, start: Array, values: Array) -> Array:
    """`values [B, G, s, H]` added to `array` from place `start` on."""
    there = _slice(array, start, values.shape[2], 2)
    return lax.dynamic_update_slice_in_dim(array, there + values, start, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_attention(
    tiling: Tiling,
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    traced_window: Array | None,
    sinks: Array | None = None,
) -> Array:
    """Causal attention of a row with itself, `[B, G, N, T, H]` in the dtype of `query`; T needn't fill whole tiles.

    Args:
        tiling: `rows` and `columns` agree.
        query, key, value: as in `attend`, S = T.
        segments: int `[B, T]`; 0 is padding.
        traced_window: int32 scalar, a traced window; None without.
        sinks: `[G, N]`, see `attention`; None without.
    """
    return _tiled_forward(tiling, query, key, value, segments, traced_window, sinks)[0]


def padded(tile: int, array: Array, axis: int) -> Array:
    """The array with zeros at the end of an axis, so that it fills whole tiles."""
    return jnp.pad(array, [(0, -array.shape[axis] % tile if i == axis else 0) for i in range(array.ndim)])


def _tiled_forward(tiling, query, key, value, segments, traced_window, sinks):
    q, k, v = padded(tiling.rows, query, 3), padded(tiling.rows, key, 2), padded(tiling.rows, value, 2)
    row = Block(jnp.zeros((), jnp.int32), padded(tiling.rows, segments, 1))
    out, log_sum = attend(tiling, q, row, k, v, row, traced_window, SoftmaxState.empty(q, sinks)).finish()
    length = query.shape[3]
    out, log_sum = checkpointed((out[:, :, :, :length].astype(query.dtype), log_sum[..., :length]))
    return out, (query, key, value, out, log_sum, segments, traced_window, sinks)


def _tiled_backward(tiling, saved, dout):
    query, key, value, out, log_sum, segments, traced_window, sinks = saved
    q, k, v = padded(tiling.rows, query, 3), padded(tiling.rows, key, 2), padded(tiling.rows, value, 2)
    row = Block(jnp.zeros((), jnp.int32), padded(tiling.rows, segments, 1))
    mean = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    output_grads = OutputGradients(*(padded(tiling.rows, array, 3) for array in (dout, log_sum, mean)))
    nothing = Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    grads = attend_vjp(tiling, q, row, output_grads, k, v, row, traced_window, nothing)
    length = query.shape[3]
    dquery, dkey, dvalue = grads.query[:, :, :, :length], grads.key[:, :, :length], grads.value[:, :, :length]
    dsinks = None if sinks is None else sink_gradient(sinks, log_sum, mean).astype(sinks.dtype)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), None, None, dsinks


tiled_attention.defvjp(_tiled_forward, _tiled_backward)
