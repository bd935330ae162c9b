"""The decoder: one configurable transformer for all families, layers stacked and run by `jax.lax.scan`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.products.quantization import FORMATS
from mora_jax.adapters.projection import OutputHead, TokenDropout, drawn, normal
from mora_jax.adapters.slots import banks, checked_ids, choose_rows
from mora_jax.backend import backend
from mora_jax.models.attention.causal import Rows
from mora_jax.models.block import Block, LayerRunner, RowLayout, norm_of
from mora_jax.models.kv_cache import Cache, empty_cache
from mora_jax.models.rope import by_length, tables
from mora_jax.models.segments import check_token_ids, default_positions, in_order, segment_lengths, sorted_by_segment

if TYPE_CHECKING:
    from mora_jax.models.attention.kernels import AttentionChoice
    from mora_jax.models.config import DecoderConfig
    from mora_jax.models.partitioning import Partitioner

REMAT = ("none", "dots", "full", "offload")


class TokenEmbedding(nnx.Embed):
    """An `nnx.Embed` that looks up first and casts afterwards: a float32 master is never cast whole.

    Attributes:
        embedding: `[V, D]`.
        path: HuggingFace module path.
        of_model: whether it is the one that the model looks tokens up in first, of which `trainable_tokens` speaks.
    """

    of_model = False

    def __init__(
        self, vocab_size: int, features: int, *, scale: float, path: str, dtype: Any, rngs: Any, axis: str = "vocab"
    ):
        """Draws a normal table with standard deviation `scale`, whose rows are the logical axis `axis`; without `rngs`
        zeros, for a loader to fill."""
        draw = functools.partial(normal, 0.0 if rngs is None else scale)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        super().__init__(vocab_size, features, dtype=dtype, param_dtype=dtype, embedding_init=draw, rngs=rngs)
        self.embedding.set_metadata(axes=(axis, "embed"))
        self.path = path

    def __call__(self, inputs: jax.Array, out_sharding: None = None) -> jax.Array:
        """Rows of `inputs [...]`: `[..., D]`. An id without a row gives NaN, never another token's row."""
        rows = self.embedding[...].at[inputs].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows.astype(self.dtype)

    def table(self) -> jax.Array:
        """The table `[V, D]` that a tied output head multiplies with."""
        return self.embedding[...]


