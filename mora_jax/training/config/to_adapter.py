"""The section `adapter` of a configuration, as the adapters room takes it."""

from __future__ import annotations

import dataclasses
from typing import Any

from mora_jax.adapters.methods.registry import CONFIGS
from mora_jax.errors import InputError
from mora_jax.training.config.adapter import AdapterConfig


def adapter_config(section: AdapterConfig, steps: int | None = None) -> Any:
    """The section as the method's own configuration.

    Args:
        section: the section `adapter`.
        steps: of the run, for methods with a schedule; None where the schedule is no matter.

    Raises:
        InputError: a value that the method refuses.
    """
    config = section.config_class
    said = {name: getattr(section, name) for name in config.settings()}
    values: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        if values.get(name):
            values[name] = tuple(_pair(text, name, kind) for text in values[name])
    try:
        return config.for_run(values, steps)
    except ValueError as error:
        raise InputError(f"config: adapter: {error}") from None


def adapter_settings(config: Any) -> dict[str, Any]:
    """The other way: a method's own configuration as values of the section `adapter`, by key.

    Raises:
        InputError: it is no configuration of a method, or has a setting that the section has no key for.
    """
    method = next((name for name, found in CONFIGS.items() if found is type(config)), None)
    if method is None:
        raise InputError(
            f"the adapter's configuration should be one of a method, such as LoRAConfig(rank=8), and is "
            f"{type(config).__name__}"
        )
    known = config.settings()
    values: dict[str, Any] = {"method": method}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in known:
            if field.name.endswith("_pattern"):
                value = tuple(f"{pattern}={number:g}" for pattern, number in value) or None
            elif value == ():
                value = None
            values[field.name] = value
        elif field.init and value != _default(field) and "by_run" not in field.metadata:
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
