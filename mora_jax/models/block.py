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
import numpy as np
from flax import nnx

from mora_jax.adapters.projection import Part, Projection, TokenDropout
from mora_jax.backend import backend
from mora_jax.models.attention.causal import NO_WINDOW, attention
from mora_jax.models.kv_cache import Cache, CacheSlot, KeySlot
from mora_jax.models.layer_scan import Places, checkpointed, run_alone, run_stack
from mora_jax.models.norms import Norm, rms_norm
from mora_jax.models.rope import rotate

if TYPE_CHECKING:
    from mora_jax.models.attention.causal import Kernel
    from mora_jax.models.config import DecoderConfig
    from mora_jax.models.partitioning import Partitioner


Slot = CacheSlot | KeySlot
#: By the number of a layer, the keys and values that others use.
Keys = dict[int, tuple[jax.Array, jax.Array]]
#: The sums of `Experts.use` over layers; None where nobody asks for them.
Use = tuple[jax.Array, jax.Array] | None


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
        layer_input: `[B, T, P]` of this layer alone; None for none.
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
    layer_input: jax.Array | None = None
    kernel: Kernel | None = None
    folded: bool = False
    partitioner: Partitioner | None = None
    mesh: Partitioner | None = None

    def arrays(self) -> dict[str, jax.Array | None]:
        """What is the same for all layers, without what is static, as a pytree."""
        static = ("window", "layer_input", "kernel", "folded", "partitioner", "mesh")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in static}

    def project(
        self, projection: Projection, x: jax.Array, token_dropout: TokenDropout | None, *, flat: bool = False
    ) -> jax.Array:
        """`projection(x)` with a kernel as the partitioner lays it; `flat` as in `Projection`, where it can be had."""
        lead, sharded = 0, False
        if self.partitioner is not None:
            shape = (projection.in_features, *projection.layout.out_shape)
            lead = self.partitioner.sharded_output_axis(projection.axes, shape) - 1
            sharded = self.partitioner.shards_features(projection.axes, shape)
        return projection(x, token_dropout=token_dropout, lead=lead, flat=flat and not lead, sharded=sharded)


def stacked_projection(
    config: DecoderConfig, names: tuple[str, ...], sizes: tuple[int, ...], in_features: int, **making: Any
) -> Projection:
    """All layers' matrices of those names, of those sizes along the part axis; all under one name is one part."""
    parts = zip(names, sizes if len(names) == len(sizes) else (sum(sizes),), strict=True)
    module, dot, _ = names[0].rpartition(".")
    return Projection(
        tuple(Part(name.rpartition(".")[2], size) for name, size in parts),
        in_features,
        path=f"{config.names.layer}.{module}{dot}{{name}}",
        num_layers=config.num_layers,
        numbers=config.numbers,
        init_std=config.initializer_range,
        **making,
    )


def stacked_matrix(
    config: DecoderConfig, name: str, sizes: tuple[int, int], axes: tuple[str, str], **making: Any
) -> Projection:
    """All layers' matrix of that name, `sizes` `[in, out]` with their logical `axes`."""
    return stacked_projection(config, (name,), sizes[1:], sizes[0], out_shape=sizes[1:], axes=axes, **making)


def dropout_at(token_dropout: TokenDropout | None, index: int) -> TokenDropout | None:
    """The dropout of one of the places of a layer."""
    return None if token_dropout is None else token_dropout.fold(index)


