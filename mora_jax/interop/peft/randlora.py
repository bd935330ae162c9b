"""PEFT's RANDLORA: two diagonals a target, and one pair of bases for all, drawn from its seed or in the file.

With `save_projection`, PEFT's default, the file holds the pair beside the model and once more at every target. What is
written here has it only where the bases are not those of the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry, adapter_at
from mora_jax.adapters.base import host
from mora_jax.adapters.matching.targets import Place
from mora_jax.adapters.methods.randlora import RandLoRAConfig, random_bases
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import (
    Format,
    Target,
    first_of,
    plain,
    require,
    require_bias,
    require_positive,
    require_share,
    same,
)
from mora_jax.interop.safetensors_io import TensorFiles


@dataclass(frozen=True)
class RandLoraFormat(Format):
    """The type.

    Attributes:
        bases: A and B of the file that is written; None where PEFT draws the same from the seed.
    """

    bases: tuple[np.ndarray, np.ndarray] | None = None

    peft_type: ClassVar[str] = "RANDLORA"
    methods: ClassVar[tuple[str, ...]] = ("randlora",)
    tensor_names: ClassVar[Mapping[str, str]] = {
        "lambda": "randlora_lambda",
        "gamma": "randlora_gamma",
        "a": "randlora_A",
        "b": "randlora_B",
    }
    shared_names: ClassVar[tuple[str, ...]] = ("randlora_A", "randlora_B")
    bias_name: ClassVar[str] = "randlora_only"
    fields: ClassVar[frozenset[str]] = frozenset(
        {
            "init_weights",
            "projection_prng_key",
            "r",
            "randlora_alpha",
            "randlora_dropout",
            "save_projection",
            "sparse",
            "very_sparse",
        }
    )

    def check(self, values: dict[str, Any], where: str) -> None:
        require_positive(values, where, "r", 32, whole=True)
        require_positive(values, where, "randlora_alpha", 640)
        require_share(values, where, "randlora_dropout")
        require_bias(values, where, self.bias_name)
        key = values.get("projection_prng_key", 0)
        require(values, where, "projection_prng_key", type(key) is int and key >= 0, "a whole number of at least 0")

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        needed = {"lambda", "gamma"}
        return needed, needed | {"a", "b"} if values.get("save_projection", True) else needed

    def shared(
        self, values: dict[str, Any], names: Mapping[str, str], files: TensorFiles, found: list[Place]
    ) -> dict[str, np.ndarray]:
        rank, seed = values.get("r", 32), values.get("projection_prng_key", 0)
        widths = max(place.in_features for place in found), max(place.out_features for place in found)
        if not values.get("save_projection", True):
            if names:
                raise InputError(
                    f"{files.folder}: save_projection is false, but there is {first_of(names)}, which PEFT would leave "
                    "unread and redraw: set save_projection to true if the tensors are the bases to use"
                )
            a, b = random_bases(rank, widths, seed, _kind(values))
            return {"randlora_A": a[:, None], "randlora_B": b}
        absent = [name for name in self.shared_names if name not in names]
        if absent:
            raise InputError(f"{files.folder}: save_projection is true, but {' and '.join(absent)} are missing")
        smaller = max(min(place.in_features, place.out_features) for place in found)
        larger = max(widths)
        least = {"randlora_A": (rank, 1, smaller), "randlora_B": (larger, -(-smaller // rank), rank)}
        arrays = {}
        for name, wanted in least.items():
            shape, fixed = files.shapes[names[name]], 2 if name == "randlora_B" else 0
            long_enough = len(shape) == 3 and all(size >= low for size, low in zip(shape, wanted, strict=True))
            if not long_enough or shape[fixed] != rank:
                raise InputError(
                    f"{files.folder}: tensor {names[name]} has shape {list(shape)}, but it must be at least "
                    f"{list(wanted)}, of rank {rank}"
                )
            arrays[name] = files.read(names[name]).astype(np.float32)
        return arrays

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        for kind, name in (("a", "randlora_A"), ("b", "randlora_B")):
            whole = target.shared[name]
            if kind in target.names and not np.array_equal(target.read(kind, whole.shape), whole):
                raise InputError(f"{target.files.folder}: tensor {target.names[kind]} is not the {name} of the others")
        place, a, b = target.place, target.shared["randlora_A"][:, 0], target.shared["randlora_B"]
        bias, rank = values.get("bias", "none"), values.get("r", 32)
        smaller, larger = sorted((place.in_features, place.out_features))
        count = -(-smaller // rank)
        config = RandLoRAConfig(
            rank=rank,
            alpha=float(values.get("randlora_alpha", 640)),
            dropout=values.get("randlora_dropout", 0.0),
            targets=(target.path,),
            bases=_kind(values),
            projection_prng_key=values.get("projection_prng_key", 0),
            widths=(a.shape[1], b.shape[0]),
            bias="lora_only" if bias == self.bias_name else bias,
        )
        arrays = {
            "randlora_a": a[:, :smaller],
            "randlora_b": b[:larger, :count],
            "randlora_lambda": target.read("lambda", (rank, count)),
            "randlora_gamma": target.read("gamma", (count, smaller)),
        }
        return AdapterValues(config, arrays)

    def for_model(self, places: list[Place]) -> RandLoraFormat:
        config = adapter_at(places[0]).config
        widths = max(place.in_features for place in places), max(place.out_features for place in places)
        own = [(_layer(place, "randlora_a"), _layer(place, "randlora_b")) for place in places]
        drawn = random_bases(config.rank, widths, config.projection_prng_key, config.bases)
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

    def shared_of(self, places: list[Place]) -> dict[str, np.ndarray]:
        return {} if self.bases is None else {"randlora_A": self.bases[0][:, None], "randlora_B": self.bases[1]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        bias, bases = same(entries, "bias"), same(entries, "bases")
        return {
            "bias": self.bias_name if bias == "lora_only" else bias,
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "projection_prng_key": same(entries, "projection_prng_key"),
            "r": same(entries, "rank"),
            "randlora_alpha": plain(same(entries, "alpha")),
            "randlora_dropout": max(entry.config.dropout for entry in entries),
            "save_projection": self.bases is not None,
            "sparse": bases == "sparse",
            "target_modules": targets,
            "very_sparse": bases == "very_sparse",
        }


def _kind(values: dict[str, Any]) -> str:
    """PEFT looks at `very_sparse` first."""
    return "very_sparse" if values.get("very_sparse") else "sparse" if values.get("sparse") else "dense"


def _layer(place: Place, name: str) -> np.ndarray:
    """A frozen array of the first layer of a place."""
    array = host(adapter_at(place).params()[name])
    return array.reshape(-1, *array.shape[-(2 if name == "randlora_a" else 3) :])[0]


def _is_piece(pair: tuple[np.ndarray, ...], whole: tuple[np.ndarray, ...]) -> bool:
    (a, b), (whole_a, whole_b) = pair, whole
    return bool(np.array_equal(a, whole_a[:, : a.shape[1]]) and np.array_equal(b, whole_b[: b.shape[0], : b.shape[1]]))
