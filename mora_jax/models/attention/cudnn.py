"""cuDNN's fused attention for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

What it can do with rows: where each holds one example, padded at its end, padding is told by lengths and nothing of it
is computed. Packed examples are told apart by a mask, which cuDNN takes as a bias of `T²` numbers a row for all heads:
the causal half of it is computed, whatever the segments. (cuDNN's own packed layout, for Hopper and later, isn't in
jax's public function.) XLA partitions the call over rows and heads by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True)
class Cudnn:
    """Attention by cuDNN. Hashable: it is part of a compiled function's key.

    Attributes:
        packed: whether a row may hold anything but one example and padding behind it.
    """

    packed: bool = True

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
            query, key, value, segments, scale: as in `attention`.
            window: as in `attention`, and not traced.
            softcap: None, as cuDNN knows none here.
        """
        assert softcap is None and (window is None or isinstance(window, int)), "refused when it was chosen"
        b, t, g, n, h = query.shape
        seen = segments > 0
        mask, lengths = None, None
        if self.packed:
            mask = ((segments[:, :, None] == segments[:, None]) & seen[:, None])[:, None]
        else:
            lengths = jnp.sum(seen, axis=1, dtype=jnp.int32)
        out = jax.nn.dot_product_attention(
            query.reshape(b, t, g * n, h),
            key,
            value,
            mask=mask,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None or window >= t else (window - 1, 0),
            implementation="cudnn",
        )
        return jnp.where(seen[:, :, None, None, None], out.reshape(query.shape), 0)
