"""What differs between the `peft_type`s of PEFT's folders: fields, tensors, and what they mean.

Each type is a file of its own with a subclass of `Format`; `config.py` lists them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.config.common import BIASES
from mora_jax.adapters.matching.targets import Place
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
        place, layer: where it is in the model.
        names: its tensors' names in the file, by `FACTORS`.
        files: the file.
        shared: arrays that all targets share, as the file has them.
    """

    path: str
    place: Place
    layer: int
    names: Mapping[str, str]
    files: TensorFiles
    shared: Mapping[str, np.ndarray]

    def read(self, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor in float32; an `InputError` where the file has another shape."""
        return read_tensor(self.files, self.names[kind], shape)


class Format:
    """A `peft_type`.

    Attributes:
        peft_type: its name in files.
        fields: the fields of its config beside `COMMON`.
        refused: those that, when set, change the function in a way that is not supported here.
        default_targets: what PEFT adapts in the families here where the config names nothing.
        bias_name: what its config calls the biases of adapted layers.
    """

    peft_type: ClassVar[str]
    fields: ClassVar[frozenset[str]]
    refused: ClassVar[tuple[str, ...]] = ()
    default_targets: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj")
    bias_name: ClassVar[str] = "lora_only"

    def check(self, values: dict[str, Any], where: str) -> None:
        """Raises `InputError` for fields of this type that have no meaning here."""

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        """Which tensors a target must have and which it may have, by `FACTORS`."""
        raise NotImplementedError  # abstract: each type's file defines it

    def shared(
        self, values: dict[str, Any], names: Mapping[str, str], files: TensorFiles, found: list[Place]
    ) -> dict[str, np.ndarray]:
        """The arrays that all targets share; `names` are those in the file, `found` the places of the targets."""
        if names:
            raise InputError(f"{files.folder}: tensor {first_of(names)} belongs to no {self.peft_type} adapter")
        return {}

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        """The configuration and the checked arrays of one target, in this library's orientation."""
        raise NotImplementedError  # abstract: each type's file defines it

    def needs_base(self, values: dict[str, Any]) -> bool:
        """Whether such an adapter, or its change, is only known beside the values of its base."""
        return bool(values.get("modules_to_save")) or values.get("bias", "none") != "none"

    def for_model(self, places: list[Place]) -> Format:
        """The type as the adapters on these places are written in it."""
        return self

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        """The tensors of one adapted matrix, by `FACTORS`."""
        raise NotImplementedError  # abstract: each type's file defines it

    def names(self, entry: AdapterEntry) -> Mapping[str, str]:
        """How files call the tensors of `write`."""
        return FACTORS

    def shared_of(self, places: list[Place]) -> dict[str, np.ndarray]:
        """The tensors that adapters on these places share, by `SHARED`."""
        return {}

    def kept(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        """The few small arrays of an entry from which `written` makes the config."""
        return {"scaling": entry.params["scaling"]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        """The fields of its own, and those of `COMMON` that differ from what `save.py` writes."""
        raise NotImplementedError  # abstract: each type's file defines it


def read_tensor(files: TensorFiles, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the file in float32.

    Raises:
        InputError: it has another shape.
    """
    if files.shapes[name] != shape:
        raise InputError(
            f"{files.folder}: tensor {name} has shape {list(files.shapes[name])}, but the base layer and the "
            f"config imply {list(shape)}"
        )
    return files.read(name).astype(np.float32)


def first_of(names: Mapping[str, str]) -> str:
    return next(iter(names.values()))


def require(values: Mapping[str, Any], where: str, name: str, good: bool, wanted: str) -> None:
    """Raises an `InputError` about a field that is not what it has to be."""
    if not good:
        raise InputError(f"{where}: {name} must be {wanted}, found {values.get(name)!r}")


def require_positive(values: Mapping[str, Any], where: str, name: str, default: Any, *, whole: bool = False) -> None:
    """As `require`, for a positive number."""
    good = is_positive(values.get(name, default), whole=whole)
    require(values, where, name, good, "a positive whole number" if whole else "a positive number")


def is_positive(value: Any, *, whole: bool = False) -> bool:
    kinds = (int,) if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf


def require_share(values: Mapping[str, Any], where: str, name: str) -> None:
    """As `require`, for a probability below 1."""
    value = values.get(name, 0.0)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
    require(values, where, name, good, "a number in [0, 1)")


def require_names(values: Mapping[str, Any], where: str, name: str) -> None:
    """As `require`, for a list of names or a regular expression, or nothing."""
    value = values.get(name)
    good = value is None or isinstance(value, str) or is_names(value)
    require(values, where, name, good, "a list of names or a string")
    check_regex(where, name, value)


def require_bias(values: Mapping[str, Any], where: str, only: str) -> None:
    """As `require`, for the field `bias`; `only` is what it calls the biases of adapted layers."""
    names = [only if name == "lora_only" else name for name in BIASES]
    require(values, where, "bias", values.get("bias", "none") in names, f"one of {', '.join(names)}")


def is_names(value: Any) -> bool:
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
    found = {getattr(entry.config, name) for entry in entries}
    if len(found) > 1:
        values = ", ".join(str(value) for value in sorted(found, key=str))
        raise InputError(f"one folder holds {entries[0].method} of one {name}, but the model has {values}")
    return found.pop()


CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# What the files call a value of an adapter, for matrices and for embedding tables, by its name here.
FACTORS = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "added": "lora_B.bias",
    "e": "lora_E",
    "d": "vera_lambda_d",
    "b_scale": "vera_lambda_b",
    "l": "ia3_l",
}
EMBEDDING_FACTORS = FACTORS | {"a": "lora_embedding_A", "b": "lora_embedding_B"}
# Of those that all modules share, which stand beside the model.
SHARED_PREFIX, SHARED = "base_model.", ("vera_A", "vera_B")

_FACTOR = re.compile(
    r"(?P<path>.+)\.(?P<name>lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|vera_lambda_[bd]|ia3_l)"
    r"(\.default)?(\.(?P<leaf>weight|bias))?"
)
_KINDS = {name.removesuffix(".weight"): kind for table in (FACTORS, EMBEDDING_FACTORS) for kind, name in table.items()}
_SHARED = re.compile(rf"((base_model\.)?(model\.)?)(?P<name>{'|'.join(SHARED)})(\.default)?")
_BASE = re.compile(r"(?P<path>.+?)(?P<inner>\.base_layer)?\.(?P<leaf>weight|bias)")


@dataclass
class Stored:
    """The tensors of an adapter's file.

    Attributes:
        factors: for each module path, the file's names by `FACTORS`.
        shared: the file's names of what all modules share, by `SHARED`.
        biases: for each module path, the file's name of its bias.
        weights: for each module path, the file's name of its whole weight.
        frozen: as `weights`, for the copies of base weights that PEFT saves beside adapters on embeddings.
        others: by module path and name in one, the file's name of what may be another parameter of a module.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


def stored_tensors(files: TensorFiles) -> Stored:
    """Sorts the tensors of a file by what they belong to; names may lack PEFT's prefix or carry an adapter's name.

    Raises:
        InputError: a name that is none of PEFT's, or two for one thing.
    """
    found = Stored()
    for name in sorted(files.shapes):
        if (shared := _SHARED.fullmatch(name)) is not None:
            _put(found.shared, shared["name"], name, files)
            continue
        group, path, kind = meaning(name)
        if group == "factors":
            _put(found.factors.setdefault(path, {}), kind, name, files)
        elif not group:
            raise unknown(files, name)
        elif group == "others":
            _put(found.others, f"{path}.{kind}", name, files)
        else:
            _put(getattr(found, group), path, name, files)
    return found


def meaning(name: str) -> tuple[str, str, str]:
    """What a tensor's name says: the attribute of `Stored`, the module path, and what it is of the module.

    The last is a factor's name in `FACTORS`, or the name of another parameter, else empty. The first is empty for a
    name that is none of PEFT's.
    """
    factor, base = _FACTOR.fullmatch(name), _BASE.fullmatch(name)
    if factor is not None:
        kind = _kind(factor["name"], factor["leaf"])
        return ("", "", "") if kind is None else ("factors", factor["path"].removeprefix(PREFIX), kind)
    if base is None:
        path, dot, leaf = name.rpartition(".")
        return ("others", path.removeprefix(PREFIX), leaf) if dot else ("", "", "")
    group = "biases" if base["leaf"] == "bias" else "frozen" if base["inner"] else "weights"
    return group, base["path"].removeprefix(PREFIX), ""


def base_name(name: str) -> str:
    """What a file's tensor is called in base checkpoints; a factor's name means nothing there."""
    group, path, leaf = meaning(name)
    ends = {"weights": "weight", "biases": "bias"}
    return f"{path}.{ends.get(group, leaf)}"


def unknown(files: TensorFiles, name: str) -> InputError:
    return InputError(f"{files.folder}: tensor {name} is no part of an adapter of a known kind")


def _kind(name: str, leaf: str | None) -> str | None:
    """What a factor is called here; None for a bias that no method has."""
    return _KINDS[name] if leaf != "bias" else _KINDS.get(f"{name}.bias")


def _put(place: dict[str, str], key: str, name: str, files: TensorFiles) -> None:
    if key in place:
        raise InputError(f"{files.folder}: tensors {place[key]} and {name} are the same factor")
    place[key] = name
