"""`adapter_config.json`: the `peft_type`s that are known, which modules it names, and fields of newer versions."""

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from flax import nnx

from mora_jax.errors import InputError
from mora_jax.interop.peft.adalora import AdaloraFormat
from mora_jax.interop.peft.format import Format, is_names, require, require_names
from mora_jax.interop.peft.lora import BitfitFormat, LoraFormat
from mora_jax.interop.peft.other_types import HiraFormat, Ia3Format, MissFormat, OftFormat
from mora_jax.interop.peft.shared_bases import RandLoraFormat, VeraFormat

FORMATS: tuple[Format, ...] = (
    BitfitFormat(),
    LoraFormat(),
    VeraFormat(),
    Ia3Format(),
    AdaloraFormat(),
    HiraFormat(),
    MissFormat(),
    RandLoraFormat(),
    OftFormat(),
)
_EXTRA = "peft_fields"  # the attribute of a model that holds fields of newer versions, as JSON


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What an `adapter_config.json` says.

    Attributes:
        format: its `peft_type`.
        values: the file's fields.
        where: the file, for error messages.
        whole_components: whether a name in `modules_to_save` stands for whole components of a path. PEFT takes any path
            that ends with its letters, so that `norm` is `final_norm`, too; models of one's own are not so regular.
        experts: the paths of those that `target_parameters` names, each with that of its parameter.
    """

    format: Format
    values: dict[str, Any]
    where: str
    whole_components: bool = False
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def matches(self, path: str) -> bool:
        """Whether PEFT would adapt the module at `path`."""
        if self.saves(path):
            return False
        if path in self.experts:
            return True
        targets = self.values.get("target_modules")
        excluded = self.values.get("exclude_modules")
        if excluded and _named(excluded, path):
            return False
        if targets is None:
            targets = list(self.format.default_targets)
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return path.rpartition(".")[2] not in ("lm_head", "embed_tokens")
        if not _named(targets, path):
            return False
        if not isinstance(targets, str) and path in targets:
            return True  # a whole path, whatever layers are named
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == [] or isinstance(targets, str):
            return True
        patterns = self.values.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
            if match:
                return int(match.group(1)) in ([layers] if isinstance(layers, int) else layers)
        return False

    @property
    def bias(self) -> str:
        """Which biases the file holds: "none", "lora_only" (of adapted layers) or "all"."""
        return self.format.bias(self.values)

    @property
    def unknown(self) -> dict[str, Any]:
        """Fields of a newer PEFT."""
        return {name: value for name, value in self.values.items() if name not in self.format.known}

    def saves(self, path: str) -> bool:
        """Whether PEFT trains the module at `path`, or one around it, whole."""
        names = self.values.get("modules_to_save") or []
        parts = path.split(".")
        above = [".".join(parts[: end + 1]) for end in range(len(parts))]
        if self.whole_components:
            return any(_named(names, module) for module in above)
        return any(module.endswith(name) for name in names for module in above)


def _named(names: str | list[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def format_of(values: dict[str, Any], where: str) -> Format:
    """The type of an `adapter_config.json`.

    Raises:
        InputError: PEFT has it, or not, but it is not supported here.
    """
    kind = values.get("peft_type")
    form = next((form for form in FORMATS if form.peft_type == kind and form.holds(values)), None)
    if form is None:
        known = dict.fromkeys(form.peft_type for form in FORMATS)
        raise InputError(f"{where}: peft_type must be one of {', '.join(known)}, found {kind!r}")
    return form


def read_adapter_config(values: dict[str, Any], where: str) -> AdapterFile:
    """Checks the fields of an `adapter_config.json`.

    Raises:
        InputError: for another kind of adapter, or a field that changes the function in an unsupported way.
    """
    form = format_of(values, where)
    tokens = values.get("trainable_token_indices")
    if isinstance(tokens, dict) and len(tokens) == 1:  # by the name of the table, which its tensors say, too
        values = values | {"trainable_token_indices": next(iter(tokens.values()))}
    for name in form.refused:
        if values.get(name):
            raise InputError(f"{where}: {name} is set, which is not supported")
    form.check(values, where)
    check_common(values, where)
    file = AdapterFile(form, values, where)
    if file.unknown:
        names = ", ".join(sorted(file.unknown))
        warnings.warn(f"{where}: unknown fields are kept, but have no effect: {names}", stacklevel=3)
    return file


def check_common(values: dict[str, Any], where: str) -> None:
    """Raises `InputError` for a field of all types whose value is of no kind that it can have."""
    base = values.get("base_model_name_or_path")
    require(values, where, "base_model_name_or_path", base is None or isinstance(base, str), "a path or a hub id")
    saved = values.get("modules_to_save")
    require(values, where, "modules_to_save", saved is None or is_names(saved), "a list of names")
    for name in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters"):
        require_names(values, where, name)
    layers = values.get("layers_to_transform")
    indices = layers if isinstance(layers, list) else [layers]
    good = layers is None or all(isinstance(index, int) and not isinstance(index, bool) for index in indices)
    require(values, where, "layers_to_transform", good, "a layer's number or a list of them")


def put_extra_fields(model: nnx.Module, fields: Mapping[str, Any]) -> None:
    """Notes the fields of a newer PEFT on a model, to be written back when its adapter is saved."""
    if fields or extra_fields(model):
        setattr(model, _EXTRA, json.dumps(dict(fields), sort_keys=True))


def extra_fields(model: nnx.Module) -> dict[str, Any]:
    """Fields that `put_extra_fields` noted."""
    return json.loads(getattr(model, _EXTRA, "{}"))
