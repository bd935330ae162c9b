"""PEFT's MISS: one block a target, whose shape depends on `init_weights`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.methods.miss import MiSSConfig
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import (
    Format,
    Target,
    require,
    require_bias,
    require_positive,
    require_share,
    same,
)


class MissFormat(Format):
    peft_type = "MISS"
    methods = ("miss",)
    tensor_names: ClassVar[Mapping[str, str]] = {"block": "miss_block"}
    fields = frozenset({"init_weights", "mini_r", "miss_dropout", "r"})
    bias_name = "MiSS_only"
    fan_in_fan_out = False

    def check(self, values: dict[str, Any], where: str) -> None:
        require_positive(values, where, "r", 64, whole=True)
        require_positive(values, where, "mini_r", 1, whole=True)
        require_share(values, where, "miss_dropout")
        require_bias(values, where, self.bias_name)
        start = values.get("init_weights", True)
        require(values, where, "init_weights", start in (True, False, "bat", "mini"), 'true, false, "bat" or "mini"')
        if start == "bat":
            raise InputError(f'{where}: init_weights "bat" is not supported; merge it in PEFT')

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        return {"block"}, {"block"}

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        mini, bias = values.get("init_weights") == "mini", values.get("bias", "none")
        config = MiSSConfig(
            rank=values.get("r", 64),
            dropout=values.get("miss_dropout", 0.0),
            targets=(target.path,),
            form="mini" if mini else "standard",
            mini_rank=values.get("mini_r", 1),
            bias="lora_only" if bias == self.bias_name else bias,
        )
        width = config.mini_rank if mini else target.place.out_features
        return AdapterValues(config, {"miss_block": target.read("block", (config.rank, width))})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {"block": entry.params["miss_block"]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        bias = same(entries, "bias")
        return {
            "bias": self.bias_name if bias == "lora_only" else bias,
            "init_weights": "mini" if same(entries, "form") == "mini" else True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "mini_r": same(entries, "mini_rank"),
            "miss_dropout": max(entry.config.dropout for entry in entries),
            "r": same(entries, "rank"),
            "target_modules": targets,
        }
