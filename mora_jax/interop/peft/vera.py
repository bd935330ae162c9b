"""PEFT's VERA: two vectors a target, and one pair of projections for all, in the file or drawn from its seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.base import host
from mora_jax.adapters.config import VeRAConfig
from mora_jax.adapters.methods.vera import projections
from mora_jax.adapters.sites import Site
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Target
from mora_jax.interop.peft.shared_bases import SharedBasesFormat, widest


class VeraFormat(SharedBasesFormat):
    peft_type = "VERA"
    config = VeRAConfig
    methods = ("vera",)
    tensor_names: ClassVar[Mapping[str, str]] = {"d": "vera_lambda_d", "b_scale": "vera_lambda_b"}
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

    def least(self, rank: int, found: list[Site]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, outputs = widest(found)
        return (rank, inputs), (outputs, rank)

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        place, left, right = target.place, target.shared["vera_A"], target.shared["vera_B"]
        config = self.configured(values, target.path, widths=(left.shape[1], right.shape[0]))
        arrays = {
            "vera_a": left[:, : place.in_features].T,
            "vera_b": right[: place.out_features].T,
            "vera_d": target.read("d", (config.rank,)),
            "vera_b_scale": target.read("b_scale", (place.out_features,)),
        }
        return AdapterValues(config, arrays)

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {"b_scale": entry.params["vera_b_scale"], "d": entry.params["vera_d"]}

    def shared_of(self, places: list[Site]) -> dict[str, np.ndarray]:
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
        return super().written(entries, targets) | {"save_projection": True}


def _factor(place: Site, name: str) -> np.ndarray:
    """A frozen factor of a place, `[*layers, …]`."""
    return host(place.adapter.params()[name])
