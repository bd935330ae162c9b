"""One training step, as a pure function: compiled once by `jax.jit`, or mapped by `jax.pmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mora_jax.adapters.attach import detach
from mora_jax.losses.cross_entropy import next_token_targets, weighted_loss
from mora_jax.losses.kl import weighted_kl
from mora_jax.training.neftune import embedding_noise
from mora_jax.training.nonfinite import chosen
from mora_jax.training.sharding.rules import Placement
from mora_jax.training.state import Arrays, Structure, TrainState

Array = jax.Array
Batch = dict[str, Array]

_NOISE = 2**31  # folded into the key for NEFTune; dropout folds the numbers of layers in


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device.

    Attributes:
        loss: what is minimised, in nats: Σ weight · negative log-likelihood over the whole step, divided by the
            normaliser, plus the KL term where there is one.
        grad_norm: global norm of its gradient, before clipping.
        learning_rate: of this step.
        tokens: tokens that are not padding.
        trained_tokens: tokens that carry loss.
        normalizer: what the sum of losses was divided by; 0 for a step without anything to train on.
        kl: mean divergence from the base, in nats a token, before `kl_weight`; 0 without that term.
        skipped: updates left out so far because loss or gradient was not finite, this one included.
        skipped_in_row: how many of them are the last steps without a break.
        penalty: what the loss got for the weights themselves; 0 without such a term.
    """

    loss: Array
    grad_norm: Array
    learning_rate: Array
    tokens: Array
    trained_tokens: Array
    normalizer: Array
    kl: Array
    skipped: Array
    skipped_in_row: Array
    penalty: Array


StepFunction = Callable[[TrainState, Arrays, Batch], tuple[TrainState, StepMetrics]]


