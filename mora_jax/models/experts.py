"""Layers with experts: a router gives each token some of many small MLPs, whose outputs are added up by its weights.

No token is dropped: rows are sorted by expert and multiplied group by group (`adapters/products/grouped.py`), however
many an expert has. So a token's result doesn't depend on what else is in the batch. The router is frozen; gradients go
through its weights into the layers below.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.expert_projection import ExpertProjection, Groups
from mora_jax.adapters.products.matmul import decoder_dot, widened
from mora_jax.adapters.projection import Part, TokenDropout, drawn
from mora_jax.models.block import MLP, dropout_at, normed, stacked_norm
from mora_jax.models.config import DecoderConfig, ExpertsConfig
from mora_jax.models.layer_scan import checkpointed

Array = jax.Array


class Router(nnx.Module):
    """Scores of tokens for experts.

    Attributes:
        left_out: why it carries no adapter.
        kernel: `[L, D, E]`.
        bias: `[L, E]`, or None.
        norm: of what it reads, or None.
        scale: `[L, E]`, what the weights of experts are multiplied by; None for nothing.
        path: HuggingFace's, with `{layer}` in it.
    """

    left_out = "the router of experts, which stays as it is"

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig, *, dtype: Any, rngs: nnx.Rngs | None):
        """Draws the kernel from `rngs`, or leaves zeros for a loader to fill."""
        shape = (config.num_layers, config.hidden_size, experts.count)
        kernel = drawn(rngs, config.initializer_range, shape, dtype)
        self.kernel = nnx.Param(kernel, axes=("layers", "embed", "router"))
        bias = nnx.Param(jnp.zeros((shape[0], shape[2]), dtype), axes=("layers", "router"))
        self.bias = nnx.data(bias if experts.router_bias else None)
        scaled = experts.router_scales
        self.norm = stacked_norm(config, "router.norm", scale=config.hidden_size**-0.5) if scaled else None
        ones = nnx.Param(jnp.ones((shape[0], shape[2]), dtype), axes=("layers", "router"))
        self.scale = nnx.data(ones if scaled else None)
        self.path = f"{config.names.layer}.{experts.router}"

    def __call__(self, x: Array) -> Array:
        """`x [N, D]` to float32 `[N, E]`."""
        scores = decoder_dot(normed(self.norm, x), self.kernel.get_value())
        return scores if self.bias is None else scores + widened(self.bias.get_value())

    def choose(self, x: Array, per_token: int, normalize: bool) -> tuple[Array, Array]:
        """Weights and experts of tokens `x [N, D]`, as `routed` gives them, times the experts' numbers."""
        weights, experts = routed(self(x), per_token, normalize)
        return weights if self.scale is None else weights * widened(self.scale.get_value())[experts], experts


def routed(scores: Array, per_token: int, normalize: bool) -> tuple[Array, Array]:
    """Each token's experts and their weights.

    Args:
        scores: float32 `[N, E]`.
        per_token: how many experts a token has, k; of equal scores those of lower numbers.
        normalize: whether the weights of a token add up to 1: the softmax of its k scores, which is that of all scores
            divided by its sum. Else it is the softmax of all scores.

    Returns:
        Weights, float32 `[N, k]`, and experts, int32 `[N, k]`.
    """
    top, experts = jax.lax.top_k(scores, per_token)
    total = top if normalize else scores
    return jnp.exp(top - jax.nn.logsumexp(total, axis=-1, keepdims=True)), experts


def balance(counts: Array, probabilities: Array, tokens: Array) -> Array:
    """`E Σ_e f_e P_e`, f the share of tokens that have an expert and P the mean of its probability (Fedus et al., 2021,
    arXiv 2101.03961); with k experts a token f sums to k, as in Mixtral, and the value is k where all are used alike.

    Args:
        counts, probabilities: `[E]`, sums over tokens and layers, as `Experts.use` gives them for one.
        tokens: how many they are over, each once for every layer.
    """
    total = jnp.maximum(tokens, 1.0)
    return len(counts) * jnp.sum(jax.lax.stop_gradient(counts) / total * probabilities / total)


