"""The weighted vocabulary loss, in chunks: the logits of a whole batch never exist.

Every token has a weight (0 for prompt and padding under the masked loss). Tokens of weight 0 are moved behind the
others and whole chunks of them are skipped, so the vocabulary product costs what the trained tokens cost.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

Array = jax.Array


class Options(NamedTuple):
    """The static part of the loss.

    Attributes:
        softcap: logits become `softcap · tanh(logits / softcap)`; None for no cap.
        shards: groups of rows that are compacted on their own; the number of devices that share the batch, so that
            no token crosses devices.
        chunk: tokens a chunk and shard.
    """

    softcap: float | None
    shards: int
    chunk: int


class Scores(NamedTuple):
    """Sums over tokens, float32 scalars.

    Attributes:
        nll: Σ weight · negative log-likelihood, in nats.
        weight: Σ weight.
        correct: Σ over tokens of non-zero weight, 1 where the most likely next token is the right one.
        tokens: number of tokens of non-zero weight.
    """

    nll: Array
    weight: Array
    correct: Array
    tokens: Array


def chunk_size(vocab_size: int, tokens: int) -> int:
    """Tokens a chunk: 64 MB of float32 logits, at least 64 tokens and no more than there are."""
    wanted = max(64, (1 << 24) // vocab_size)
    return max(1, min(wanted, tokens))


def next_token_targets(input_ids: Array, weights: Array) -> tuple[Array, Array]:
    """Shifts tokens and their weights together, so that position t predicts token t + 1.

    Args:
        input_ids: int `[B, T]`.
        weights: float `[B, T]`, the weight of predicting token t.

    Returns:
        `(targets, weights)` `[B, T]`; the last position predicts nothing and has weight 0.
    """
    targets = jnp.roll(input_ids, -1, axis=1)
    shifted = jnp.roll(weights, -1, axis=1).at[:, -1].set(0)
    return targets, shifted.astype(jnp.float32)


def weighted_loss(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    *,
    softcap: float | None = None,
    shards: int = 1,
    chunk: int | None = None,
) -> Array:
    """Σ weight · (−log p(target)) over all tokens: a sum; the caller divides by its normaliser.

    Args:
        hidden: `[B, T, D]` in the compute dtype, after the final norm.
        kernel: `[V, D]`, the output head; used in the dtype of `hidden`. It gets a gradient only if it is
            differentiated.
        targets: int `[B, T]`, the token that each position predicts.
        weights: float32 `[B, T]`, non-negative; NaN-free where 0.
        softcap: see `Options`.
        shards: divides B; see `Options`.
        chunk: tokens a chunk; None chooses by vocabulary size.

    Returns:
        float32 scalar in nats; 0, with zero gradients, when every weight is 0.
    """
    options, arguments = _prepare(hidden, kernel, targets, weights, softcap, shards, chunk)
    return _loss(options, *arguments)


def score(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Scores:
    """The sums that evaluation reports, in the same chunks as the loss; arguments as in `weighted_loss`."""
    options, (flat, kernel, goals, scales) = _prepare(hidden, kernel, targets, weights, softcap, 1, chunk)
    kernel = kernel.astype(flat.dtype)

    def chunk_scores(start, sums):
        h, t, w = _slice(options, start, flat, goals, scales)
        logits = _logits(options, h, kernel)
        nll = jax.nn.logsumexp(logits, axis=-1) - _picked(logits, t)
        right = (jnp.argmax(logits, axis=-1) == t) & (w > 0)
        return sums[0] + jnp.sum(jnp.where(w > 0, nll * w, 0.0)), sums[1] + jnp.sum(right)

    zero = jnp.zeros((), jnp.float32)
    nll, correct = lax.fori_loop(0, _chunks(options, scales), chunk_scores, (zero, jnp.zeros((), jnp.int32)))
    return Scores(nll, jnp.sum(weights), correct.astype(jnp.float32), jnp.sum(weights > 0).astype(jnp.float32))


def _prepare(hidden, kernel, targets, weights, softcap, shards, chunk):
    """Compacts tokens of non-zero weight to the front of each shard: `[shards, tokens, …]`."""
    batch, length, width = hidden.shape
    if batch % shards:
        raise ValueError(f"{shards} shards can't share {batch} rows evenly")
    per_shard = batch // shards * length
    options = Options(softcap, shards, chunk or chunk_size(kernel.shape[0], per_shard))
    goals, scales = targets.reshape(shards, per_shard), weights.reshape(shards, per_shard)
    order = jnp.argsort(scales == 0, axis=1, stable=True)
    padding = -per_shard % options.chunk
    order = jnp.pad(order, ((0, 0), (0, padding)))
    flat = jnp.take_along_axis(hidden.reshape(shards, per_shard, width), order[:, :, None], axis=1)
    goals = jnp.take_along_axis(goals, order, axis=1)
    scales = jnp.take_along_axis(scales, order, axis=1)
    # The padding repeats a real token; its weight is 0, so it counts for nothing.
    scales = jnp.where(jnp.arange(per_shard + padding) < per_shard, scales, 0.0)
    return options, (flat, kernel, goals, scales)


def _chunks(options: Options, weights: Array) -> Array:
    """How many chunks hold any token of non-zero weight, over all shards."""
    used = jnp.max(jnp.sum(weights > 0, axis=1))
    return (used + options.chunk - 1) // options.chunk


def _slice(options: Options, index, *arrays):
    start = index * options.chunk
    return tuple(lax.dynamic_slice_in_dim(a, start, options.chunk, axis=1) for a in arrays)


def _logits(options: Options, hidden: Array, kernel: Array) -> Array:
    """`[shards, chunk, D]`, `[V, D]` → float32 `[shards, chunk, V]`."""
    logits = lax.dot_general(hidden, kernel, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return logits if options.softcap is None else options.softcap * jnp.tanh(logits / options.softcap)


def _picked(logits: Array, targets: Array) -> Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, hidden: Array, kernel: Array, targets: Array, weights: Array) -> Array:
    used = kernel.astype(hidden.dtype)

    def add(index, total):
        h, t, w = _slice(options, index, hidden, targets, weights)
        logits = _logits(options, h, used)
        nll = jax.nn.logsumexp(logits, axis=-1) - _picked(logits, t)
        return total + jnp.sum(jnp.where(w > 0, nll * w, 0.0))

    return lax.fori_loop(0, _chunks(options, weights), add, jnp.zeros((), jnp.float32))


def _loss_fwd(options, hidden, kernel, targets, weights):
    """Loss and gradient together: the loss is a scalar, so its gradient needs no second pass over the logits."""
    head_trained = kernel.perturbed
    hidden, kernel, targets, weights = hidden.value, kernel.value, targets.value, weights.value
    used = kernel.astype(hidden.dtype)
    width = hidden.shape[-1]

    def add(index, carry):
        total, dhidden, dkernel = carry
        h, t, w = _slice(options, index, hidden, targets, weights)
        logits = _logits(options, h, used)
        top = jnp.max(logits, axis=-1, keepdims=True)
        powers = jnp.exp(logits - top)
        norm = jnp.sum(powers, axis=-1, keepdims=True)
        nll = (jnp.log(norm) + top)[..., 0] - _picked(logits, t)
        total = total + jnp.sum(jnp.where(w > 0, nll * w, 0.0))
        hot = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == t[..., None]
        slope = (powers / norm - hot) * w[..., None]
        if options.softcap is not None:
            slope = slope * (1.0 - jnp.square(logits / options.softcap))
        slope = slope.astype(hidden.dtype)
        dh = lax.dot_general(slope, used, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        start = index * options.chunk
        dhidden = lax.dynamic_update_slice_in_dim(dhidden, dh.astype(hidden.dtype), start, axis=1)
        if dkernel is not None:
            flat_slope, flat_h = slope.reshape(-1, slope.shape[-1]), h.reshape(-1, width)
            dkernel = dkernel + lax.dot_general(
                flat_slope, flat_h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
        return total, dhidden, dkernel

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros_like(hidden),
        jnp.zeros(kernel.shape, jnp.float32) if head_trained else None,
    )
    total, dhidden, dkernel = lax.fori_loop(0, _chunks(options, weights), add, start)
    return total, (dhidden, None if dkernel is None else dkernel.astype(kernel.dtype))


def _loss_bwd(options, saved, dtotal):
    dhidden, dkernel = saved
    if isinstance(dtotal, SymbolicZero):
        dtotal = jnp.zeros(dtotal.shape, dtotal.dtype)
    scaled = (dhidden.astype(jnp.float32) * dtotal).astype(dhidden.dtype)
    return scaled, None if dkernel is None else dkernel * dtotal, None, None


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)
