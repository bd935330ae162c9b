"""What differs between the `peft_type`s of PEFT's folders: fields, tensors, and what they mean.

Each type is a file of its own with a subclass of `Format`; `config.py` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flax import nnx

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.config.common import BIASES, CommonConfig
from mora_jax.adapters.config.limits import Number
from mora_jax.adapters.config.patterns import exactly
from mora_jax.adapters.sites import Site
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.safetensors_io import TensorFiles

# Fields of every type.
COMMON = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",  # says how the base is stored; adapters are stored alike
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)


@dataclass(frozen=True)
class Target:
    """One adapted matrix of a file that is read.

    Attributes:
        path: its module path.
        place: where it is in the model.
        names: its tensors' names in the file, by the keys of the type's `tensor_names`.
        files: the file.
        shared: arrays that all targets share, as the file has them.
        setting_path: the path by which patterns name it: of experts that of their parameter in transformers.
    """

    path: str
    place: Site
    names: Mapping[str, str]
    files: TensorFiles
    shared: Mapping[str, np.ndarray]
    setting_path: str

    def read(self, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor in float32, or float64 where the file is; an `InputError` where it has another shape."""
        name, window = self.names[kind], torch_window(self.place)
        if len(self.files.shapes[name]) == len(shape):
            return read_tensor(self.files, name, shape)
        if window is None and isinstance(self.place.layer, nnx.Conv):
            raise InputError(
                f"{self.files.folder}: {name} is PEFT's, whose adapter is another one than on {self.path}: it "
                "reads all groups of channels, dilates no kernel and wraps no input"
            )
        window = window or ()
        tensor = read_tensor(self.files, name, _in_window(kind, np.empty(shape, np.bool_), window).shape)
        return (np.moveaxis(tensor, 1, -1) if kind == "a" else tensor).reshape(shape)