def make_step(
    structure: Structure,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    shards: int | None = None,
    placement: Placement | None = None,
    dropout: bool = False,
    axis_name: str | None = None,
    divisor: float | None = None,
    neftune_alpha: float = 0.0,
    kl_weight: float = 0.0,
    penalty: Callable[[Arrays], Array] | None = None,
) -> StepFunction:
    """The pure step: gradients of the trainable tree alone, summed over micro-batches and devices.

    Weights are divided by their normaliser, which runs over the whole step, all micro-batches and devices, before
    anything is summed: any split of the same rows gives the same update. A step whose normaliser or whose weights
    are 0 has loss 0 and gradient 0. One whose loss or gradient is not finite changes nothing (see nonfinite.py).

    Args:
        structure: of the model, split into trainable and frozen arrays.
        optimizer, schedule: from optimizer.py; the schedule is only reported.
        shards: devices among which the rows of a micro-batch are laid (see chunked_logits.py); None: those of
            `placement`.
        placement: where arrays lie on a mesh (see rules.py); None where all weights are on every device.
        dropout: whether adapters' dropout is on.
        axis_name: the mapped axis to sum over, under `jax.pmap`.
        divisor: a fixed normaliser; None: the sum of `counts`, or without them of the weights.
        neftune_alpha: strength of the noise on the embeddings (see neftune.py); 0 for none.
        kl_weight: factor on the mean divergence from the base (see kl.py); 0 for no such term. The base is the same
            model without its adapters, dropout and noise, run once more forward.
        penalty: a term of the loss that depends on the trained arrays alone; it counts once a step.

    Returns:
        `step(state, frozen, batch) → (state, metrics)`. `batch` holds, each `[micro-batches, rows, T]`:

        - `input_ids`, `segment_ids`: tokens, and the example of each (0 is padding).
        - `weights`: of predicting token t. Those of padding and of an example's first token are left out.
        - `positions`, optional: of the rotary angles; they restart with each example anyway.
        - `kl_weights`, with a `kl_weight`: of the divergence in predicting token t.

        and `counts`, optional, float `[micro-batches, rows]`: what each row adds to the normaliser. Other keys are
        not looked at.

    Raises:
        ValueError: `kl_weight` where the base itself is trained, so that there is none to compare with; a divisor
            that is not positive.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    if kl_weight and structure.trains_base:
        raise ValueError("full fine-tuning keeps no frozen base, so there is no divergence from it: use kl_weight=0")
    if divisor is not None and not divisor > 0:
        raise ValueError(f"divisor must be positive, got {divisor}")
    if shards is None:
        shards = 1 if placement is None else placement.row_shards
    spread = placement if placement is not None and placement.mesh.size > 1 else None

    def objective(adapters: Arrays, frozen: Arrays, rows: Batch, keys: Keys) -> tuple[Array, Array]:
        """Loss and KL of one micro-batch; their weights are divided already, so that both are shares of the step's."""
        model = structure.model(adapters, frozen)
        model.spread = spread
        inputs = rows["input_ids"], rows["segment_ids"], rows.get("positions")
        noise = None
        if keys.noise is not None:
            width = model.config.hidden_size
            noise = embedding_noise(keys.noise, rows["numbers"], rows["segment_ids"], width, neftune_alpha)
        hidden = model.hidden(*inputs, dropout_key=keys.dropout, row_numbers=rows.get("numbers"), embedding_noise=noise)
        head = model.head()
        ring = None if spread is None else spread.ring(hidden.shape[0])
        fold = spread.fold if spread is not None else lambda x: x
        shared: dict[str, Any] = {"softcap": head.softcap, "shards": shards * (1 if ring is None else ring.size)}
        loss = weighted_loss(fold(hidden), head.kernel, fold(rows["targets"]), fold(rows["weights"]), **shared)
        if not kl_weight:
            return loss, jnp.zeros((), jnp.float32)
        adapted_head = model.has_adapted_head
        detach(model)
        shared["base_kernel"] = model.head().kernel if adapted_head else None
        kl = weighted_kl(fold(hidden), fold(model.hidden(*inputs)), head.kernel, fold(rows["kl_weights"]), **shared)
        return loss + kl_weight * kl, kl

    def total(x: Array) -> Array:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def row_numbers(micro_batches: int, rows: int) -> Array:
        """The number of each row in the whole step, `[micro-batches, rows]` on this device."""
        if axis_name is None:
            return jnp.arange(micro_batches * rows).reshape(micro_batches, rows)
        devices = jax.lax.psum(1, axis_name)
        number = jnp.arange(micro_batches)[:, None] * devices + jax.lax.axis_index(axis_name)
        return number * rows + jnp.arange(rows)

    def step(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, StepMetrics]:
        ids, segments = batch["input_ids"], batch["segment_ids"]
        targets, weights = next_token_targets(ids, batch["weights"], segments)
        if divisor is None:
            normalizer = total(jnp.sum(batch.get("counts", weights), dtype=jnp.float32))
        else:
            normalizer = jnp.asarray(divisor, jnp.float32)
        rows = {"input_ids": ids, "segment_ids": segments, "targets": targets}
        rows["weights"] = weights * _inverse(normalizer)
        if "positions" in batch:
            rows["positions"] = batch["positions"]
        if kl_weight:
            _, kl_weights = next_token_targets(ids, batch["kl_weights"], segments)
            rows["kl_weights"] = kl_weights * _inverse(total(jnp.sum(kl_weights)))
        count = ids.shape[0]
        if dropout or neftune_alpha:
            rows["numbers"] = row_numbers(*ids.shape[:2])

        key = jax.random.fold_in(state.key, state.step)
        keys = Keys(key if dropout else None, jax.random.fold_in(key, _NOISE) if neftune_alpha else None)
        value_and_grad = jax.value_and_grad(objective, has_aux=True)

        def micro(carry, rows):
            found = value_and_grad(state.adapters, frozen, rows, keys)
            return jax.tree.map(jnp.add, carry, found), None

        if count == 1:
            rows = {name: value[0] for name, value in rows.items()}
            sums = value_and_grad(state.adapters, frozen, rows, keys)
        else:
            zero = jnp.zeros((), jnp.float32)
            start = ((zero, zero), jax.tree.map(jnp.zeros_like, state.adapters))
            sums, _ = jax.lax.scan(micro, start, rows)

        (loss, kl), gradient = jax.tree.map(total, sums)
        extra = jnp.zeros((), jnp.float32)
        if penalty is not None:
            extra, slope = jax.value_and_grad(penalty)(state.adapters)
            loss, gradient = loss + extra, jax.tree.map(jnp.add, gradient, slope)
        grad_norm = optax.tree.norm(gradient)
        taken = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        skips = state.skips.after(taken)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            tokens=total(jnp.sum(segments > 0)),
            trained_tokens=total(jnp.sum(weights > 0)),
            normalizer=normalizer,
            kl=kl,
            skipped=skips.total,
            skipped_in_row=skips.in_row,
            penalty=extra,
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapters, taken=taken)
        adapters: Any = optax.apply_updates(state.adapters, updates)
        adapters = chosen(taken, adapters, state.adapters)
        optimizer_state = chosen(taken, optimizer_state, state.optimizer)
        return TrainState(state.step + 1, adapters, optimizer_state, state.key, skips), metrics

    return step


class Keys(NamedTuple):
    """What every micro-batch of a step draws from, by the numbers of its rows; None turns a kind of noise off."""

    dropout: Array | None
    noise: Array | None


def _inverse(normalizer: Array) -> Array:
    """1 / normalizer, and 0 for 0: nothing to train on is no division by zero."""
    return jnp.where(normalizer > 0, 1.0 / jnp.where(normalizer > 0, normalizer, 1.0), 0.0)
