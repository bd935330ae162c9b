"""What the configurations of all methods have: targets, layers, modules trained whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Targets = str | tuple[str, ...]
Pattern = Mapping[str, Any] | tuple[tuple[str, Any], ...]
BIASES = ("none", "lora_only", "all")


def freeze_targets(targets) -> Targets:
    if isinstance(targets, str):
        if not targets:
            raise ValueError("targets is empty; give layer names, a regular expression or 'all-linear'")
        return targets
    names = tuple(targets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"targets must be layer names, a regular expression or 'all-linear', not {targets!r}")
    return names


def check_rank(rank: Any, name: str = "rank") -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{name} must be a positive integer, not {rank!r}")


def check_positive(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, not {value!r}")


def check_bias(value: Any) -> None:
    """Raises `ValueError` for what says nothing about which biases are trained."""
    if value not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, not {value!r}")


def freeze_pattern(pattern: Pattern, name: str, check) -> tuple[tuple[str, Any], ...]:
    """A pattern as pairs, which can be hashed; keys are regular expressions."""
    pairs = tuple((key, value) for key, value in (pattern.items() if isinstance(pattern, Mapping) else pattern))
    for key, value in pairs:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{name} {key!r} is no regular expression: {error}") from None
        check(value, f"{name}[{key!r}]")
    return pairs


def module_names(names: Any, what: str) -> tuple[str, ...]:
    given = (names,) if isinstance(names, str) else tuple(names or ())
    if not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"{what} must be module names, not {names!r}")
    return given


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every method has.

    Attributes:
        layers_to_transform: numbers of the layers that are adapted, one number or several; None for all. The number
            of a layer is the first number in its module path; layers without one are left out.
        modules_to_save: names of modules (`"lm_head"`, `"embed_tokens"`, `"norm"`) that are trained whole, as
            float32 masters, and never adapted.
    """

    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()

    # Of methods without such a field. Not annotated: an annotation would fix their place among a subclass's fields.
    dropout = 0.0
    bias = "none"

    @property
    def rates(self) -> dict[str, float]:
        """How many times the learning rate arrays of some names get."""
        return {}

    def at_path(self, path: str) -> CommonConfig:
        """The configuration for one module path."""
        return self

    def __post_init__(self):
        object.__setattr__(self, "targets", freeze_targets(self.targets))  # type: ignore[attr-defined]
        object.__setattr__(self, "modules_to_save", module_names(self.modules_to_save, "modules_to_save"))
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout!r}")
        layers = self.layers_to_transform
        if layers is not None:
            numbers = (layers,) if isinstance(layers, int) else tuple(layers)
            if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError(f"layers_to_transform must be layer numbers, not {layers!r}")
            object.__setattr__(self, "layers_to_transform", numbers)
