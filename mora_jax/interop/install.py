"""Put adapters with given values on a model: one configuration and one set of arrays for each module path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.attach import adapter_at, attach
from mora_jax.adapters.targets import Place, has_adapter, places
from mora_jax.errors import InputError


class Filling(NamedTuple):
    """What one matrix gets.

    Attributes:
        config: the method and its sizes; `targets` is of no matter.
        values: arrays by name, as in `AdapterEntry.params`; those of the adapter that are not named keep their start.
    """

    config: Any
    values: Mapping[str, np.ndarray]


def install(model: nnx.Module, fillings: Mapping[str, Filling]) -> None:
    """Attaches an adapter to every path of `fillings` and gives it its values.

    Args:
        model: a model without adapters; changed in place.
        fillings: by module path.

    Raises:
        InputError: the model has adapters, lacks a path, or a stack can't hold ranks that differ by layer.
    """
    found = list(places(model))
    if any(has_adapter(place) for place in found):
        raise InputError("the model carries an adapter already: merge it, or load the base model again")
    wanted = [(place, [i for i, path in enumerate(place.paths) if path in fillings]) for place in found]
    wanted = [(place, layers) for place, layers in wanted if layers]
    possible = [path for place in found for path in place.paths]
    absent = sorted(set(fillings) - set(possible))
    if absent:
        raise InputError(f"the model has no {first(absent)}")
    for config, paths in _groups(wanted, fillings):
        attach(model, dataclasses.replace(config, targets=tuple(short_targets(paths, possible))), rngs=nnx.Rngs(0))
    for place, layers in wanted:
        _fill(place, {layer: fillings[place.paths[layer]].values for layer in layers})


def _groups(wanted: list[tuple[Place, list[int]]], fillings: Mapping[str, Filling]) -> Iterable[tuple[Any, list[str]]]:
    """As few configurations as there are ranks; scalings are filled in afterwards, layer by layer."""
    groups: dict[Any, tuple[Any, list[str]]] = {}
    for place, layers in wanted:
        configs = [fillings[place.paths[layer]].config for layer in layers]
        ranks = sorted({config.rank for config in configs})
        if len(ranks) > 1:
            raise InputError(f"ranks that differ by layer are not supported ({place.title} has {ranks})")
        key = (type(configs[0]), ranks[0], getattr(configs[0], "kind", None))
        groups.setdefault(key, (configs[0], []))[1].extend(place.paths[layer] for layer in layers)
    return groups.values()


def _fill(place: Place, values: dict[int, Mapping[str, np.ndarray]]) -> None:
    """Writes the arrays of all layers of a place at once."""
    adapter = adapter_at(place)
    for name in next(iter(values.values())):
        variable = getattr(adapter, name)
        array = np.array(variable[...])
        for layer, arrays in values.items():
            array[layer if place.stacked else ...] = arrays[name]
        variable.set_value(jnp.asarray(array))


def short_targets(adapted: Iterable[str], possible: Iterable[str]) -> list[str]:
    """The shortest list of PEFT targets that names exactly the `adapted` paths among the `possible` ones."""
    adapted, possible = set(adapted), set(possible)
    targets = set()
    for path in adapted:
        name = path.rpartition(".")[2]
        same = {other for other in possible if other == name or other.endswith("." + name)}
        targets.add(name if same <= adapted else path)
    return sorted(targets)


def first(names: list[str]) -> str:
    """The first few of a list of names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
