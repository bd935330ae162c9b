"""Rotary position embeddings with the scaling variants of the supported families."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary table.

    Attributes:
        theta: the base wavelength.
        kind: one of `KINDS`, or "none" for layers that don't rotate.
        factor: how much longer the context is than in pretraining (linear, llama3, yarn, proportional).
        original_positions: the context length of pretraining (llama3, yarn, longrope).
        low_freq_factor, high_freq_factor: the band that llama3 interpolates.
        beta_fast, beta_slow: numbers of rotations between which yarn ramps.
        truncate: whether yarn rounds the ends of its ramp to whole dimensions.
        attention_factor: what cos and sin are multiplied by (yarn, longrope), already resolved.
        short_factors, long_factors: what the wavelength of each pair is multiplied by in texts of up to
            `original_positions` tokens, and in longer ones (longrope).
        turning: the part of the pairs that rotate, the first ones; the others stand still (proportional).
        width: how many numbers of a head the pairs are of, where that isn't what the model has; else 0.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    turning: float = 1.0
    width: int = 0


def inverse_frequencies(rope: Rope, head_dim: int, *, long: bool = False) -> np.ndarray:
    """The angle per position of every pair of dimensions.

    Args:
        rope: the table's description.
        head_dim: how many numbers of a head rotate, even.
        long: whether the text is longer than those of pretraining (longrope).

    Returns:
        float32 `[head_dim / 2]`.

    Raises:
        ValueError: for an unknown kind or an odd `head_dim`.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embeddings need an even head_dim, got {head_dim}")
    plain = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "default":
        frequencies = plain
    elif rope.kind == "linear":
        frequencies = plain / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, plain)
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, plain, head_dim)
    elif rope.kind == "longrope":
        frequencies = plain / np.asarray(rope.long_factors if long else rope.short_factors)
    elif rope.kind == "proportional":
        still = np.arange(len(plain)) >= int(rope.turning * head_dim // 2)
        frequencies = np.where(still, 0.0, plain / rope.factor)
    elif rope.kind == "none":
        frequencies = np.zeros_like(plain)
    else:
        raise ValueError(f"unknown rotary kind {rope.kind!r}; known: {', '.join(KINDS)}")
    return frequencies.astype(np.float32)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / plain
    position = rope.original_positions / wavelength
    smooth = (position - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * plain / rope.factor + smooth * plain


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """A linear ramp over the dimensions from unscaled (fast) to divided by the factor (slow)."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """The factor on cos and sin that yarn implies when a config does not state it."""

    def scaled(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scaled(mscale) / scaled(mscale_all_dim)
    return scaled(1.0)


def tables(
    ropes: tuple[Rope, ...], head_dim: int, positions: jax.Array, lengths: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every table at every position.

    Args:
        ropes: R table descriptions.
        head_dim: how many numbers of a head rotate.
        positions: int32 `[B, T]`.
        lengths: int32 `[B, T]`, the length of the text of each token, or one for all (longrope).

    Returns:
        Two float32 arrays `[R, B, T, head_dim / 2]`; as wide as the widest of the tables, with zeros for angles behind
        the others.
    """
    widths = [rope.width or head_dim for rope in ropes]

    def frequencies(long: bool) -> jax.Array:
        rows = [inverse_frequencies(rope, width, long=long) for rope, width in zip(ropes, widths, strict=True)]
        rows = [np.pad(row, (0, (max(widths) - width) // 2)) for row, width in zip(rows, widths, strict=True)]
        return jnp.asarray(np.stack(rows))[:, None, None]

    turns = frequencies(False)
    if by_length(ropes):
        limits = jnp.asarray([rope.original_positions for rope in ropes])[:, None, None]
        turns = jnp.where((jnp.broadcast_to(lengths, positions.shape) > limits)[..., None], frequencies(True), turns)
    factors = jnp.asarray([rope.attention_factor for rope in ropes], dtype=jnp.float32)[:, None, None, None]
    angles = positions.astype(jnp.float32)[None, :, :, None] * turns
    return jnp.cos(angles) * factors, jnp.sin(angles) * factors


def by_length(ropes: tuple[Rope, ...]) -> bool:
    """Whether angles depend on the length of a text."""
    return any(rope.kind == "longrope" for rope in ropes)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, neighbours: bool = False) -> jax.Array:
    """Rotates pairs of the first R numbers of the last axis, in float32, and returns the dtype of `x`.

    Args:
        x: `[B, T, ..., H]`, H ≥ R.
        cos: float32 `[B, T, R / 2]`.
        sin: the same.
        neighbours: whether the pairs are (2j, 2j + 1), not (j, j + R/2).
    """
    return _rotated(neighbours, x, cos, sin)


# Autodiff alone would save the reshaped tables of every layer; the tables themselves all layers share.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _rotated(neighbours: bool, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    shape = (*cos.shape[:2], *(1,) * (x.ndim - 3), cos.shape[-1])
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    size = 2 * cos.shape[-1]
    if not size:
        return x
    turning, still = (x, None) if size == x.shape[-1] else jnp.split(x, (size,), axis=-1)
    wide = turning.astype(jnp.float32)
    if neighbours:
        pairs = wide.reshape(*wide.shape[:-1], size // 2, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(wide.shape)
    else:
        first, second = jnp.split(wide, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if still is None else jnp.concatenate([rotated, still], axis=-1)
