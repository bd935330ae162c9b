"""One decoder layer: attention and MLP with their norms, every matrix product in a `Projection` slot."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.products.dropout import TokenDropout
from mora_jax.adapters.projection import Part, Projection
from mora_jax.models.activations import gated
from mora_jax.models.attention import attention
from mora_jax.models.config import DecoderConfig
from mora_jax.models.norms import RMSNorm
from mora_jax.models.remat import kept
from mora_jax.models.ring_attention import Ring
from mora_jax.models.rope import rotate


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Who sees whom, and where everything stands; the same for all layers of a kind.

    Attributes:
        segments: int32 `[B, T]` of the queries.
        kv_segments: int32 `[B, S]` of the keys.
        positions, kv_positions: int32 of the same shapes where order is by position (with a cache); None
            where it is by index.
        cos, sin: float32 `[B, T, head_dim / 2]`.
        window: how many positions back a query sees; None for all.
        ring: the devices that share each row, whose shares are rows here (`Spread.fold`); None for whole rows.
    """

    segments: jax.Array
    kv_segments: jax.Array
    positions: jax.Array | None
    kv_positions: jax.Array | None
    cos: jax.Array
    sin: jax.Array
    window: int | jax.Array | None
    ring: Ring | None = None

    def arrays(self) -> dict[str, jax.Array | None]:
        """All but the window and the ring, as a pytree."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("window", "ring")]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, arrays: dict[str, Any]) -> "RowLayout":
        """The inverse of `arrays`; sees every place before it."""
        return cls(**arrays, window=None)


@dataclasses.dataclass(frozen=True)
class CacheSlot:
    """Where a layer writes keys and values: `[layer, :, length:length + T]` of `[L, B, S, G, H]` arrays."""

    keys: jax.Array
    values: jax.Array
    layer: jax.Array
    length: jax.Array

    def write(self, keys: jax.Array, values: jax.Array) -> "CacheSlot":
        """The slot with `keys` and `values` `[B, T, G, H]` written."""
        zero = jnp.zeros_like(self.length)  # indices of one type, with float64 on too
        start = (self.layer.astype(zero.dtype), zero, self.length, zero, zero)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys[None].astype(self.keys.dtype), start),
            values=jax.lax.dynamic_update_slice(self.values, values[None].astype(self.values.dtype), start),
        )

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, `[B, S, G, H]` each."""
        return self.keys[self.layer], self.values[self.layer]


