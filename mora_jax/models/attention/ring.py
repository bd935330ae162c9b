"""Causal attention of rows that are sharded along their length over a ring of devices.

Keys and values travel around the ring (Liu et al., 2023, arXiv 2310.01889); each device holds one share of them at a
time and carries its queries' softmax on (flash.py), so that memory is that of one share. The backward pass
sends keys and values around once more, with their gradients.

In causal order the device with a row's end would have all the work and that with its start none. So each row is dealt
in 2·c pieces before the ring starts, device i getting the pieces i and 2·c − 1 − i (Brandon et al., 2023, arXiv
2311.09431): at every turn each device then computes two pairs of pieces.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from mora_jax.models.attention.flash import (
    TILE,
    Block,
    Gradients,
    OutputGradients,
    Scoring,
    SoftmaxState,
    Tiling,
    attend,
    attend_vjp,
    padded,
)
from mora_jax.models.layer_scan import checkpointed


@dataclass(frozen=True)
class HeadShards:
    """How the arrays of attention are sharded: by rows and by key/value heads. Hashable, for a compiled function's key.

    Attributes:
        mesh: the devices.
        rows: the mesh axes of rows; () where every device computes all of them.
        heads: the mesh axis of key/value heads; None where every device computes all of them.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    heads: str | None

    def mapped(self, function: Any, kinds: str, results: str) -> Any:
        """`function` on each device's share, its results as a tuple. Kinds: `q` `[R, G, N, t, H]`, `k` `[R, G, t, H]`,
        `r` `[R, G, N, t]`, `s` `[R, t]`, `w` a scalar."""
        specs = dict.fromkeys("qkr", PartitionSpec(self.rows, self.heads))
        specs |= {"s": PartitionSpec(self.rows), "w": PartitionSpec()}
        into = tuple(specs[kind] for kind in kinds)
        out = tuple(specs[kind] for kind in results)
        return jax.shard_map(function, mesh=self.mesh, in_specs=into, out_specs=out, check_vma=False)


