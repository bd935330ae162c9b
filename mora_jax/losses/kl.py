"""The divergence of the tuned model from its frozen base, per token over the whole vocabulary, in chunks.

`KL(tuned ‖ base) = Σ_v p(v) · (log p(v) − log q(v))`, p the tuned model's next-token distribution and q the base's.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from mora_jax.losses.cross_entropy import (
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


def weighted_kl(
    hidden: Array,
    base_hidden: Array,
    kernel: Array,
    weights: Array,
    *,
    base_kernel: Array | None = None,
    softcap: float | None = None,
    shards: int = 1,
    chunk: int | None = None,
) -> Array:
    """Σ weight · KL(tuned ‖ base) over all tokens: a sum; the caller divides by its normaliser.

    The base gets no gradient.

    Args:
        hidden, base_hidden: `[B, T, D]` in the compute dtype, after the final norm.
        kernel: `[V, D]`, the output head; used in the dtype of `hidden`.
        weights: float32 `[B, T]`, non-negative.
        base_kernel: `[V, D]`, the base's output head where it is another; `kernel` then gets a gradient, if it is
            differentiated. None: both share `kernel`, which is frozen.
        softcap, shards, chunk: as in `loss.weighted_loss`.

    Returns:
        float32 scalar in nats; 0, with zero gradients, when every weight is 0.
    """
    options, (scales, tuned, base) = pack_weighted_tokens(
        weights, hidden, base_hidden, vocab_size=kernel.shape[0], softcap=softcap, shards=shards, chunk=chunk
    )
    if base_kernel is None:
        base_kernel = kernel = lax.stop_gradient(kernel)
    return _kl(options, tuned, kernel, lax.stop_gradient(base), lax.stop_gradient(base_kernel), scales)


def _divergence(
    options: Options, tuned: Array, kernel: Array, base: Array, base_kernel: Array
) -> tuple[Array, Array, Array, Array]:
    """Of one chunk: the KL of each token `[shards, chunk]`, and the tuned logits, probabilities, log-ratios."""
    z, y = logits(options, tuned, kernel), logits(options, base, base_kernel)
    # log p − log q, without making either: a tenth faster than two log_softmax.
    log_norm = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    ratio = z - y - (log_norm - jax.nn.logsumexp(y, axis=-1, keepdims=True))
    p = jnp.exp(z - log_norm)
    return jnp.sum(p * ratio, axis=-1), z, p, ratio


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(options: Options, tuned: Array, kernel: Array, base: Array, base_kernel: Array, weights: Array) -> Array:
    kernels = kernel.astype(tuned.dtype), base_kernel.astype(tuned.dtype)

    def add(index, total):
        h, b, w = take(options, index, tuned, base, weights)
        kl = _divergence(options, h, kernels[0], b, kernels[1])[0]
        return total + jnp.sum(jnp.where(w > 0, kl * w, 0.0))

    return lax.fori_loop(0, used_chunks(options, weights), add, jnp.zeros((), jnp.float32))


def _kl_fwd(options, tuned, kernel, base, base_kernel, weights):
    """Value and gradient together, as in the loss: one pass over the logits."""
    head_trained = kernel.perturbed
    tuned, kernel, base, base_kernel, weights = (x.value for x in (tuned, kernel, base, base_kernel, weights))
    used, base_used = kernel.astype(tuned.dtype), base_kernel.astype(tuned.dtype)

    def add(index, carry):
        total, dtuned, dkernel = carry
        h, b, w = take(options, index, tuned, base, weights)
        kl, z, p, ratio = _divergence(options, h, used, b, base_used)
        total = total + jnp.sum(jnp.where(w > 0, kl * w, 0.0))
        # ∂KL/∂z(v) = p(v) · (log p(v) − log q(v) − KL)
        slope, dh = logits_vjp(options, z, p * (ratio - kl[..., None]) * w[..., None], used)
        if dkernel is not None:
            dkernel = dkernel + kernel_vjp(slope, h)
        return total, put(options, index, dtuned, dh), dkernel

    dkernel = jnp.zeros(kernel.shape, jnp.float32) if head_trained else None
    start = (jnp.zeros((), jnp.float32), jnp.zeros_like(tuned), dkernel)
    total, dtuned, dkernel = lax.fori_loop(0, used_chunks(options, weights), add, start)
    return total, (dtuned, None if dkernel is None else dkernel.astype(kernel.dtype))


def _kl_bwd(options, saved, dtotal):
    dtuned, dkernel = saved
    if isinstance(dtotal, SymbolicZero):
        dtotal = jnp.zeros(dtotal.shape, dtotal.dtype)
    scaled = (dtuned.astype(jnp.float32) * dtotal).astype(dtuned.dtype)
    return scaled, None if dkernel is None else dkernel * dtotal, None, None, None


_kl.defvjp(_kl_fwd, _kl_bwd, symbolic_zeros=True)
