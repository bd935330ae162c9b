"""PEFT's OFT: the upper triangles of a target's skew-symmetric blocks."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.config.limits import COUNT, NUMBERS
from mora_jax.adapters.methods.oft import OFTConfig, block_shape
from mora_jax.errors import InputError, refused
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Format, Target, require_number, same

_SINCE = "0.18.0"  # the PEFT whose series for rotations this is


class OftFormat(Format):
    peft_type = "OFT"
    config = OFTConfig
    methods = ("oft",)
    tensor_names: ClassVar[Mapping[str, str]] = {"triangles": "oft_R.weight"}
    settings: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "block_share": ("block_share", False),
        "num_cayley_neumann_terms": ("num_cayley_neumann_terms", 5),
        "r": ("blocks", 0),
        "use_cayley_neumann": ("use_cayley_neumann", True),
    }
    # PEFT reads module_dropout, and drops nothing. Of r and oft_block_size one is 0.
    fields = frozenset({"coft", "eps", "module_dropout", "oft_block_size"})
    refused = ("coft",)
    bias_name = "oft_only"

    def check(self, values: dict[str, Any], where: str) -> None:
        super().check(values, where)
        require_number(values, where, "oft_block_size", COUNT, 32)
        require_number(values, where, "module_dropout", NUMBERS["dropout"], 0.0)
        if bool(values.get("r", 0)) == bool(values.get("oft_block_size", 32)):
            raise InputError(f"{where}: one of r and oft_block_size must be above 0, and the other 0")
        version = [int(number) for number in re.findall(r"\d+", str(values.get("peft_version", "")))[:2]]
        if values.get("use_cayley_neumann", True) and version < [0, 18]:
            raise InputError(
                f"{where}: use_cayley_neumann is set and peft_version is not {_SINCE} or newer, and older ones took "
                "another series: merge the adapter with the PEFT that made it"
            )

    def needs_base(self, values: dict[str, Any]) -> bool:
        return True  # what it changes is a rotation of the base

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        size = OFTConfig.block_size if values.get("r") else values.get("oft_block_size", 32)
        share, series = bool(values.get("block_share")), values.get("use_cayley_neumann", True) is not False
        with refused(target.path):
            config = self.configured(values, target.path, block_size=size, block_share=share, use_cayley_neumann=series)
            count, size = block_shape(config, target.place.in_features)
        shape = (1 if config.block_share else count, size * (size - 1) // 2)
        return AdapterValues(config, {"oft_r": target.read("triangles", shape)})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {"triangles": entry.params["oft_r"]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        fields = super().written(entries, targets)
        size = 0 if fields["r"] else same(entries, "block_size")
        own = {"coft": False, "eps": 6e-05, "module_dropout": 0.0, "peft_version": _SINCE}
        return fields | own | {"oft_block_size": size}
