"""One decoder layer: attention and MLP with their norms, every matrix product in a `Projection` slot.

The parameters of all layers are stacked; `LayerRunner` takes the stack apart and runs one layer after the other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.projection import Part, Projection, TokenDropout
from mora_jax.backend import backend
from mora_jax.models.attention.causal import NO_WINDOW, attention
from mora_jax.models.kv_cache import Cache, CacheSlot
from mora_jax.models.layer_scan import Places, checkpointed, run_stack
from mora_jax.models.norms import Norm
from mora_jax.models.rope import rotate

if TYPE_CHECKING:
    from mora_jax.models.attention.causal import Kernel
    from mora_jax.models.config import DecoderConfig
    from mora_jax.models.partitioning import Partitioner


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Who sees whom, and where everything stands; the same for all layers of a kind.

    Attributes:
        segments: int32 `[B, T]` of the queries.
        kv_segments: int32 `[B, S]` of the keys.
        positions, kv_positions: int32 of the same shapes where order is by position (with a cache); None
            where it is by index.
        cos, sin: float32 `[B, T, rotary_dim / 2]`.
        window: how many positions back a query sees; None for all.
        query_scale: float32 `[B, T]`, what queries are multiplied by; None for nothing.
        kernel: computes attention where order is by index (see attention/kernels.py); None for XLA's blocks.
        folded: whether devices share each row, so that its shares are rows here (`Partitioner.fold`).
        partitioner: how the devices of a mesh share the weights; None where each has all of them.
        mesh: how they share rows, be it nothing else; None on one device.
    """

    segments: jax.Array
    kv_segments: jax.Array
    positions: jax.Array | None
    kv_positions: jax.Array | None
    cos: jax.Array
    sin: jax.Array
    window: int | jax.Array | None
    query_scale: jax.Array | None = None
    kernel: Kernel | None = None
    folded: bool = False
    partitioner: Partitioner | None = None
    mesh: Partitioner | None = None

    def arrays(self) -> dict[str, jax.Array | None]:
        """All but the window and what is static, as a pytree."""
        static = ("window", "kernel", "folded", "partitioner", "mesh")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in static}

    def with_arrays(self, arrays: dict[str, Any]) -> RowLayout:
        """The layout with other arrays, as `arrays` gives them."""
        return dataclasses.replace(self, **arrays)

    def project(
        self, projection: Projection, x: jax.Array, token_dropout: TokenDropout | None, *, flat: bool = False
    ) -> jax.Array:
        """`projection(x)` with a kernel as the partitioner lays it; `flat` as in `Projection`, where it can be had."""
        lead, sharded = 0, False
        if self.partitioner is not None:
            shape = (projection.in_features, *projection.layout.out_shape)
            lead = self.partitioner.lead(projection.axes, shape) - 1
            sharded = self.partitioner.cuts_features(projection.axes, shape)
        return projection(x, token_dropout=token_dropout, lead=lead, flat=flat and not lead, sharded=sharded)


def _projection(
    config: DecoderConfig, names: tuple[str, ...], sizes: tuple[int, ...], in_features: int, **making: Any
) -> Projection:
    """All layers' matrices of those names, of those sizes along the part axis; all under one name is one part."""
    parts = zip(names, sizes if len(names) == len(sizes) else (sum(sizes),), strict=True)
    return Projection(
        tuple(Part(name.rpartition(".")[2], size) for name, size in parts),
        in_features,
        path=f"{config.names.layer}.{names[0].rpartition('.')[0]}.{{name}}",
        num_layers=config.num_layers,
        init_std=config.initializer_range,
        **making,
    )


def _fold(token_dropout: TokenDropout | None, index: int) -> TokenDropout | None:
    return None if token_dropout is None else token_dropout.fold(index)