@dataclass(frozen=True)
class Ring(HeadShards):
    """The devices that share rows: `rows` are the mesh axes of the folded rows `[c · B, T / c]`, `axis` first.

    Attributes:
        axis: along it lie the shares of a row (see `Partitioner.fold`).
        tile: most queries, and keys, computed at once.
    """

    axis: str
    tile: int = TILE

    @property
    def size(self) -> int:
        """Devices of one ring."""
        return self.mesh.shape[self.axis]

    def attention(self, query: Array, key: Array, value: Array, **scoring: Unpack[Scoring]) -> Array:
        """Causal attention inside segments, as `attention` without positions, of folded rows.

        Args:
            query: `[c · B, t, G, N, H]`, where row `j · B + b` is the j-th share of row b; t is even.
            key, value: `[c · B, t, G, H]`.
            **scoring: see `Scoring`; segments `[c · B, t]`.

        Returns:
            `[c · B, t, G, N, H]` in the dtype of `query`.
        """
        window = scoring["window"]
        fixed = window if isinstance(window, int) else None
        traced_window = None if window is None or fixed is not None else jnp.asarray(window, jnp.int32)
        tile = min(self.tile, -(-query.shape[1] // 2))
        tiling = Tiling(float(scoring["scale"]), scoring["softcap"], fixed, tile, tile)
        query, key, value = query.transpose(0, 2, 3, 1, 4), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        return _ring(self, tiling, query, key, value, scoring["segments"], traced_window).transpose(0, 3, 1, 2, 4)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(
    ring: Ring, tiling: Tiling, query: Array, key: Array, value: Array, segments: Array, traced_window: Array | None
) -> Array:
    return _forward(ring, tiling, query, key, value, segments, traced_window)[0]


def _forward(ring, tiling, query, key, value, segments, traced_window):
    around = ring.mapped(partial(_around, ring, tiling), "qkksw", "qr")
    out, log_sum = checkpointed(around(query, key, value, segments, traced_window))
    return out, (query, key, value, out, log_sum, segments, traced_window)


def _backward(ring, tiling, saved, dout):
    query, key, value, out, log_sum, segments, traced_window = saved
    back = ring.mapped(partial(_back, ring, tiling), "qkkqqrsw", "qkk")
    return (*back(query, key, value, out, dout, log_sum, segments, traced_window), None, None)


_ring.defvjp(_forward, _backward)


class _Held(NamedTuple):
    """A piece of keys `[B, G, t, H]`, its values and segments `[B, t]`, on its way around the ring."""

    key: Array
    value: Array
    segments: Array


class _Pair(NamedTuple):
    """The two pieces of a row that a device holds: i (`early`) and 2·c − 1 − i (`late`)."""

    early: Any
    late: Any


def _chosen(condition: Array, pair: _Pair) -> Any:
    """The early piece where the condition holds, else the late one."""
    return jax.tree.map(lambda early, late: jnp.where(condition, early, late), pair.early, pair.late)


def _put(condition: Array, pair: _Pair, values: Any) -> _Pair:
    """The pair with the piece that `_chosen` takes replaced."""
    early = jax.tree.map(lambda new, old: jnp.where(condition, new, old), values, pair.early)
    late = jax.tree.map(lambda new, old: jnp.where(condition, old, new), values, pair.late)
    return _Pair(early, late)


class _Dealer:
    """Deals pieces of a row out and takes them back, inside `shard_map`.

    Device i has the contiguous pieces 2i and 2i + 1. Each half of the devices' pieces, the even and the odd ones, goes
    to distinct devices, so that two permutations deal all.
    """

    def __init__(self, ring: Ring, share: int, tile: int):
        count = ring.size
        self.axis, self.half, self.tile = ring.axis, share // 2, tile
        self.index = lax.axis_index(ring.axis)
        self.even = [(i, min(2 * i, 2 * count - 1 - 2 * i)) for i in range(count)]
        self.odd = [(i, min(2 * i + 1, 2 * count - 2 - 2 * i)) for i in range(count)]
        self.next = [(i, (i + 1) % count) for i in range(count)]
        self.is_even = self.index % 2 == 0

    def deal(self, array: Array, axis: int) -> _Pair:
        """The pieces of this device, filled up to whole tiles, of an array whose places lie along `axis`."""
        even, odd = jnp.split(array, 2, axis)
        even = padded(self.tile, lax.ppermute(even, self.axis, self.even), axis)
        odd = padded(self.tile, lax.ppermute(odd, self.axis, self.odd), axis)
        # Block i is an even one on an even device.
        return _Pair(jnp.where(self.is_even, even, odd), jnp.where(self.is_even, odd, even))

    def collect(self, pair: _Pair, axis: int) -> Array:
        """The inverse of `deal`."""
        early, late = (lax.slice_in_dim(piece, 0, self.half, axis=axis) for piece in pair)
        even, odd = jnp.where(self.is_even, early, late), jnp.where(self.is_even, late, early)
        even = lax.ppermute(even, self.axis, [(target, source) for source, target in self.even])
        odd = lax.ppermute(odd, self.axis, [(target, source) for source, target in self.odd])
        return jnp.concatenate([even, odd], axis)

    def pass_on(self, tree: Any) -> Any:
        """Every array goes to the next device of the ring."""
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, self.next), tree)

    def starts(self, holder: Array) -> _Pair:
        """Where the pieces of device `holder` start in the row."""
        return _Pair(holder * self.half, (2 * len(self.next) - 1 - holder) * self.half)


class _Turn(NamedTuple):
    """The second pair of pieces of a turn, beside late queries and early keys.

    Attributes:
        any: whether there is one; not in the first turn, where a device holds its own keys.
        early: whether the keys come from an earlier device. Then it is early queries and early keys, else late and
            late.
    """

    any: Array
    early: Array


def _turn(dealer: _Dealer, number: Array) -> tuple[Array, _Turn]:
    """Whose keys are here, and what is to be computed with them."""
    holder = (dealer.index - number) % len(dealer.next)
    return holder, _Turn(holder != dealer.index, holder < dealer.index)


def _hidden_unless(condition: Array, query_block: Block) -> Block:
    """Queries at a place where they see nothing, unless the condition holds: their tiles are then skipped."""
    return query_block._replace(start=jnp.where(condition, query_block.start, -(2**30)))


