"""The section `adapter` of a configuration, as the adapters room takes it."""

from __future__ import annotations

import dataclasses
from typing import Any

from mora_jax.adapters.methods.registry import METHODS, config_from
from mora_jax.errors import InputError
from mora_jax.training.config.adapter import START
from mora_jax.training.config.schema import METHOD_KEYS, AdapterConfig


def adapter_config(section: AdapterConfig, steps: int | None = None) -> Any:
    """The section as the method's own configuration.

    Args:
        section: the section `adapter`.
        steps: of the run, for methods with a schedule; None where the schedule is no matter.

    Raises:
        InputError: a value that the method refuses.
    """
    values: dict[str, Any] = {name: getattr(section, name) for name in METHOD_KEYS[section.method] - START}
    if section.method == "adalora":
        values["total_steps"] = section.tinit + section.tfinal + 1 if steps is None else steps
        if section.target_rank is None and section.rank is not None:
            values["target_rank"] = max(1, 2 * section.rank // 3)
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        if values.get(name):
            values[name] = tuple(_pair(text, name, kind) for text in values[name])
    try:
        return config_from({"method": section.method, **values})
    except ValueError as error:
        raise InputError(f"adapter: {error}") from None


def adapter_settings(config: Any) -> dict[str, Any]:
    """The other way: a method's own configuration as values of the section `adapter`, by key.

    Raises:
        InputError: it is no configuration of a method, or has a setting that the section has no key for.
    """
    method = next((name for name, found in METHODS.items() if found.config is type(config)), None)
    if method is None:
        raise InputError(
            f"the adapter's configuration should be one of a method, such as LoRAConfig(rank=8), and is "
            f"{type(config).__name__}"
        )
    known = METHOD_KEYS[method] - START
    values: dict[str, Any] = {"method": method}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in known:
            if field.name.endswith("_pattern"):
                value = tuple(f"{pattern}={number:g}" for pattern, number in value) or None
            elif value == ():
                value = None
            values[field.name] = value
        elif field.init and value != _default(field) and field.name != "total_steps":
            raise InputError(f"adapter: {type(config).__name__}({field.name}={value!r}) can't be set for a run")
    return values


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _pair(text: str, name: str, kind: type) -> tuple[str, Any]:
    """One entry of a pattern: a regular expression may hold "=", its value can't."""
    pattern, _, value = text.rpartition("=")
    try:
        return pattern, kind(value)
    except ValueError:
        example = r"q_proj=16" if kind is int else r"q_proj=32.0"
        raise InputError(f'adapter.{name}: {text!r} should read "REGEX=NUMBER", such as "{example}"') from None
