"""PEFT's HIRA: two factors a target, whose product multiplies the base's kernel entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.methods.hira import HiRAConfig
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Format, Target, require, require_positive, require_share, same


class HiraFormat(Format):
    peft_type = "HIRA"
    methods = ("hira",)
    tensor_names: ClassVar[Mapping[str, str]] = {"hira_a": "hira_A", "hira_b": "hira_B"}
    fields = frozenset({"hira_dropout", "init_weights", "r", "rank_pattern"})

    def check(self, values: dict[str, Any], where: str) -> None:
        require_positive(values, where, "r", 32, whole=True)
        require_share(values, where, "hira_dropout")
        require(values, where, "bias", values.get("bias", "none") == "none", "none, the only one that HIRA has")

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        return {"hira_a", "hira_b"}, {"hira_a", "hira_b"}

    def needs_base(self, values: dict[str, Any]) -> bool:
        return True  # what it changes is a multiple of the base

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        rank = values.get("r", 32)  # PEFT has a rank_pattern, too, and makes all layers of rank r whatever it says
        config = HiRAConfig(rank=rank, dropout=values.get("hira_dropout", 0.0), targets=(target.path,))
        shapes = {"hira_a": (rank, target.place.in_features), "hira_b": (target.place.out_features, rank)}
        return AdapterValues(config, {name: target.read(name, shape).T for name, shape in shapes.items()})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {name: entry.params[name].T for name in self.tensor_names}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        return {
            "hira_dropout": max(entry.config.dropout for entry in entries),
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "r": same(entries, "rank"),
            "rank_pattern": {},
            "target_modules": targets,
        }
