"""Splash attention, jax's Pallas kernel for TPUs: forward and backward in tiles that stay in the chip's fast memory.

Tiles that the causal mask or a window hides are neither computed nor read. Packed examples are told apart by segment
ids; their tiles are computed and masked. A kernel can't be partitioned by the compiler, so on a mesh it runs under
`shard_map`, each device with its rows and its key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax.models.attention.causal import NO_WINDOW
from mora_jax.models.attention.head_shards import HeadShards
from mora_jax.models.layer_scan import SAVED

Array = jax.Array

#: Tiles of keys and queries: those that MaxText takes by default, and smaller ones for rows that would be filled up to
#: them by more than an eighth. The kernel's tiles are multiples of 128.
_TILES = (512, 256, 128)


@dataclass(frozen=True)
class Splash:
    """Attention by the kernel. Hashable: it is part of a compiled function's key.

    Attributes:
        windows: those of the model's layers, each once; None for all.
        shards: how rows and heads are sharded over a mesh; None on one device.
        interpret: whether the kernel is interpreted, as it can be anywhere, for tests.
    """

    windows: tuple[int | None, ...]
    shards: HeadShards | None = None
    interpret: bool = False

    def attention(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        segments: Array,
        window: int | Array | None,
        scale: float,
        softcap: float | None,
    ) -> Array:
        """As `attention` without positions: `query [B, T, G, N, H]`, `key, value [B, T, G, H]`, `segments [B, T]`.

        Args:
            query, key, value, segments, scale, softcap: as in `attention`.
            window: as in `attention`; a traced one is `NO_WINDOW` or one of `windows`.
        """
        b, length, g, n, h = query.shape
        tile = tile_of(length)
        # All query heads as one axis: arrays whose last axes are few heads and `H` would be copied to fill whole tiles
        # of memory. Scores of the kernel are plain products, so the scale is the queries'.
        heads = (query * jnp.float32(scale)).astype(query.dtype).reshape(b, length, g * n, h)
        arrays = (
            *(_padded(array.swapaxes(1, 2), tile, 2) for array in (heads, key, value)),
            _padded(segments, tile, 1),
        )
        traced = window is not None and not isinstance(window, int)
        windows = self.windows if traced else (window,)
        places = jnp.asarray([NO_WINDOW if known is None else known for known in windows])
        which = jnp.argmax(places == window).astype(jnp.int32) if traced else jnp.zeros((), jnp.int32)
        run = partial(_share, windows, tile, softcap, self.interpret)
        if self.shards is not None:
            run = self.shards.mapped(run, "kkksw", "k")
        (out,) = run(*arrays, which)
        out = out[:, :, :length].swapaxes(1, 2)
        out = jnp.where((segments > 0)[:, :, None, None], out, 0)  # padding sees padding in the kernel
        return out.reshape(b, length, g, n, h)


def _share(windows: tuple[Any, ...], tile: int, softcap: float | None, interpret: bool, *arrays: Array) -> tuple[Array]:
    """The output for one device's `[B, G · N, T, H]`, `[B, G, T, H]` twice, `[B, T]`, and the number of the window."""
    *inputs, which = arrays
    branches = [partial(_rows, window, tile, softcap, interpret) for window in windows]
    return (branches[0](*inputs) if len(branches) == 1 else jax.lax.switch(which, branches, *inputs),)


def _rows(
    window: int | None,
    tile: int,
    softcap: float | None,
    interpret: bool,
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, t, _ = query.shape
    whole = (t, t)
    mask = masks.CausalMask(whole) if window is None or window >= t else masks.LocalMask(whole, (window - 1, 0), 0)
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(*(tile,) * 8),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def row(query: Array, key: Array, value: Array, segments: Array) -> Array:
        return kernel(query, key, value, kernels.SegmentIds(segments, segments))

    return jax.vmap(row)(query, key, value, segments)


def tile_of(length: int) -> int:
    """Queries, and keys, of a tile, for rows of `length` tokens."""
    return next((tile for tile in _TILES if -length % tile <= length // 8), _TILES[-1])


def _padded(array: Array, tile: int, axis: int) -> Array:
    return jnp.pad(array, [(0, -array.shape[axis] % tile if i == axis else 0) for i in range(array.ndim)])
