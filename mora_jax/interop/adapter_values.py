"""Put adapters with given values on a model: one configuration and one set of arrays for each module path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.attach import add_adapters, undone_on_error
from mora_jax.adapters.config.patterns import pattern_for, targets_for
from mora_jax.adapters.sites import Site, sites
from mora_jax.errors import InputError


class AdapterValues(NamedTuple):
    """What one matrix gets.

    Attributes:
        config: the method and its sizes, `targets` being of no matter; None where another path's method brings the
            adapter (a bias beside LoRA).
        values: arrays by name, as in `AdapterEntry.params`; those of the adapter that are not named keep their start.
    """

    config: Any
    values: Mapping[str, np.ndarray]


def install(model: nnx.Module, by_path: Mapping[str, AdapterValues], *, modules_to_save: tuple[str, ...] = ()) -> None:
    """Attaches an adapter to every path of `by_path` and gives it its values.

    Args:
        model: a model without adapters; changed in place.
        by_path: by module path.
        modules_to_save: names of modules that become trained whole.

    Raises:
        InputError: the model has adapters, lacks a path, or can't hold what is asked for.
    """
    found = list(sites(model))
    if any(place.adapter is not None for place in found):
        raise InputError("the model carries an adapter already: merge it, or load the base model again")
    possible = [path for place in found for path in place.paths]
    absent = sorted(set(by_path) - set(possible))
    if absent:
        raise InputError(f"the model has no {first(absent)}")
    for place in found:
        settings = {_settings(by_path[path].config) for path in place.paths if path in by_path} - {None}
        if len(settings) > 1:
            raise InputError(f"{place.title} is one stack, whose layers have to agree in everything but their ranks")
    with undone_on_error(model):
        for config in _configs(by_path, possible):
            changes = dataclasses.replace(config, modules_to_save=modules_to_save)
            try:
                add_adapters(model, changes, rngs=nnx.Rngs(0))
            except ValueError as error:
                raise InputError(str(error)) from None
            modules_to_save = ()
        for place in found:
            layers = {i: by_path[path].values for i, path in enumerate(place.paths) if path in by_path}
            if layers:
                _fill(place, layers)


def _configs(by_path: Mapping[str, AdapterValues], possible: list[str]) -> list[Any]:
    """As few configurations as there are methods, with patterns for what differs by layer."""
    groups: dict[Any, list[str]] = {}
    for path, (config, _) in by_path.items():
        if config is not None:
            groups.setdefault(_settings(config), []).append(path)
    configs = []
    for config, paths in groups.items():
        targets = targets_for(paths, possible)
        changes: dict[str, Any] = {"targets": targets if isinstance(targets, str) else tuple(targets)}
        for name in _varied(config):
            values = {path: getattr(by_path[path].config, name) for path in paths}
            # Scalings are filled in afterwards; only what is taken from the base has to know them before.
            if name == "rank" or config.starts_from_base:
                changes[name] = max(values.values())
                changes[f"{name}_pattern"] = pattern_for(values, changes[name])
        configs.append(dataclasses.replace(config, **changes))
    return configs


def _settings(config: Any) -> Any:
    """A configuration without what may differ by layer."""
    if config is None:
        return None
    settings = {name: 1.0 if name == "alpha" else 1 for name in _varied(config)}
    return dataclasses.replace(config, targets=("any",), layers_to_transform=None, modules_to_save=(), **settings)


def _varied(config: Any) -> list[str]:
    """The settings that may differ by layer."""
    return [name for name in ("rank", "alpha") if hasattr(config, f"{name}_pattern")]


def _fill(place: Site, values: dict[int, Mapping[str, np.ndarray]]) -> None:
    """Writes the arrays of all layers of a place at once; what is smaller than its place (a lower rank) is padded."""
    adapter = place.adapter
    for name in dict.fromkeys(name for arrays in values.values() for name in arrays):
        variable = getattr(adapter, name)
        array = np.array(variable[...])
        for layer, arrays in values.items():
            if name in arrays:
                index: tuple[Any, ...] = place.index(layer)
                array[index] = 0
                array[(*index, *(slice(size) for size in np.shape(arrays[name])))] = arrays[name]
        variable.set_value(jnp.asarray(array))


def first(names: list[str]) -> str:
    """The first few of a list of names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
