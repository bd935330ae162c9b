"""One training step, as a pure function: compiled once by `jax.jit`, or mapped by `jax.pmap`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mora_jax.losses.cross_entropy import inverse, next_token_targets, weighted_loss
from mora_jax.losses.kl import weighted_kl
from mora_jax.training.neftune import embedding_noise
from mora_jax.training.state import Arrays, Structure, TrainState, if_taken, ordered_after

if TYPE_CHECKING:
    from mora_jax.batch import Batch
    from mora_jax.models.partitioning import Partitioner


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
        of_loss: further means over the step, by name; those of preferences are named in training/preferences.py.
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
    of_loss: dict[str, Array]


@dataclass(frozen=True)
class StepConfig:
    """What is fixed when a step is made.

    Attributes:
        shards: devices among which the rows of a micro-batch are laid (see losses/chunked_sum.py); None: those of
            `partitioner`.
        partitioner: how arrays are laid over the devices of a mesh (see sharding/rules.py); None where each device
            has all weights.
        dropout: whether the adapters' dropout is on.
        axis_name: the mapped axis to sum over, under `jax.pmap`.
        divisor: a fixed normaliser; None: the sum of `counts`, or without them of the weights.
        neftune_alpha: strength of the noise on the embeddings (see neftune.py); 0 for none.
        balance_weight: factor on how unevenly experts are used (see `mora_jax.models.experts.balance`), the mean over
            micro-batches, and under `jax.pmap` over devices; 0 for no such term.
        kl_weight: factor on the mean divergence from the base (see kl.py); 0 for no such term.
        base: the same model without its adapters, which the divergence is from: its arrays are among the frozen ones.
            It is run once more forward, without dropout and noise.
        penalty: a term of the loss that depends on the trained arrays alone; it counts once a step.
        mapped: whether the step is under `jax.vmap` over runs that share the base (see mora_jax/sweeps).
        packed: whether a row may hold several examples.
        loss: what is minimised; None for the weighted loss of tokens.
        view: gives a user's own model the decoder's methods (see models/own.py); None for a decoder.

    Raises:
        ValueError: a divisor that is not positive; `kl_weight` without a `base`.
    """

    shards: int | None = None
    partitioner: Partitioner | None = None
    dropout: bool = False
    axis_name: str | None = None
    divisor: float | None = None
    neftune_alpha: float = 0.0
    balance_weight: float = 0.0
    kl_weight: float = 0.0
    base: Structure | None = None
    penalty: Callable[[Arrays], Array] | None = None
    mapped: bool = False
    packed: bool = True
    loss: StepLoss | None = None
    view: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.divisor is not None and not self.divisor > 0:
            raise ValueError(f"divisor must be positive, got {self.divisor}")
        if self.kl_weight and self.base is None:
            raise ValueError(
                "kl_weight needs the base that the divergence is from; full fine-tuning keeps no frozen base"
            )

    def total(self, x: Array) -> Array:
        """The sum over the mapped devices."""
        return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)

    def normalizer(self, counts: Array) -> Array:
        """What the sum of losses of a step is divided by: `divisor`, or without it the sum of `counts`."""
        if self.divisor is not None:
            return jnp.asarray(self.divisor, jnp.float32)
        return self.total(jnp.sum(counts, dtype=jnp.float32))

    def token_shards(self, rows: int) -> int:
        """Devices among which the tokens of so many rows are laid, once they are folded."""
        if self.partitioner is None:
            return self.shards or 1
        ring = self.partitioner.ring(rows)
        return (self.shards or self.partitioner.row_shards) * (1 if ring is None else ring.size)


class MicroBatch(NamedTuple):
    """What one evaluation of the loss takes; stacked, all micro-batches of a step.

    Attributes:
        input_ids, segment_ids, positions: int `[rows, T]`, as in the batch.
        targets: int `[rows, T]`, the next token of each.
        weights, kl_weights: float32 `[rows, T]`, by target, divided by what the whole step sums to.
        numbers: int `[rows]`, of each row in the step, where something random is drawn for it.
        share: of the step's micro-batches and devices, for what is a mean over them.
    """

    input_ids: Array
    segment_ids: Array
    positions: Array | None
    targets: Array
    weights: Array
    kl_weights: Array | None
    numbers: Array | None
    share: Array | None = None


class Keys(NamedTuple):
    """What every micro-batch of a step draws from, by the numbers of its rows; None turns a kind of noise off."""

    dropout: Array | None
    noise: Array | None


class StepLoss(Protocol):
    """What a step minimises."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics beside the loss."""
        ...

    def rows(
        self, config: StepConfig, structure: Structure, adapters: Arrays, frozen: Arrays, batch: Any
    ) -> tuple[Any, Array, Array]:
        """What each micro-batch needs, stacked; the normaliser of the step; how many tokens carry loss.

        All that is divided by something of the whole step is divided here. Like a `MicroBatch` the first has at least
        `input_ids` and `segment_ids`.
        """
        ...

    def __call__(
        self, config: StepConfig, model: Any, frozen: Arrays, rows: Any, keys: Keys
    ) -> tuple[Array, dict[str, Array]]:
        """The loss and the metrics of one micro-batch, as shares that add up to those of the step."""
        ...


