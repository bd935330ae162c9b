"""PEFT's ADALORA: P, λ and Q of each target; after pruning, those of the triplets that are left."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.base import host
from mora_jax.adapters.config import AdaLoRAConfig
from mora_jax.adapters.sites import Site
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import PREFIX, Format, Target, require, same
from mora_jax.interop.peft.lora import LoraFormat

# The fields of the schedule, by their names here.
_SCHEDULE = {
    "tinit": "tinit",
    "tfinal": "tfinal",
    "deltaT": "delta_t",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orth_weight",
    "total_step": "total_steps",
    "target_r": "target_rank",
}
_KEY = re.compile(rf"({re.escape(PREFIX)})?(?P<path>.+)\.lora_E(\.\w+)?")


@dataclass(frozen=True)
class AdaloraFormat(Format):
    """A triplet whose λ is exactly 0 does nothing: it was pruned, and is left out.

    Attributes:
        fresh: whether all λ of a model are 0, before the first step; then nothing is left out.
    """

    fresh: bool = False

    peft_type: ClassVar[str] = "ADALORA"
    config: ClassVar[type[AdaLoRAConfig]] = AdaLoRAConfig
    settings: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "init_r": ("rank", 12),
        "lora_alpha": ("alpha", 8),
        "lora_dropout": ("dropout", 0.0),
    }
    init_name: ClassVar[str] = "init_lora_weights"
    methods: ClassVar[tuple[str, ...]] = ("adalora",)
    tensor_names: ClassVar[Mapping[str, str]] = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
    refused: ClassVar[tuple[str, ...]] = (*LoraFormat.refused, "use_dora", "loftq_config")
    # PEFT inherits all of LoRA's fields, of which AdaLoRA reads few: r, alpha_pattern and use_rslora change nothing.
    fields: ClassVar[frozenset[str]] = LoraFormat.fields | {"r", *_SCHEDULE}

    def check(self, values: dict[str, Any], where: str) -> None:
        super().check(values, where)
        try:
            self.configured(values, "any")
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}") from None
        pattern, rank = values.get("rank_pattern"), values.get("init_r", 12)
        require(values, where, "rank_pattern", pattern is None or isinstance(pattern, dict), "names with lists")
        for key, mask in (pattern or {}).items():
            good = isinstance(mask, list) and len(mask) == rank and all(type(on) is bool for on in mask)
            if not good or _KEY.fullmatch(key) is None:
                raise InputError(f"{where}: rank_pattern of {key!r} must be a list of {rank} truth values (init_r)")

    def configured(self, values: Mapping[str, Any], path: str, **extra: Any) -> AdaLoRAConfig:
        schedule = {ours: values[name] for name, ours in _SCHEDULE.items() if values.get(name) is not None}
        return super().configured(values, path, **schedule, **extra)

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        """What was pruned stays as columns, numbers and rows of zeros, so that all layers have one shape."""
        config, place = self.configured(values, target.path), target.place
        used = _used(values, target.path, config.rank)
        count = int(used.sum())
        a, e = target.read("a", (count, place.in_features)), target.read("e", (count, 1))
        b = target.read("b", (place.out_features, count))
        lora_a = np.zeros((place.in_features, config.rank), a.dtype)
        lora_e = np.zeros(config.rank, e.dtype)
        lora_b = np.zeros((config.rank, place.out_features), b.dtype)
        lora_a[:, used], lora_e[used], lora_b[used] = a.T, e[:, 0], b.T
        return AdapterValues(config, {"lora_a": lora_a, "lora_e": lora_e, "lora_b": lora_b})

    def for_model(self, places: list[Site]) -> AdaloraFormat:
        values = [host(place.adapter.params()["lora_e"]) for place in places]
        return AdaloraFormat(fresh=not any(value.any() for value in values))

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        params, used = entry.params, self._left(entry)
        a, e, b = params["lora_a"][:, used].T, params["lora_e"][used][:, None], params["lora_b"][used].T
        return {"a": a, "b": b, "e": e}

    def kept(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {"lora_e": entry.params["lora_e"]}

    def _left(self, entry: AdapterEntry) -> np.ndarray:
        """Which triplets are written, `[rank]`."""
        return (entry.params["lora_e"] != 0) | self.fresh

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        masks = {f"{entry.path}.lora_E": self._left(entry).tolist() for entry in entries}
        pruned = not all(all(mask) for mask in masks.values())
        return super().written(entries, targets) | {
            "alpha_pattern": {},
            "exclude_modules": None,
            "r": 8,  # PEFT's default, which it warns to leave alone
            "rank_pattern": masks if pruned else None,
            **{name: same(entries, ours) for name, ours in _SCHEDULE.items()},
        }


def _used(values: dict[str, Any], path: str, rank: int) -> np.ndarray:
    """Which triplets of a target are left, `[rank]`."""
    for key, mask in (values.get("rank_pattern") or {}).items():
        match = _KEY.fullmatch(key)
        if match is not None and match["path"] == path:
            return np.array(mask)
    return np.ones(rank, bool)
