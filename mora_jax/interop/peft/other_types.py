"""PEFT's HIRA, IA3, MISS and OFT: types with one tensor or two a target, and few settings."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.config import IA3Config
from mora_jax.adapters.config.limits import COUNT, NUMBERS
from mora_jax.adapters.config.patterns import exactly
from mora_jax.adapters.methods.hira import HiRAConfig
from mora_jax.adapters.methods.miss import MiSSConfig
from mora_jax.adapters.methods.oft import OFTConfig, block_shape
from mora_jax.errors import InputError, refused
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Format, Target, require, require_names, require_number, same


class HiraFormat(Format):
    """Two factors a target, whose product multiplies the base's kernel entry by entry."""

    peft_type = "HIRA"
    multiplies_base = True
    config = HiRAConfig
    methods = ("hira",)
    tensor_names: ClassVar[Mapping[str, str]] = {"hira_a": "hira_A", "hira_b": "hira_B"}
    settings: ClassVar[Mapping[str, tuple[str, Any]]] = {"r": ("rank", 32), "hira_dropout": ("dropout", 0.0)}
    # PEFT has a rank_pattern, too, and makes all layers of rank r whatever it says.
    fields = frozenset({"rank_pattern"})
    bias_name = ""

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        config = self.configured(values, target.path)
        shapes = {"hira_a": (config.rank, target.place.in_features), "hira_b": (target.place.out_features, config.rank)}
        return AdapterValues(config, {name: target.read(name, shape).T for name, shape in shapes.items()})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {name: entry.params[name].T for name in self.tensor_names}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        return super().written(entries, targets) | {"rank_pattern": {}}


_FEEDFORWARD = ("down_proj",)


class Ia3Format(Format):
    """One vector a target, on inputs for feed-forward modules and on outputs for the others."""

    peft_type = "IA3"
    multiplies_base = True
    config = IA3Config
    methods = ("ia3",)
    tensor_names: ClassVar[Mapping[str, str]] = {"l": "ia3_l"}
    fields = frozenset({"feedforward_modules"})
    init_name = "init_ia3_weights"
    bias_name = ""
    default_targets = ("k_proj", "v_proj", "down_proj")

    def check(self, values: dict[str, Any], where: str) -> None:
        super().check(values, where)
        require_names(values, where, "feedforward_modules")

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        inputs = _is_feedforward(values.get("feedforward_modules"), target.path)
        name = (target.path.rpartition(".")[2],)
        config = self.configured(values, target.path, feedforward=name if inputs else ())
        shape = (1, target.place.in_features) if inputs else (target.place.out_features, 1)
        return AdapterValues(config, {"ia3_l": target.read("l", shape).reshape(-1)})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        return {"l": entry.params["ia3_l"].reshape((1, -1) if entry.config.feedforward else (-1, 1))}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        inputs = {entry.path: bool(entry.config.feedforward) for entry in entries}
        paths = sorted(path for path, on in inputs.items() if on)
        names = sorted({path.rpartition(".")[2] for path in paths})
        # PEFT takes any path that ends as a name of a list does, and wants the list among that of the targets. So
        # names, where they tell the two apart, then whole paths, then an expression for them.
        forms: list[tuple[list[str] | str, list[str] | str]] = [(exactly(paths) if paths else [], targets)]
        if not isinstance(targets, str):
            forms = [(names, targets), (paths, sorted(inputs)), *forms]
        for feedforward, among in forms:
            told = all(_is_feedforward(feedforward, path) == on for path, on in inputs.items())
            if told and (isinstance(feedforward, str) or set(feedforward) <= set(among)):
                break
        return {"feedforward_modules": feedforward, self.init_name: True, "target_modules": among}


def _is_feedforward(names: str | list[str] | None, path: str) -> bool:
    """As PEFT tells it: a list names ends of paths, whole components or not."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path.endswith(name) for name in (_FEEDFORWARD if names is None else names))


class MissFormat(Format):
    """One block a target, whose shape depends on `init_weights`."""

    peft_type = "MISS"
    config = MiSSConfig
    methods = ("miss",)
    tensor_names: ClassVar[Mapping[str, str]] = {"miss_block": "miss_block"}
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
        return AdapterValues(config, {"miss_block": target.read("miss_block", (config.rank, width))})

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        start = "mini" if same(entries, "form") == "mini" else True
        return super().written(entries, targets) | {"init_weights": start}


_OFT_SINCE = "0.18.0"  # the PEFT whose series for rotations this is


class OftFormat(Format):
    """The upper triangles of a target's skew-symmetric blocks."""

    peft_type = "OFT"
    multiplies_base = True
    config = OFTConfig
    methods = ("oft",)
    tensor_names: ClassVar[Mapping[str, str]] = {"oft_r": "oft_R.weight"}
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
                f"{where}: use_cayley_neumann is set and peft_version is not {_OFT_SINCE} or newer, and older ones "
                "took another series: merge the adapter with the PEFT that made it"
            )

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        size = OFTConfig.block_size if values.get("r") else values.get("oft_block_size", 32)
        share, series = bool(values.get("block_share")), values.get("use_cayley_neumann", True) is not False
        with refused(target.path):
            config = self.configured(values, target.path, block_size=size, block_share=share, use_cayley_neumann=series)
            count, size = block_shape(config, target.place.in_features)
        shape = (1 if config.block_share else count, size * (size - 1) // 2)
        return AdapterValues(config, {"oft_r": target.read("oft_r", shape)})

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        fields = super().written(entries, targets)
        size = 0 if fields["r"] else same(entries, "block_size")
        defaults = {"coft": False, "eps": 6e-05, "module_dropout": 0.0, "peft_version": _OFT_SINCE}
        return fields | defaults | {"oft_block_size": size}