def _around(ring: Ring, tiling: Tiling, query, key, value, segments, traced_window):
    """Forward on one device: the output and log-sum-exp of its share."""
    dealer = _Dealer(ring, query.shape[3], tiling.rows)
    queries, marks = dealer.deal(query, 3), dealer.deal(segments, 1)
    query_block = _Pair(*map(Block, dealer.starts(dealer.index), marks))
    keys = _Pair(*map(_Held, dealer.deal(key, 2), dealer.deal(value, 2), marks))
    running = _Pair(*(SoftmaxState.empty(piece) for piece in queries))
    # Each piece with itself; in the ring's first turn only late queries and early keys are left.
    pieces = zip(queries, query_block, keys, running, strict=True)
    running = _Pair(*(attend(tiling, q, a, h.key, h.value, a, traced_window, r) for q, a, h, r in pieces))

    def turn(number: Array, carry: tuple[_Pair, _Pair]) -> tuple[_Pair, _Pair]:
        keys, running = carry
        arriving = dealer.pass_on(keys)
        holder, second = _turn(dealer, number)
        starts = dealer.starts(holder)
        early_keys = Block(starts.early, keys.early.segments)
        key, value, _ = keys.early
        late = attend(tiling, queries.late, query_block.late, key, value, early_keys, traced_window, running.late)
        running = running._replace(late=late)
        query, place = _chosen(second.early, queries), _hidden_unless(second.any, _chosen(second.early, query_block))
        key, value, mark = _chosen(second.early, keys)
        piece = Block(_chosen(second.early, starts), mark)
        state = attend(tiling, query, place, key, value, piece, traced_window, _chosen(second.early, running))
        return arriving, _put(second.early, running, state)

    _, running = lax.fori_loop(0, ring.size, turn, (keys, running))
    out, log_sum = (_Pair(*pieces) for pieces in zip(*(piece.finish() for piece in running), strict=True))
    out = _Pair(*(piece.astype(query.dtype) for piece in out))
    return dealer.collect(out, 3), dealer.collect(log_sum, 3)


def _back(ring: Ring, tiling: Tiling, query, key, value, out, dout, log_sum, segments, traced_window):
    """Backward on one device: the derivatives by its share of queries, keys and values."""
    dealer = _Dealer(ring, query.shape[3], tiling.rows)
    mean = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    queries, marks = dealer.deal(query, 3), dealer.deal(segments, 1)
    query_block = _Pair(*map(Block, dealer.starts(dealer.index), marks))
    output_grads = _Pair(*map(OutputGradients, dealer.deal(dout, 3), dealer.deal(log_sum, 3), dealer.deal(mean, 3)))
    keys = _Pair(*map(_Held, dealer.deal(key, 2), dealer.deal(value, 2), marks))
    grads = [
        attend_vjp(tiling, q, a, r, h.key, h.value, a, traced_window, _no_gradients(q, h.key, h.value))
        for q, a, r, h in zip(queries, query_block, output_grads, keys, strict=True)
    ]
    dquery = _Pair(*(gradient.query for gradient in grads))
    dheld = _Pair(*((gradient.key, gradient.value) for gradient in grads))

    def turn(number: Array, carry: tuple[_Pair, _Pair, _Pair]) -> tuple[_Pair, _Pair, _Pair]:
        keys, dheld, dquery = carry
        holder, second = _turn(dealer, number)
        starts = dealer.starts(holder)
        early_keys = Block(starts.early, keys.early.segments)
        so_far = Gradients(dquery.late, *dheld.early)
        key, value, _ = keys.early
        late = attend_vjp(
            tiling, queries.late, query_block.late, output_grads.late, key, value, early_keys, traced_window, so_far
        )
        dquery, dheld = dquery._replace(late=late.query), dheld._replace(early=(late.key, late.value))
        query, place = _chosen(second.early, queries), _hidden_unless(second.any, _chosen(second.early, query_block))
        key, value, mark = _chosen(second.early, keys)
        piece = Block(_chosen(second.early, starts), mark)
        so_far = Gradients(_chosen(second.early, dquery), *_chosen(second.early, dheld))
        gradients = attend_vjp(
            tiling, query, place, _chosen(second.early, output_grads), key, value, piece, traced_window, so_far
        )
        dquery = _put(second.early, dquery, gradients.query)
        dheld = _put(second.early, dheld, (gradients.key, gradients.value))
        # Keys go on with what they have gathered; after the last turn both are at home.
        return dealer.pass_on(keys), dealer.pass_on(dheld), dquery

    _, dheld, dquery = lax.fori_loop(0, ring.size, turn, (keys, dheld, dquery))
    dkey, dvalue = (_Pair(*pieces) for pieces in zip(*dheld, strict=True))
    gradients = dealer.collect(dquery, 3), dealer.collect(dkey, 2), dealer.collect(dvalue, 2)
    return tuple(gradient.astype(like.dtype) for gradient, like in zip(gradients, (query, key, value), strict=True))


def _no_gradients(*arrays: Array) -> Gradients:
    return Gradients(*(jnp.zeros(array.shape, jnp.float32) for array in arrays))
