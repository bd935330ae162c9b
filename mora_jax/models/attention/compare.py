"""Every way to compute attention that this machine has, against a plain one in float64: outputs and gradients."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh

from mora_jax.backend import backend, default_dtype
from mora_jax.models.attention.causal import attention
from mora_jax.models.attention.flash import TILE, Tiling, tiled_attention
from mora_jax.models.attention.kernels import Cudnn, Splash
from mora_jax.models.attention.ring import Ring

Attention = Callable[..., Array]

ROWS, LENGTH, GROUPS, QUERIES, SIZE = 2, 640, 2, 2, 64  # more than one block of queries and one tile everywhere
SCALE = SIZE**-0.5
WINDOWS = (None, 100)
#: Largest difference from float64 relative to the largest number: of sums of bfloat16 numbers, which matrix units take
#: for float32 too, and of float32 on CPUs.
TOLERANCES = {"matrix unit": 3e-2, "cpu": 1e-4}


class Comparison(NamedTuple):
    """One kernel on one kind of rows.

    Attributes:
        kernel: its name, with the key that asks for it.
        rows: of what kind they were.
        error: the largest difference from float64, relative to the largest number; of output and gradients.
        tolerance: what is right.
        seconds: compiling included.
    """

    kernel: str
    rows: str
    error: float
    tolerance: float
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether the kernel is right."""
        return self.error <= self.tolerance  # false where it is NaN


def kernels() -> Iterator[tuple[str, bool, Attention]]:
    """Those of this machine: name, whether rows may be packed, and the function."""
    yield "xla: blocks", True, partial(_by_attention, None)
    yield "xla: tiles", True, _by_tiles
    if jax.local_device_count() > 1 and jax.process_count() == 1:
        yield f"xla: ring of {jax.local_device_count()} (mesh.context)", True, _around_a_ring
    if backend() == "tpu":
        yield "splash", True, partial(_by_attention, Splash(WINDOWS))
    if backend() == "gpu":
        yield "cudnn", True, partial(_by_attention, Cudnn(packed=True))
        yield "cudnn", False, partial(_by_attention, Cudnn(packed=False))


def compare() -> Iterator[Comparison]:
    """Runs each kernel forward and backward, on rows with and without a window."""
    rng = np.random.default_rng(0)
    shapes = [(ROWS, LENGTH, GROUPS, QUERIES, SIZE)] + [(ROWS, LENGTH, GROUPS, SIZE)] * 2
    on_cpu = backend() == "cpu" and default_dtype() == jnp.float32
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    tolerance = TOLERANCES["cpu" if on_cpu else "matrix unit"]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in (*shapes, shapes[0])]
    query, key, value, doutput = (np.asarray(array, np.float64) for array in arrays)
    for name, packed, function in kernels():
        segments = _segments(packed)
        for window in WINDOWS:
            started = time.perf_counter()
            gradients = _gradients(partial(function, segments=jnp.asarray(segments), window=window), *arrays)
            expected = plain_attention(query, key, value, doutput, segments, window)
            pairs = zip(gradients, expected, strict=True)
            error = max(
                np.abs(np.asarray(ours, np.float64) - right).max() / np.abs(right).max() for ours, right in pairs
            )
            rows = f"{'packed' if packed else 'padded'} rows{f', window {window}' if window else ''}"
            yield Comparison(name, rows, float(error), tolerance, time.perf_counter() - started)


def plain_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, doutput: np.ndarray, segments: np.ndarray, window: int | None
) -> tuple[np.ndarray, ...]:
    """Causal attention inside segments and its gradients by the formula, every score at once, in float64.

    Args:
        query: `[B, T, G, N, H]`.
        key, value: `[B, T, G, H]`.
        doutput: the gradient of the output, in its shape.
        segments: int `[B, T]`; 0 is padding.
        window: how many places back a query sees, itself included; None for all.

    Returns:
        The output and the gradients of `query`, `key` and `value`.
    """
    back = np.arange(query.shape[1])[:, None] - np.arange(query.shape[1])
    seen = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, :, None] & (back >= 0)
    seen = (seen & (back < window) if window else seen)[:, None, None]
    scores = np.where(seen, np.einsum("btgnh,bsgh->bgnts", query, key) * SCALE, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True)
    powers = np.where(seen, np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    weights = powers / np.maximum(powers.sum(-1, keepdims=True), 1e-300)
    of_weights = np.einsum("btgnh,bsgh->bgnts", doutput, value)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * SCALE
    return (
        np.einsum("bgnts,bsgh->btgnh", weights, value),
        np.einsum("bgnts,bsgh->btgnh", of_scores, key),
        np.einsum("bgnts,btgnh->bsgh", of_scores, query),
        np.einsum("bgnts,btgnh->bsgh", weights, doutput),
    )


def _segments(packed: bool) -> np.ndarray:
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[0, 500:] = 0
    if packed:
        segments[0, 200:] = 2
        segments[0, 610:] = 0
    return segments


def _gradients(function: Attention, query: Array, key: Array, value: Array, doutput: Array) -> tuple[Array, ...]:
    @jax.jit
    def run(query: Array, key: Array, value: Array) -> Any:
        out, pullback = jax.vjp(function, query, key, value)
        return out, *pullback(doutput)

    return run(query, key, value)


def _by_attention(kernel: Any, *arrays: Array, segments: Array, window: int | None) -> Array:
    return attention(*arrays, q_segments=segments, kv_segments=segments, window=window, scale=SCALE, kernel=kernel)


def _by_tiles(query: Array, key: Array, value: Array, *, segments: Array, window: int | None) -> Array:
    tiling = Tiling(SCALE, None, window, TILE, TILE)
    query, key, value = query.transpose(0, 2, 3, 1, 4), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    return tiled_attention(tiling, query, key, value, segments, None).transpose(0, 3, 1, 2, 4)


def _around_a_ring(*arrays: Array, segments: Array, window: int | None) -> Array:
    count = jax.local_device_count()
    mesh = Mesh(np.array(jax.local_devices()), ("context",), axis_types=(AxisType.Auto,))
    share = -(-LENGTH // (2 * count)) * 2

    def fold(array: Array) -> Array:
        array = jnp.pad(array, [(0, 0), (0, count * share - LENGTH), *[(0, 0)] * (array.ndim - 2)])
        return array.reshape(ROWS, count, share, *array.shape[2:]).swapaxes(0, 1).reshape(-1, share, *array.shape[2:])

    ring = Ring(mesh, ("context",), None, "context")
    folded = [fold(array) for array in arrays]
    out = ring.attention(*folded, segments=fold(segments), window=window, scale=SCALE, softcap=None)
    return out.reshape(count, ROWS, share, *out.shape[2:]).swapaxes(0, 1).reshape(ROWS, -1, *out.shape[2:])[:, :LENGTH]
