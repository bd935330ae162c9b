"""PEFT's MISS: one block a target, whose shape depends on `init_weights`."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.methods.miss import MiSSConfig
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Format, Target, require, same


class MissFormat(Format):
    peft_type = "MISS"
    config = MiSSConfig
    methods = ("miss",)
    tensor_names: ClassVar[Mapping[str, str]] = {"block": "miss_block"}
    settings: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 64),
        "miss_dropout": ("dropout", 0.0),
        "mini_r": ("mini_rank", 1),
    }
    bias_name = "MiSS_only"
    fan_in_fan_out = False

    def check(self, values: dict[str, Any], where: str) -> None:
        super().check(values, where)
        start = values.get("init_weights", True)
        require(values, where, "init_weights", start in (True, False, "bat", "mini"), 'true, false, "bat" or "mini"')
        if start == "bat":
            raise InputError(f'{where}: init_weights "bat" is not supported; merge it in PEFT')

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        mini = values.get("init_weights") == "mini"
        config = self.configured(values, target.path, form="mini" if mini else "standard")
        width = config.mini_rank if mini else target.place.out_features
        return AdapterValues(config, {"miss_block": target.read("block", (config.rank, width))})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {"block": entry.params["miss_block"]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        start = "mini" if same(entries, "form") == "mini" else True
        return super().written(entries, targets) | {"init_weights": start}
