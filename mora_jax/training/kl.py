"""The divergence of the tuned model from its frozen base, per token over the whole vocabulary, in chunks.

`KL(tuned ‖ base) = Σ_v p(v) · (log p(v) − log q(v))`, p the tuned model's next-token distribution and q the base's.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax.training.chunks import Options, compact, logits, pull_logits, put, take, used_chunks

Array = jax.Array


def weighted_kl(
    hidden: Array,
    base_hidden: Array,
    kernel: Array,
    weights: Array,
    *,
    softcap: float | None = None,
    shards: int = 1,
    chunk: int | None = None,
) -> Array:
    """Σ weight · KL(tuned ‖ base) over all tokens: a sum; the caller divides by its normaliser.

    Only `hidden` gets a gradient: the base and the output head that both share are frozen.

    Args:
        hidden, base_hidden: `[B, T, D]` in the compute dtype, after the final norm.
        kernel: `[V, D]`, the output head; used in the dtype of `hidden`.
        weights: float32 `[B, T]`, non-negative.
        softcap, shards, chunk: as in `loss.weighted_loss`.

    Returns:
        float32 scalar in nats; 0, with zero gradients, when every weight is 0.
    """
    options, (scales, tuned, base) = compact(
        weights, hidden, base_hidden, vocab_size=kernel.shape[0], softcap=softcap, shards=shards, chunk=chunk
    )
    return _kl(options, tuned, lax.stop_gradient(base), lax.stop_gradient(kernel), scales)


def _divergence(options: Options, tuned: Array, base: Array, kernel: Array) -> tuple[Array, Array, Array, Array]:
    """Of one chunk: the KL of each token `[shards, chunk]`, and the tuned logits, probabilities, log-ratios."""
    z, y = logits(options, tuned, kernel), logits(options, base, kernel)
    # log p − log q, without making either: a tenth faster than two log_softmax.
    log_norm = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    ratio = z - y - (log_norm - jax.nn.logsumexp(y, axis=-1, keepdims=True))
    p = jnp.exp(z - log_norm)
    return jnp.sum(p * ratio, axis=-1), z, p, ratio


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(options: Options, tuned: Array, base: Array, kernel: Array, weights: Array) -> Array:
    used = kernel.astype(tuned.dtype)

    def add(index, total):
        h, b, w = take(options, index, tuned, base, weights)
        kl = _divergence(options, h, b, used)[0]
        return total + jnp.sum(jnp.where(w > 0, kl * w, 0.0))

    return lax.fori_loop(0, used_chunks(options, weights), add, jnp.zeros((), jnp.float32))


def _kl_fwd(options, tuned, base, kernel, weights):
    """Value and gradient together, as in the loss: one pass over the logits."""
    used = kernel.astype(tuned.dtype)

    def add(index, carry):
        total, dtuned = carry
        h, b, w = take(options, index, tuned, base, weights)
        kl, z, p, ratio = _divergence(options, h, b, used)
        total = total + jnp.sum(jnp.where(w > 0, kl * w, 0.0))
        # ∂KL/∂z(v) = p(v) · (log p(v) − log q(v) − KL)
        slope = p * (ratio - kl[..., None]) * w[..., None]
        return total, put(options, index, dtuned, pull_logits(options, z, slope, used)[1])

    start = (jnp.zeros((), jnp.float32), jnp.zeros_like(tuned))
    return lax.fori_loop(0, used_chunks(options, weights), add, start)


def _kl_bwd(options, dtuned, dtotal):
    return (dtuned.astype(jnp.float32) * dtotal).astype(dtuned.dtype), None, None, None


_kl.defvjp(_kl_fwd, _kl_bwd)
