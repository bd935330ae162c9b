"""PEFT's RANDLORA: two diagonals a target, and one pair of bases for all, drawn from its seed or in the file.

With `save_projection`, PEFT's default, the file holds the pair beside the model and once more at every target. What is
written here has it only where the bases are not those of the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.base import host
from mora_jax.adapters.methods.randlora import RandLoRAConfig, random_bases
from mora_jax.adapters.sites import Site
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Target, same
from mora_jax.interop.peft.shared_bases import SharedBasesFormat, widest


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

    def configured(self, values: Mapping[str, Any], path: str, **own: Any) -> RandLoRAConfig:
        # PEFT looks at very_sparse first.
        bases = "very_sparse" if values.get("very_sparse") else "sparse" if values.get("sparse") else "dense"
        return super().configured(values, path, bases=bases, **own)

    def drawn(self, values: dict[str, Any], widths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        config = self.configured(values, "any")
        a, b = random_bases(config.rank, widths, config.projection_prng_key, config.bases)
        return a[:, None], b

    def least(self, rank: int, found: list[Site]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        smaller = max(min(place.in_features, place.out_features) for place in found)
        return (rank, 1, smaller), (max(widest(found)), -(-smaller // rank), rank)

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        for kind, name in (("a", "randlora_A"), ("b", "randlora_B")):
            whole = target.shared[name]
            if kind in target.names and not np.array_equal(target.read(kind, whole.shape), whole):
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
        own = [(_layer(place, "randlora_a"), _layer(place, "randlora_b")) for place in places]
        drawn = random_bases(config.rank, widest(places), config.projection_prng_key, config.bases)
        if all(_is_piece(pair, drawn) for pair in own):
            return RandLoraFormat()
        # What the pieces show of the bases; nobody reads the rest.
        a, b = (np.zeros_like(base) for base in drawn)
        for piece_a, piece_b in own:
            a[:, : piece_a.shape[1]] = piece_a
            b[: piece_b.shape[0], : piece_b.shape[1]] = piece_b
        for place, pair in zip(places, own, strict=True):
            if not _is_piece(pair, (a, b)):
                raise InputError(f"{place.title} has bases of its own; one folder holds one pair for all")
        return RandLoraFormat((a, b))

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        tensors = {"lambda": entry.params["randlora_lambda"], "gamma": entry.params["randlora_gamma"]}
        return tensors if self.bases is None else tensors | {"a": self.bases[0][:, None], "b": self.bases[1]}

    def shared_of(self, places: list[Site]) -> dict[str, np.ndarray]:
        return {} if self.bases is None else {"randlora_A": self.bases[0][:, None], "randlora_B": self.bases[1]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        bases = same(entries, "bases")
        sparse = {"sparse": bases == "sparse", "very_sparse": bases == "very_sparse"}
        return super().written(entries, targets) | sparse | {"save_projection": self.bases is not None}


def _layer(place: Site, name: str) -> np.ndarray:
    """A frozen array of the first layer of a place."""
    array = host(place.adapter.params()[name])
    return array.reshape(-1, *array.shape[-(2 if name == "randlora_a" else 3) :])[0]


def _is_piece(pair: tuple[np.ndarray, ...], whole: tuple[np.ndarray, ...]) -> bool:
    (a, b), (whole_a, whole_b) = pair, whole
    return bool(np.array_equal(a, whole_a[:, : a.shape[1]]) and np.array_equal(b, whole_b[: b.shape[0], : b.shape[1]]))