StepFunction = Callable[[TrainState, Arrays, "Batch"], tuple[TrainState, StepMetrics]]


def make_step(
    structure: Structure,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    config: StepConfig = StepConfig(),
) -> StepFunction:
    """The pure step: gradients of the trainable tree alone, summed over micro-batches and devices.

    Weights are divided by their normaliser, which runs over the whole step, all micro-batches and devices, before
    anything is summed: any split of the same rows gives the same update. A step whose normaliser or whose weights
    are 0 has loss 0 and gradient 0. One whose loss or gradient is not finite changes nothing (see `state.if_taken`).

    Args:
        structure: of the model, split into trainable and frozen arrays.
        optimizer, schedule: from optimizer.py; the schedule is only reported. None: what the optimizer's state says
            (`optax.inject_hyperparams`), NaN where it says nothing.
        config: what else is fixed.

    Returns:
        `step(state, frozen, batch) → (state, metrics)`. The batch is a `mora_jax.batch.Batch` of
        `[micro-batches, rows]`; keys that the step has no use for are not looked at.

    Raises:
        ValueError: `kl_weight` where the base itself is trained, so that there is none to compare with.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    if config.kl_weight and structure.trains_base:
        raise ValueError("full fine-tuning keeps no frozen base, so there is no divergence from it: use kl_weight=0")

    loss_of = TokenLoss(balanced=config.balance_weight > 0) if config.loss is None else config.loss

    def objective(adapters: Arrays, frozen: Arrays, rows: Any, keys: Keys) -> tuple[Array, dict[str, Array]]:
        """Loss and metrics of one micro-batch, all shares of the step's."""
        return loss_of(config, structure.model(adapters, frozen), frozen, rows, keys)

    def step(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, StepMetrics]:
        rows, normalizer, trained_tokens = loss_of.rows(config, structure, state.adapters, frozen, batch)
        key = jax.random.fold_in(state.key, state.step)
        keys = Keys(key if config.dropout else None, jax.random.fold_in(key, _NOISE) if config.neftune_alpha else None)
        value_and_grad = jax.value_and_grad(objective, has_aux=True)

        def add_micro_batch(sums: Any, rows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, value_and_grad(state.adapters, frozen, rows, keys)), None

        if len(rows.input_ids) == 1:
            sums = value_and_grad(state.adapters, frozen, jax.tree.map(lambda x: x[0], rows), keys)
        else:
            zero = jnp.zeros((), jnp.float32)
            start = ((zero, dict.fromkeys(loss_of.names, zero)), jax.tree.map(jnp.zeros_like, state.adapters))
            sums, _ = jax.lax.scan(add_micro_batch, start, rows)

        (loss, of_loss), gradient = jax.tree.map(config.total, sums)
        # Divided by a sum of weights beyond float32 any loss is 0.
        loss = jnp.where(jnp.isfinite(normalizer), loss, jnp.nan)
        penalty = jnp.zeros((), jnp.float32)
        if config.penalty is not None:
            penalty, penalty_gradient = jax.value_and_grad(config.penalty)(state.adapters)
            loss, gradient = loss + penalty, jax.tree.map(jnp.add, gradient, penalty_gradient)
        grad_norm = optax.tree.norm(gradient)
        taken = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        skips = state.skips.after(taken)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(jnp.nan if schedule is None else schedule(state.step), jnp.float32),
            tokens=config.total(jnp.sum(rows.segment_ids > 0)),
            trained_tokens=trained_tokens,
            normalizer=normalizer,
            kl=of_loss.pop("kl", jnp.zeros((), jnp.float32)),
            skipped=skips.total,
            skipped_in_row=skips.in_row,
            penalty=penalty,
            of_loss=of_loss,
        )
        extra = {"taken": taken, "value": loss, "grad": gradient}
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapters, **extra)
        if schedule is None:
            metrics = metrics._replace(learning_rate=_learning_rate(optimizer_state))
        adapters: Any = optax.apply_updates(state.adapters, updates)
        adapters = if_taken(taken, adapters, state.adapters)
        if config.partitioner is None:
            taken = ordered_after(taken, adapters)
        optimizer_state = if_taken(taken, optimizer_state, state.optimizer)
        return TrainState(state.step + 1, adapters, optimizer_state, state.key, skips), metrics

    return step


def _learning_rate(state: Any) -> Array:
    """The one that an optimizer's state tells; NaN where it tells none, or several."""
    # Beside the rate of a schedule that is injected lies that schedule's own state, under the same name.
    rates = [rate for _, rate in optax.tree.get_all_with_path(state, "learning_rate") if isinstance(rate, jax.Array)]
    return jnp.asarray(rates[0] if len(rates) == 1 else jnp.nan, jnp.float32)


