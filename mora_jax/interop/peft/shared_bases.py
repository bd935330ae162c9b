"""PEFT's VERA and RANDLORA: small arrays a target, and one pair of arrays for all, in the file or drawn from its seed.

With `save_projection`, PEFT's default, the file of a RANDLORA holds the pair beside the model and once more at every
target. What is written here has it only where it is not that of the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.base import host
from mora_jax.adapters.config import VeRAConfig
from mora_jax.adapters.methods.randlora import RandLoRAConfig, random_bases
from mora_jax.adapters.methods.vera import projections
from mora_jax.adapters.sites import Site
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Format, Target, same
from mora_jax.interop.safetensors_io import TensorFiles


class SharedBasesFormat(Format):
    """A type with such a pair.

    Attributes:
        rank_axes: the axis of the rank, of each of the pair.
    """

    rank_axes: ClassVar[tuple[int, int]]

    def drawn(self, values: dict[str, Any], widths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The pair that PEFT draws for layers of these widths, as files have it."""
        raise NotImplementedError  # abstract: each type's file defines it

    def least(self, rank: int, places: list[Site]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest shapes that do for the places of the targets."""
        raise NotImplementedError  # abstract: each type's file defines it

    def shared(
        self, values: dict[str, Any], names: Mapping[str, str], files: TensorFiles, places: list[Site]
    ) -> dict[str, np.ndarray]:
        if not values.get("save_projection", True):
            if names:
                raise InputError(
                    f"{files.folder}: save_projection is false, but there is {next(iter(names.values()))}, which PEFT "
                    "would leave unread and redraw: set save_projection to true if the tensors are the ones to use"
                )
            return dict(zip(self.shared_names, self.drawn(values, widest(places)), strict=True))
        absent = [name for name in self.shared_names if name not in names]
        if absent:
            raise InputError(f"{files.folder}: save_projection is true, but {' and '.join(absent)} are missing")
        arrays, rank = {}, self.configured(values, "any").rank
        for name, wanted, axis in zip(self.shared_names, self.least(rank, places), self.rank_axes, strict=True):
            shape = files.shapes[names[name]]
            large = len(shape) == len(wanted) and all(size >= low for size, low in zip(shape, wanted, strict=True))
            if not large or shape[axis] != rank:
                raise InputError(
                    f"{files.folder}: tensor {names[name]} has shape {list(shape)}, but it must be at least "
                    f"{list(wanted)}, of rank {rank}"
                )
            arrays[name] = files.read_wide(names[name])
        return arrays


def widest(places: list[Site]) -> tuple[int, int]:
    """The most inputs and outputs."""
    return max(place.in_features for place in places), max(place.out_features for place in places)


def _pair(places: list[Site], names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """The pair of arrays, by name, that adapters hold pieces of: as much of it as they show.

    Raises:
        InputError: the adapters have pieces of several pairs.
    """
    pair = []
    for name in names:
        pieces = [_pieces(place, name) for place in places]
        array = np.zeros(np.max([piece.shape[1:] for piece in pieces], axis=0), pieces[0].dtype)
        for piece in pieces:
            array[tuple(map(slice, piece.shape[1:]))] = piece[0]
        for place, piece in zip(places, pieces, strict=True):
            if not _is_piece(piece, array):
                raise InputError(f"{place.title} has frozen factors of its own; one folder holds one pair for all")
        pair.append(array)
    return pair[0], pair[1]


def _pieces(place: Site, name: str) -> np.ndarray:
    """An array of the adapters on a place, `[layers, …]`."""
    array = host(place.adapter.params()[name])
    return array.reshape(-1, *array.shape[len(place.stack) :])


def _is_piece(piece: np.ndarray, array: np.ndarray) -> bool:
    """Whether each layer's array, `[layers, …]`, is what the beginning of `array` has."""
    return bool((piece == array[tuple(map(slice, piece.shape[1:]))]).all())


class VeraFormat(SharedBasesFormat):
    peft_type = "VERA"
    config = VeRAConfig
    methods = ("vera",)
    tensor_names: ClassVar[Mapping[str, str]] = {"vera_b_scale": "vera_lambda_b", "vera_d": "vera_lambda_d"}
    shared_names = ("vera_A", "vera_B")
    rank_axes = (0, 1)
    settings: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 256),
        "vera_dropout": ("dropout", 0.0),
        "d_initial": ("d_initial", 0.1),
        "projection_prng_key": ("projection_prng_key", 0),
    }
    fields = frozenset({"save_projection"})
    bias_name = "vera_only"

    def drawn(self, values: dict[str, Any], widths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        config = self.configured(values, "any")
        left, right = projections(config.rank, widths, config.projection_prng_key)
        return left.T, right.T

    def least(self, rank: int, places: list[Site]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, outputs = widest(places)
        return (rank, inputs), (outputs, rank)

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        place, left, right = target.place, target.shared["vera_A"], target.shared["vera_B"]
        config = self.configured(values, target.path, widths=(left.shape[1], right.shape[0]))
        arrays = {
            "vera_a": left[:, : place.in_features].T,
            "vera_b": right[: place.out_features].T,
            "vera_d": target.read("vera_d", (config.rank,)),
            "vera_b_scale": target.read("vera_b_scale", (place.out_features,)),
        }
        return AdapterValues(config, arrays)

    def shared_of(self, places: list[Site]) -> dict[str, np.ndarray]:
        left, right = _pair(places, ("vera_a", "vera_b"))
        return {"vera_A": left.T, "vera_B": right.T}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        return super().written(entries, targets) | {"save_projection": True}


@dataclass(frozen=True)
class RandLoraFormat(SharedBasesFormat):
    """The type.

    Attributes:
        bases: A and B of the file that is written; None where PEFT draws the same from the seed.
    """

    bases: tuple[np.ndarray, np.ndarray] | None = None

    peft_type: ClassVar[str] = "RANDLORA"
    config: ClassVar[type[RandLoRAConfig]] = RandLoRAConfig
    methods: ClassVar[tuple[str, ...]] = ("randlora",)
    tensor_names: ClassVar[Mapping[str, str]] = {
        "lambda": "randlora_lambda",
        "gamma": "randlora_gamma",
        "a": "randlora_A",
        "b": "randlora_B",
    }
    shared_names: ClassVar[tuple[str, ...]] = ("randlora_A", "randlora_B")
    bias_name: ClassVar[str] = "randlora_only"
    rank_axes: ClassVar[tuple[int, int]] = (0, 2)
    settings: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 32),
        "randlora_alpha": ("alpha", 640),
        "randlora_dropout": ("dropout", 0.0),
        "projection_prng_key": ("projection_prng_key", 0),
    }
    fields: ClassVar[frozenset[str]] = frozenset({"save_projection", "sparse", "very_sparse"})

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        needed = {"lambda", "gamma"}
        return needed, needed | {"a", "b"} if values.get("save_projection", True) else needed

    def configured(self, values: Mapping[str, Any], path: str, **extra: Any) -> RandLoRAConfig:
        # PEFT looks at very_sparse first.
        bases = "very_sparse" if values.get("very_sparse") else "sparse" if values.get("sparse") else "dense"
        return super().configured(values, path, bases=bases, **extra)

    def drawn(self, values: dict[str, Any], widths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        config = self.configured(values, "any")
        a, b = random_bases(config.rank, widths, config.projection_prng_key, config.bases)
        return a[:, None], b

    def least(self, rank: int, places: list[Site]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        smaller = max(min(place.in_features, place.out_features) for place in places)
        return (rank, 1, smaller), (max(widest(places)), -(-smaller // rank), rank)

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        for kind, name in (("a", "randlora_A"), ("b", "randlora_B")):
            shared = target.shared[name]
            if kind in target.names and not np.array_equal(target.read(kind, shared.shape), shared):
                raise InputError(f"{target.files.folder}: tensor {target.names[kind]} is not the {name} of the others")
        place, a, b = target.place, target.shared["randlora_A"][:, 0], target.shared["randlora_B"]
        config = self.configured(values, target.path, widths=(a.shape[1], b.shape[0]))
        smaller, larger = sorted((place.in_features, place.out_features))
        count = -(-smaller // config.rank)
        arrays = {
            "randlora_a": a[:, :smaller],
            "randlora_b": b[:larger, :count],
            "randlora_lambda": target.read("lambda", (config.rank, count)),
            "randlora_gamma": target.read("gamma", (count, smaller)),
        }
        return AdapterValues(config, arrays)

    def for_model(self, places: list[Site]) -> RandLoraFormat:
        config = places[0].adapter.config
        # Layers that are switched off are not in the file, so PEFT draws for the others alone.
        places = [place for place in places if host(place.adapter.scaling[...]).any()] or places
        drawn = random_bases(config.rank, widest(places), config.projection_prng_key, config.bases)
        names = "randlora_a", "randlora_b"
        pieces = ((_pieces(place, name), base) for place in places for name, base in zip(names, drawn, strict=True))
        # Of other bases what the pieces show; nobody reads the rest.
        return RandLoraFormat(None if all(_is_piece(*piece) for piece in pieces) else _pair(places, names))

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        tensors = {"lambda": entry.params["randlora_lambda"], "gamma": entry.params["randlora_gamma"]}
        return tensors if self.bases is None else tensors | {"a": self.bases[0][:, None], "b": self.bases[1]}

    def shared_of(self, places: list[Site]) -> dict[str, np.ndarray]:
        return {} if self.bases is None else {"randlora_A": self.bases[0][:, None], "randlora_B": self.bases[1]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        bases = same(entries, "bases")
        sparse = {"sparse": bases == "sparse", "very_sparse": bases == "very_sparse"}
        return super().written(entries, targets) | sparse | {"save_projection": self.bases is not None}
