"""Sums over the tokens of a batch of what depends on their logits, in chunks: the logits of all never exist together.

Tokens of weight 0 (prompt and padding under the masked loss) are moved behind the others and whole chunks of them are
skipped, so that the vocabulary product costs what the weighted tokens cost.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from mora_jax.backend import backend, product_over_tokens


class Options(NamedTuple):
    """The static part of a sum over tokens.

    Attributes:
        softcap: logits become `softcap · tanh(logits / softcap)`; None for no cap.
        shards: groups of rows that are compacted on their own; the number of devices that share the batch, so that
            no token crosses devices.
        chunk: tokens a chunk and shard.
        mapped: whether the sum is under `jax.vmap`, whose elements then are as many shards: one loop and one product
            of all their tokens a chunk, where the head is the same for all.
        part: tokens of what a last chunk is made up of that is at most half full; divides `chunk`. None: it is whole.
    """

    softcap: float | None
    shards: int
    chunk: int
    mapped: bool = False
    part: int | None = None


def chunk_size(vocab_size: int, tokens: int, heads: int = 1) -> int:
    """Tokens a chunk, no more than there are; where there are several they are about equal, so that few are filled up.

    On a CPU 64 MB of float32 logits, at least 256 tokens. Accelerators read the whole head for every chunk, and want as
    many tokens for it: 1024, or the multiple of 128 that keeps 320 MB of bfloat16 powers (a GPU: 160 MB), of all the
    `heads` whose logits are there at once.
    """
    if backend() == "cpu":
        multiple, most = 32, 32 * max(8, (1 << 24) // (32 * vocab_size))
    else:
        powers = (160 if backend() == "tpu" else 80) << 20
        multiple, most = 128, 128 * min(8, max(1, powers // (128 * vocab_size * heads)))
    if tokens <= most:
        return max(1, tokens)
    even = -(-tokens // -(-tokens // most))
    return multiple * -(-even // multiple)


def part_size(vocab_size: int, chunk: int) -> int | None:
    """Tokens of a part, see `Options`: on a CPU a fourth of a chunk, so that few weighted tokens cost little.

    None where a chunk has less than 16 MB of logits: little is saved there, and a second loop has to be compiled.
    """
    worth = backend() == "cpu" and chunk * vocab_size >= 1 << 22
    return chunk // 4 if worth and chunk % 32 == 0 else None


def pack_weighted_tokens(
    weights: Array,
    *arrays: Array,
    kernel: Array | None,
    softcap: float | None,
    shards: int,
    chunk: int | None,
    mapped: bool = False,
    heads: int = 1,
) -> tuple[Options, tuple[Array, ...]]:
    """Brings tokens of non-zero weight to the front of each shard and fills up the last chunk.

    Args:
        weights: float32 `[B, T]`.
        *arrays: `[B, T, …]`, hidden states first.
        kernel, heads: the output head `[V, D]`, None where the states are logits, and how many there are; they choose
            the size of a chunk.
        softcap, shards, mapped: see `Options`; `shards` divides B.
        chunk: tokens a chunk; None chooses.

    Returns:
        The options, and the weights and arrays as `[shards, tokens, …]`.
    """
    batch, length = weights.shape
    if batch % shards:
        raise ValueError(f"{shards} shards can't share {batch} rows evenly")
    per_shard, vocab_size = batch // shards * length, vocabulary(arrays[0], kernel)
    size = chunk or chunk_size(vocab_size, per_shard, heads)
    # Under vmap the elements' chunks are laid side by side, which makes them small enough.
    part = None if chunk or mapped else part_size(vocab_size, size)
    options = Options(softcap, shards, size, mapped, part)
    flat = weights.reshape(shards, per_shard)
    order = jnp.argsort(flat == 0, axis=1, stable=True)
    padding = -per_shard % options.chunk
    order = jnp.pad(order, ((0, 0), (0, padding)))
    # The padding repeats a real token; its weight is 0, so it counts for nothing.
    scales = jnp.take_along_axis(flat, order, axis=1)
    scales = jnp.where(jnp.arange(per_shard + padding) < per_shard, scales, 0.0)

    def moved(array: Array) -> Array:
        array = array.reshape(shards, per_shard, *array.shape[2:])
        return jnp.take_along_axis(array, order.reshape(*order.shape, *(1,) * (array.ndim - 2)), axis=1)

    return options, (scales, *map(moved, arrays))


def over_chunks(options: Options, weights: Array, add: Callable[[Options, Array, Any], Any], start: Any) -> Any:
    """Runs over the chunks that hold any token of non-zero weight, over all shards.

    Args:
        options: of the whole.
        weights: float32 `[shards, tokens]`, those of weight 0 last.
        add: `(options, index, carry) → carry`, with the options of the chunk.
        start: the first `carry`.
    """
    used = jnp.max(jnp.sum(weights > 0, axis=1))
    if options.part is None:
        return lax.fori_loop(0, -(-used // options.chunk), partial(add, options), start)
    full_chunks = (used + options.chunk // 2 - 1) // options.chunk  # a chunk up to half full is made up of parts
    carry = lax.fori_loop(0, full_chunks, partial(add, options), start)
    parts = options._replace(chunk=options.part, part=None)
    first = full_chunks * (options.chunk // options.part)
    return lax.fori_loop(first, jnp.maximum(first, -(-used // options.part)), partial(add, parts), carry)


def take(options: Options, index: Array, *arrays: Array) -> tuple[Array, ...]:
    """Chunk `index` of each array: `[shards, tokens, …]` → `[shards, chunk, …]`."""
    start = index * options.chunk
    return tuple(lax.dynamic_slice_in_dim(array, start, options.chunk, axis=1) for array in arrays)


def put(options: Options, index: Array, array: Array, values: Array) -> Array:
    """The array with chunk `index` replaced, in its own dtype."""
    return lax.dynamic_update_slice_in_dim(array, values.astype(array.dtype), index * options.chunk, axis=1)


def vocabulary(hidden: Array, kernel: Array | None) -> int:
    """The number of ids that a head gives logits for; without one the states are the logits."""
    return (hidden if kernel is None else kernel.T).shape[-1]


def cast_like(kernel: Array | None, hidden: Array) -> Array | None:
    """A head in the dtype of the states that it is used with."""
    return None if kernel is None else kernel.astype(hidden.dtype)


def logits(options: Options, hidden: Array, kernel: Array | None) -> Array:
    """`[shards, chunk, D]`, `[V, D]` → float32 `[shards, chunk, V]`, capped; states without a head are logits."""
    if kernel is None:
        raw = hidden.astype(jnp.float32)
    else:
        raw = lax.dot_general(hidden, kernel, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return raw if options.softcap is None else options.softcap * jnp.tanh(raw / options.softcap)


def uncapped(options: Options, capped: Array, dlogits: Array) -> Array:
    """From a derivative by what `logits` returned, `capped`, to that by the logits before the cap."""
    return dlogits if options.softcap is None else dlogits * (1.0 - jnp.square(capped / options.softcap))


def hidden_vjp(dlogits: Array, hidden: Array, kernel: Array | None) -> Array:
    """The derivative by `hidden`, float32, from that by the uncapped logits, which is used in the compute dtype."""
    dlogits = dlogits.astype(hidden.dtype)
    if kernel is None:
        return dlogits
    return lax.dot_general(dlogits, kernel, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def kernel_vjp(dlogits: Array, hidden: Array) -> Array:
    """The derivative by the kernel, float32 `[V, D]`, from that by the uncapped logits `[shards, chunk, V]`."""
    flat, rows = dlogits.reshape(-1, dlogits.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    return product_over_tokens(flat, rows)


#: `(options, hidden [shards, chunk, D], kernel [V, D] or None, the chunk of arrays by token, arrays that all chunks
#: read)` → what is summed, float32 `[shards, chunk]`, and its derivative by the uncapped logits, float32
#: `[shards, chunk, V]`.
TokenValue = Callable[[Options, Array, Array | None, tuple[Array, ...], tuple[Array | None, ...]], tuple[Array, Array]]


def primals(tree: Any) -> Any:
    """The values of what a forward pass with symbolic zeros gets."""
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def weighted_sum(
    options: Options,
    value_of: TokenValue,
    fast: TokenValue | None,
    hidden: Array,
    kernel: Array | None,
    by_token: tuple[Array, ...],
    shared: tuple[Array | None, ...],
    weights: Array,
) -> Array:
    """Σ weight · value over tokens, differentiated by `hidden` and, where it is trained, by `kernel` alone.

    Args:
        options: as `pack_weighted_tokens` gave them.
        value_of: the value of each token and its derivative by the uncapped logits.
        fast: the same in another way, taken for the gradient where the head is frozen. Where its sum is not finite,
            all is computed once more by `value_of`. None: there is none.
        hidden: `[shards, tokens, D]` in the compute dtype.
        kernel: `[V, D]`, used in the dtype of `hidden`; None where that is the logits.
        by_token: arrays `[shards, tokens, …]` that `value_of` reads.
        shared: other arrays that it reads.
        weights: float32 `[shards, tokens]`; values of tokens of weight 0 don't matter.

    Returns:
        float32 scalar.
    """
    used = cast_like(kernel, hidden)
    return jnp.sum(_laid_out(options, value_of, ())(hidden, used, by_token, shared, weights)[0])


def _sums(options: Options, value_of: TokenValue, by: tuple[str, ...], *arrays: Any) -> tuple[Array, Any, Any]:
    """The sum over the tokens of each shard, float32 `[shards]`, and its derivatives `by` "hidden" and "kernel".

    `arrays` are those of `weighted_sum`, the kernel in the dtype that it is used in.
    """
    hidden, used, by_token, shared, weights = arrays

    def add(options: Options, index: Array, carry: Any) -> Any:
        totals, dhidden, dkernel = carry
        h, w, *others = take(options, index, hidden, weights, *by_token)
        value, dlogits = value_of(options, h, used, tuple(others), shared)
        totals = totals + jnp.sum(jnp.where(w > 0, value * w, 0.0), axis=1)
        dlogits = dlogits * w[..., None]
        if used is None:  # of padding a user's logits may be infinite
            dlogits = jnp.where(w[..., None] > 0, dlogits, 0.0)
        if dhidden is not None:
            dhidden = put(options, index, dhidden, hidden_vjp(dlogits, h, used))
        if dkernel is not None:
            dkernel = dkernel + kernel_vjp(dlogits.astype(h.dtype), h)
        return totals, dhidden, dkernel

    dhidden = jnp.zeros_like(hidden) if "hidden" in by else None
    dkernel = jnp.zeros(used.shape, jnp.float32) if "kernel" in by else None
    return over_chunks(options, weights, add, (jnp.zeros(weights.shape[0], jnp.float32), dhidden, dkernel))


_ROWS = 512  # of a product over the tokens of several elements: enough for its rate, few enough to skip weight 0


def _laid_out(options: Options, value_of: TokenValue, by: tuple[str, ...]) -> Callable[..., Any]:
    """`_sums` as a function of its arrays; under `jax.vmap`, if `options.mapped`, with the elements as shards."""
    plain = partial(_sums, options, value_of, by)
    if not options.mapped:
        return plain
    call = custom_vmap(plain)

    @call.def_vmap
    def _by_shards(size: int, mapped: Any, *arrays: Any) -> Any:
        if any(jax.tree.leaves((mapped[1], mapped[3]))):  # the head, or what is shared
            sums = jax.vmap(plain, jax.tree.map(lambda on: 0 if on else None, tuple(mapped)))(*arrays)
            return sums, jax.tree.map(lambda _: True, sums)
        hidden, kernel, by_token, shared, weights = arrays
        shards, tokens = options.shards, weights.shape[-1]
        rows = min(chunk_size(vocabulary(hidden, kernel), size * shards * tokens), _ROWS)
        chunk = min(max(8, rows // (size * shards)), tokens)

        def side_by_side(array: Array, on: bool) -> Array:
            array = array if on else jnp.broadcast_to(array, (size, *array.shape))
            array = array.reshape(size * shards, tokens, *array.shape[3:])
            return jnp.pad(array, [(0, 0), (0, -tokens % chunk), *[(0, 0)] * (array.ndim - 2)])

        by_tokens = jax.tree.map(side_by_side, (hidden, by_token, weights), (mapped[0], mapped[2], mapped[4]))
        inner = _laid_out(options._replace(shards=size * shards, chunk=chunk), value_of, by)
        sums = inner(by_tokens[0], kernel, by_tokens[1], shared, by_tokens[2])

        def back(array: Array) -> Array:
            array = array.reshape(size, shards, *array.shape[1:])
            return array if array.ndim == 2 else array[:, :, :tokens]

        sums = jax.tree.map(back, sums)
        return sums, jax.tree.map(lambda _: True, sums)

    return call


def _forward(
    options: Options, value_of: TokenValue, fast: TokenValue | None, hidden: Any, kernel: Any, *others: Any
) -> tuple[Array, tuple[Array, Array | None]]:
    """Sum and gradient together: the sum is a scalar, so its gradient needs no second pass over the logits."""
    head_trained = kernel is not None and kernel.perturbed
    hidden, kernel, (by_token, shared, weights) = primals((hidden, kernel, others))
    used = cast_like(kernel, hidden)
    arrays = hidden, used, by_token, shared
    if head_trained:
        totals, dhidden, dkernel = _sums(options, value_of, ("hidden", "kernel"), *arrays, weights)
        return jnp.sum(totals), (dhidden, dkernel.astype(kernel.dtype))

    def run(options: Options, value_of: TokenValue, weights: Array) -> tuple[Array, Array]:
        return _laid_out(options, value_of, ("hidden",))(*arrays, weights)[:2]

    if fast is None:
        totals, dhidden = run(options, value_of, weights)
    else:
        # Half the tokens a chunk: `value_of` has float32 logits where `fast` has them in the compute dtype.
        halved = options._replace(chunk=options.chunk // (1 if options.chunk % 2 else 2))
        totals, dhidden = _once_more(partial(run, halved, value_of), weights, run(options, fast, weights))
    return jnp.sum(totals), (dhidden, None)


def _once_more(
    exactly: Callable[[Array], tuple[Array, Array]], weights: Array, sums: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The `sums`, or where a total isn't finite all of them by `exactly(weights)`.

    A loop of one turn at most: a conditional would under `jax.vmap` do both.
    """

    def needed(state: Any) -> Array:
        return state[0] & ~jnp.all(jnp.isfinite(state[1][0]))

    def again(state: Any) -> Any:
        # What depends on nothing in `state` a compiler might do before the loop.
        return jnp.array(False), exactly(jnp.where(state[0], weights, 0.0))

    return lax.while_loop(needed, again, (jnp.array(True), sums))[1]


def _backward(
    options: Options, value_of: TokenValue, fast: TokenValue | None, saved: tuple[Array, Array | None], dtotal: Any
) -> Any:
    dhidden, dkernel = saved
    if isinstance(dtotal, SymbolicZero):
        dtotal = jnp.zeros(dtotal.shape, dtotal.dtype)
    scaled = (dhidden.astype(jnp.float32) * dtotal).astype(dhidden.dtype)
    return scaled, None if dkernel is None else dkernel * dtotal, None, None, None


weighted_sum.defvjp(_forward, _backward, symbolic_zeros=True)
