"""The weighted vocabulary loss.

Every token has a weight, 0 for prompt and padding under the masked loss. It is summed in chunks of tokens that have one
(`losses/chunked_sum.py`); the logits of a whole batch never exist.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax.backend import backend
from mora_jax.losses.chunked_sum import Options, logits, pack_weighted_tokens, uncapped, weighted_sum

Array = jax.Array


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
    mapped: bool = False,
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
        mapped: see `Options`.

    Returns:
        float32 scalar in nats; 0, with zero gradients, when every weight is 0.
    """
    options, (scales, flat, goals) = pack_weighted_tokens(
        weights,
        hidden,
        targets,
        vocab_size=kernel.shape[0],
        softcap=softcap,
        shards=shards,
        chunk=chunk,
        mapped=mapped,
    )
    fast = _by_powers if softcap is None and backend() != "cpu" else None
    return weighted_sum(options, _loss_of_tokens, fast, flat, kernel, (goals,), (), scales)


def negative_log_likelihood(z: Array, t: Array) -> tuple[Array, Array]:
    """−log p(target), float32 `[shards, chunk]`, and its derivative by the logits `z` `[shards, chunk, V]`."""
    top = jnp.max(z, axis=-1, keepdims=True)
    powers = jnp.exp(z - top)
    norm = jnp.sum(powers, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(z, t[..., None], axis=-1)[..., 0]
    return (jnp.log(norm) + top)[..., 0] - picked, powers / norm - _hot(z.shape, t)


def _loss_of_tokens(
    options: Options, hidden: Array, kernel: Array, targets: tuple[Array, ...], shared: tuple[Array, ...]
) -> tuple[Array, Array]:
    """The `TokenValue` of this loss."""
    z = logits(options, hidden, kernel)
    nll, slope = negative_log_likelihood(z, *targets)
    return nll, uncapped(options, z, slope)


def _by_powers(
    options: Options, hidden: Array, kernel: Array, targets: tuple[Array, ...], shared: tuple[Array, ...]
) -> tuple[Array, Array]:
    """`_loss_of_tokens` for accelerators, which make logits, powers and their sum in one pass over the vocabulary.

    The powers alone are kept, in the compute dtype. That needs something near the largest logit before any logit is
    there: the target's own, whose power is then 1. Where a target is less likely than e⁻⁸⁸ its loss is infinite here.
    """
    # As a matrix: of three axes the TPU's compiler doesn't make powers and sums with the product.
    t, h = targets[0].reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    rows = jnp.take(kernel, t, axis=0, mode="clip").astype(jnp.float32)
    shift = jnp.sum(h.astype(jnp.float32) * rows, axis=-1, keepdims=True)
    z = lax.dot_general(h, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    powers = jnp.exp(z - shift)
    norm = jnp.sum(powers, axis=-1, keepdims=True)
    picked = jnp.sum(jnp.where(_hot(z.shape, t), z, 0.0), axis=-1, keepdims=True)
    kept = lax.optimization_barrier(powers.astype(kernel.dtype))
    slope = jnp.where(_hot(z.shape, t), jnp.exp(picked - shift) / norm - 1.0, kept * (1.0 / norm))
    return (jnp.log(norm) + shift - picked).reshape(targets[0].shape), slope.reshape(*targets[0].shape, -1)


def _hot(shape: tuple[int, ...], t: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == t[..., None]
