"""The negative log-likelihood of each token, differentiable, in the chunks of the loss; beside it that of a base."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from mora_jax.losses.chunked_sum import (
    Options,
    cast_like,
    hidden_vjp,
    kernel_vjp,
    logits,
    over_chunks,
    pack_weighted_tokens,
    primals,
    put,
    take,
    uncapped,
)
from mora_jax.losses.cross_entropy import negative_log_likelihood


class TokenNLL(NamedTuple):
    """Nats a token, float32 `[B, T]`; 0 for tokens that are not counted.

    Attributes:
        nll: −log p(target), the only one with a gradient.
        base_nll: the same under the base; None without one.
        kl: `KL(tuned ‖ base)` over the vocabulary; None without a base.
    """

    nll: Array
    base_nll: Array | None = None
    kl: Array | None = None


def token_nll(
    hidden: Array,
    kernel: Array | None,
    targets: Array,
    counted: Array,
    *,
    base: tuple[Array, Array | None] | None = None,
    softcap: float | None = None,
    shards: int = 1,
    chunk: int | None = None,
) -> TokenNLL:
    """What each counted token costs.

    The logits of a chunk are made once: the derivative of each value by its own hidden state is kept, and scaled by
    whatever comes back for it. Only a head that is trained needs them again in the backward pass.

    Args:
        hidden: `[B, T, D]` in the compute dtype, after the final norm.
        kernel: `[V, D]`, the output head; it gets a gradient only if it is differentiated. None: `hidden` is logits.
        targets: int `[B, T]`.
        counted: float32 `[B, T]`, 0 for tokens that nobody asks about.
        base: hidden states `[B, T, D]` and head `[V, D]` of another model; they get no gradient.
        softcap, shards, chunk: as in `weighted_loss`.
    """
    places = jnp.arange(targets.size).reshape(targets.shape) % (targets.size // shards)
    arrays = (hidden, targets, places) if base is None else (hidden, targets, places, base[0])
    heads = 1 if base is None else 2
    options, (marks, flat, goals, places, *others) = pack_weighted_tokens(
        counted, *arrays, kernel=kernel, softcap=softcap, shards=shards, chunk=chunk, heads=heads
    )
    by_token = (goals, *map(lax.stop_gradient, others))
    shared = () if base is None else (cast_like(lax.stop_gradient(base[1]), flat),)

    def back(values: Array) -> Array:
        zeros = jnp.zeros(targets.size // shards, jnp.float32)
        by_shard = jax.vmap(lambda place, value: zeros.at[place].add(value))(places, values)
        return by_shard.reshape(targets.shape)

    values = [back(array) for array in _packed(options, flat, kernel, by_token, shared, marks)]
    return TokenNLL(values[0], *map(lax.stop_gradient, values[1:]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(
    options: Options, hidden: Array, kernel: Array | None, by_token: Any, shared: Any, marks: Array
) -> tuple[Array, ...]:
    """The values of packed tokens, float32 `[shards, tokens]` each."""
    return _values(options, hidden, kernel, by_token, shared, marks, with_slopes=False)[0]


def _values(
    options: Options, hidden: Array, kernel: Any, by_token: Any, shared: Any, marks: Array, *, with_slopes: bool
) -> tuple[tuple[Array, ...], Array | None]:
    """The values, and the derivative of each token's by its own hidden state."""
    used = cast_like(kernel, hidden)

    def add(options: Options, index: Array, carry: Any) -> Any:
        sums, slopes = carry
        h, w, t, *base = take(options, index, hidden, marks, *by_token)
        z = logits(options, h, used)
        nll, slope = negative_log_likelihood(z, t)
        values = [nll]
        if base:
            y = logits(options, *base, *shared)
            log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(y)
            values += [negative_log_likelihood(y, t)[0], jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)]
        written = tuple(
            put(options, index, array, jnp.where(w > 0, value, 0.0)) for array, value in zip(sums, values, strict=True)
        )
        if slopes is None:
            return written, None
        slope = jnp.where(w[..., None] > 0, uncapped(options, z, slope), 0.0)
        return written, put(options, index, slopes, hidden_vjp(slope, h, used))

    zeros = tuple(jnp.zeros(marks.shape, jnp.float32) for _ in range(3 if shared else 1))
    return over_chunks(options, marks, add, (zeros, jnp.zeros_like(hidden) if with_slopes else None))


def _forward(options: Options, hidden: Any, kernel: Any, by_token: Any, shared: Any, marks: Any) -> Any:
    head_trained = kernel is not None and kernel.perturbed
    hidden, kernel, by_token, shared, marks = primals((hidden, kernel, by_token, shared, marks))
    values, slopes = _values(options, hidden, kernel, by_token, shared, marks, with_slopes=True)
    again = (hidden, kernel, by_token[0]) if head_trained else None
    return values, (slopes, again, marks)


def _backward(options: Options, saved: Any, cotangents: Any) -> Any:
    slopes, again, marks = saved
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        scale = jnp.zeros(scale.shape, scale.dtype)
    dhidden = (slopes.astype(jnp.float32) * scale[..., None]).astype(slopes.dtype)
    if again is None:
        return dhidden, None, None, None, None
    hidden, kernel, targets = again
    used = kernel.astype(hidden.dtype)

    def add(options: Options, index: Array, dkernel: Array) -> Array:
        h, w, t, by = take(options, index, hidden, marks, targets, scale)
        z = logits(options, h, used)
        slope = uncapped(options, z, negative_log_likelihood(z, t)[1]) * jnp.where(w > 0, by, 0.0)[..., None]
        return dkernel + kernel_vjp(slope.astype(used.dtype), h)

    dkernel = over_chunks(options, marks, add, jnp.zeros(kernel.shape, jnp.float32))
    return dhidden, dkernel.astype(kernel.dtype), None, None, None


_packed.defvjp(_forward, _backward, symbolic_zeros=True)