class Head(NamedTuple):
    """What turns hidden states into logits: `softcap(hidden @ kernel.T)`, in float32.

    Attributes:
        kernel: `[V, D]`; the embedding itself when the head is tied. None where the states are logits already.
        softcap: logits become `softcap * tanh(logits / softcap)`; None for no cap.
    """

    kernel: jax.Array | None
    softcap: float | None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 `[..., V]` of `hidden [..., D]`."""
        if self.kernel is None:
            return hidden.astype(jnp.float32)
        kernel = self.kernel.astype(hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, kernel, preferred_element_type=jnp.float32)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


class Decoder(nnx.Module):
    """A causal language model.

    Attributes:
        config: its description.
        dtype: dtype of the computation, the residual stream and the frozen weights (norms are float32).
        remat: what the backward pass computes again: "none", "dots" (all but the results of projections and
            of attention), "full", or "offload" (full, and what is saved is in the host's memory).
        quantize: how the layers' kernels are held: "none", "int8" or "nf4" (see
            `mora_jax.adapters.products.quantization`).
        attention: chooses what computes attention (`mora_jax.models.attention.kernels`); None for XLA's blocks.
        layers: one `Block` whose leaves have a leading `[L]`; where layers are of several kinds a list of such stacks,
            in the order of `config.runs`.
        name_or_path: what the model was loaded from (a folder's absolute path, or a hub id); None for a fresh one.
        folder: the local folder with its files; None for a fresh one.
        added_tokens: texts of those that `add_tokens` added since; the tokenizer in `folder` doesn't know them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
        remat: str = "none",
        quantize: str = "none",
        attention: AttentionChoice | None = None,
    ):
        """Makes the parameters: normal (`config.initializer_range`) from `rngs`, else zeros to be filled."""
        if remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {remat!r}")
        if quantize not in ("none", *FORMATS):
            raise ValueError(f"quantize must be one of none, {', '.join(FORMATS)}, got {quantize!r}")
        dtype = jnp.dtype(dtype)
        if attention is not None:
            attention.check(Rows(config, dtype))
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.quantize = quantize
        self.attention = attention
        self.name_or_path: str | None = None
        self.folder: str | None = None
        self.added_tokens: tuple[str, ...] = ()
        making: dict[str, Any] = {"scale": config.initializer_range, "dtype": dtype, "rngs": rngs}
        names, width = config.names, config.hidden_size
        self.embed_tokens = TokenEmbedding(config.vocab_size, width, path=names.embedding, **making)
        self.embed_tokens.of_model = True
        positions = None
        if names.positions is not None:
            positions = TokenEmbedding(config.max_positions, width, path=names.positions, axis="positions", **making)
        self.embed_positions = nnx.data(positions)
        self.layer_inputs: Any = nnx.data(
            config.layer_input and config.layer_input.model(config, dtype=dtype, rngs=rngs)
        )
        form = {"dtype": dtype, "rngs": rngs, "quantize": None if quantize == "none" else quantize}
        blocks = [Block(stack, **form) for run in config.runs for stack in run]
        self.layers = nnx.List(blocks) if config.differing else blocks[0]
        self.norm = norm_of(config, names.final_norm, size=width, scale=config.logit_scale)
        if config.tie_embeddings:
            self.lm_head = None
        else:
            table = drawn(rngs, config.initializer_range, (config.vocab_size, width), dtype)
            self.lm_head = OutputHead(table, path=names.head)

    def __call__(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
        adapter_ids: jax.Array | None = None,
        partitioner: Partitioner | None = None,
    ) -> jax.Array:
        """The logits of every token.

        Args:
            input_ids: int `[B, T]`. Concrete ids outside the embedding are refused; traced ones give NaN.
            segment_ids: int `[B, T]`; 0 is padding, equal positive numbers see each other causally. A 0/1
                attention mask is valid. None: every row is one segment.
            positions: int `[B, T]`, the rotary angles' positions; None: they restart with each segment.
            dropout_key: turns on the adapters' dropout.
            adapter_ids: int `[B]`, which of several named adapters each row uses (see `mj.NamedAdapters`), -1 for the
                base alone; None: the active one.
            partitioner: how the model's arrays are laid over the devices of a mesh; None for one device, or where the
                compiler decides.

        Returns:
            float32 `[B, T, V]`; finite, but without meaning, at padding.
        """
        rows, *arrays = self._checked(adapter_ids, input_ids, segment_ids, positions)
        return _logits(*nnx.split(self), partitioner, rows, *arrays, dropout_key=dropout_key)

    def hidden(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
        row_numbers: jax.Array | None = None,
        embedding_noise: jax.Array | None = None,
        adapter_ids: jax.Array | None = None,
        partitioner: Partitioner | None = None,
    ) -> jax.Array:
        """The states after the final norm, `[B, T, D]` in the compute dtype, times `config.logit_scale`.

        Args:
            input_ids, segment_ids, positions, dropout_key, adapter_ids, partitioner: as in `__call__`.
            row_numbers, embedding_noise: as in `forward`.
        """
        options = {"dropout_key": dropout_key, "row_numbers": row_numbers, "embedding_noise": embedding_noise}
        rows, *arrays = self._checked(adapter_ids, input_ids, segment_ids, positions)
        return _hidden(*nnx.split(self), partitioner, rows, *arrays, **options)

    def forward(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
        row_numbers: jax.Array | None = None,
        embedding_noise: jax.Array | None = None,
        partitioner: Partitioner | None = None,
        packed: bool = True,
        balanced: bool = False,
    ) -> Any:
        """`hidden` inside a compiled function: nothing is checked, and nothing is compiled by itself.

        Args:
            input_ids, segment_ids, positions, dropout_key, partitioner: as in `__call__`.
            row_numbers: int `[B]`, the number of each row among those that share `dropout_key`, by which they get their
                masks; None: these are all of them.
            embedding_noise: float32 `[B, T, D]`, added to the looked-up embeddings before the family scales them.
            packed: whether a row of `segment_ids` may hold anything but one example and padding behind it.
            balanced: whether to give, beside the states, how evenly experts are used: the scalar of
                `mora_jax.models.experts.balance`, over all layers and tokens that are not padding.
        """
        count, length = input_ids.shape
        rows = Rows(self.config, self.dtype, count, length, partitioner, packed and segment_ids is not None)
        kernel = rows.ring() if self.attention is None else self.attention.kernel(rows)
        if segment_ids is None:
            segments = jnp.ones(input_ids.shape, dtype=jnp.int32)
            default_places = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
        else:
            segments = segment_ids.astype(jnp.int32)
            default_places = default_positions(segments) if positions is None else segments
        places = default_places if positions is None else positions.astype(jnp.int32)
        order = None
        if self.config.has_states and rows.packed:
            order, input_ids, segments, places = sorted_by_segment(segments, input_ids, segments, places)
            embedding_noise = None if embedding_noise is None else in_order(embedding_noise, order)
        cos, sin, query_scale = self._by_position(places, lambda: segment_lengths(segments))
        token_dropout = None
        if dropout_key is not None:
            token_dropout = TokenDropout.of(dropout_key, len(input_ids), input_ids.shape[1], row_numbers)
            if order is not None:
                token_dropout = token_dropout._replace(tokens=in_order(token_dropout.tokens, order))
        x = self._embed(input_ids, places, embedding_noise, partitioner)
        layer_input = None
        if self.layer_inputs is not None:
            dropout = None if token_dropout is None else token_dropout.fold(self.config.num_layers + 1)
            layer_input = self.layer_inputs(input_ids, x, dropout, partitioner)
        ring = None if partitioner is None else partitioner.ring(x.shape[0])
        if partitioner is not None and ring is not None:
            x, segments, query_scale = jax.tree.map(partitioner.fold, (x, segments, query_scale))
            cos, sin = jax.vmap(partitioner.fold)(cos), jax.vmap(partitioner.fold)(sin)
            if token_dropout is not None:
                token_dropout = token_dropout._replace(tokens=partitioner.fold(token_dropout.tokens))
        sharded = partitioner if partitioner is not None and partitioner.shards_weights else None
        static: dict[str, Any] = {
            "kernel": kernel,
            "folded": ring is not None,
            "partitioner": sharded,
            "mesh": partitioner,
        }
        layout = RowLayout(segments, segments, None, None, cos, sin, None, query_scale, layer_input, **static)
        experts = self.config.experts if balanced else None
        use = None if experts is None else (jnp.zeros(experts.count), jnp.zeros(experts.count))
        x, use = self.runner(self.layers, x, layout, token_dropout, use)
        x = self.norm(x)
        if order is not None:
            x = in_order(x, jnp.argsort(order, axis=1))
        x = x if ring is None or partitioner is None else partitioner.unfold(x, *input_ids.shape)
        if experts is None or use is None:
            return x
        layers = sum(layer.experts is not None for layer in self.config.by_layer)
        return x, experts.balance(*use, layers * jnp.sum(segments > 0, dtype=jnp.float32))

    @property
    def blocks(self) -> list[Block]:
        """The stacks of layers, in the order of `config.runs`."""
        return [self.layers] if isinstance(self.layers, Block) else list(self.layers)

    def head(self, partitioner: Partitioner | None = None) -> Head:
        """The output projection, for a loss that never makes the logits of a whole batch."""
        parameter = self.embed_tokens.embedding if self.lm_head is None else self.lm_head.kernel
        kernel = self.embed_tokens.table() if self.lm_head is None else self.lm_head.table()
        if partitioner is not None:
            kernel = partitioner.gathered(kernel, parameter.get_metadata()["axes"])
        return Head(kernel, self.config.final_softcap)

    def head_with_dropout(
        self, hidden: jax.Array, key: jax.Array, row_numbers: jax.Array | None, partitioner: Partitioner | None
    ) -> tuple[Head, jax.Array]:
        """The head and its inputs where its adapter leaves out inputs, and the base doesn't.

        `hidden @ W.T + dropped @ (W' - W).T`, with W' the adapted kernel, is one product of the two inputs side by
        side, so that a loss needs no other form. A tied head has the embedding's adapter, whose inputs are tokens.

        Args:
            hidden: `[B, T, D]`.
            key, row_numbers, partitioner: as in `forward`.

        Returns:
            The head and `hidden`; with dropout on the head a kernel `[V, 2 · D]` and inputs `[B, T, 2 · D]`.
        """
        head = self.head(partitioner)
        adapter = None if self.lm_head is None else self.lm_head.adapter
        if self.lm_head is None or adapter is None or not adapter.config.dropout:
            return head, hidden
        base = self.lm_head.kernel[...].astype(jnp.float32)
        if partitioner is not None:
            base = partitioner.gathered(base, self.lm_head.kernel.get_metadata()["axes"])
        rows, length, width = hidden.shape
        dropout = TokenDropout.of(key, rows, length, row_numbers).fold(self.config.num_layers)
        dropped = dropout.drop(hidden.reshape(-1, width), adapter.config.dropout).reshape(hidden.shape)
        assert head.kernel is not None, "a decoder has one"
        kernel = jnp.concatenate([base, head.kernel - base], axis=1)
        return Head(kernel, head.softcap), jnp.concatenate([hidden, dropped], axis=-1)

    @property
    def has_adapted_head(self) -> bool:
        """Whether an adapter is on the output projection, the tied table included."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return getattr(head, "adapter", None) is not None

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `max_length` tokens (padding included) in each of `batch_size` rows."""
        # XLA's CPU backend would widen a bfloat16 cache for each write, and round it again.
        dtype = jnp.promote_types(self.dtype, jnp.float32) if backend() == "cpu" else self.dtype
        return empty_cache(self.config, batch_size, max_length, dtype)

    def extend(
        self,
        cache: Cache,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        adapter_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Reads more tokens: the prompt first, then one token at a time.

        Args:
            cache: what was read so far.
            input_ids: int `[B, T]`.
            positions: int `[B, T]`; None: they go on from the tokens of the row that are not padding.
            segment_ids: int `[B, T]`, 0 for padding (on either side); None: no padding.
            adapter_ids: as in `__call__`.

        Returns:
            float32 logits `[B, V]` of the last token of each row that is not padding, and the cache after it.
        """
        rows, input_ids, segment_ids, positions = self._checked(adapter_ids, input_ids, segment_ids, positions)
        used = cache.length
        if not isinstance(used, jax.core.Tracer) and int(used) + input_ids.shape[1] > cache.max_length:
            raise ValueError(
                f"the cache has {cache.max_length} slots, {int(used)} in use: no room for {input_ids.shape[1]} tokens"
            )
        return _extend(*nnx.split(self), rows, cache, input_ids, positions, segment_ids)

    def _checked(self, adapter_ids: Any, input_ids: Any, segment_ids: Any, positions: Any) -> tuple[Any, Any, Any, Any]:
        """The arguments as arrays, shapes and concrete ids checked."""
        input_ids, segment_ids, positions = (
            np.asarray(value) if isinstance(value, (list, tuple)) else value
            for value in (input_ids, segment_ids, positions)
        )
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, length], got shape {tuple(input_ids.shape)}")
        for name, value in (("segment_ids", segment_ids), ("positions", positions)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {value.shape}")
        if not isinstance(input_ids, jax.core.Tracer):
            check_token_ids(input_ids, self.config.vocab_size)
        rows = None if adapter_ids is None else checked_ids(list(banks(self)), adapter_ids, len(input_ids))
        return rows, input_ids, segment_ids, positions

    def _embed(
        self, input_ids: jax.Array, places: jax.Array, noise: jax.Array | None, partitioner: Partitioner | None
    ) -> jax.Array:
        x = looked_up(self.embed_tokens, input_ids, partitioner)
        if noise is not None:
            x = (x.astype(jnp.float32) + noise).astype(x.dtype)
        x = self._scaled(x)
        return x if self.embed_positions is None else x + looked_up(self.embed_positions, places, partitioner)

    def _by_position(self, places: jax.Array, lengths: Callable[[], Any]) -> tuple[Any, Any, jax.Array | None]:
        """Cosines and sines of the angles, `[R, B, T, rotary_dim / 2]`, and what queries are multiplied by.

        Args:
            places: int32 `[B, T]`.
            lengths: gives the lengths of the texts, as in `tables`.
        """
        config = self.config
        cos, sin = tables(config.ropes, config.rotary_dim, places, lengths() if by_length(config.ropes) else 0)
        if config.query_growth is None:
            return cos, sin, None
        beta, length = config.query_growth
        return cos, sin, 1 + beta * jnp.log(1 + (places // length).astype(jnp.float32))

    def _scaled(self, x: jax.Array) -> jax.Array:
        scale = self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, dtype=x.dtype)

    @property
    def runner(self) -> LayerRunner:
        """What runs its layers."""
        return LayerRunner(self.config, self.remat)

    def read(
        self,
        cache: Cache,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        head: Head | None = None,
    ) -> tuple[jax.Array, Cache]:
        """`extend` inside a compiled function: nothing is checked, and nothing is compiled by itself.

        Args:
            cache, input_ids, positions, segment_ids: as in `extend`.
            head: the model's, where it is at hand.
        """
        x, layout, cache = self.enter(cache, input_ids, positions, segment_ids)
        x, cache = self.runner.extend(self.layers, x, layout, cache)
        return self.leave(x, layout.segments, head), dataclasses.replace(cache, length=cache.length + x.shape[1])

    def enter(
        self,
        cache: Cache,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        look_up: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, RowLayout, Cache]:
        """What comes before the layers in `read`.

        Args:
            cache, input_ids, positions, segment_ids: as in `extend`.
            look_up: from ids to rows of the embedding; None for the model's own.

        Returns:
            The layers' input `[B, T, D]`, who sees whom, and the cache with the tokens' segments and positions.
        """
        shape = input_ids.shape
        segments = jnp.ones(shape, jnp.int32) if segment_ids is None else (segment_ids > 0).astype(jnp.int32)
        if positions is None:
            before = jnp.sum(cache.segments, axis=1, keepdims=True)
            positions = before + jnp.cumsum(segments, axis=1) - segments
        positions = positions.astype(jnp.int32)
        if self.config.has_states and shape[1] > 1:
            _, input_ids, segments, positions = sorted_by_segment(segments, input_ids, segments, positions)
        start = (jnp.int32(0), cache.length)  # of one type, with float64 on too
        cache = dataclasses.replace(
            cache,
            segments=jax.lax.dynamic_update_slice(cache.segments, segments, start),
            positions=jax.lax.dynamic_update_slice(cache.positions, positions, start),
        )
        cos, sin, query_scale = self._by_position(positions, lambda: cache.max_length)
        x = self._scaled((look_up or self.embed_tokens)(input_ids).astype(self.dtype))
        x = x if self.embed_positions is None else x + self.embed_positions(positions)
        layer_input = None if self.layer_inputs is None else self.layer_inputs(input_ids, x)
        places = (segments, cache.segments, positions, cache.positions)
        return x, RowLayout(*places, cos, sin, None, query_scale, layer_input), cache

    def leave(self, x: jax.Array, segments: jax.Array, head: Head | None = None) -> jax.Array:
        """What comes behind the layers in `read`: float32 logits `[B, V]` of each row's last token of a segment."""
        last = jnp.max(jnp.where(segments > 0, jnp.arange(x.shape[1]), 0), axis=1)
        hidden = self.norm(jnp.take_along_axis(x, last[:, None, None], axis=1))[:, 0]
        return (head or self.head()).logits(hidden)


# Compiled once per structure and shape, so that eager calls don't compile the scan again each time.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _logits(graphdef: Any, state: Any, partitioner: Any, adapter_ids: Any, *arrays: Any, **options: Any) -> jax.Array:
    model = _merged(graphdef, state, adapter_ids, arrays[0])
    hidden = model.forward(*arrays, partitioner=partitioner, **options)
    if (key := options["dropout_key"]) is None:
        return model.head(partitioner).logits(hidden)
    head, inputs = model.head_with_dropout(hidden, key, None, partitioner)
    return head.logits(inputs)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _hidden(graphdef: Any, state: Any, partitioner: Any, adapter_ids: Any, *arrays: Any, **options: Any) -> jax.Array:
    return _merged(graphdef, state, adapter_ids, arrays[0]).forward(*arrays, partitioner=partitioner, **options)


@functools.partial(jax.jit, static_argnums=0)
def _extend(graphdef: Any, state: Any, adapter_ids: Any, *args: Any) -> tuple[jax.Array, Cache]:
    return _merged(graphdef, state, adapter_ids, args[1]).read(*args)


def looked_up(table: TokenEmbedding, ids: jax.Array, partitioner: Partitioner | None) -> jax.Array:
    """Rows of a table `[..., D]`, which a mesh may share."""
    if partitioner is None:
        return table(ids)
    count, width = table.embedding.shape
    return partitioner.looked_up(table.embedding.get_metadata()["axes"], (count, width), ids, table)


def _merged(graphdef: Any, state: Any, adapter_ids: Any, input_ids: jax.Array) -> Decoder:
    """The model whose rows use those adapters."""
    model = nnx.merge(graphdef, state)
    choose_rows(model, adapter_ids, len(input_ids))
    return model
