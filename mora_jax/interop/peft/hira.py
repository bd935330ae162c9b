"""PEFT's HIRA: two factors a target, whose product multiplies the base's kernel entry by entry."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.methods.hira import HiRAConfig
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Format, Target


class HiraFormat(Format):
    peft_type = "HIRA"
    config = HiRAConfig
    methods = ("hira",)
    tensor_names: ClassVar[Mapping[str, str]] = {"hira_a": "hira_A", "hira_b": "hira_B"}
    settings: ClassVar[Mapping[str, tuple[str, Any]]] = {"r": ("rank", 32), "hira_dropout": ("dropout", 0.0)}
    # PEFT has a rank_pattern, too, and makes all layers of rank r whatever it says.
    fields = frozenset({"rank_pattern"})
    bias_name = ""

    def needs_base(self, values: dict[str, Any]) -> bool:
        return True  # what it changes is a multiple of the base

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        config = self.configured(values, target.path)
        shapes = {"hira_a": (config.rank, target.place.in_features), "hira_b": (target.place.out_features, config.rank)}
        return AdapterValues(config, {name: target.read(name, shape).T for name, shape in shapes.items()})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {name: entry.params[name].T for name in self.tensor_names}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        return super().written(entries, targets) | {"rank_pattern": {}}