class Experts(nnx.Module):
    """The experts of all layers, in the place of the MLP. Gate and up are one product.

    Where they have a norm of their own the router reads what is before it.
    """

    def __init__(self, config: DecoderConfig, activation: Callable[[Array], Array], **making: Any):
        """Makes router and stacked projections; `activation` is that of the gate, `making` is the dtype, the keys and
        the quantisation of `Projection`."""
        experts = config.experts
        assert experts is not None
        self.router = Router(config, experts, dtype=making["dtype"], rngs=making["rngs"])
        self.norm = stacked_norm(config, experts.norms[2]) if experts.norms else None
        gate, up, down = experts.names
        making |= {
            "experts": experts.count,
            "num_layers": config.num_layers,
            "numbers": config.numbers,
            "path": f"{config.names.layer}.{experts.path}",
            "layer_path": experts.parameters,
            "use_bias": experts.bias,
            "init_std": config.initializer_range,
        }
        self.gate_axis = int(experts.fused == "interleaved")  # of `[2, M]` or `[M, 2]`
        pair, axes = [2, experts.width], ["gate_up", "expert_mlp"]
        if self.gate_axis:
            pair, axes = pair[::-1], axes[::-1]
        self.gate_up_proj = ExpertProjection(
            (Part(gate, 1), Part(up, 1)),
            config.hidden_size,
            out_shape=tuple(pair),
            part_axis=self.gate_axis,
            axes=("embed", *axes),
            whole="gate_up_proj",
            seen_whole=experts.fused is not None,
            **making,
        )
        self.down_proj = ExpertProjection(
            (Part(down, config.hidden_size),),
            experts.width,
            out_shape=(config.hidden_size,),
            axes=("expert_mlp", "embed"),
            whole=down,
            **making,
        )
        self.config = experts
        self.activation = activation

    def __call__(self, x: Array, layout: Any, token_dropout: TokenDropout | None) -> Array:
        """`x [B, T, D]` to `[B, T, D]`, with the `RowLayout` of the block.

        On a mesh each device sorts its own rows, and has a share of the experts.
        """
        if layout.mesh is None:
            return self._sums(x, token_dropout, 0).astype(x.dtype)
        graphdef, state = nnx.split(self)
        leaves, tree = jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        weights = [(leaf.get_value(), leaf.get_metadata()["axes"][1:]) for leaf in leaves]
        rows = (x,) if token_dropout is None else (x, token_dropout.tokens)

        def share(number: Array, *arrays: Array) -> Array:
            x, *tokens = arrays[: len(rows)]
            held = [leaf.replace(array) for leaf, array in zip(leaves, arrays[len(rows) :], strict=False)]
            dropout = TokenDropout(arrays[-1], tokens[0]) if tokens else None
            experts = nnx.merge(graphdef, jax.tree.unflatten(tree, held))
            return experts._sums(x, dropout, number * experts.gate_up_proj.local_experts)

        if token_dropout is not None:
            weights.append((token_dropout.key, (None,) * token_dropout.key.ndim))
        return layout.mesh.by_experts(share, rows, weights, folded=layout.folded).astype(x.dtype)

    def use(self, x: Array, segments: Array) -> tuple[Array, Array]:
        """How tokens `x [B, T, D]` that are not padding are spread over the experts, float32 `[E]` each.

        Returns:
            How many tokens have each expert, and the sum of its probabilities among all.
        """
        scores = self.router(x.reshape(-1, x.shape[-1]))
        real = (segments.reshape(-1, 1) > 0).astype(jnp.float32)
        _, chosen = jax.lax.top_k(scores, self.config.per_token)
        counts = jnp.sum(jax.nn.one_hot(chosen, scores.shape[-1]).sum(1) * real, axis=0)
        return counts, jnp.sum(jax.nn.softmax(scores, axis=-1) * real, axis=0)

    def _sums(self, x: Array, token_dropout: TokenDropout | None, first: Array | int) -> Array:
        """What experts from number `first` on, those that are here, give `x [B, T, D]`: float32 `[B, T, D]`."""
        rows, k = x.reshape(-1, x.shape[-1]), self.config.per_token  # [N, D]
        weights, chosen = self.router.choose(rows, k, self.config.normalize)
        count = self.gate_up_proj.local_experts
        here = (chosen >= first) & (chosen < first + count)
        owner = jnp.where(here, chosen - first, count).reshape(-1)  # behind all groups where it is elsewhere
        order = jnp.argsort(owner, stable=True)  # of the N · k pairs of a token and an expert
        places = jnp.argsort(order)
        groups = Groups(jnp.bincount(owner, length=count).astype(jnp.int32), owner[order])
        if token_dropout is not None:
            pairs = token_dropout.tokens.reshape(-1)[order // k] * jnp.uint32(k) + (order % k).astype(jnp.uint32)
            token_dropout = token_dropout._replace(tokens=pairs)
        drop = (None, None) if token_dropout is None else (token_dropout.fold(2), token_dropout.fold(3))
        inputs = _taken(k, normed(self.norm, rows), order, places)  # [N · k, D]
        fused = checkpointed(self.gate_up_proj(inputs, groups, token_dropout=drop[0]))
        outputs = checkpointed(self.down_proj(self._gated(fused), groups, token_dropout=drop[1]))
        by_token = _taken(1, outputs, places, order).reshape(len(rows), k, -1)
        return jnp.einsum("nkd,nk->nd", widened(by_token), weights).reshape(x.shape)

    def _gated(self, fused: Array) -> Array:
        """Gate and up `[R, …]`, with an axis of two, to `[R, M]`; computed in float32, and again in the backward."""

        def product(fused: Array) -> Array:
            gate, up = (widened(jnp.take(fused, i, axis=1 + self.gate_axis)) for i in range(2))
            limit = self.config.limit
            if limit is None:
                return (self.activation(gate) * up).astype(fused.dtype)
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            return (gate * jax.nn.sigmoid(self.config.sigmoid_scale * gate) * (up + 1)).astype(fused.dtype)

        return jax.checkpoint(product, prevent_cse=False)(fused)


class ExpertsBeside(nnx.Module):
    """Experts beside a dense MLP, each with norms before and behind it, as Gemma 4 has them, in the place of the MLP.

    `norm(MLP(norm(x))) + norm(experts(norm(x)))`. No norm is before all of it, since the router reads `x` itself.
    """

    def __init__(self, config: DecoderConfig, activation: Callable[[Array], Array], **making: Any):
        """Makes both; `activation` is that of the experts' gate."""
        assert config.experts is not None
        self.dense = MLP(config, **making)
        self.experts = Experts(config, activation, **making)  # with the norm before them
        before, behind, _, behind_experts = config.experts.norms
        self.dense_norm = stacked_norm(config, before)
        self.post_dense_norm = stacked_norm(config, behind)
        self.post_experts_norm = stacked_norm(config, behind_experts)

    def __call__(self, x: Array, layout: Any, token_dropout: TokenDropout | None) -> Array:
        """`x [B, T, D]` to `[B, T, D]`, with the `RowLayout` of the block."""
        dense = self.post_dense_norm(self.dense(self.dense_norm(x), layout, token_dropout))
        return dense + self.post_experts_norm(self.experts(x, layout, dropout_at(token_dropout, 6)))

    def use(self, x: Array, segments: Array) -> tuple[Array, Array]:
        """See `Experts.use`."""
        return self.experts.use(x, segments)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taken(copies: int, x: Array, order: Array, places: Array) -> Array:
    """`x [N, D]`, so many copies of each row, in another order: `[N · copies, D]`.

    Args:
        copies: of each row.
        x: any rows.
        order: for each row of the result the number of its copy; its row is that divided by `copies`.
        places: the inverse of `order`, by which gradients are looked up where autodiff would scatter them.
    """
    return x[order // copies]


def _taken_fwd(copies, x, order, places):
    return _taken(copies, x, order, places), places


def _taken_bwd(copies, places, dy):
    by_row = dy[places].reshape(-1, copies, dy.shape[-1])
    return jnp.sum(widened(by_row), axis=1).astype(dy.dtype), None, None


_taken.defvjp(_taken_fwd, _taken_bwd)