@jax.custom_vjp
def split_heads(fused: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[B, T, G, N + 2, H]` → queries `[B, T, G, N, H]`, keys and values `[B, T, G, H]`.

    Its own backward joins the three; autodiff would pad each to the whole and add them up.
    """
    return fused[:, :, :, :-2], fused[:, :, :, -2], fused[:, :, :, -1]


def _join_heads(_: None, parts: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array]:
    query, key, value = parts
    return (jnp.concatenate([query, key[:, :, :, None], value[:, :, :, None]], axis=3),)


split_heads.defvjp(lambda fused: (split_heads(fused), None), _join_heads)


def _fold(token_dropout: TokenDropout | None, index: int) -> TokenDropout | None:
    return None if token_dropout is None else token_dropout.fold(index)


class Attention(nnx.Module):
    """Grouped-query attention. q, k and v are one product, grouped by key/value head."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None, quantize: str | None = None):
        """Makes the stacked projections (and the norms of q and k where the family has them)."""
        path = config.names.layer + ".self_attn.{name}"
        heads = config.num_kv_heads * config.q_per_kv
        self.qkv_proj = Projection(
            (Part("q_proj", config.q_per_kv), Part("k_proj", 1), Part("v_proj", 1)),
            config.hidden_size,
            out_shape=(config.num_kv_heads, config.q_per_kv + 2, config.head_dim),
            part_axis=1,
            axes=("embed", "kv_heads", "q_per_kv", "head_dim"),
            num_layers=config.num_layers,
            use_bias=config.qkv_bias,
            path=path,
            dtype=dtype,
            rngs=rngs,
            init_std=config.initializer_range,
            quantize=quantize,
        )
        self.o_proj = Projection(
            (Part("o_proj", config.hidden_size),),
            heads * config.head_dim,
            out_shape=(config.hidden_size,),
            axes=("heads", "embed"),
            num_layers=config.num_layers,
            use_bias=config.out_bias,
            path=path,
            dtype=dtype,
            rngs=rngs,
            init_std=config.initializer_range,
            quantize=quantize,
        )
        self.q_norm = _head_norm(config, "self_attn.q_norm") if config.qk_norm else None
        self.k_norm = _head_norm(config, "self_attn.k_norm") if config.qk_norm else None
        self.scale = config.attention_scale
        self.softcap = config.attention_softcap

    def __call__(
        self, x: jax.Array, layout: RowLayout, slot: CacheSlot | None, token_dropout: TokenDropout | None
    ) -> tuple[jax.Array, CacheSlot | None]:
        """`x [B, T, D]` to `[B, T, D]`, and the cache slot with this layer's keys and values written."""
        fused = kept(self.qkv_proj(x, token_dropout=_fold(token_dropout, 0)))  # [B, T, G, N + 2, H]
        query, key, value = split_heads(fused)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, layout.cos, layout.sin)
        key = rotate(key, layout.cos, layout.sin)
        if slot is not None:
            slot = slot.write(key, value)
            key, value = slot.read()
        mixed = attention(
            query,
            key,
            value,
            q_segments=layout.segments,
            kv_segments=layout.kv_segments,
            q_positions=layout.positions,
            kv_positions=layout.kv_positions,
            window=layout.window,
            scale=self.scale,
            softcap=self.softcap,
            ring=layout.ring,
        )
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        return kept(self.o_proj(mixed, token_dropout=_fold(token_dropout, 1))), slot


class MLP(nnx.Module):
    """The gated MLP. Gate and up are one product."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None, quantize: str | None = None):
        """Makes the stacked projections."""
        path = config.names.layer + ".mlp.{name}"
        self.gate_up_proj = Projection(
            (Part("gate_proj", 1), Part("up_proj", 1)),
            config.hidden_size,
            out_shape=(2, config.intermediate_size),
            part_axis=0,
            axes=("embed", "gate_up", "mlp"),
            num_layers=config.num_layers,
            use_bias=config.mlp_bias,
            path=path,
            dtype=dtype,
            rngs=rngs,
            init_std=config.initializer_range,
            quantize=quantize,
        )
        self.down_proj = Projection(
            (Part("down_proj", config.hidden_size),),
            config.intermediate_size,
            out_shape=(config.hidden_size,),
            axes=("mlp", "embed"),
            num_layers=config.num_layers,
            use_bias=config.mlp_bias,
            path=path,
            dtype=dtype,
            rngs=rngs,
            init_std=config.initializer_range,
            quantize=quantize,
        )
        self.activation = config.activation

    def __call__(self, x: jax.Array, token_dropout: TokenDropout | None) -> jax.Array:
        """`x [B, T, D]` to `[B, T, D]`."""
        fused = kept(self.gate_up_proj(x, token_dropout=_fold(token_dropout, 2)))  # [B, T, 2, M]
        return kept(self.down_proj(gated(self.activation, fused), token_dropout=_fold(token_dropout, 3)))


class Block(nnx.Module):
    """All layers at once: every leaf has a leading `[L]`. A scan slices it and calls one layer."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None, quantize: str | None = None):
        """Makes `config.num_layers` stacked layers."""
        names = config.names
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs, quantize=quantize)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs, quantize=quantize)
        self.attention_norm = _norm(config, names.attention_norm)
        self.mlp_norm = _norm(config, names.mlp_norm)
        self.post_attention_norm = _norm(config, names.post_attention_norm) if names.post_attention_norm else None
        self.post_mlp_norm = _norm(config, names.post_mlp_norm) if names.post_mlp_norm else None

    def __call__(
        self,
        x: jax.Array,
        layout: RowLayout,
        slot: CacheSlot | None = None,
        token_dropout: TokenDropout | None = None,
    ) -> tuple[jax.Array, CacheSlot | None]:
        """`x [B, T, D]` through one layer; also the cache slot after this layer's write."""
        mixed, slot = self.self_attn(self.attention_norm(x), layout, slot, token_dropout)
        if self.post_attention_norm is not None:
            mixed = self.post_attention_norm(mixed)
        x = x + mixed
        out = self.mlp(self.mlp_norm(x), token_dropout)
        if self.post_mlp_norm is not None:
            out = self.post_mlp_norm(out)
        return x + out, slot


def _head_norm(config: DecoderConfig, name: str) -> RMSNorm:
    return _norm(config, name, size=config.head_dim, axis="head_dim")


def _norm(config: DecoderConfig, name: str, *, size: int | None = None, axis: str = "embed") -> RMSNorm:
    return RMSNorm(
        size or config.hidden_size,
        eps=config.norm_eps,
        offset=config.norm_offset,
        path=f"{config.names.layer}.{name}",
        axis=axis,
        num_layers=config.num_layers,
    )
