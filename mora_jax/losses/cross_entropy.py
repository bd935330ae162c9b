"""The weighted vocabulary loss.

Every token has a weight, 0 for prompt and padding under the masked loss. It is summed in chunks of tokens that have one
(`losses/chunked_sum.py`); the logits of a whole batch never exist.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from mora_jax.backend import backend
from mora_jax.losses.chunked_sum import Options, logits, pack_weighted_tokens, uncapped, weighted_sum


def next_token_targets(input_ids: Array, weights: Array, segment_ids: Array | None = None) -> tuple[Array, Array]:
    """Shifts tokens and their weights together, so that position t predicts token t + 1.

    Nothing predicts the first token of a row, nor of an example in it, nor padding: such weights are left out.

    Args:
        input_ids: int `[..., T]`.
        weights: float `[..., T]`, the weight of predicting token t.
        segment_ids: int `[..., T]`, the example of each token, 0 for padding; None: every row is one example.

    Returns:
        `(targets, weights)` `[..., T]`; the last position predicts nothing and has weight 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> ids, weights = jnp.array([[5, 6, 7]]), jnp.array([[0.0, 1.0, 1.0]])
        >>> targets, weights = next_token_targets(ids, weights)
        >>> targets[:, :-1].tolist(), weights.tolist()
        ([[6, 7]], [[1.0, 1.0, 0.0]])
    """
    targets = jnp.roll(input_ids, -1, axis=-1)
    shifted = jnp.roll(weights, -1, axis=-1).at[..., -1].set(0)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        inside = (segment_ids > 0) & (jnp.roll(segment_ids, -1, axis=-1) == segment_ids)
        shifted = jnp.where(inside, shifted, 0)
    return targets, shifted.astype(jnp.float32)


def token_weights(
    answers: Array, segment_ids: Array | None = None, *, mode: str = "masked", prompt_weight: float = 0.1
) -> Array:
    """The weight of predicting each token.

    Args:
        answers: bool `[..., T]`, whether a token is part of an answer.
        segment_ids: int `[..., T]`, 0 for padding; None where there is none.
        mode: "masked" trains answers alone, "unmasked" prompts as much, "weighted" prompts at `prompt_weight`.
        prompt_weight: of `weighted`.

    Returns:
        float32 `[..., T]`.

    Raises:
        ValueError: another mode.

    Examples:
        >>> import jax.numpy as jnp
        >>> from mora_jax.losses import token_weights
        >>> answers, segments = jnp.array([False, True, True, False]), jnp.array([1, 1, 1, 0])
        >>> token_weights(answers, segments, mode="weighted", prompt_weight=0.5).tolist()
        [0.5, 1.0, 1.0, 0.0]
    """
    prompts = {"masked": 0.0, "unmasked": 1.0, "weighted": prompt_weight}
    if mode not in prompts:
        raise ValueError(f"mode must be one of {', '.join(prompts)}, not {mode!r}")
    weights = jnp.where(answers, 1.0, prompts[mode]).astype(jnp.float32)
    return weights if segment_ids is None else jnp.where(segment_ids > 0, weights, 0.0)


def normalized(weights: Array, *, counts: Array | None = None, axis_name: str | None = None) -> tuple[Array, Array]:
    """Weights divided by what a step divides by: their sum over all micro-batches and all devices.

    So losses and gradients of micro-batches are shares that add up, and any split of the same rows gives the same step.

    Args:
        weights: float32, of all micro-batches of the step that this device has.
        counts: what to sum in place of the weights, such as 1 for each row.
        axis_name: the mapped axis to sum over, under `jax.pmap` or `jax.shard_map`.

    Returns:
        The weights, zero where their sum is, and the sum, float32 scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> weights, total = normalized(jnp.array([[0.0, 1.0, 1.0, 2.0]]))
        >>> weights.tolist(), float(total)
        ([[0.0, 0.25, 0.25, 0.5]], 4.0)
    """
    total = jnp.sum(weights if counts is None else counts, dtype=jnp.float32)
    total = total if axis_name is None else lax.psum(total, axis_name)
    return weights * inverse(total), total


def inverse(normalizer: Array) -> Array:
    """1 / normalizer, and 0 for 0: nothing to train on is no division by zero."""
    return jnp.where(normalizer > 0, 1.0 / jnp.where(normalizer > 0, normalizer, 1.0), 0.0)


def weighted_loss_of_logits(logits: Array, targets: Array, weights: Array) -> Array:
    """`weighted_loss` of logits that are there already, as other people's models give them.

    Args:
        logits: `[..., V]`, of any floating dtype; sums are taken in float32.
        targets: int `[...]`.
        weights: float32 `[...]`.

    Returns:
        float32 scalar in nats; 0, with zero gradients, when every weight is 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> logits, targets, weights = jnp.zeros((2, 5)), jnp.array([1, 2]), jnp.array([0.0, 1.0])
        >>> round(float(weighted_loss_of_logits(logits, targets, weights)), 4)  # log 5
        1.6094
    """
    # Of tokens that don't count neither loss nor gradient may be infinite.
    z = jnp.where((weights > 0)[..., None], logits.astype(jnp.float32), 0.0)
    picked = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(z, axis=-1) - picked))


def weighted_loss(
    hidden: Array,
    kernel: Array | None,
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
            differentiated. None: `hidden` is logits `[B, T, V]` already.
        targets: int `[B, T]`, the token that each position predicts.
        weights: float32 `[B, T]`, non-negative; NaN-free where 0.
        softcap: see `Options`.
        shards: divides B; see `Options`.
        chunk: tokens a chunk; None chooses by vocabulary size.
        mapped: see `Options`.

    Returns:
        float32 scalar in nats; 0, with zero gradients, when every weight is 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> hidden, kernel = jnp.zeros((1, 2, 3)), jnp.ones((5, 3))
        >>> targets, weights = jnp.array([[1, 2]]), jnp.array([[0.0, 1.0]])
        >>> round(float(weighted_loss(hidden, kernel, targets, weights)), 4)  # log 5
        1.6094
    """
    options, (scales, flat, goals) = pack_weighted_tokens(
        weights, hidden, targets, kernel=kernel, softcap=softcap, shards=shards, chunk=chunk, mapped=mapped
    )
    fast = _by_powers if kernel is not None and softcap is None and backend() != "cpu" else None
    return weighted_sum(options, _loss_of_tokens, fast, flat, kernel, (goals,), (), scales)


