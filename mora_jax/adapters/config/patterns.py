"""Ranks and alphas that differ by layer: `rank_pattern` and `alpha_pattern`, matched as PEFT matches them."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def names_end(key: str, path: str) -> bool:
    """Whether a key of a pattern is, or as a regular expression matches, the end of a module path."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def value_at(pattern: Iterable[tuple[str, Any]], path: str, default: Any) -> Any:
    """The value of the first key that names the end of a module path, else of the key that is the path."""
    exact = default
    for key, value in pattern:
        if names_end(key, path):
            return value
        exact = value if key == path else exact
    return exact


def pattern_for(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The pattern that gives each of these module paths its value, in whatever order a reader takes its keys.

    A key is the path as it is, and is tied to the path's beginning (`^`) and escaped only where it would name another
    path with another value too: `out` beside `block.out`.
    """
    pattern = {}
    for path, value in values.items():
        if value == default:
            continue
        # Most paths end otherwise, and the last component of a plain one is no expression: no need to try those.
        plain = re.fullmatch(r"[\w.]+", path) is not None
        last = path.rpartition(".")[2] if plain else ""
        try:
            matches = {other for other in values if other.endswith(last) and names_end(path, other)}
        except re.error:
            matches = set()
        alone = path in matches and all(values[other] == value for other in matches)
        pattern[path if alone else f"^{re.escape(path)}"] = value
    return pattern


def targets_for(adapted: Iterable[str], possible: Iterable[str]) -> list[str] | str:
    """The shortest targets that name exactly the `adapted` paths among the `possible` ones.

    A list of ends of paths, as PEFT takes it; where that would name a path too many (`out` alone beside `block.out`), a
    regular expression for whole paths.
    """
    adapted = set(adapted)
    by_end: dict[str, set[str]] = {}
    for path in possible:
        components = path.split(".")
        for start in range(len(components)):
            by_end.setdefault(".".join(components[start:]), set()).add(path)
    targets = set()
    for path in adapted:
        last = path.rpartition(".")[2]
        name = last if by_end.get(last, set()) <= adapted else path
        if not by_end.get(name, set()) <= adapted or not name:
            return exactly(adapted)
        targets.add(name)
    return sorted(targets)


def exactly(paths: Iterable[str]) -> str:
    """A regular expression for these whole paths; never a plain word, which `attach` would take for a name."""
    return f"^({'|'.join(re.escape(path) for path in sorted(paths))})$"


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
        scalings: of each layer, `[paths]`; 0 for those that are left out.
        ranks: of each layer, `[paths]`; None where they agree, or the method has none.
    """

    config: Any
    scalings: np.ndarray
    ranks: np.ndarray | None = None


def by_layer(config: Any, paths: tuple[str, ...], mask: tuple[bool, ...]) -> tuple[Any | None, ...]:
    """The configuration of each layer of a place with these paths; None for those that `mask` leaves out."""
    return tuple(config_at(config, path) if on else None for path, on in zip(paths, mask, strict=True))


def resolve(configs: Sequence[Any | None], method: Any, paths: tuple[str, ...]) -> Resolved:
    """What the layers of a place use.

    Args:
        configs: of each layer, None for those that are left out.
        method: the adapters' class.
        paths: of each layer.

    Raises:
        ValueError: the layers of a stack differ in what has no form by layer.
    """
    used = [config for config in configs if config is not None]
    first = used[0]
    scalings = np.array([0.0 if config is None else method.scale(config) for config in configs])
    if all(other == first for other in used):
        return Resolved(first, scalings)
    if not hasattr(first, "rank"):
        adapted = [path for path, config in zip(paths, configs, strict=True) if config is not None]
        other = next(path for path, config in zip(adapted, used, strict=True) if config != first)
        raise ValueError(f"{adapted[0]} and {other} lie in one stack, so feedforward has to name both or none")
    ranks = np.array([(config or first).rank for config in configs])
    widest = max(used, key=lambda layer: layer.rank)
    return Resolved(widest, scalings, None if len({layer.rank for layer in used}) == 1 else ranks)
