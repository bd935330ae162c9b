"""A model of the real shapes without any weights, with its adapters, and the step that would train it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.attach import add_adapters
from mora_jax.backend import read_dtype
from mora_jax.errors import InputError
from mora_jax.losses.chunked_sum import chunk_size
from mora_jax.models.attention.kernels import AttentionChoice
from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder
from mora_jax.training.build_step import Assembly, assemble, shapes_in_place
from mora_jax.training.config.schema import Config, adapter_config
from mora_jax.training.preferences import reference_of
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.runner import JitRunner
from mora_jax.training.state import initial_state

STEPS = 1000  # of a run whose length nobody said; the schedule needs one, and nothing of a step's cost depends on it


def abstract_model(decoder: DecoderConfig, config: Config) -> Decoder:
    """The model that `train` would load and adapt, as shapes.

    Raises:
        InputError: the adapter doesn't fit the model.
    """
    method = adapter_config(config.adapter)

    def build() -> Decoder:
        settings = config.model
        model = Decoder(
            decoder,
            dtype=read_dtype(settings.dtype),
            rngs=None,
            remat=settings.remat,
            quantize=settings.quantize,
            attention=AttentionChoice(settings.attention),
        )
        add_adapters(model, method, rngs=nnx.Rngs(0))
        return model

    try:
        return nnx.eval_shape(build)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"adapter: {error}") from None


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of one step, `[micro-batches, rows, T]`, as `training.loop` places it."""
    train = config.train
    rows = train.micro_batch
    shape = (train.batch_size // rows, rows, config.data.max_length)
    integers, floats = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = {"input_ids": integers, "segment_ids": integers, "positions": integers, "weights": floats}
    if config.loss.preference is not None:
        batch = {name: jax.ShapeDtypeStruct((*shape[:2], 2, shape[2]), value.dtype) for name, value in batch.items()}
        batch["answer_weights"] = batch["weights"]
        for name in ("example_weights", "desired"):
            batch[name] = jax.ShapeDtypeStruct((*shape[:2], 1), jnp.float32)
        if config.loss.preference.referenced:
            batch["reference_logps"] = jax.ShapeDtypeStruct((*shape[:2], 2, 1), jnp.float32)
    batch["counts"] = jax.ShapeDtypeStruct(shape[:2], jnp.float32)
    if config.loss.kl_weight:
        batch["kl_weights"] = floats
    return batch


def loss_chunks(model: Decoder, config: Config, tokens: int) -> int:
    """How often the loop of the vocabulary loss runs where each of so many tokens carries loss."""
    heads = 2 if reference_of(config, model) == "base" else 1
    return -(-tokens // chunk_size(model.config.vocab_size, tokens, heads))


def assemble_abstract(
    model: Decoder, config: Config, mesh: tuple[int, ...], devices: Sequence[Any] | None = None
) -> tuple[Assembly, tuple[Any, Any, Any]]:
    """The step, and the shapes of its arguments with their places: state, frozen arrays, batch.

    Args:
        model: of shapes alone.
        config: the whole run.
        mesh: devices along each axis.
        devices: that make up the mesh, perhaps only described; None: those of this process.
    """
    assembly = assemble(model, config, config.train.steps or STEPS, make_mesh(*mesh, devices=devices))
    assert assembly.placement is not None and isinstance(assembly.runner, JitRunner), "pmap is refused before"
    runner, rows = assembly.runner, assembly.placement.batch(1)
    state = jax.eval_shape(lambda adapters: initial_state(adapters, assembly.optimizer, config.seed), assembly.adapters)
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=rows)
        for name, value in abstract_batch(config).items()
    }
    return assembly, (shapes_in_place(runner, state), shapes_in_place(runner, assembly.frozen), batch)
