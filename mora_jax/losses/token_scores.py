"""What evaluation reads of each token, in the chunks of the loss: the logits of a whole batch never exist."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from mora_jax.losses.chunked_sum import Options, cast_like, logits, over_chunks, pack_weighted_tokens, put, take
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
    places = jnp.arange(targets.size).reshape(targets.shape)
    options, (scales, flat, goals, places) = pack_weighted_tokens(
        weights, hidden, targets, places, kernel=kernel, softcap=softcap, shards=shards, chunk=chunk
    )
    kernel = cast_like(kernel, flat)

    def add(options: Options, index: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        h, t, w = take(options, index, flat, goals, scales)
        z = logits(options, h, kernel)
        nll, _ = negative_log_likelihood(z, t)
        right = (jnp.argmax(z, axis=-1) == t) & (w > 0)
        return put(options, index, found[0], jnp.where(w > 0, nll, 0.0)), put(options, index, found[1], right)

    none = jnp.zeros(scales.shape, jnp.float32), jnp.zeros(scales.shape, bool)
    nll, correct = over_chunks(options, scales, add, none)
    # What fills up the last chunk repeats a token, with a score of 0.
    back = jnp.zeros(targets.size, jnp.float32)
    nll, correct = back.at[places].add(nll), back.at[places].add(correct.astype(jnp.float32)) > 0
    return TokenScores(nll.reshape(targets.shape), correct.reshape(targets.shape))


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
