"""PEFT's VERA: two vectors a target, and one pair of projections for all, in the file or drawn from its seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry, adapter_at
from mora_jax.adapters.base import host
from mora_jax.adapters.config import VeRAConfig
from mora_jax.adapters.matching.targets import Place
from mora_jax.adapters.methods.vera import projections
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import (
    Format,
    Target,
    first_of,
    require,
    require_bias,
    require_positive,
    require_share,
    same,
)
from mora_jax.interop.safetensors_io import TensorFiles


class VeraFormat(Format):
    peft_type = "VERA"
    methods = ("vera",)
    tensor_names: ClassVar[Mapping[str, str]] = {"d": "vera_lambda_d", "b_scale": "vera_lambda_b"}
    shared_names = ("vera_A", "vera_B")
    fields = frozenset({"d_initial", "init_weights", "projection_prng_key", "r", "save_projection", "vera_dropout"})
    bias_name = "vera_only"

    def check(self, values: dict[str, Any], where: str) -> None:
        require_positive(values, where, "r", 256, whole=True)
        require_share(values, where, "vera_dropout")
        require_bias(values, where, self.bias_name)
        number = values.get("d_initial", 0.1)
        good = isinstance(number, (int, float)) and not isinstance(number, bool)
        require(values, where, "d_initial", good, "a number")
        key = values.get("projection_prng_key", 0)
        require(values, where, "projection_prng_key", type(key) is int and key >= 0, "a whole number of at least 0")

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        return {"d", "b_scale"}, {"d", "b_scale"}

    def shared(
        self, values: dict[str, Any], names: Mapping[str, str], files: TensorFiles, found: list[Place]
    ) -> dict[str, np.ndarray]:
        rank, seed = values.get("r", 256), values.get("projection_prng_key", 0)
        least = max(place.in_features for place in found), max(place.out_features for place in found)
        if not values.get("save_projection", True):
            if names:
                raise InputError(
                    f"{files.folder}: save_projection is false, but there is {first_of(names)}, which PEFT would leave "
                    "unread and redraw: set save_projection to true if the tensors are the projections to use"
                )
            drawn = projections(rank, least, seed)
            return {"vera_A": drawn[0].T, "vera_B": drawn[1].T}
        absent = [name for name in self.shared_names if name not in names]
        if absent:
            raise InputError(f"{files.folder}: save_projection is true, but {' and '.join(absent)} are missing")
        arrays = {}
        for name, axis, smallest in (("vera_A", 1, least[0]), ("vera_B", 0, least[1])):
            shape = files.shapes[names[name]]
            if len(shape) != 2 or shape[1 - axis] != rank or shape[axis] < smallest:
                wanted = f"[{rank}, {smallest} or more]" if axis else f"[{smallest} or more, {rank}]"
                raise InputError(
                    f"{files.folder}: tensor {names[name]} has shape {list(shape)}, but it must be {wanted}"
                )
            arrays[name] = files.read(names[name]).astype(np.float32)
        return arrays

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        place, left, right = target.place, target.shared["vera_A"], target.shared["vera_B"]
        bias = values.get("bias", "none")
        config = VeRAConfig(
            rank=values.get("r", 256),
            dropout=values.get("vera_dropout", 0.0),
            targets=(target.path,),
            d_initial=values.get("d_initial", 0.1),
            projection_prng_key=values.get("projection_prng_key", 0),
            widths=(left.shape[1], right.shape[0]),
            bias="lora_only" if bias == self.bias_name else bias,
        )
        arrays = {
            "vera_a": left[:, : place.in_features].T,
            "vera_b": right[: place.out_features].T,
            "vera_d": target.read("d", (config.rank,)),
            "vera_b_scale": target.read("b_scale", (place.out_features,)),
        }
        return AdapterValues(config, arrays)

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {"b_scale": entry.params["vera_b_scale"], "d": entry.params["vera_d"]}

    def shared_of(self, places: list[Place]) -> dict[str, np.ndarray]:
        """The factors of the widest places; every other has to have a piece of the same."""
        left = _factor(max(places, key=lambda place: place.in_features), "vera_a")
        right = _factor(max(places, key=lambda place: place.out_features), "vera_b")
        left, right = (factor.reshape(-1, *factor.shape[-2:])[0] for factor in (left, right))
        for place in places:
            a, b = _factor(place, "vera_a"), _factor(place, "vera_b")
            if not (a == left[: place.in_features]).all() or not (b == right[:, : place.out_features]).all():
                raise InputError(f"{place.title} has frozen factors of its own; one folder holds one pair for all")
        return {"vera_A": left.T, "vera_B": right.T}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        bias = same(entries, "bias")
        return {
            "bias": self.bias_name if bias == "lora_only" else bias,
            "d_initial": same(entries, "d_initial"),
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "projection_prng_key": same(entries, "projection_prng_key"),
            "r": same(entries, "rank"),
            "save_projection": True,
            "target_modules": targets,
            "vera_dropout": max(entry.config.dropout for entry in entries),
        }


def _factor(place: Place, name: str) -> np.ndarray:
    """A frozen factor of a place, `[*layers, …]`."""
    return host(adapter_at(place).params()[name])