class Attention(nnx.Module):
    """Grouped-query attention. q, k and v are one product, grouped by key/value head unless files hold it ungrouped."""

    def __init__(self, config: DecoderConfig, **making: Any):
        """Makes the stacked projections (and the norms of q and k where the family has them)."""
        names = config.names
        # One tensor that has all queries, all keys and all values is `[N + 2, G, H]` in its order, not `[G, N + 2, H]`.
        self.by_head = len(names.qkv) == 3 or names.by_head
        # It stays whole along `tensor`: devices would take its columns in another order than its adapter has.
        axis = "kv_heads" if self.by_head else "fused_heads"
        heads = (config.num_kv_heads, axis), (config.q_per_kv + 2, "q_per_kv")
        sizes, axes = zip(*(heads if self.by_head else reversed(heads)), strict=True)
        self.qkv_proj = _projection(
            config,
            names.qkv,
            (config.q_per_kv, 1, 1),
            config.hidden_size,
            out_shape=(*sizes, config.head_dim),
            part_axis=1 if self.by_head else 0,
            axes=("embed", *axes, "head_dim"),
            use_bias=config.qkv_bias,
            **making,
        )
        self.o_proj = _projection(
            config,
            (names.out,),
            (config.hidden_size,),
            config.num_heads * config.head_dim,
            out_shape=(config.hidden_size,),
            axes=("heads", "embed"),
            use_bias=config.out_bias,
            **making,
        )
        one = config.qk_norm == "all"
        size = config.head_dim * (config.num_heads if one else 1), config.head_dim * (config.num_kv_heads if one else 1)
        self.q_norm = _norm(config, names.q_norm if config.qk_norm else None, size=size[0], axis="head_dim")
        self.k_norm = _norm(config, names.k_norm if config.qk_norm else None, size=size[1], axis="head_dim")
        sinks = None
        if config.attention_sinks:
            zeros = jnp.zeros((config.num_layers, config.num_kv_heads, config.q_per_kv), making["dtype"])
            sinks = nnx.Param(zeros, axes=("layers", "kv_heads", "q_per_kv"))
        self.sinks = nnx.data(sinks)
        self.scale = config.attention_scale
        self.softcap = config.attention_softcap
        self.neighbours = config.rotary_neighbours

    def __call__(
        self, x: jax.Array, layout: RowLayout, slot: CacheSlot | None, token_dropout: TokenDropout | None
    ) -> tuple[jax.Array, CacheSlot | None]:
        """`x [B, T, D]` to `[B, T, D]`, and the cache slot with this layer's keys and values written."""
        query, key, value = self._split(checkpointed(layout.project(self.qkv_proj, x, _fold(token_dropout, 0))))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = _normed_heads(self.q_norm, query), _normed_heads(self.k_norm, key)
        query = rotate(query, layout.cos, layout.sin, self.neighbours)
        key = rotate(key, layout.cos, layout.sin, self.neighbours)
        if layout.query_scale is not None:
            query = query * layout.query_scale[:, :, None, None, None].astype(query.dtype)
        if slot is not None:
            slot = slot.write(key, value)
            key, value = slot.read()
            query = query.astype(key.dtype)
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
            sinks=None if self.sinks is None else self.sinks.get_value(),
            kernel=layout.kernel,
        )
        mixed = mixed.reshape(*mixed.shape[:2], -1).astype(x.dtype)
        return checkpointed(layout.project(self.o_proj, mixed, _fold(token_dropout, 1))), slot

    def _split(self, fused: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[B, T, G, N + 2, H]`, or else `[B, T, N + 2, G, H]`, as `[B, T, G, N, H]` and twice `[B, T, G, H]`."""
        axis = 3 if self.by_head else 2
        heads = fused.shape[axis] - 2
        query, key, value = jnp.split(fused, (heads, heads + 1), axis=axis)
        if not self.by_head:
            query = query.reshape(*query.shape[:2], fused.shape[3], heads, fused.shape[4])
        return query, jnp.squeeze(key, axis), jnp.squeeze(value, axis)


def _normed_heads(norm: Norm, x: jax.Array) -> jax.Array:
    """Heads `[B, T, ..., H]`, normalised each or, by a longer norm, all together."""
    if norm.weight.shape[-1] == x.shape[-1]:
        return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def gated(activation: str, fused: jax.Array, flat: bool = False) -> jax.Array:
    """`activation(gate) · up`, computed in float32 and rounded once.

    Args:
        activation: a name in `ACTIVATIONS`.
        fused: gate and up, `[..., 2, M]`, or with `flat` side by side, `[..., 2 · M]`.
        flat: see `fused`. TPUs take columns as they are, where an axis of two has all of them moved.

    Returns:
        `[..., M]` in the dtype of `fused`.
    """

    def product(fused: jax.Array) -> jax.Array:
        gate, up = jnp.split(fused, 2, axis=-1 if flat else -2)
        wide = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return (wide if flat else wide[..., 0, :]).astype(fused.dtype)

    # The backward pass computes it again from `fused`, in place of saving three arrays of the size of the result.
    return jax.checkpoint(product, prevent_cse=False)(fused)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def activated(activation: str, up: jax.Array) -> jax.Array:
    """`activation(up)`, computed in float32, in the dtype of `up`; the backward pass computes it again."""
    return ACTIVATIONS[activation](up.astype(jnp.float32)).astype(up.dtype)


class MLP(nnx.Module):
    """The MLP. Gate, where there is one, and up are one product."""

    def __init__(self, config: DecoderConfig, **making: Any):
        """Makes the stacked projections; `making` is the dtype, the keys and the quantisation of `Projection`."""
        names, inner = config.names, config.intermediate_size
        self.gate_up_proj = _projection(
            config,
            names.gate_up,
            (1, 1) if config.gated else (inner,),
            config.hidden_size,
            out_shape=(2, inner) if config.gated else (inner,),
            axes=("embed", "gate_up", "mlp" if len(names.gate_up) == 2 else "fused_mlp")
            if config.gated
            else ("embed", "mlp"),
            use_bias=config.mlp_bias,
            **making,
        )
        self.down_proj = _projection(
            config,
            (names.down,),
            (config.hidden_size,),
            inner,
            out_shape=(config.hidden_size,),
            axes=("mlp", "embed"),
            use_bias=config.mlp_bias,
            **making,
        )
        self.activation = config.activation
        self.gated = config.gated

    def __call__(self, x: jax.Array, layout: RowLayout, token_dropout: TokenDropout | None) -> jax.Array:
        """`x [B, T, D]` to `[B, T, D]`."""
        projected = layout.project(self.gate_up_proj, x, _fold(token_dropout, 2), flat=True)
        fused = checkpointed(projected)  # [B, T, 2 · M], or [B, T, 2, M]
        if self.gated:
            inner = gated(self.activation, fused, fused.ndim == x.ndim)
        else:
            inner = activated(self.activation, fused)
        return checkpointed(layout.project(self.down_proj, inner, _fold(token_dropout, 3)))


class Block(nnx.Module):
    """All layers at once: every leaf has a leading `[L]`. A scan slices it and calls one layer."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None, quantize: str | None = None):
        """Makes `config.num_layers` stacked layers."""
        names = config.names
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs, quantize=quantize)
        self.mlp: Any
        if config.experts is None:
            self.mlp = MLP(config, dtype=dtype, rngs=rngs, quantize=quantize)
        else:
            activation = ACTIVATIONS[config.activation]
            self.mlp = config.experts.layer(config, activation, dtype=dtype, rngs=rngs, quantize=quantize)
        self.attention_norm = _norm(config, names.attention_norm)
        self.mlp_norm = _norm(config, names.mlp_norm)
        self.post_attention_norm = _norm(config, names.post_attention_norm)
        self.post_mlp_norm = _norm(config, names.post_mlp_norm)
        self.parallel = config.parallel
        self.residual_scale = config.residual_scale

    def __call__(
        self,
        x: jax.Array,
        layout: RowLayout,
        slot: CacheSlot | None = None,
        token_dropout: TokenDropout | None = None,
    ) -> tuple[jax.Array, CacheSlot | None]:
        """`x [B, T, D]` through one layer; also the cache slot after this layer's write."""
        inputs = _normed(self.attention_norm, x)
        mixed, slot = self.self_attn(inputs, layout, slot, token_dropout)
        y = self._added(x, _normed(self.post_attention_norm, mixed))
        if self.mlp_norm is not None or not self.parallel:  # else one norm is for both
            inputs = _normed(self.mlp_norm, x if self.parallel else y)
        out = self.mlp(inputs, layout, token_dropout)
        return self._added(y, _normed(self.post_mlp_norm, out)), slot

    def _added(self, x: jax.Array, update: jax.Array) -> jax.Array:
        return x + (update if self.residual_scale == 1 else update * self.residual_scale)


@dataclasses.dataclass(frozen=True)
class LayerRunner:
    """Runs stacked layers one after the other: the stack is split once, and a layer merged where it is traced.

    Attributes:
        config: the model's.
        remat: see `run_stack`.
    """

    config: DecoderConfig
    remat: str

    def __call__(
        self, layers: Block, x: jax.Array, layout: RowLayout, token_dropout: TokenDropout | None = None
    ) -> jax.Array:
        """`x [B, T, D]` through all layers, with their own backward.

        Args:
            layers: the stack.
            x: the embeddings.
            layout: for all layers; its `cos` and `sin` are `[R, B, T, rotary_dim / 2]`.
            token_dropout: turns the adapters' dropout on.
        """
        graphdef, per_layer = self._split(layers, layout.partitioner)
        layout = self.shared(layout)
        partitioner, folded = layout.partitioner, layout.folded

        def by_rows(x: jax.Array) -> jax.Array:
            return x if partitioner is None else partitioner.rows(x, folded=folded)

        def body(x: jax.Array, layer: Any, shared: Any) -> jax.Array:
            index, leaves, window, rope = layer
            arrays, token_dropout = shared
            here = self.of_layer(layout.with_arrays(arrays), window, rope)
            token_dropout = None if token_dropout is None else token_dropout.fold(index)
            return by_rows(nnx.merge(graphdef, leaves)(by_rows(x), here, None, token_dropout)[0])

        places = None if partitioner is None else _places(partitioner, per_layer)
        return run_stack(body, self.remat, x, per_layer, (layout.arrays(), token_dropout), places)

    def extend(self, layers: Block, x: jax.Array, layout: RowLayout, cache: Cache) -> tuple[jax.Array, Cache]:
        """`x` through all layers behind the tokens of the cache, and the cache with its keys and values."""
        layout = self.shared(layout)
        graphdef, per_layer = self._split(layers)
        # Where a loop carries the cache, XLA copies all of it for each write on CPUs, and none of it elsewhere.
        carried = backend() != "cpu"

        def body(carry: Any, layer: Any) -> tuple[Any, Any]:
            (index, leaves, window, rope), own = layer
            x, (keys, values) = carry if carried else (carry, own)
            slot = CacheSlot(keys, values, index if carried else None, cache.length)
            x, written = nnx.merge(graphdef, leaves)(x, self.of_layer(layout, window, rope), slot, None)
            assert written is not None
            arrays = (written.keys, written.values)
            return ((x, arrays), None) if carried else (x, arrays)

        arrays = (cache.keys, cache.values)
        if carried:
            (x, (keys, values)), _ = jax.lax.scan(body, (x, arrays), (per_layer, None))
        else:
            x, (keys, values) = jax.lax.scan(body, x, (per_layer, arrays))
        return x, dataclasses.replace(cache, keys=keys, values=values)

    def _split(self, layers: Block, partitioner: Partitioner | None = None) -> tuple[Any, Any]:
        """The structure of a layer, and what differs between layers: number, leaves, and window and angles or None."""
        graphdef, leaves = nnx.split(layers)
        config = self.config
        flat = functools.partial(_flattened, partitioner)
        leaves = jax.tree.map(flat, leaves, is_leaf=lambda node: isinstance(node, nnx.Variable))
        windows = None if self._one_window else jnp.asarray([window or NO_WINDOW for window in config.windows])
        ropes = None if self._one_rope else jnp.asarray(config.layer_ropes)
        return graphdef, (jnp.arange(config.num_layers), leaves, windows, ropes)

    @property
    def _one_rope(self) -> bool:
        return len(self.config.ropes) == 1

    @property
    def _one_window(self) -> bool:
        return len(set(self.config.windows)) == 1

    def shared(self, layout: RowLayout) -> RowLayout:
        """The layout with the angles of all layers where they are the same."""
        return dataclasses.replace(layout, cos=layout.cos[0], sin=layout.sin[0]) if self._one_rope else layout

    def of_layer(self, layout: RowLayout, window: Any, rope: Any) -> RowLayout:
        """The layout of a layer with that window and the angles of that number."""
        layout = dataclasses.replace(layout, window=self.config.windows[0] if self._one_window else window)
        if self._one_rope:
            return layout
        return dataclasses.replace(layout, cos=layout.cos[rope], sin=layout.sin[rope])


def _flattened(partitioner: Partitioner | None, leaf: Any) -> Any:
    """A stack of kernels `[L, in, *out]` as matrices `[L, in, features]`, where that leaves each device what it has.

    Products take matrices. A TPU would move every number of an array whose last axes are short into one.
    """
    described = leaf.get_metadata()
    count, axes = described.get("out_axes", 1), described.get("axes")
    if count < 2 or (partitioner is not None and not partitioner.flattens(axes[1:], leaf.shape[1:])):
        return leaf
    value = leaf.get_value()
    return leaf.replace(value.reshape(*value.shape[:-count], -1), axes=axes[: len(axes) - count + 1])


def _places(partitioner: Partitioner, per_layer: Any) -> Places:
    """Where one layer's share of each leaf is: stacked parameters by their axes, nothing else."""
    stored: list[Any] = []
    used: list[Any] = []
    leads: list[int] = []
    for leaf in jax.tree.leaves(per_layer, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        axes = (leaf.get_metadata().get("axes") or ())[1:] if isinstance(leaf, nnx.Variable) else ()
        stored.append(partitioner.stored(axes, leaf.shape[1:]) if axes else None)
        used.append(partitioner.used(axes, leaf.shape[1:]) if axes else None)
        leads.append(partitioner.lead(axes, leaf.shape[1:]) if axes else 1)
    return Places(tuple(stored), tuple(used), tuple(leads))


def _norm(config: DecoderConfig, name: str | None, *, size: int | None = None, axis: str = "embed") -> Norm | None:
    """All layers' norms of that name; None where the family has none."""
    if name is None:
        return None
    path = f"{config.names.layer}.{name}"
    return norm_of(config, path, size=size or config.hidden_size, axis=axis, num_layers=config.num_layers)


def norm_of(config: DecoderConfig, path: str, **making: Any) -> Norm:
    """A norm of the family's kind."""
    making |= {"eps": config.norm_eps, "offset": config.norm_offset, "kind": config.norm, "use_bias": config.norm_bias}
    return Norm(path=path, **making)


def _normed(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
