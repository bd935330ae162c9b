"""Values of adapters into the slots of banks, and out of them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from mora_jax.adapters.bank import Bank, LoRABank, MoRABank
from mora_jax.adapters.config import LoRAConfig, MoRAConfig
from mora_jax.adapters.projection import OutputHead
from mora_jax.adapters.sites import Site, sites
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues, first
from mora_jax.interop.read_adapter import ValuesByPath


def placed_banks(model: nnx.Module) -> Iterator[tuple[Site, Bank]]:
    """Every bank of `model` with its place."""
    for place in sites(model):
        if isinstance(place.adapter, Bank):
            yield place, place.adapter


def check_places(model: nnx.Module, by_path: ValuesByPath) -> list[tuple[Site, list[AdapterValues]]]:
    """The places that an adapter is for, with its values for them.

    Raises:
        InputError: a path that the model lacks, or a place where the adapter can't stand beside those that are there.
    """
    found = list(sites(model))
    absent = sorted(set(by_path) - {path for place in found for path in place.paths})
    if absent:
        raise InputError(f"the model has no {first(absent)}")
    filled = [(place, [by_path[path] for path in place.paths if path in by_path]) for place in found]
    filled = [(place, values) for place, values in filled if values]
    for place, values in filled:
        if place.is_embedding or isinstance(place.layer, OutputHead):
            raise InputError(
                f"{place.title} is a table that all rows share; an adapter on it can't be used beside others: merge it"
            )
        sides = {len(adapter_values.values["m"]) for adapter_values in values if "m" in adapter_values.values}
        if isinstance(place.adapter, MoRABank):
            sides.add(place.adapter.m.shape[-1])
        if len(sides) > 1:
            raise InputError(
                f"{place.title}: MoRA's matrices have sides {' and '.join(map(str, sorted(sides)))}; a square can't be "
                "padded, so only adapters of one rank go together"
            )
    return filled


def make_room(place: Site, configs: list[Any], slots: int, rank: int) -> None:
    """Sees that a place has a bank that is large enough; what its present bank holds is kept.

    Args:
        place: without an adapter, or with a bank.
        configs: of the adapters that go into it.
        slots: how many it has to have at least.
        rank: the least rank of a bank of LoRAs.
    """
    old = place.adapter
    assert old is None or isinstance(old, Bank), "the model had no other adapters"
    known = configs if old is None else [old.config, *configs]
    config: Any
    if isinstance(known[0], MoRAConfig):
        config = MoRAConfig(rank=known[0].rank, kind=known[0].kind)
    else:
        config = LoRAConfig(rank=max(rank, *(one.rank for one in known)), alpha=1.0)
    if old is not None and old.slots >= slots and old.config == config:
        return
    make: Any = MoRABank if isinstance(config, MoRAConfig) else LoRABank
    bank = make(place.in_features, place.out_features, config, slots=slots, **place.layout)
    if old is not None:
        bank.copy_from(old)
        place.take_adapter()
    place.put_adapter(bank, None)


def write_slot(place: Site, bank: Bank, slot: int, by_path: ValuesByPath) -> None:
    """Writes an adapter's values at one place: zeros for layers without any, those of a lower rank padded.

    Args:
        place: where the bank is.
        bank: the place's adapter.
        slot: the number of the slot.
        by_path: the adapter's values by module path.
    """
    stack = len(bank.layers)
    values = {}
    for name, variable in bank.arrays().items():
        shape = variable.get_value().shape
        array = np.zeros(shape[:stack] + shape[stack + 1 :], np.float32)
        for layer, path in enumerate(place.paths):
            if path in by_path:
                value = np.asarray(by_path[path].values[name])
                index: list[Any] = [*place.index(layer), *(slice(size) for size in value.shape)]
                array[tuple(index)] = value
        values[name] = array
    bank.write(slot, values)


def read_slot(place: Site, bank: Bank, slot: int, configs: Mapping[str, Any]) -> dict[str, AdapterValues]:
    """The values of an adapter at one place, without padding.

    Args:
        place: where the bank is.
        bank: the place's adapter.
        slot: the number of the slot.
        configs: the adapter's configurations by module path.
    """
    arrays = bank.read(slot)
    by_path = {}
    for layer, path in enumerate(place.paths):
        if path in configs:
            values = {name: array[place.index(layer)] for name, array in arrays.items()}
            if "lora_a" in values:
                rank = configs[path].rank
                values |= {"lora_a": values["lora_a"][:, :rank], "lora_b": values["lora_b"][:rank]}
            by_path[path] = AdapterValues(configs[path], values)
    return by_path
