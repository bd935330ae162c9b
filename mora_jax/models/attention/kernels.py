"""Attention by kernels of TPUs and GPUs, and the one rule that chooses: for the decoder, a run's start and `plan`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from mora_jax.backend import alone, backend, interpreted
from mora_jax.errors import InputError
from mora_jax.models.attention.causal import NO_WINDOW, Kernel, Rows
from mora_jax.models.attention.flash import Scoring, padded
from mora_jax.models.attention.ring import HeadShards
from mora_jax.models.layer_scan import SAVED

#: Tiles of keys and queries: those that MaxText takes by default, and smaller ones for rows that would be filled up to
#: them by more than an eighth. The kernel's tiles are multiples of 128.
_TILES = (512, 256, 128)


@dataclass(frozen=True)
class Splash:
    """Splash attention, jax's Pallas kernel for TPUs. Hashable: it is part of a compiled function's key.

    Tiles that the causal mask or a window hides are neither computed nor read. Packed examples are told apart by
    segment ids; their tiles are computed and masked. A kernel can't be partitioned by the compiler, so on a mesh it
    runs under `shard_map`, each device with its rows and its key/value heads.

    Attributes:
        windows: those of the model's layers, each once; None for all.
        shards: how rows and heads are sharded over a mesh; None on one device.
        interpret: whether the kernel is interpreted, as it can be anywhere, for tests.
    """

    windows: tuple[int | None, ...]
    shards: HeadShards | None = None
    interpret: bool = False

    def attention(self, query: Array, key: Array, value: Array, **scoring: Unpack[Scoring]) -> Array:
        """As `attention` without positions: `query [B, T, G, N, H]`, `key, value [B, T, G, H]`, `segments [B, T]`.

        Args:
            query, key, value: as in `attention`.
            **scoring: see `Scoring`; a traced window is `NO_WINDOW` or one of `windows`.
        """
        segments, window = scoring["segments"], scoring["window"]
        b, length, g, n, h = query.shape
        tile = tile_of(length)
        # All query heads as one axis: arrays whose last axes are few heads and `H` would be copied to fill whole tiles
        # of memory. Scores of the kernel are plain products, so the scale is the queries'.
        heads = (query * jnp.float32(scoring["scale"])).astype(query.dtype).reshape(b, length, g * n, h)
        arrays = [padded(tile, array.swapaxes(1, 2), 2) for array in (heads, key, value)] + [padded(tile, segments, 1)]
        traced = window is not None and not isinstance(window, int)
        windows = self.windows if traced else (window,)
        places = jnp.asarray([NO_WINDOW if known is None else known for known in windows])
        which = jnp.argmax(places == window).astype(jnp.int32) if traced else jnp.zeros((), jnp.int32)
        run = partial(_share, windows, tile, scoring["softcap"], self.interpret)
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


def _rows(window: int | None, tile: int, softcap: float | None, interpret: bool, *arrays: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
        splash_attention_mask as masks,
    )

    _, heads, t, _ = arrays[0].shape
    square = (t, t)
    mask = masks.CausalMask(square) if window is None or window >= t else masks.LocalMask(square, (window - 1, 0), 0)
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(*(tile,) * 8),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def row(query: Array, key: Array, value: Array, segments: Array) -> Array:
        return kernel(query, key, value, kernels.SegmentIds(segments, segments))

    return jax.vmap(row)(*arrays)


def tile_of(length: int) -> int:
    """Queries, and keys, of a tile, for rows of `length` tokens."""
    return next((tile for tile in _TILES if -length % tile <= length // 8), _TILES[-1])


@dataclass(frozen=True)
class Cudnn:
    """cuDNN's fused attention for NVIDIA GPUs. Hashable: it is part of a compiled function's key.

    Where each row holds one example, padded at its end, padding is told by lengths and nothing of it is computed.
    Packed examples are told apart by a mask, which cuDNN takes as a bias of `T²` numbers a row for all heads: the
    causal half of it is computed, whatever the segments. (cuDNN's own packed layout, for Hopper and later, isn't in
    jax's public function.) XLA partitions the call over rows and heads by itself.

    Attributes:
        packed: whether a row may hold anything but one example and padding behind it.
    """

    packed: bool = True

    def attention(self, query: Array, key: Array, value: Array, **scoring: Unpack[Scoring]) -> Array:
        """As `attention` without positions: `query [B, T, G, N, H]`, `key, value [B, T, G, H]`, `segments [B, T]`.

        Args:
            query, key, value: as in `attention`.
            **scoring: see `Scoring`; the window is not traced, and `softcap` None, as cuDNN knows none here.
        """
        segments, window = scoring["segments"], scoring["window"]
        assert scoring["softcap"] is None and (window is None or isinstance(window, int)), "refused when it was chosen"
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
            scale=scoring["scale"],
            is_causal=True,
            local_window_size=None if window is None or window >= t else (window - 1, 0),
            implementation="cudnn",
        )
        return jnp.where(seen[:, :, None, None, None], out.reshape(query.shape), 0)


class _Implementation(NamedTuple):
    """A way to compute attention besides XLA's blocks.

    Attributes:
        why_unavailable: why it can't be used, in words that go on from its name; None where it can.
        make: the kernel.
    """

    why_unavailable: Callable[[Rows], str | None]
    make: Callable[[Rows], Kernel]


def _largest_head(rows: Rows) -> int:
    return max(layer.head_dim for layer in rows.config.by_layer)


def _splash_unavailable(rows: Rows) -> str | None:
    if rows.config.attention_sinks:
        return "has no attention sinks here, and this model has them"
    if (largest := _largest_head(rows)) > 256:
        return f"takes heads of up to 256 numbers here, and this model has {largest}"
    return None if backend() == "tpu" or interpreted() else f"needs a TPU, and this is for {backend()}"


def _splash(rows: Rows) -> Kernel:
    shards = None if rows.partitioner is None else rows.partitioner.head_shards(rows.rows)
    return Splash(rows.windows, shards, interpreted())


def _cudnn_unavailable(rows: Rows) -> str | None:
    config = rows.config
    if config.attention_sinks:
        return "has no attention sinks, and this model has them"
    if backend() != "gpu":
        return f"needs an NVIDIA GPU, and this is for {backend()}"
    if jnp.dtype(rows.dtype).name != "bfloat16":
        return f"computes in bfloat16, and model.dtype is {rows.dtype}"
    largest = _largest_head(rows)
    if largest % 8 or largest > 128:
        return f"takes heads of up to 128 numbers, a multiple of 8, and this model has {largest}"
    if config.attention_softcap is not None:
        return "has no cap on scores, and this model has one"
    if len(rows.windows) > 1:
        return "has one window for all layers, and this model's differ"
    if rows.packed and rows.length % 2:
        return f"takes packed rows of an even length, not of {rows.length} tokens"
    return None


#: By the names of `model.attention` besides `auto` and `xla`.
IMPLEMENTATIONS = {
    "splash": _Implementation(_splash_unavailable, _splash),
    "cudnn": _Implementation(_cudnn_unavailable, lambda rows: Cudnn(rows.packed)),
}
NAMES = ("auto", "xla", *IMPLEMENTATIONS)


@dataclass(frozen=True)
class AttentionChoice:
    """`model.attention`, as a decoder holds it.

    Attributes:
        name: `auto`, `xla`, or a name of `IMPLEMENTATIONS`. `auto` takes splash attention on TPUs for long rows, by
            what the TPU's compiler says (benchmarks/results/attention.md). cuDNN's has to be asked for: no run has
            compared its numbers yet, as `mora-jax doctor --kernels` does.

    Raises:
        InputError: no such name.
    """

    name: str = "auto"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"attention must be one of {', '.join(NAMES)}, got {self.name!r}")

    def check(self, rows: Rows) -> None:
        """Refuses an implementation that can't be had.

        Raises:
            InputError: one line that says why.
        """
        if self.name in IMPLEMENTATIONS and (reason := IMPLEMENTATIONS[self.name].why_unavailable(rows)):
            raise InputError(f"model.attention={self.name} {reason}; set model.attention=auto, which chooses")

    def implementation(self, rows: Rows) -> str:
        """The implementation by name.

        Raises:
            InputError: the one asked for can't be used; one line that says why.
        """
        if rows.ring() is not None:
            config = rows.config
            reasons = {
                "attention sinks": config.attention_sinks,
                "linear attention": config.has_states,
                "layers' own inputs": config.layer_input is not None,
                "shared keys and values": any(layer.keys_of is not None for layer in config.by_layer),
            }
            if reason := next((name for name, holds in reasons.items() if holds), None):
                raise InputError(f"mesh.context has no form for the {reason} of {config.family}: leave it at 1")
            if self.name in IMPLEMENTATIONS:
                raise InputError(
                    f"model.attention={self.name} takes whole rows, and mesh.context shares each; leave one out"
                )
            return "xla"
        if self.name != "auto":
            self.check(rows)
            return self.name
        alone_or_laid_out = rows.partitioner is not None or alone()
        return "splash" if rows.length >= 1024 and alone_or_laid_out and not _splash_unavailable(rows) else "xla"

    def kernel(self, rows: Rows) -> Kernel | None:
        """What computes attention: the ring of `mesh.context`, a kernel, or None for XLA's blocks (attention.py).

        Raises:
            InputError: as `implementation`.
        """
        name = self.implementation(rows)
        return IMPLEMENTATIONS[name].make(rows) if name in IMPLEMENTATIONS else rows.ring()
