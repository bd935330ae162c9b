"""The negative log-likelihood of each token in the chunks of the loss: the logits of a whole batch never exist.

It is differentiable, and stands beside that of a base, or beside whether the token was the most likely one.
"""

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


class TokenSums(NamedTuple):
    """Sums over the tokens of each row, float32 `[B]`.

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


class TokenScores(NamedTuple):
    """What each token is given; tokens of weight 0 have zeros.

    Attributes:
        nll: float32 `[B, T]`, the negative log-likelihood in nats, whatever the weight.
        correct: bool `[B, T]`, whether the most likely next token is the right one.
    """

    nll: Array
    correct: Array


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
    arrays = (hidden, targets, _places(targets, shards)) + (() if base is None else base[:1])
    heads = 1 if base is None else 2
    options, (marks, flat, goals, places, *others) = pack_weighted_tokens(
        counted, *arrays, kernel=kernel, softcap=softcap, shards=shards, chunk=chunk, heads=heads
    )
    by_token = (goals, *map(lax.stop_gradient, others))
    shared = () if base is None else (cast_like(lax.stop_gradient(base[1]), flat),)
    values = [_unpacked(targets, places, array) for array in _packed(options, flat, kernel, by_token, shared, marks)]
    return TokenNLL(values[0], *map(lax.stop_gradient, values[1:]))


def token_scores(
    hidden: Array,
    kernel: Array | None,
    targets: Array,
    weights: Array,
    *,
    softcap: float | None = None,
    shards: int = 1,
    chunk: int | None = None,
) -> TokenScores:
    """The score of each token of non-zero weight, in the same chunks as the loss; arguments as in `weighted_loss`."""
    options, (scales, flat, goals, places) = pack_weighted_tokens(
        weights, hidden, targets, _places(targets, shards), kernel=kernel, softcap=softcap, shards=shards, chunk=chunk
    )
    (nll, correct), _ = _values(options, (flat, kernel, (goals,), (), scales), correct=True)
    return TokenScores(_unpacked(targets, places, nll), _unpacked(targets, places, correct) > 0)


def token_sums(
    hidden: Array,
    kernel: Array | None,
    targets: Array,
    weights: Array,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> TokenSums:
    """What evaluation adds up, row by row; arguments as in `weighted_loss`."""
    nll, correct = token_scores(hidden, kernel, targets, weights, softcap=softcap, chunk=chunk)
    by_token = (nll * weights, weights, correct, weights > 0)
    return TokenSums(*(jnp.sum(array.astype(jnp.float32), axis=1) for array in by_token))


def _places(targets: Array, shards: int) -> Array:
    """Where each token `[B, T]` lies in its shard."""
    return jnp.arange(targets.size).reshape(targets.shape) % (targets.size // shards)


def _unpacked(targets: Array, places: Array, values: Array) -> Array:
    """The values of packed tokens `[shards, tokens]` at their places `[B, T]`; those that fill up a chunk are 0."""
    zeros = jnp.zeros(targets.size // len(places), jnp.float32)
    by_shard = jax.vmap(lambda place, value: zeros.at[place].add(value))(places, values)
    return by_shard.reshape(targets.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(
    options: Options, hidden: Array, kernel: Array | None, by_token: Any, shared: Any, marks: Array
) -> tuple[Array, ...]:
    """The values of packed tokens, float32 `[shards, tokens]` each."""
    return _values(options, (hidden, kernel, by_token, shared, marks))[0]


def _values(
    options: Options, arrays: tuple[Any, ...], *, with_derivatives: bool = False, correct: bool = False
) -> tuple[tuple[Array, ...], Array | None]:
    """The values, and the derivative of each token's by its own hidden state.

    Args:
        options: as packed.
        arrays: those of `_packed`.
        with_derivatives: whether to make the derivatives.
        correct: whether to make another value, 1 where the target is the most likely token.
    """
    hidden, kernel, by_token, shared, marks = arrays
    used = cast_like(kernel, hidden)

    def add(options: Options, index: Array, carry: Any) -> Any:
        sums, derivatives = carry
        h, w, t, *base = take(options, index, hidden, marks, *by_token)
        z = logits(options, h, used)
        nll, dlogits = negative_log_likelihood(z, t)
        values = [nll]
        if base:
            y = logits(options, *base, *shared)
            log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(y)
            values += [negative_log_likelihood(y, t)[0], jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)]
        if correct:
            values.append(jnp.argmax(z, axis=-1) == t)
        written = tuple(
            put(options, index, array, jnp.where(w > 0, value, 0.0)) for array, value in zip(sums, values, strict=True)
        )
        if derivatives is None:
            return written, None
        dlogits = jnp.where(w[..., None] > 0, uncapped(options, z, dlogits), 0.0)
        return written, put(options, index, derivatives, hidden_vjp(dlogits, h, used))

    zeros = (jnp.zeros(marks.shape, jnp.float32),) * (3 if shared else 2 if correct else 1)
    return over_chunks(options, marks, add, (zeros, jnp.zeros_like(hidden) if with_derivatives else None))


def _forward(options: Options, *arrays: Any) -> Any:
    head_trained = arrays[1] is not None and arrays[1].perturbed
    arrays = primals(arrays)
    hidden, kernel, by_token, _, marks = arrays
    values, derivatives = _values(options, arrays, with_derivatives=True)
    return values, (derivatives, (hidden, kernel, by_token[0]) if head_trained else None, marks)


def _backward(options: Options, saved: Any, cotangents: Any) -> Any:
    derivatives, again, marks = saved
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        scale = jnp.zeros(scale.shape, scale.dtype)
    dhidden = (derivatives.astype(jnp.float32) * scale[..., None]).astype(derivatives.dtype)
    if again is None:
        return dhidden, None, None, None, None
    hidden, kernel, targets = again
    used = kernel.astype(hidden.dtype)

    def add(options: Options, index: Array, dkernel: Array) -> Array:
        h, w, t, by = take(options, index, hidden, marks, targets, scale)
        z = logits(options, h, used)
        dlogits = uncapped(options, z, negative_log_likelihood(z, t)[1]) * jnp.where(w > 0, by, 0.0)[..., None]
        return dkernel + kernel_vjp(dlogits.astype(used.dtype), h)

    dkernel = over_chunks(options, marks, add, jnp.zeros(kernel.shape, jnp.float32))
    return dhidden, dkernel.astype(kernel.dtype), None, None, None


_packed.defvjp(_forward, _backward, symbolic_zeros=True)
