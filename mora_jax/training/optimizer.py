"""An optimizer with clipping, warm-up and a schedule, for whatever tree is trained."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mora_jax.errors import InputError
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.relora import Restarts
from mora_jax.training.state import Arrays, streamed
from mora_jax.training.update_rules import OBJECT, RULES, weight_masks


def make_schedule(config: OptimizerConfig, steps: int, restarts: Restarts | None = None) -> optax.Schedule:
    """The learning rate of each step, counted from 0.

    It rises linearly over `warmup_steps` (the first step already has 1 / warmup_steps of the peak) and then stays,
    falls linearly, or falls along a cosine; both reach `min_ratio` of the peak one step after the last.

    Args:
        config: the section `optimizer`.
        steps: the run's steps.
        restarts: those after which it rises again from zero (ReLoRA's jagged schedule); None without.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, steps - warmup)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, config.min_ratio * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.min_ratio),
    }[config.schedule]
    decay = _above(decay, config.min_ratio * peak)
    if warmup:
        rise = optax.linear_schedule(peak / warmup, peak * (1 + 1 / warmup), warmup)
        decay = optax.join_schedules([rise, decay], [warmup])
    return decay if restarts is None else restarts.rewarm(decay, warmup)


def _above(schedule: optax.Schedule, lowest: float) -> optax.Schedule:
    """`schedule` without what rounding takes below its end, as where compiled code multiplies by 1 / steps."""
    return lambda step: jnp.maximum(schedule(step), lowest)


def make_optimizer(
    config: OptimizerConfig, steps: int, rates: Mapping[str, float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then the optimizer; decoupled weight decay leaves norms and biases alone.

    Args:
        config: the section `optimizer`.
        steps: the run's steps.
        rates: how many times the learning rate arrays of some names get, as an adapter configuration's `rates`.

    Returns:
        A transformation whose `update` takes `taken`: whether the step counts (see `state.chosen`); only moments in the
        host's memory (`config.offload`) look at it.
    """
    return scheduled(config, make_schedule(config, steps), rates)


def scheduled(
    config: OptimizerConfig, schedule: optax.Schedule, rates: Mapping[str, float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """`make_optimizer` with a given schedule; its rate, the weight decay and the norm to clip to may be traced."""
    check_named(config)
    rule = RULES[config.name].scale(**config.settings)
    # As `optax.adamw`, whose state is made up in the same way.
    optimizer = optax.chain(
        streamed(rule) if config.offload else rule,
        optax.add_decayed_weights(config.weight_decay, weight_masks),
        optax.scale_by_learning_rate(schedule),
    )
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return with_rates(optimizer, rates)


def check_named(config: OptimizerConfig) -> None:
    """Refuses the optimizer of a program where that program isn't.

    Raises:
        InputError: says how the run goes on.
    """
    if config.name == OBJECT:
        raise InputError(
            "optimizer.name=object is an optax object, which the program has that called mora_jax.finetune: go on with "
            "the run there, by finetune(..., optimizer=..., resume=True)"
        )


def check_given(optimizer: optax.GradientTransformationExtraArgs, arrays: Arrays) -> None:
    """Refuses an optimizer that can't take what the step gives it.

    Raises:
        InputError: it needs another tree than a dictionary of arrays, or an argument that the step doesn't have.
    """
    loss, taken = jnp.zeros(()), jnp.array(True)

    def update(arrays: Arrays) -> Any:
        return optimizer.update(arrays, optimizer.init(arrays), arrays, taken=taken, value=loss, grad=arrays)

    try:
        jax.eval_shape(update, arrays)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the optimizer doesn't work on a dictionary of arrays with the arguments value and grad alone: {reason}"
        ) from error


def with_rates(
    optimizer: optax.GradientTransformation, rates: Mapping[str, float] | None
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with other learning rates for arrays of some names (see `make_optimizer`)."""
    return optax.with_extra_args_support(optax.chain(optimizer, scale_rates(rates)) if rates else optimizer)


def scale_rates(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of arrays by the last component of their name: a learning rate of their own.

    After the optimizer, so that moments and the norm for clipping are those of one optimizer over all arrays.
    """

    def scaled(updates: dict[str, Any], params: Any = None) -> dict[str, Any]:
        return {name: value * rates.get(name.rpartition(".")[2], 1.0) for name, value in updates.items()}

    return optax.stateless(scaled)