class TokenLoss:
    """The weighted loss of tokens, with the divergence from the base and the balance of experts where those count."""

    def __init__(self, *, balanced: bool = False):
        """With `balanced` the balance of experts is a term, and a metric."""
        self.names = ("kl", "balance") if balanced else ("kl",)

    def rows(
        self, config: StepConfig, structure: Structure, adapters: Arrays, frozen: Arrays, batch: Any
    ) -> tuple[MicroBatch, Array, Array]:
        """See `StepLoss`."""
        ids, segments = batch["input_ids"], batch["segment_ids"]
        targets, weights = next_token_targets(ids, batch["weights"], segments)
        normalizer = config.normalizer(batch.get("counts", weights))
        kl_weights = share = None
        if config.kl_weight:
            _, kl_weights = next_token_targets(ids, batch["kl_weights"], segments)
            kl_weights = kl_weights * inverse(config.total(jnp.sum(kl_weights)))
        if config.balance_weight:
            share = jnp.broadcast_to(1 / (len(ids) * config.total(jnp.ones((), jnp.float32))), len(ids))
        numbers = row_numbers(config, *ids.shape[:2])
        divided = weights * inverse(normalizer)
        rows = MicroBatch(ids, segments, batch.get("positions"), targets, divided, kl_weights, numbers, share)
        return rows, normalizer, config.total(jnp.sum(weights > 0))

    def __call__(
        self, config: StepConfig, model: Any, frozen: Arrays, rows: MicroBatch, keys: Keys
    ) -> tuple[Array, dict[str, Array]]:
        partitioner = config.partitioner
        states, head, balance = head_inputs(config, model, rows, keys)
        fold = partitioner.fold if partitioner is not None else lambda x: x
        shards = config.token_shards(len(states))
        shared: dict[str, Any] = {"softcap": head.softcap, "shards": shards, "mapped": config.mapped}
        loss = weighted_loss(fold(states), head.kernel, fold(rows.targets), fold(rows.weights), **shared)
        metrics = {"kl": jnp.zeros((), jnp.float32)}
        if config.balance_weight:
            assert rows.share is not None, "there is one where the balance counts"
            assert balance is not None
            metrics["balance"] = balance * rows.share
            loss = loss + config.balance_weight * metrics["balance"]
        if not config.kl_weight:
            return loss, metrics
        assert config.base is not None, "the configuration demands it"
        base_states, base_head, _ = head_inputs(config, config.base.model(frozen), rows, Keys(None, None))
        shared["base_kernel"] = base_head.kernel if getattr(model, "has_adapted_head", False) else None
        assert rows.kl_weights is not None, "there are some where the divergence counts"
        kl = weighted_kl(fold(states), fold(base_states), head.kernel, fold(rows.kl_weights), **shared)
        return loss + config.kl_weight * kl, metrics | {"kl": kl}


def head_inputs(config: StepConfig, model: Any, rows: Any, keys: Keys) -> tuple[Array, Any, Array | None]:
    """The states `[rows, T, …]` that go into the output head, that head, and the balance of experts where it counts.

    Args:
        config: of the step.
        model: whose states.
        rows: a `MicroBatch`, or another with its `input_ids`, `segment_ids`, `positions` and `numbers`.
        keys: of what is random.
    """
    noise = None
    if keys.noise is not None:
        assert rows.numbers is not None, "rows are numbered where noise is drawn"
        width = model.config.hidden_size
        noise = embedding_noise(keys.noise, rows.numbers, rows.segment_ids, width, config.neftune_alpha)
    random = {"dropout_key": keys.dropout, "row_numbers": rows.numbers, "embedding_noise": noise}
    inputs = rows.input_ids, rows.segment_ids, rows.positions
    model = model if config.view is None else config.view(model)
    options = random | {"partitioner": config.partitioner, "packed": config.packed}
    balance = None
    if config.balance_weight:
        hidden, balance = _hidden(model, *inputs, balanced=True, **options)
    else:
        hidden = _hidden(model, *inputs, **options)
    if keys.dropout is None:
        return hidden, model.head(config.partitioner), balance
    head, states = model.head_with_dropout(hidden, keys.dropout, rows.numbers, config.partitioner)
    return states, head, balance


def _hidden(model: Any, *inputs: Array | None, **options: Any) -> Any:
    """`model.forward` as a function of its own: JAX then leaves out of its derivative what nothing reads."""

    def hidden_states() -> Any:  # planning/collectives.py knows the loop over layers by this name
        return model.forward(*inputs, **options)

    return jax.jit(hidden_states)()


def row_numbers(config: StepConfig, micro_batches: int, rows: int) -> Array | None:
    """The number of each row in the step, `[micro-batches, rows]` on this device; None where nothing is random."""
    if not (config.dropout or config.neftune_alpha):
        return None
    if config.axis_name is None:
        return jnp.arange(micro_batches * rows).reshape(micro_batches, rows)
    devices = jax.lax.psum(1, config.axis_name)
    number = jnp.arange(micro_batches)[:, None] * devices + jax.lax.axis_index(config.axis_name)
    return number * rows + jnp.arange(rows)
