"""The weighted vocabulary loss, in chunks (see chunked_logits.py): the logits of a whole batch never exist.

Every token has a weight (0 for prompt and padding under the masked loss).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from mora_jax.losses.chunked_logits import (
    Options,
    kernel_vjp,
    logits,
    logits_vjp,
    pack_weighted_tokens,
    put,
    take,
    used_chunks,
)

Array = jax.Array


class TokenSums(NamedTuple):
    """Sums over tokens, float32 scalars.

    Attributes:
        nll: Σ weight · negative log-likelihood, in nats.
        weight: Σ weight.
        correct: Σ over tokens of non-zero weight, 1 where the most likely next token is the right one.
        tokens: number of tokens of non-zero weight.
    """

    nll: Any
    weight: Any
    correct: Any
    tokens: Any


def next_token_targets(input_ids: Array, weights: Array, segment_ids: Array | None = None) -> tuple[Array, Array]:
    """Shifts tokens and their weights together, so that position t predicts token t + 1.

    Nothing predicts the first token of a row, nor of an example in it, nor padding: such weights are left out.

    Args:
        input_ids: int `[..., T]`.
        weights: float `[..., T]`, the weight of predicting token t.
        segment_ids: int `[..., T]`, the example of each token, 0 for padding; None: every row is one example.

    Returns:
        `(targets, weights)` `[..., T]`; the last position predicts nothing and has weight 0.
    """
    targets = jnp.roll(input_ids, -1, axis=-1)
    shifted = jnp.roll(weights, -1, axis=-1).at[..., -1].set(0)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        inside = (segment_ids > 0) & (jnp.roll(segment_ids, -1, axis=-1) == segment_ids)
        shifted = jnp.where(inside, shifted, 0)
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
    options, (scales, flat, goals) = pack_weighted_tokens(
        weights, hidden, targets, vocab_size=kernel.shape[0], softcap=softcap, shards=shards, chunk=chunk
    )
    return _loss(options, flat, kernel, goals, scales)


def token_sums(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> TokenSums:
    """What evaluation adds up, in the same chunks as the loss; arguments as in `weighted_loss`."""
    options, (scales, flat, goals) = pack_weighted_tokens(
        weights, hidden, targets, vocab_size=kernel.shape[0], softcap=softcap, shards=1, chunk=chunk
    )
    kernel = kernel.astype(flat.dtype)

    def add(index, sums):
        h, t, w = take(options, index, flat, goals, scales)
        z = logits(options, h, kernel)
        nll = jax.nn.logsumexp(z, axis=-1) - _picked(z, t)
        right = (jnp.argmax(z, axis=-1) == t) & (w > 0)
        return sums[0] + jnp.sum(jnp.where(w > 0, nll * w, 0.0)), sums[1] + jnp.sum(right)

    zero = jnp.zeros((), jnp.float32)
    nll, correct = lax.fori_loop(0, used_chunks(options, scales), add, (zero, jnp.zeros((), jnp.int32)))
    return TokenSums(nll, jnp.sum(weights), correct.astype(jnp.float32), jnp.sum(weights > 0).astype(jnp.float32))


def _picked(z: Array, targets: Array) -> Array:
    return jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, hidden: Array, kernel: Array, targets: Array, weights: Array) -> Array:
    used = kernel.astype(hidden.dtype)

    def add(index, total):
        h, t, w = take(options, index, hidden, targets, weights)
        z = logits(options, h, used)
        nll = jax.nn.logsumexp(z, axis=-1) - _picked(z, t)
        return total + jnp.sum(jnp.where(w > 0, nll * w, 0.0))

    return lax.fori_loop(0, used_chunks(options, weights), add, jnp.zeros((), jnp.float32))


def _loss_fwd(options, hidden, kernel, targets, weights):
    """Loss and gradient together: the loss is a scalar, so its gradient needs no second pass over the logits."""
    head_trained = kernel.perturbed
    hidden, kernel, targets, weights = hidden.value, kernel.value, targets.value, weights.value
    used = kernel.astype(hidden.dtype)

    def add(index, carry):
        total, dhidden, dkernel = carry
        h, t, w = take(options, index, hidden, targets, weights)
        z = logits(options, h, used)
        top = jnp.max(z, axis=-1, keepdims=True)
        powers = jnp.exp(z - top)
        norm = jnp.sum(powers, axis=-1, keepdims=True)
        nll = (jnp.log(norm) + top)[..., 0] - _picked(z, t)
        total = total + jnp.sum(jnp.where(w > 0, nll * w, 0.0))
        hot = lax.broadcasted_iota(jnp.int32, z.shape, 2) == t[..., None]
        slope, dh = logits_vjp(options, z, (powers / norm - hot) * w[..., None], used)
        dhidden = put(options, index, dhidden, dh)
        if dkernel is not None:
            dkernel = dkernel + kernel_vjp(slope, h)
        return total, dhidden, dkernel

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros_like(hidden),
        jnp.zeros(kernel.shape, jnp.float32) if head_trained else None,
    )
    total, dhidden, dkernel = lax.fori_loop(0, used_chunks(options, weights), add, start)
    return total, (dhidden, None if dkernel is None else dkernel.astype(kernel.dtype))


def _loss_bwd(options, saved, dtotal):
    dhidden, dkernel = saved
    if isinstance(dtotal, SymbolicZero):
        dtotal = jnp.zeros(dtotal.shape, dtotal.dtype)
    scaled = (dhidden.astype(jnp.float32) * dtotal).astype(dhidden.dtype)
    return scaled, None if dkernel is None else dkernel * dtotal, None, None


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)
