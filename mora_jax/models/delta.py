"""Linear attention by the gated delta rule (Yang et al., 2024, arXiv 2412.06464), as Qwen3.5 has it.

Each value head has a state S `[key_dim, value_dim]` in place of a cache that grows. A token first lets it decay, then
replaces what it holds under the token's key, and reads it by the token's query:

    S ← e^g S,   S ← S + k (β (v - Sᵀk))ᵀ,   o = Sᵀq

Rows are computed in chunks. The corrections u = β (v - Sᵀk) of a chunk depend on each other,
(I + A) u = β (v - e^G Sᵀk) with A_ij = β_i (k_i·k_j) e^(G_i - G_j) for j < i and G the sums of g inside the chunk. This
triangular system is solved for all chunks at once; a scan then goes over the chunks with the state alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mora_jax.adapters.products.matmul import widened
from mora_jax.models.block import dropout_at, stacked_matrix, stacked_norm, stacked_projection
from mora_jax.models.layer_scan import checkpointed

if TYPE_CHECKING:
    from mora_jax.adapters.projection import TokenDropout
    from mora_jax.models.block import RowLayout
    from mora_jax.models.config import DecoderConfig
    from mora_jax.models.kv_cache import CacheSlot


CHUNK = 64  # tokens
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class GatedDelta(nnx.Module):
    """The gated delta rule behind a short convolution, in the place of attention. What it takes is one product.

    Attributes:
        conv: float32 `[L, C, window]`, the weights of each channel of queries, keys and values, the last token's last.
        decay: float32 `[L, value_heads]`, the logarithm of how fast a head forgets.
        step_bias: float32 `[L, value_heads]`, added to each token's step.
        norm: of what a head gives.
    """

    def __init__(self, config: DecoderConfig, **making: Any):
        """Makes the stacked parameters; `making` is the dtype, the keys and the quantisation of `Projection`."""
        delta = config.delta
        assert delta is not None
        self.config = delta
        keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
        sizes = (2 * keys + values, values, delta.value_heads, delta.value_heads)
        self.in_proj = stacked_projection(
            config,
            tuple(f"{delta.path}.in_proj_{name}" for name in ("qkv", "z", "b", "a")),
            sizes,
            config.hidden_size,
            out_shape=(sum(sizes),),
            axes=("embed", "delta"),
            **making,
        )
        out = f"{delta.path}.out_proj"
        self.out_proj = stacked_matrix(config, out, (values, config.hidden_size), ("delta", "embed"), **making)
        layers, rngs = config.num_layers, making["rngs"]
        conv = jnp.zeros((layers, sizes[0], delta.window))
        if rngs is not None:
            conv = jax.random.uniform(rngs.params(), conv.shape, minval=-1, maxval=1) * delta.window**-0.5
        self.conv = nnx.Param(conv, axes=("layers", "delta", "window"))
        self.decay = nnx.Param(jnp.zeros((layers, delta.value_heads)), axes=("layers", "delta"))
        self.step_bias = nnx.Param(jnp.ones((layers, delta.value_heads)), axes=("layers", "delta"))
        self.norm = stacked_norm(config, f"{delta.path}.norm", size=delta.value_dim, axis="head_dim", offset=0.0)

    def __call__(
        self, x: Array, layout: RowLayout, slot: CacheSlot | None, token_dropout: TokenDropout | None
    ) -> tuple[Array, CacheSlot | None]:
        """`x [B, T, D]` to `[B, T, D]`, and the slot of the cache after it.

        Tokens of a segment are side by side, in order, and padding is behind them.
        """
        projected = checkpointed(layout.project(self.in_proj, x, dropout_at(token_dropout, 0)))
        arrays = (self.conv[...], self.decay[...], self.step_bias[...], self.norm.weight[...])
        mix = partial(_mixed, self.config, self.norm.eps)
        if slot is None:
            # The backward pass computes it again from the product, in place of saving a dozen float32 arrays.
            mixed = jax.checkpoint(mix, prevent_cse=False)(projected, arrays, layout.segments)
        else:
            mixed, held = mix(projected, arrays, layout.segments, slot.held())
            slot = slot.put(*held)
        mixed = checkpointed(mixed)
        return checkpointed(layout.project(self.out_proj, mixed, dropout_at(token_dropout, 1))), slot


def _mixed(
    config: Any, eps: float, projected: Array, arrays: tuple[Array, ...], segments: Array, held: Any = None
) -> Any:
    """`[B, T, in]` of the four matrices to `[B, T, value_heads · value_dim]`; with `held` also what to keep after it.

    With it the row goes on with the one text of `held`, and padding changes nothing.
    """
    conv, decay, step_bias, weight = arrays
    heads = config.value_heads
    inner = config.value_dim * heads
    inputs, z, b, a = jnp.split(projected, np.cumsum([len(conv), inner, heads]), axis=-1)
    before, state = (None, None) if held is None else held
    convolved, inputs = _convolved(conv, inputs, segments, before)
    sizes = config.key_heads * config.key_dim
    query, key, value = jnp.split(convolved, [sizes, 2 * sizes], axis=-1)
    lead = projected.shape[:2]
    query, key = (_unit(x.reshape(*lead, config.key_heads, -1)) for x in (query, key))
    log_decay = -jnp.exp(decay) * jax.nn.softplus(widened(a) + step_bias)  # [B, T, Hv]
    beta = jax.nn.sigmoid(widened(b))
    if held is not None:
        real = segments[..., None] > 0
        log_decay, beta = log_decay * real, beta * real
        segments = jnp.ones_like(segments)
    out, state = delta_rule(query, key, value.reshape(*lead, heads, -1), log_decay, beta, segments, state)
    out = out * jax.lax.rsqrt(jnp.mean(jnp.square(out), axis=-1, keepdims=True) + eps) * weight
    out = out.reshape(*lead, -1) * jax.nn.silu(widened(z))
    out = out.astype(projected.dtype)
    return out if held is None else (out, (inputs, state))


def _convolved(weights: Array, inputs: Array, segments: Array, before: Array | None) -> tuple[Array, Array]:
    """The convolution of `inputs [B, T, C]` with `weights [C, window]` inside segments, through silu, float32.

    Also the inputs of the last real tokens, `[B, window - 1, C]`, which go before those of the next call.
    """
    window, length = weights.shape[1], inputs.shape[1]
    pad = ((0, 0), (window - 1, 0), (0, 0))
    wide = jnp.pad(inputs, pad) if before is None else jnp.concatenate([before.astype(inputs.dtype), inputs], axis=1)
    texts = jnp.pad(segments, pad[:2], constant_values=0 if before is None else 1)
    total = jnp.zeros(inputs.shape, jnp.float32)
    for i in range(window):
        same = (texts[:, i : i + length] == segments)[..., None]
        total += jnp.where(same, widened(wide[:, i : i + length]), 0) * weights[:, i]
    count = jnp.sum(segments > 0, axis=1)
    last = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, window - 1))(wide, count)
    return jax.nn.silu(total), last


def _unit(x: Array) -> Array:
    """Of length 1 along the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def delta_rule(
    query: Array, key: Array, value: Array, log_decay: Array, beta: Array, segments: Array, state: Array | None = None
) -> tuple[Array, Array]:
    """The rule over rows, chunk by chunk; each segment starts from a state of zeros.

    Args:
        query, key: float32 `[B, T, Hk, dk]` of length 1; scores are divided by √dk.
        value: float32 `[B, T, Hv, dv]`.
        log_decay: float32 `[B, T, Hv]`, g, at most 0.
        beta: float32 `[B, T, Hv]`, how much of a correction is made.
        segments: int32 `[B, T]`; tokens of a segment are side by side.
        state: float32 `[B, Hv, dk, dv]` that the segment 1 goes on from; None for zeros.

    Returns:
        float32 `[B, T, Hv, dv]`, and the state after the last token.
    """
    rows, length, groups, size = query.shape
    heads, width = value.shape[2:]
    chunk = min(CHUNK, length)
    start = jnp.zeros((rows, heads, size, width), jnp.float32) if state is None else state

    def chunked(x: Array, *shape: int, **how: Any) -> Array:
        """`[B, T, …]` as `[n, B, *shape, C, …]`."""
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)), **how)
        x = x.reshape(rows, -1, chunk, *shape, *x.shape[3 if shape else 2 :])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 2 + len(shape))

    q, k = chunked(query * size**-0.5, groups), chunked(key, groups)  # [n, B, G, C, dk]
    v = chunked(value, groups, heads // groups)  # [n, B, G, N, C, dv]
    g, b = (chunked(x, groups, heads // groups) for x in (log_decay, beta))  # [n, B, G, N, C]
    texts = chunked(segments, mode="edge")  # [n, B, C]
    ends = jnp.concatenate([jnp.ones((1, rows), texts.dtype), texts[:-1, :, -1]])  # the text that the state is of
    goes_on = (texts == ends[..., None])[:, :, None, None]  # tokens that read the state
    stays = (texts == texts[..., -1:])[:, :, None, None]  # tokens that it remembers
    sums = jnp.cumsum(g, axis=-1)
    order = jnp.arange(chunk)
    earlier = (texts[..., :, None] == texts[..., None, :]) & (order[:, None] >= order)
    between = jnp.exp(jnp.where(earlier[:, :, None, None], sums[..., :, None] - sums[..., None, :], -jnp.inf))
    scores = _einsum("nbgid,nbgjd->nbgij", q, k)[:, :, :, None] * between
    alike = _einsum("nbgid,nbgjd->nbgij", k, k)[:, :, :, None] * between
    keys = k[:, :, :, None] * (b * jnp.exp(sums) * goes_on)[..., None]
    right = jnp.concatenate([v * b[..., None], keys], axis=-1)
    if chunk > 1:
        system = jnp.where(order[:, None] > order, alike * b[..., None], 0)
        right = jax.lax.linalg.triangular_solve(system, right, left_side=True, lower=True, unit_diagonal=True)
    values, keys = jnp.split(right, [width], axis=-1)
    reads = q[:, :, :, None] * (jnp.exp(sums) * goes_on)[..., None]
    writes = k[:, :, :, None] * (jnp.exp(sums[..., -1:] - sums) * stays)[..., None]
    decays = jnp.exp(sums[..., -1]) * (stays & goes_on)[..., -1]

    def step(state: Array, arrays: Any) -> tuple[Array, Array]:
        values, keys, scores, reads, writes, decay = arrays
        corrections = values - _einsum("bghid,bghde->bghie", keys, state)
        out = _einsum("bghid,bghde->bghie", reads, state) + _einsum("bghij,bghje->bghie", scores, corrections)
        return state * decay[..., None, None] + _einsum("bghid,bghie->bghde", writes, corrections), out

    start = start.reshape(rows, groups, heads // groups, size, width)
    end, out = jax.lax.scan(step, start, (values, keys, scores, reads, writes, decays))
    out = jnp.moveaxis(jnp.moveaxis(out, 0, 1), 4, 2)  # [B, n, C, G, N, dv]
    return out.reshape(rows, -1, heads, width)[:, :length], end.reshape(rows, heads, size, width)
