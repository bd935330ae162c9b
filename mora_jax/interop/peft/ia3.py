"""PEFT's IA3: one vector a target, on inputs for feed-forward modules and on outputs for the others."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.config import IA3Config
from mora_jax.adapters.config.patterns import exactly
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Format, Target, require_names

_FEEDFORWARD = ("down_proj",)


class Ia3Format(Format):
    peft_type = "IA3"
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

    def needs_base(self, values: dict[str, Any]) -> bool:
        return True  # what it changes is a multiple of the base

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
        forms: list[tuple[list[str] | str, list[str] | str]] = [(exactly(paths), targets)]
        if not isinstance(targets, str):
            forms = [(names, targets), (paths, sorted(inputs)), *forms]
        for named, among in forms:
            told = all(_is_feedforward(named, path) == on for path, on in inputs.items())
            if told and (isinstance(named, str) or set(named) <= set(among)):
                break
        return {"feedforward_modules": named, self.init_name: True, "target_modules": among}


def _is_feedforward(names: str | list[str] | None, path: str) -> bool:
    """As PEFT tells it: a list names ends of paths, whole components or not."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path.endswith(name) for name in (_FEEDFORWARD if names is None else names))
