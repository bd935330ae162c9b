"""BitFit as a PEFT folder: PEFT has no method that trains biases alone, but its LoRA has a bias of its own.

With `lora_bias` PEFT's LoRA computes `y = x W + s (x A B + β)`. With A and B zero nothing but β is left, and as the
gradient of each of them is a product with the other, neither can be trained: such a LoRA is BitFit, in PEFT as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.config import BitFitConfig, LoRAConfig
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Target, require
from mora_jax.interop.peft.lora import LoraFormat, lora_fields, scaling_at


class BitfitFormat(LoraFormat):
    methods = ("bitfit",)
    tensor_names: ClassVar[Mapping[str, str]] = {**LoraFormat.tensor_names, "added": "lora_B.bias"}
    biases_alone = True
    refused = tuple(name for name in LoraFormat.refused if name != "lora_bias")

    def holds(self, values: dict[str, Any]) -> bool:
        return bool(values.get("lora_bias"))

    def check(self, values: dict[str, Any], where: str) -> None:
        super().check(values, where)
        require(values, where, "bias", values.get("bias", "none") == "none", "none beside lora_bias")
        for name in ("use_dora", "use_mora"):
            if values.get(name):
                raise InputError(f"{where}: {name} beside lora_bias is not supported")

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        return {"a", "b", "added"}, {"a", "b", "added"}

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        adapter_values = super().read(values, target)
        if adapter_values.values["lora_a"].any() or adapter_values.values["lora_b"].any():
            raise InputError(
                f"{target.files.folder}: lora_bias beside a LoRA that is not zero, as in {target.names['a']}, is not "
                "supported; merge it in PEFT"
            )
        change = target.read("added", (target.place.out_features,)) * np.float32(scaling_at(values, target.path))
        return AdapterValues(BitFitConfig(targets=(target.path,)), {"bias": change})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        zero_a = np.zeros((1, entry.in_features), np.float32)
        zero_b = np.zeros((entry.out_features, 1), np.float32)
        return {"a": zero_a, "b": zero_b, "added": entry.params["bias"]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        config = LoRAConfig(rank=1, alpha=1.0)
        return lora_fields(config, targets=targets, alpha=1.0, ranks={}, alphas={}) | {"lora_bias": True}
