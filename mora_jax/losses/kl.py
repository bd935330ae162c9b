"""The divergence of the tuned model from its frozen base, per token over the whole vocabulary, in chunks.

`KL(tuned ‖ base) = Σ_v p(v) · (log p(v) − log q(v))`, p the tuned model's next-token distribution and q the base's.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from mora_jax.losses.chunked_sum import Options, cast_like, logits, pack_weighted_tokens, uncapped, weighted_sum


def weighted_kl(
    hidden: Array,
    base_hidden: Array,
    kernel: Array | None,
    weights: Array,
    *,
    base_kernel: Array | None = None,
    softcap: float | None = None,
    shards: int = 1,
    chunk: int | None = None,
    mapped: bool = False,
) -> Array:
    """Σ weight · KL(tuned ‖ base) over all tokens: a sum; the caller divides by its normaliser.

    The base gets no gradient.

    Args:
        hidden, base_hidden: `[B, T, D]` in the compute dtype, after the final norm.
        kernel: `[V, D]`, the output head; used in the dtype of `hidden`. None: the states are logits.
        weights: float32 `[B, T]`, non-negative.
        base_kernel: `[V, D]`, the base's output head where it is another; `kernel` then gets a gradient, if it is
            differentiated. None: both share `kernel`, which is frozen.
        softcap, shards, chunk, mapped: as in `loss.weighted_loss`.

    Returns:
        float32 scalar in nats; 0, with zero gradients, when every weight is 0.
    """
    options, (scales, tuned, base) = pack_weighted_tokens(
        weights, hidden, base_hidden, kernel=kernel, softcap=softcap, shards=shards, chunk=chunk, mapped=mapped, heads=2
    )  # two heads: both models' logits are there at once
    if base_kernel is None:
        base_kernel = kernel = lax.stop_gradient(kernel)
    shared = (cast_like(lax.stop_gradient(base_kernel), tuned),)
    return weighted_sum(options, _divergence, None, tuned, kernel, (lax.stop_gradient(base),), shared, scales)


def _divergence(
    options: Options,
    hidden: Array,
    kernel: Array | None,
    base: tuple[Array, ...],
    base_kernel: tuple[Array | None, ...],
) -> tuple[Array, Array]:
    z = logits(options, hidden, kernel)
    y = logits(options, *base, *base_kernel)
    # log p − log q, without making either: a tenth faster than two log_softmax.
    log_norm = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    ratio = z - y - (log_norm - jax.nn.logsumexp(y, axis=-1, keepdims=True))
    p = jnp.exp(z - log_norm)
    kl = jnp.sum(p * ratio, axis=-1)
    # ∂KL/∂z(v) = p(v) · (log p(v) − log q(v) − KL)
    return kl, uncapped(options, z, p * (ratio - kl[..., None]))
