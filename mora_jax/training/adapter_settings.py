"""The section `adapter` of a configuration, as the adapters room takes it."""

from __future__ import annotations

from typing import Any

from mora_jax.adapters.registry import config_from
from mora_jax.errors import InputError
from mora_jax.training.adapter_keys import START
from mora_jax.training.config import METHOD_KEYS, AdapterConfig


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


def _pair(text: str, name: str, kind: type) -> tuple[str, Any]:
    """One entry of a pattern: a regular expression may hold "=", its value can't."""
    pattern, _, value = text.rpartition("=")
    try:
        return pattern, kind(value)
    except ValueError:
        example = r"q_proj=16" if kind is int else r"q_proj=32.0"
        raise InputError(f'adapter.{name}: {text!r} should read "REGEX=NUMBER", such as "{example}"') from None
