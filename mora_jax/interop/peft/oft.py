"""PEFT's OFT: the upper triangles of a target's skew-symmetric blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.methods.oft import OFTConfig, block_shape
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Format, Target, require, require_bias, require_share, same

_SINCE = "0.18.0"  # the PEFT whose series for rotations this is


class OftFormat(Format):
    peft_type = "OFT"
    methods = ("oft",)
    tensor_names: ClassVar[Mapping[str, str]] = {"triangles": "oft_R.weight"}
    fields = frozenset(
        {
            "block_share",
            "coft",
            "eps",
            "init_weights",
            "module_dropout",  # PEFT reads it, and drops nothing
            "num_cayley_neumann_terms",
            "oft_block_size",
            "r",
            "use_cayley_neumann",
        }
    )
    refused = ("coft",)
    bias_name = "oft_only"

    def check(self, values: dict[str, Any], where: str) -> None:
        sizes = values.get("r", 0), values.get("oft_block_size", 32)
        for name, number in zip(("r", "oft_block_size"), sizes, strict=True):
            require(values, where, name, type(number) is int and number >= 0, "a whole number of at least 0")
        if bool(sizes[0]) == bool(sizes[1]):
            raise InputError(f"{where}: one of r and oft_block_size must be above 0, and the other 0")
        for name in ("block_share", "use_cayley_neumann"):
            require(values, where, name, values.get(name) in (None, True, False), "true or false")
        terms = values.get("num_cayley_neumann_terms", 5)
        require(values, where, "num_cayley_neumann_terms", type(terms) is int and terms >= 2, "2 or more")
        require_share(values, where, "module_dropout")
        require_bias(values, where, self.bias_name)
        version = [int(number) for number in re.findall(r"\d+", str(values.get("peft_version", "")))[:2]]
        if values.get("use_cayley_neumann", True) and version < [0, 18]:
            raise InputError(
                f"{where}: use_cayley_neumann is set and peft_version is not {_SINCE} or newer, and older ones took "
                "another series: merge the adapter with the PEFT that made it"
            )

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        return {"triangles"}, {"triangles"}

    def needs_base(self, values: dict[str, Any]) -> bool:
        return True  # what it changes is a rotation of the base

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        bias, blocks = values.get("bias", "none"), values.get("r", 0)
        try:
            config = OFTConfig(
                block_size=OFTConfig.block_size if blocks else values.get("oft_block_size", 32),
                targets=(target.path,),
                blocks=blocks,
                block_share=bool(values.get("block_share")),
                use_cayley_neumann=values.get("use_cayley_neumann", True) is not False,
                num_cayley_neumann_terms=values.get("num_cayley_neumann_terms", 5),
                bias="lora_only" if bias == self.bias_name else bias,
            )
            count, size = block_shape(config, target.place.in_features)
        except ValueError as error:
            raise InputError(f"{target.path}: {error}") from None
        shape = (1 if config.block_share else count, size * (size - 1) // 2)
        return AdapterValues(config, {"oft_r": target.read("triangles", shape)})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {"triangles": entry.params["oft_r"]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        bias, blocks = same(entries, "bias"), same(entries, "blocks")
        return {
            "bias": self.bias_name if bias == "lora_only" else bias,
            "block_share": same(entries, "block_share"),
            "coft": False,
            "eps": 6e-05,
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "module_dropout": 0.0,
            "num_cayley_neumann_terms": same(entries, "num_cayley_neumann_terms"),
            "oft_block_size": 0 if blocks else same(entries, "block_size"),
            "peft_version": _SINCE,
            "r": blocks,
            "target_modules": targets,
            "use_cayley_neumann": same(entries, "use_cayley_neumann"),
        }