class Attention(nnx.Module):
    """Grouped-query attention. q, k and v are one product, grouped by key/value head unless files hold it ungrouped."""

    def __init__(self, config: DecoderConfig, **making: Any):
        """Makes the stacked projections (and the norms of q and k where the family has them)."""
        names = config.names
        # One tensor that has all queries, all keys and all values is `[N + 2, G, H]` in its order, not `[G, N + 2, H]`.
        self.by_head = len(names.qkv) == 3 or names.by_head
        # Layers may have no matrix for v, or use the keys and values of another.
        self.extra = 0 if config.keys_of is not None else 1 if config.values_are_keys else 2
        matrices = names.qkv[: 1 + self.extra]
        # It stays whole along `tensor`: devices would take its columns in another order than its adapter has.
        axis = "kv_heads" if self.by_head else "fused_heads"
        queries = config.q_per_kv * (2 if config.attention_gate else 1)
        heads = (config.num_kv_heads, axis), (queries + self.extra, "q_per_kv")
        sizes, axes = zip(*(heads if self.by_head else reversed(heads)), strict=True)
        self.qkv_proj = stacked_projection(
            config,
            matrices,
            (queries, 1, 1)[: 1 + self.extra],
            config.hidden_size,
            out_shape=(*sizes, config.head_dim),
            part_axis=1 if self.by_head else 0,
            axes=("embed", *axes, "head_dim"),
            use_bias=config.qkv_bias,
            **making,
        )
        sizes = config.num_heads * config.head_dim, config.hidden_size
        self.o_proj = stacked_matrix(config, names.out, sizes, ("heads", "embed"), use_bias=config.out_bias, **making)
        one = config.qk_norm == "all"
        size = config.head_dim * (config.num_heads if one else 1), config.head_dim * (config.num_kv_heads if one else 1)
        self.q_norm = _norm(config, names.q_norm if config.qk_norm else None, size=size[0], axis="head_dim")
        has_keys = config.qk_norm and self.extra
        self.k_norm = _norm(config, names.k_norm if has_keys else None, size=size[1], axis="head_dim")
        self.value_eps = config.norm_eps if config.value_norm and self.extra else None
        sinks = None
        if config.attention_sinks:
            zeros = jnp.zeros((config.num_layers, config.num_kv_heads, config.q_per_kv), making["dtype"])
            sinks = nnx.Param(zeros, axes=("layers", "kv_heads", "q_per_kv"))
        self.sinks = nnx.data(sinks)
        self.scale = config.attention_scale
        self.softcap = config.attention_softcap
        self.neighbours = config.rotary_neighbours
        self.has_gate = config.attention_gate

    def __call__(
        self, x: jax.Array, layout: RowLayout, slot: Slot | None, token_dropout: TokenDropout | None
    ) -> tuple[jax.Array, Slot | None]:
        """`x [B, T, D]` to `[B, T, D]`, and the slot with this layer's keys and values written, or with another's."""
        query, key, value = self._split(checkpointed(layout.project(self.qkv_proj, x, dropout_at(token_dropout, 0))))
        gate = None
        if self.has_gate:
            query, gate = jnp.split(query.reshape(*query.shape[:3], -1, 2 * query.shape[-1]), 2, axis=-1)
        query = rotate(_normed_heads(self.q_norm, query), layout.cos, layout.sin, self.neighbours)
        if key is not None:
            key = rotate(_normed_heads(self.k_norm, key), layout.cos, layout.sin, self.neighbours)
        if self.value_eps is not None:
            value = rms_norm(self.value_eps, value, jnp.ones(value.shape[-1], jnp.float32))
        if layout.query_scale is not None:
            query = query * layout.query_scale[:, :, None, None, None].astype(query.dtype)
        if slot is not None:
            slot = slot if key is None else slot.write(key, value)
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
        if gate is not None:
            mixed = _times_sigmoid(mixed, gate)
        mixed = mixed.reshape(*mixed.shape[:2], -1).astype(x.dtype)
        return checkpointed(layout.project(self.o_proj, mixed, dropout_at(token_dropout, 1))), slot

    def _split(self, fused: jax.Array) -> tuple[jax.Array, Any, Any]:
        """`[B, T, G, N + 2, H]`, or else `[B, T, N + 2, G, H]`, as `[B, T, G, N, H]` and twice `[B, T, G, H]`.

        Without a matrix for v it is what that for k gives; without either there are queries alone.
        """
        axis = 3 if self.by_head else 2
        heads = fused.shape[axis] - self.extra
        if self.extra < 2:
            query, last = jnp.split(fused, (heads,), axis=3)
            key = jnp.squeeze(last, 3) if self.extra else None
            return query, key, key
        query, first, last = jnp.split(fused, (heads, heads + 1), axis=axis)
        if not self.by_head:
            query = query.reshape(*query.shape[:2], fused.shape[3], heads, fused.shape[4])
        return query, jnp.squeeze(first, axis), jnp.squeeze(last, axis)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _times_sigmoid(x: jax.Array, gate: jax.Array) -> jax.Array:
    """`x · sigmoid(gate)`, computed in float32; the backward pass computes it again."""
    return (x.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(x.dtype)


def _normed_heads(norm: Norm | None, x: jax.Array) -> jax.Array:
    """Heads `[B, T, ..., H]`, normalised each or, by a longer norm, all together."""
    if norm is None:
        return x
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
        axis = -1 if flat else -2
        # As rows: with axes split between, XLA writes out the joined gradients of gate and up where slices read them.
        gate, up = jnp.split(fused.reshape(-1, fused.shape[-1]) if flat else fused, 2, axis)
        wide = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return wide.astype(fused.dtype).reshape(*fused.shape[:axis], wide.shape[-1])

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
        self.gate_up_proj = stacked_projection(
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
        sizes = inner, config.hidden_size
        self.down_proj = stacked_matrix(config, names.down, sizes, ("mlp", "embed"), use_bias=config.mlp_bias, **making)
        self.activation = config.activation
        self.gated = config.gated

    def __call__(self, x: jax.Array, layout: RowLayout, token_dropout: TokenDropout | None) -> jax.Array:
        """`x [B, T, D]` to `[B, T, D]`."""
        projected = layout.project(self.gate_up_proj, x, dropout_at(token_dropout, 2), flat=True)
        fused = checkpointed(projected)  # [B, T, 2 · M], or [B, T, 2, M]
        if self.gated:
            inner = gated(self.activation, fused, fused.ndim == x.ndim)
        else:
            inner = activated(self.activation, fused)
        return checkpointed(layout.project(self.down_proj, inner, dropout_at(token_dropout, 3)))


class Constant(nnx.Variable):
    """A number of a checkpoint that nothing trains."""


class Block(nnx.Module):
    """All layers at once: every leaf has a leading `[L]`. A scan slices it and calls one layer."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None, quantize: str | None = None):
        """Makes `config.num_layers` stacked layers."""
        names = config.names
        mixer = Attention if config.delta is None else config.delta.layer
        self.self_attn: Any = mixer(config, dtype=dtype, rngs=rngs, quantize=quantize)
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
        inputs = config.layer_input
        self.layer_input: Any = nnx.data(inputs and inputs.layer(config, dtype=dtype, rngs=rngs, quantize=quantize))
        self.layer_scale = nnx.data(
            Constant(jnp.ones(config.num_layers), axes=("layers",)) if config.layer_scale else None
        )
        self.parallel = config.parallel
        self.has_experts = config.experts is not None
        self.residual_scale = config.residual_scale

    def __call__(
        self, x: jax.Array, layout: RowLayout, slot: Slot | None, token_dropout: TokenDropout | None, use: Use = None
    ) -> tuple[jax.Array, Slot | None, Use]:
        """`x [B, T, D]` through one layer; also the slot after this layer's write, and the sums of `Experts.use`.

        Args:
            x, layout, slot, token_dropout: of the layer.
            use: the sums of the layers before, to which those of this one are added; None for none.
        """
        inputs = normed(self.attention_norm, x)
        mixed, slot = self.self_attn(inputs, layout, slot, token_dropout)
        y = self._added(x, normed(self.post_attention_norm, mixed))
        if self.mlp_norm is not None or not self.parallel:  # else one norm is for both
            inputs = normed(self.mlp_norm, x if self.parallel else y)
        if use is not None and self.has_experts:
            counts, probabilities = self.mlp.use(inputs, layout.segments)
            use = use[0] + counts, use[1] + probabilities
        out = self.mlp(inputs, layout, token_dropout)
        y = self._added(y, normed(self.post_mlp_norm, out))
        if self.layer_input is not None:
            y = y + self.layer_input(y, layout, token_dropout)
        y = y if self.layer_scale is None else y * self.layer_scale[...].astype(y.dtype)
        return y, slot, use

    def _added(self, x: jax.Array, update: jax.Array) -> jax.Array:
        return x + (update if self.residual_scale == 1 else update * self.residual_scale)


#: The layers of a model: a stack, or the stacks of several kinds in the order of `DecoderConfig.runs`.
Layers = Block | nnx.List


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
        self, layers: Layers, x: jax.Array, layout: RowLayout, token_dropout: TokenDropout | None, use: Use
    ) -> tuple[jax.Array, Use]:
        """`x [B, T, D]` through all layers, with their own backward; and the sums of `Experts.use` over them.

        Args:
            layers: the stacks.
            x: the embeddings.
            layout: for all layers; its `cos` and `sin` are `[R, B, T, rotary_dim / 2]`.
            token_dropout: turns the adapters' dropout on.
            use: zeros `[E]` to which the sums are added; None for none.
        """
        layout = self.shared(layout)
        carry = x, use
        keys: Keys = {}
        for run in _runs_of(self.config, layers):
            carry = self._run(run, carry, layout, token_dropout, keys)
        return carry

    def _run(
        self, run: list[_Stack], carry: Any, layout: RowLayout, token_dropout: TokenDropout | None, keys: Keys
    ) -> Any:
        """The residual stream and the sums of `Experts.use` through the layers of a run, which adds to `keys`."""
        partitioner, folded = layout.partitioner, layout.folded
        splits = [stack.split(layout, partitioner) for stack in run]

        def by_rows(x: jax.Array) -> jax.Array:
            return x if partitioner is None else partitioner.rows(x, folded=folded)

        def layer(i: int, carry: Any, differing: Any, shared: Any, slot: KeySlot | None) -> Any:
            (x, use), (arrays, dropout) = carry, shared
            index, leaves, *others = differing
            here = run[i].layout(dataclasses.replace(layout, **arrays), *others)
            token_dropout = None if dropout is None else dropout.fold(index)
            x, slot, use = nnx.merge(splits[i][0], leaves)(by_rows(x), here, slot, token_dropout, use)
            return (by_rows(x), use), slot

        def body(carry: Any, layers: Any, shared: Any, given: Any) -> Any:
            for i, (stack, differing) in enumerate(zip(run, layers, strict=True)):
                slot = None if stack.config.keys_of is None else KeySlot(*given[stack.config.keys_of])
                carry, _ = layer(i, carry, differing, shared, slot)
            return carry

        per_layer = tuple(leaves for _, leaves in splits)
        places = None if partitioner is None else _places(partitioner, per_layer)
        shared = (layout.arrays(), token_dropout)
        if run[0].config.keys_used is not None:

            def alone(carry: Any, differing: Any, shared: Any) -> Any:
                carry, slot = layer(0, carry, differing, shared, KeySlot())
                return carry, (slot.keys, slot.values)

            carry, keys[run[0].config.keys_used] = run_alone(alone, self.remat, carry, per_layer[0], shared, places)
            return carry
        used = {stack.config.keys_of for stack in run if stack.config.keys_of is not None}
        return run_stack(
            body, self.remat, carry, per_layer, shared, {layer: keys[layer] for layer in sorted(used)}, places
        )

    def extend(self, layers: Layers, x: jax.Array, layout: RowLayout, cache: Cache) -> tuple[jax.Array, Cache]:
        """`x` through all layers behind the tokens of the cache, and the cache with its keys and values."""
        layout = self.shared(layout)
        stored: list[Any] = []
        stacks = iter(cache.stacks)
        keys: Keys = {}
        for run in _runs_of(self.config, layers):
            x, arrays = self._extend_run(run, x, layout, [next(stacks) for _ in run], cache.length, keys)
            stored += arrays
            if run[0].config.keys_used is not None:
                keys[run[0].config.keys_used] = arrays[0][0][0], arrays[0][1][0]
        return x, cache.with_stacks(stored)

    def _extend_run(
        self, run: list[_Stack], x: jax.Array, layout: RowLayout, stacks: list[Any], length: jax.Array, keys_of: Keys
    ) -> tuple[jax.Array, list[Any]]:
        splits = [stack.split(layout) for stack in run]
        # Where a loop carries the cache, XLA copies all of it for each write on CPUs, and none of it elsewhere.
        carried = backend() != "cpu"

        def body(carry: Any, turn: Any) -> tuple[Any, Any]:
            place, per_layer, slots = turn
            x, arrays = carry if carried else (carry, slots)
            written = []
            for stack, (graphdef, _), layer, (keys, values) in zip(run, splits, per_layer, arrays, strict=True):
                _, leaves, *others = layer
                slot = CacheSlot(keys, values, place if carried else None, length)
                if (used := stack.config.keys_of) is not None:
                    slot = CacheSlot(*keys_of[used], None, length)
                x, slot, _ = nnx.merge(graphdef, leaves)(x, stack.layout(layout, *others), slot, None)
                written.append((keys, values) if used is not None else (slot.keys, slot.values))
            return ((x, written), None) if carried else (x, written)

        places = jnp.arange(run[0].config.num_layers)
        per_layer = [leaves for _, leaves in splits]
        if carried:
            (x, stacks), _ = jax.lax.scan(body, (x, stacks), (places, per_layer, None))
        else:
            x, stacks = jax.lax.scan(body, x, (places, per_layer, stacks))
        return x, stacks

    def shared(self, layout: RowLayout) -> RowLayout:
        """The layout with the angles of all layers where they are the same."""
        one = len(self.config.ropes) == 1
        return dataclasses.replace(layout, cos=layout.cos[0], sin=layout.sin[0]) if one else layout


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Like layers with their description."""

    config: DecoderConfig
    block: Block

    def split(self, layout: RowLayout, partitioner: Partitioner | None = None) -> tuple[Any, Any]:
        """The structure of a layer, and what differs between layers: number, leaves, and window, angles and inputs of
        their own, or None. `layout` has these inputs of all layers, `[B, T, L, P]`."""
        graphdef, leaves = nnx.split(self.block)
        config = self.config
        flat = functools.partial(_flattened, partitioner)
        leaves = jax.tree.map(flat, leaves, is_leaf=lambda node: isinstance(node, nnx.Variable))
        windows, ropes = None, None
        if len(set(config.windows)) > 1:
            windows = jnp.asarray([window or NO_WINDOW for window in config.windows])
        if len(set(config.layer_ropes)) > 1:
            ropes = jnp.asarray(config.layer_ropes)
        numbers = jnp.asarray(config.numbers) if config.numbers else jnp.arange(config.num_layers)
        inputs = layout.layer_input
        if inputs is not None:
            inputs = jnp.moveaxis(inputs[:, :, np.asarray(config.numbers)] if config.numbers else inputs, 2, 0)
        return graphdef, (numbers, leaves, windows, ropes, inputs)

    def layout(self, layout: RowLayout, window: Any, rope: Any, inputs: Any) -> RowLayout:
        """That of one layer, whose window, angles and inputs are given where layers differ in them."""
        config = self.config
        window = config.windows[0] if window is None else window
        return of_layer(layout, config, window, config.layer_ropes[0] if rope is None else rope, inputs)


def of_layer(layout: RowLayout, config: DecoderConfig, window: Any, rope: Any, inputs: Any = None) -> RowLayout:
    """The layout of a layer with that window, the angles of that number, and inputs of its own."""
    layout = dataclasses.replace(layout, window=window, layer_input=inputs)
    if layout.cos.ndim == 3:  # all layers have the same angles
        return layout
    cos, sin = (table[rope][..., : config.rotary_dim // 2] for table in (layout.cos, layout.sin))
    return dataclasses.replace(layout, cos=cos, sin=sin)


def _runs_of(config: DecoderConfig, layers: Layers) -> list[list[_Stack]]:
    """The stacks by the loops that go through them."""
    blocks = iter([layers] if isinstance(layers, Block) else layers)
    return [[_Stack(stack, next(blocks)) for stack in run] for run in config.runs]


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
    output_axes: list[int] = []
    for leaf in jax.tree.leaves(per_layer, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        axes = (leaf.get_metadata().get("axes") or ())[1:] if isinstance(leaf, nnx.Variable) else ()
        stored.append(partitioner.stored(axes, leaf.shape[1:]) if axes else None)
        used.append(partitioner.used(axes, leaf.shape[1:]) if axes else None)
        output_axes.append(partitioner.sharded_output_axis(axes, leaf.shape[1:]) if axes else 1)
    return Places(tuple(stored), tuple(used), tuple(output_axes))


def stacked_norm(config: DecoderConfig, name: str, *, size: int | None = None, **making: Any) -> Norm:
    """All layers' norms of that name."""
    making |= {"num_layers": config.num_layers, "numbers": config.numbers}
    return norm_of(config, f"{config.names.layer}.{name}", size=size or config.hidden_size, **making)


def _norm(config: DecoderConfig, name: str | None, **making: Any) -> Norm | None:
    """The same; None where the family has none."""
    return None if name is None else stacked_norm(config, name, **making)


def norm_of(config: DecoderConfig, path: str, **making: Any) -> Norm:
    """A norm of the family's kind; its offset is the family's unless `making` has another."""
    making |= {"eps": config.norm_eps, "kind": config.norm, "use_bias": config.norm_bias}
    making.setdefault("offset", config.norm_offset)
    return Norm(path=path, **making)


def normed(norm: Norm | None, x: jax.Array) -> jax.Array:
    """`norm(x)`, or `x` where there is no norm."""
    return x if norm is None else norm(x)
