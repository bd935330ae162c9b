"""What can't be together in a configuration, though each value is in its range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mora_jax.data.segments import ROLE_SEGMENT
from mora_jax.errors import InputError
from mora_jax.training.config.adapter import adapter_config
from mora_jax.training.config.schema import Config, flatten, lay_over


def config_from_dict(values: Mapping[str, Any], origin: str = "config.json") -> Config:
    """Reads what `Config.to_dict` wrote (also after JSON made lists of tuples), checking every key again.

    Raises:
        InputError: as `lay_over` and `check_together`.
    """
    config = lay_over(Config(), [(name, value, origin) for name, value in flatten(values)])
    check_together(config)
    return config


def check_together(config: Config) -> None:
    """Refuses values that are fine alone and impossible together, and missing required keys.

    Raises:
        InputError: naming the keys and what is allowed.
    """
    required = {"model.path": config.model.path, "data.train": config.data.train, "out": config.out}
    missing = [name for name, value in required.items() if value is None]
    if missing:
        flags = " ".join(f"--config.{name}=..." for name in missing)
        raise InputError(f"config: {', '.join(missing)} must be set, in the file or by {flags}")
    train = config.train
    micro = train.micro_batch_size
    if micro is not None and train.batch_size % micro:
        raise InputError(f"config: train.micro_batch_size={micro} must divide train.batch_size={train.batch_size}")
    mesh, attention = config.mesh, config.model.attention
    if mesh.context != 1 and attention not in ("auto", "xla"):
        raise InputError(
            f"config: model.attention={attention} takes whole rows, and mesh.context={mesh.context} shares each; set "
            "model.attention=auto with it"
        )
    if mesh.pmap and (mesh.fsdp, mesh.tensor, mesh.context) != (1, 1, 1):
        raise InputError(
            f"config: mesh.pmap shares rows only; set mesh.fsdp, mesh.tensor and mesh.context (now {mesh.fsdp}, "
            f"{mesh.tensor}, {mesh.context}) to 1"
        )
    if mesh.pmap and config.optimizer.offload:
        raise InputError("config: optimizer.offload needs jit over a mesh; set mesh.pmap=false with it")
    if train.steps is not None:
        check_warmup(config, train.steps)
    adapter_config(config.adapter)
    check_quantize(config)
    _check_data_and_loss(config)


def check_quantize(config: Config) -> None:
    """Refuses a quantised base for methods that change it, or that start from its numbers.

    Raises:
        InputError: naming the keys.
    """
    adapter, held = config.adapter, config.model.quantize
    if held == "none":
        return
    method = adapter.config_class
    if not method.changes_base and not adapter_config(adapter).starts_from_base:
        return
    by_method = method.changes_base or method().starts_from_base
    asked = f"adapter.method={adapter.method}" if by_method else f"adapter.init={adapter.init}"
    why = "changes it" if method.changes_base else "takes its start from the exact weights"
    raise InputError(
        f"config: model.quantize={held} holds the base frozen, with rounded weights, and {asked} {why}; set "
        "model.quantize=none, or another method"
    )


def _check_data_and_loss(config: Config) -> None:
    loss, data = config.loss, config.data
    if loss.normalize == "constant" and loss.constant is None:
        raise InputError("config: loss.normalize=constant needs loss.constant, the number to divide by")
    if unknown := [role for role in loss.roles if role not in ROLE_SEGMENT]:
        raise InputError(f"config: loss.roles: unknown role {unknown[0]!r}; choose from {', '.join(ROLE_SEGMENT)}")
    if loss.kl_weight and config.adapter.config_class.changes_base:
        raise InputError(
            f"config: loss.kl_weight needs a base that stays frozen, and adapter.method={config.adapter.method} "
            f"changes it"
        )
    if data.packing and data.bucketing:
        raise InputError("config: data.packing fills rows of one length; set data.bucketing=false with it")


def check_warmup(config: Config, steps: int) -> None:
    """Refuses a warm-up longer than the run, and restarts that it never reaches; for when its steps are known."""
    warmup, every = config.optimizer.warmup_steps, config.adapter.restart_every
    if warmup > steps:
        raise InputError(f"config: optimizer.warmup_steps={warmup} must be at most the run's {steps} steps")
    if config.adapter.config_class.restarts and every >= steps:
        raise InputError(
            f"config: adapter.restart_every={every} must be less than the run's {steps} steps, or nothing restarts"
        )