class Format:
    """A `peft_type`.

    Attributes:
        peft_type: its name in files.
        config: the configuration of the method that it holds.
        settings: the fields of its config that are settings of that configuration: the setting, and PEFT's default.
        fields: the other fields of its config beside `COMMON`.
        refused: those that, when set, change the function in a way that is not supported here.
        default_targets: what PEFT adapts in the families here where the config names nothing.
        init_name: what its config calls the start of the adapter.
        bias_name: what its config calls the biases of adapted layers; empty for a type that trains none.
        methods: what is written as this type, by `Adapter.file_method`.
        tensor_names: what files call a target's values, by the short names that the methods below take.
        embedding_names: those of a target that is an embedding table, where they differ.
        shared_names: what files call the arrays that all targets share, which stand beside the model.
        fan_in_fan_out: whether its config has the field of that name.
        convolutions: whether PEFT has it on torch's convolutions, as two of them.
        biases_alone: whether the type's adapters train biases and nothing else.
        multiplies_base: whether what they change is a multiple or a rotation of the base.
    """

    peft_type: ClassVar[str]
    config: ClassVar[type[CommonConfig]]
    settings: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    methods: ClassVar[tuple[str, ...]]
    tensor_names: ClassVar[Mapping[str, str]]
    embedding_names: ClassVar[Mapping[str, str]] = {}
    shared_names: ClassVar[tuple[str, ...]] = ()
    fan_in_fan_out: ClassVar[bool] = True
    convolutions: ClassVar[bool] = False
    biases_alone: ClassVar[bool] = False
    multiplies_base: ClassVar[bool] = False
    fields: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[tuple[str, ...]] = ()
    default_targets: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj")
    init_name: ClassVar[str] = "init_weights"
    bias_name: ClassVar[str] = "lora_only"

    def holds(self, values: dict[str, Any]) -> bool:
        """Whether a config of this `peft_type` is of this form; the first form that says so is taken."""
        return True

    @property
    def known(self) -> set[str]:
        """All fields of its config."""
        return {*COMMON, self.init_name, *self.settings, *self.fields}

    def check_values(self, values: dict[str, Any], where: str) -> None:
        """Raises `InputError` for fields of this type whose values are of no kind that they can have."""
        for name, (setting, default) in self.settings.items():
            limits = self.config.limits(setting)
            if limits is None:
                require_truth(values, where, name)
            else:
                require_number(values, where, name, limits, default)

    def check(self, values: dict[str, Any], where: str) -> None:
        """As `check_values`, and for fields that have no meaning here."""
        self.check_values(values, where)
        bias = values.get("bias", "none")
        if self.bias_name:
            names = [self.bias_name if name == "lora_only" else name for name in BIASES]
            require(values, where, "bias", bias in names, f"one of {', '.join(names)}")
        else:
            require(values, where, "bias", bias == "none", f"none, the only one that {self.peft_type} has")

    def bias(self, values: Mapping[str, Any]) -> str:
        """Which biases such an adapter trains: "none", "lora_only" (of adapted layers) or "all"."""
        bias = values.get("bias", "none")
        return "lora_only" if bias == self.bias_name else bias

    def configured(self, values: Mapping[str, Any], path: str, **extra: Any) -> Any:
        """The configuration of the target at `path`; `extra` are settings that take more than a field of the file."""
        settings = {setting: values.get(name, default) for name, (setting, default) in self.settings.items()}
        if self.bias_name:
            settings["bias"] = self.bias(values)
        return self.config(targets=exactly((path,)), **(settings | extra))  # type: ignore[call-arg]  # each has targets

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        """Which tensors a target must have and which it may have, by their keys in `tensor_names`."""
        return set(self.tensor_names), set(self.tensor_names)

    def shared(
        self, values: dict[str, Any], names: Mapping[str, str], files: TensorFiles, places: list[Site]
    ) -> dict[str, np.ndarray]:
        """The arrays that all targets share; `names` are those in the file, `places` the places of the targets."""
        if names:
            name = next(iter(names.values()))
            raise InputError(f"{files.folder}: tensor {name} belongs to no {self.peft_type} adapter")
        return {}

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        """The configuration and the checked arrays of one target, in this library's orientation."""
        raise NotImplementedError  # abstract: each type's file defines it

    def needs_base(self, values: dict[str, Any]) -> bool:
        """Whether such an adapter, or its change, is only known beside the values of its base."""
        beside = values.get("modules_to_save") or values.get("trainable_token_indices")
        return self.multiplies_base or bool(beside) or values.get("bias", "none") != "none"

    def for_model(self, places: list[Site]) -> Format:
        """The type as the adapters on these places are written in it."""
        return self

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        """The tensors of one adapted matrix, by their keys in `tensor_names`; here the adapter's own arrays."""
        return {name: entry.params[name] for name in self.tensor_names}

    def names(self, entry: AdapterEntry) -> Mapping[str, str]:
        """How files call the tensors of `write`."""
        return {**self.tensor_names, **self.embedding_names} if entry.is_embedding else self.tensor_names

    def shared_of(self, places: list[Site]) -> dict[str, np.ndarray]:
        """The tensors that adapters on these places share, by `shared_names`."""
        return {}

    def kept(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        """The few small arrays of an entry from which `written` makes the config."""
        return {"scaling": entry.params["scaling"]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        """The fields of its own, and those of `COMMON` that `save.py` doesn't write."""
        fields = {self.init_name: True, "layers_pattern": None, "layers_to_transform": None, "target_modules": targets}
        if self.bias_name:
            bias = same(entries, "bias")
            fields["bias"] = self.bias_name if bias == "lora_only" else bias
        return fields | {name: _setting(entries, setting) for name, (setting, _) in self.settings.items()}


def _setting(entries: list[AdapterEntry], name: str) -> Any:
    if name == "dropout":
        return max(entry.config.dropout for entry in entries)
    return plain(same(entries, name)) if name == "alpha" else same(entries, name)


def torch_window(site: Site) -> tuple[int, ...] | None:
    """The sizes of a convolution's windows where PEFT's adapter is the same function as the one here, else None.

    PEFT's second convolution reads all groups of channels, which no merged kernel could, and its first one neither
    dilates its kernel nor wraps its input.
    """
    layer = site.layer
    if not isinstance(layer, nnx.Conv) or layer.feature_group_count != 1 or layer.padding in ("CIRCULAR", "REFLECT"):
        return None
    dilations = layer.kernel_dilation, layer.input_dilation
    return layer.kernel_size if all(np.all(np.equal(one or 1, 1)) for one in dilations) else None


def in_windows(site: Site, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """LoRA's tensors `a [r, in]`, `b [out, r]` and `magnitude [out]` as those of torch's convolutions."""
    window = torch_window(site)
    if window is None:
        return tensors
    return {kind: _in_window(kind, tensor, window) for kind, tensor in tensors.items()}


def _in_window(kind: str, tensor: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    ones = (1,) * len(window)
    if kind == "a":
        return np.moveaxis(tensor.reshape(len(tensor), *window, -1), -1, 1)
    return tensor.reshape(1, -1, *ones) if kind == "magnitude" else tensor.reshape(*tensor.shape, *ones)


def read_tensor(files: TensorFiles, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the file in float32, or float64 where the file is.

    Raises:
        InputError: it has another shape.
    """
    if files.shapes[name] != shape:
        raise InputError(
            f"{files.folder}: tensor {name} has shape {list(files.shapes[name])}, but the base layer and the "
            f"config imply {list(shape)}"
        )
    return files.read_wide(name)


def require(values: Mapping[str, Any], where: str, name: str, good: bool, wanted: str) -> None:
    """Raises an `InputError` about a field that is not what it has to be."""
    if not good:
        raise InputError(f"{where}: {name} must be {wanted}, found {values.get(name)!r}")


def require_number(values: Mapping[str, Any], where: str, name: str, limits: Number, default: Any) -> None:
    """As `require`, for a number; `default` is that of a file without the field."""
    require(values, where, name, limits.takes(values.get(name, default)), limits.describe())


def require_truth(values: Mapping[str, Any], where: str, name: str) -> None:
    """As `require`, for true or false, or nothing."""
    require(values, where, name, values.get(name) in (None, True, False), "true or false")


def require_names(values: Mapping[str, Any], where: str, name: str) -> None:
    """As `require`, for a list of names or a regular expression, or nothing."""
    value = values.get(name)
    good = value is None or isinstance(value, str) or is_names(value)
    require(values, where, name, good, "a list of names or a string")
    check_regex(where, name, value)


def is_names(value: Any) -> bool:
    """Whether a field holds a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def check_regex(where: str, name: str, value: Any) -> None:
    """Refuses a string that is no regular expression."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise InputError(f"{where}: {name} {value!r} is not a regular expression: {error}") from None


def plain(value: float) -> int | float:
    """A whole number as int, as PEFT writes it."""
    return int(value) if float(value).is_integer() else float(value)


def same(entries: list[AdapterEntry], name: str) -> Any:
    """The value of a setting that a folder has once.

    Raises:
        InputError: the entries differ in it.
    """
    values = {getattr(entry.config, name) for entry in entries}
    if len(values) > 1:
        listed = ", ".join(str(value) for value in sorted(values, key=str))
        raise InputError(f"one folder holds {entries[0].method} of one {name}, but the model has {listed}")
    return values.pop()


CONFIG_NAME, WEIGHTS = "adapter_config.json", "adapter_model"
PREFIX = "base_model.model."