def negative_log_likelihood(z: Array, t: Array) -> tuple[Array, Array]:
    """−log p(target), float32 `[shards, chunk]`, and its derivative by the logits `z` `[shards, chunk, V]`."""
    top = jnp.max(z, axis=-1, keepdims=True)
    powers = jnp.exp(z - top)
    norm = jnp.sum(powers, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(z, t[..., None], axis=-1)[..., 0]
    return (jnp.log(norm) + top)[..., 0] - picked, powers / norm - _hot(z.shape, t)


def _loss_of_tokens(
    options: Options, hidden: Array, kernel: Array | None, targets: tuple[Array, ...], shared: Any
) -> tuple[Array, Array]:
    """The `TokenValue` of this loss."""
    z = logits(options, hidden, kernel)
    nll, dlogits = negative_log_likelihood(z, *targets)
    return nll, uncapped(options, z, dlogits)


def _by_powers(
    options: Options, hidden: Array, kernel: Array | None, targets: tuple[Array, ...], shared: Any
) -> tuple[Array, Array]:
    """`_loss_of_tokens` for accelerators, which make logits, powers and their sum in one pass over the vocabulary.

    The powers alone are kept, in the compute dtype. That needs something near the largest logit before any logit is
    there: the target's own, whose power is then 1. Where a target is less likely than e⁻⁸⁸ its loss is infinite here.
    """
    # As a matrix: of three axes the TPU's compiler doesn't make powers and sums with the product.
    assert kernel is not None, "it makes the logits itself"
    t, h = targets[0].reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    rows = jnp.take(kernel, t, axis=0, mode="clip").astype(jnp.float32)
    shift = jnp.sum(h.astype(jnp.float32) * rows, axis=-1, keepdims=True)
    z = lax.dot_general(h, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    powers = jnp.exp(z - shift)
    norm = jnp.sum(powers, axis=-1, keepdims=True)
    picked = jnp.sum(jnp.where(_hot(z.shape, t), z, 0.0), axis=-1, keepdims=True)
    stored_powers = lax.optimization_barrier(powers.astype(kernel.dtype))
    dlogits = jnp.where(_hot(z.shape, t), jnp.exp(picked - shift) / norm - 1.0, stored_powers * (1.0 / norm))
    return (jnp.log(norm) + shift - picked).reshape(targets[0].shape), dlogits.reshape(*targets[0].shape, -1)


def _hot(shape: tuple[int, ...], t: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == t[..., None]
