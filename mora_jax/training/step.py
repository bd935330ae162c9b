"""One training step, as a pure function: compiled once by `jax.jit`, or mapped by `jax.pmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mora_jax.training.loss import next_token_targets, weighted_loss
from mora_jax.training.state import Arrays, Structure, TrainState

Array = jax.Array
Batch = dict[str, Array]


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device.

    Attributes:
        loss: weighted mean of the negative log-likelihood over the whole step, in nats.
        grad_norm: global norm of its gradient, before clipping.
        learning_rate: of this step.
        tokens: tokens that are not padding.
        trained_tokens: tokens that carry loss.
        weight: sum of the weights, the normaliser.
    """

    loss: Array
    grad_norm: Array
    learning_rate: Array
    tokens: Array
    trained_tokens: Array
    weight: Array


StepFunction = Callable[[TrainState, Arrays, Batch], tuple[TrainState, StepMetrics]]


def make_step(
    structure: Structure,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    shards: int = 1,
    dropout: bool = False,
    axis_name: str | None = None,
) -> StepFunction:
    """The pure step: gradients of the trainable tree alone, summed over micro-batches and divided once.

    The normaliser is the sum of weights over the whole step, all micro-batches and devices, so any split of the same
    rows gives the same update. A step whose weights are all 0 has loss 0 and gradient 0.

    Args:
        structure: of the model, split into trainable and frozen arrays.
        optimizer, schedule: from optimizer.py; the schedule is only reported.
        shards: devices among which the rows of a micro-batch are laid (see loss.py).
        dropout: whether adapters' dropout is on.
        axis_name: the mapped axis to sum over, under `jax.pmap`.

    Returns:
        `step(state, frozen, batch) → (state, metrics)`; `batch` holds `input_ids`, `segment_ids` (0 is padding) and
        `weights` (of predicting token t), each `[micro-batches, rows, T]`.
    """

    def loss_sum(adapters: Arrays, frozen: Arrays, rows: Batch, key: Array | None) -> Array:
        model = structure.model(adapters, frozen)
        hidden = model.hidden(rows["input_ids"], rows["segment_ids"], dropout_key=key)
        head = model.head()
        targets, weights = next_token_targets(rows["input_ids"], rows["weights"])
        return weighted_loss(hidden, head.kernel, targets, weights, softcap=head.softcap, shards=shards)

    def total(x: Array) -> Array:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def step(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step) if dropout else None
        if key is not None and axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        count = batch["input_ids"].shape[0]

        def micro(carry, indexed):
            index, rows = indexed
            micro_key = None if key is None else jax.random.fold_in(key, index)
            loss, gradient = jax.value_and_grad(loss_sum)(state.adapters, frozen, rows, micro_key)
            return (carry[0] + loss, jax.tree.map(jnp.add, carry[1], gradient)), None

        if count == 1:
            rows = {name: value[0] for name, value in batch.items()}
            loss, gradient = jax.value_and_grad(loss_sum)(state.adapters, frozen, rows, key)
        else:
            zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.adapters))
            (loss, gradient), _ = jax.lax.scan(micro, zero, (jnp.arange(count), batch))

        carried = batch["weights"][..., 1:]
        weight = total(jnp.sum(carried, dtype=jnp.float32))
        scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        gradient = jax.tree.map(lambda g: total(g) * scale, gradient)
        metrics = StepMetrics(
            loss=total(loss) * scale,
            grad_norm=optax.tree.norm(gradient),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            tokens=total(jnp.sum(batch["segment_ids"] > 0)),
            trained_tokens=total(jnp.sum(carried > 0)),
            weight=weight,
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapters)
        adapters: Any = optax.apply_updates(state.adapters, updates)
        return TrainState(state.step + 1, adapters, optimizer_state, state.key), metrics

    return step
