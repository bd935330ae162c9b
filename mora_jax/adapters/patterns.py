"""Ranks and alphas that differ by layer: `rank_pattern` and `alpha_pattern`, matched as PEFT matches them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np


def value_at(pattern: tuple[tuple[str, Any], ...], path: str, default: Any) -> Any:
    """The value of the first key that is, or as a regular expression matches, the end of a module path."""
    for key, value in pattern:
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def config_at(config: Any, path: str) -> Any:
    """The configuration that counts for one module path: its own settings, and no pattern."""
    config = config.at_path(path)
    changes: dict[str, Any] = {}
    for name in ("rank", "alpha"):
        if hasattr(config, f"{name}_pattern"):
            changes[name] = value_at(getattr(config, f"{name}_pattern"), path, getattr(config, name))
            changes[f"{name}_pattern"] = ()
    return dataclasses.replace(config, **changes) if changes else config


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What the layers of one place use.

    Attributes:
        config: with the highest rank among the adapted layers.
        ranks: of each layer, `[paths]`; None where they agree, or the method has none.
        scalings: of each layer, `[paths]`; None where they agree.
    """

    config: Any
    ranks: np.ndarray | None = None
    scalings: np.ndarray | None = None


def resolve(config: Any, method: Any, paths: tuple[str, ...], mask: tuple[bool, ...]) -> Resolved:
    """The configuration of a place with these paths, of which `mask` says which are adapted.

    Raises:
        ValueError: the layers of a stack differ in what has no form by layer.
    """
    used = [config_at(config, path) for path, on in zip(paths, mask, strict=True) if on]
    first = used[0]
    if all(other == first for other in used):
        return Resolved(first)
    if not hasattr(first, "rank"):
        named = [path for path, on in zip(paths, mask, strict=True) if on]
        other = next(path for path, config in zip(named, used, strict=True) if config != first)
        raise ValueError(f"{named[0]} and {other} lie in one stack, so feedforward has to name both or none")
    every = iter(used)
    by_layer = [next(every) if on else first for on in mask]
    ranks = np.array([layer.rank for layer in by_layer])
    scalings = np.array([method.scale(layer) if on else 0.0 for layer, on in zip(by_layer, mask, strict=True)])
    widest = max(used, key=lambda layer: layer.rank)
    return Resolved(widest, None if len({layer.rank for layer in used}) == 1 else ranks, scalings.astype(np.float32))
