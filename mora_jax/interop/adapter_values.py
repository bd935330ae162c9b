"""Adapters as plain values, one configuration and one set of arrays for each module path, and back onto models.

How a method trains its factors is no matter for files: LoRA and its relatives are two factors and a scaling there, and
ReMoRA is, at any moment, the MoRA of the kind whose turn it is. The methods say it (`Adapter.in_file`); PiSSA and
OLoRA, whose start is subtracted again, become a product of twice the rank, which needs no other base.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.attach import AdapterEntry, check_site, put_adapter, undone_on_error
from mora_jax.adapters.config import BitFitConfig, LoRAConfig
from mora_jax.adapters.config.patterns import targets_for
from mora_jax.adapters.methods.lora_init import is_start
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.adapters.sites import Site, sites
from mora_jax.errors import InputError, refused


class AdapterValues(NamedTuple):
    """The adapter of one matrix.

    Attributes:
        config: the method and its sizes; None where there is nothing but a bias, beside other matrices' adapters.
        values: arrays by name, as in `AdapterEntry.params`; those of the adapter that are not named keep their start.
    """

    config: Any
    values: Mapping[str, np.ndarray]


def lora_of(a: np.ndarray, b: np.ndarray, scaling: float = 1.0, dropout: float = 0.0) -> AdapterValues:
    """LoRA of the factors `a [in, r]` and `b [r, out]`, whose product times `scaling` is the update."""
    rank = a.shape[1]
    config = LoRAConfig(rank=rank, alpha=scaling * rank, dropout=dropout)
    return AdapterValues(config, {"lora_a": a, "lora_b": b, "scaling": np.asarray(scaling)})


ValuesByPath = Mapping[str, AdapterValues]


def install(model: nnx.Module, by_path: ValuesByPath) -> None:
    """Puts an adapter on every path of `by_path` and gives it its values.

    Args:
        model: a model without adapters; changed in place.
        by_path: by module path.

    Raises:
        InputError: the model has adapters, lacks a path, or can't hold what is asked for; it is as it was then.
    """
    places = list(sites(model))
    if any(place.adapter is not None for place in places):
        raise InputError("the model carries an adapter already: merge it, or load the base model again")
    possible = [path for place in places for path in place.paths]
    absent = sorted(set(by_path) - set(possible))
    if absent:
        raise InputError(f"the model has no {first(absent)}")
    filled = [(place, {i: by_path[path] for i, path in enumerate(place.paths) if path in by_path}) for place in places]
    filled = [(place, values) for place, values in filled if values]
    targets = targets_for([path for path in by_path if by_path[path].config is not None], possible)
    sizes = [(place.in_features, place.out_features) for place, _ in filled]
    rngs = nnx.Rngs(0)
    with undone_on_error(model):
        for place, values in filled:
            _put(place, values, targets, sizes, rngs)


def _put(
    place: Site,
    values: Mapping[int, AdapterValues],
    targets: list[str] | str,
    sizes: list[tuple[int, int]],
    rngs: nnx.Rngs,
) -> None:
    """Puts the adapter of one place on it, layers of lower ranks padded.

    Args:
        place: without an adapter.
        values: by the number of the layer.
        targets: of all places.
        sizes: inputs and outputs of all places.
        rngs: for what is drawn, and for dropout.
    """
    same: dict[str, Any] = {"targets": targets, "layers_to_transform": None, "modules_to_save": ()}
    configs: list[Any] = [None] * len(place.paths)
    for layer, adapter_values in values.items():
        if adapter_values.config is not None:
            configs[layer] = dataclasses.replace(adapter_values.config, **same)
    if not any(configs):
        configs = [BitFitConfig(**same)] * len(place.paths)
    method = adapter_class(next(filter(None, configs)))
    if len({_without_sizes(config) for config in configs if config is not None}) > 1:
        raise InputError(f"{place.title} is one stack, whose layers have to agree in everything but their ranks")
    with refused():
        check_site(place, configs, method)
        configs = [None if config is None else method.configure_for_shapes(config, sizes) for config in configs]
        adapter = put_adapter(place, configs, method, rngs)
    names = dict.fromkeys(name for adapter_values in values.values() for name in adapter_values.values)
    if "bias" in names and not hasattr(adapter, "bias"):
        adapter.train_bias()
    for name in names:
        variable = getattr(adapter, name)
        array = np.array(variable[...])
        for layer, adapter_values in values.items():
            if name in adapter_values.values:
                put_padded(array, place.index(layer), adapter_values.values[name])
        variable.set_value(jnp.asarray(array))


def put_padded(array: np.ndarray, index: tuple[int, ...], value: Any) -> None:
    """Writes a value where `array[index]` begins, and zeros into what is left of that."""
    rows: tuple[Any, ...] = tuple(map(slice, np.shape(value)))
    array[index] = 0
    array[(*index, *rows)] = value


def _without_sizes(config: Any) -> Any:
    """A configuration without what may differ by layer."""
    alike = {"rank": 1, "alpha": 1.0}
    return dataclasses.replace(config, **{name: alike[name] for name in alike if hasattr(config, f"{name}_pattern")})


def plain(entry: AdapterEntry) -> AdapterEntry:
    """The entry in the form of files."""
    config, params = adapter_class(entry.config).in_file(entry.config, entry.params)
    return dataclasses.replace(entry, method=adapter_class(config).method, config=config, params=params)


def trained_as(
    adapter_values: AdapterValues, method: Any, kernel: Callable[[], np.ndarray], path: str
) -> AdapterValues:
    """An adapter out of a file as one of another method, which computes the same and is trained otherwise.

    LoRA+ and LoRA-FA take any LoRA. PiSSA and OLoRA take what they wrote: the half of the ranks that is their start is
    the start again. Where `method` is another function than the file's, the values come back as they are.

    Args:
        adapter_values: of one matrix.
        method: the configuration of the method; its rank, alpha and so on are of no matter.
        kernel: gives the base's `[in, out]`.
        path: where the matrix is, for messages.

    Raises:
        InputError: PiSSA or OLoRA, and the file holds no LoRA that started so from this base.
    """
    given, values = adapter_values.config, dict(adapter_values.values)
    adapter = adapter_class(method)
    if type(given) is type(method) or not adapter.continues(method, given):
        return adapter_values
    rank, init = given.rank, given.init
    if adapter.start_in_file:
        rank, init = rank // 2, method.init
        lora_a, lora_b = values["lora_a"], values["lora_b"]
        values |= {"lora_a": lora_a[:, :rank], "initial_a": lora_a[:, rank:]}
        values |= {"lora_b": lora_b[:rank], "initial_b": -lora_b[rank:]}
        start = values["initial_a"], values["initial_b"]
        if given.rank % 2 or not is_start(init, kernel(), *start, float(values["scaling"])):
            raise InputError(
                f"the LoRA on {path} did not start as {init} from this base, so there is no start to hold fixed; set "
                "adapter.method=lora to train all of it"
            )
    same = {name: getattr(given, name) for name in ("dropout", "targets", "use_dora", "bias")}
    how = {name: getattr(method, name) for name in method.training_settings()}
    config = type(method)(rank=rank, alpha=float(values["scaling"]) * rank, init=init, **same, **how)
    return AdapterValues(config, values)


def first(names: list[str]) -> str:
    """The first few of a list of names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
