"""Configurations for tests that try every method."""

from collections.abc import Mapping
from typing import Any

from mora_jax.adapters.methods.registry import CONFIGS


def config_from(values: Mapping[str, Any]) -> Any:
    """The configuration of `values["method"]`, with those of the values that it has."""
    config = CONFIGS[values["method"]]
    return config(**{name: value for name, value in values.items() if name in config.__dataclass_fields__})
