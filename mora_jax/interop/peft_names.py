"""The names of tensors in PEFT's files: what each belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mora_jax.errors import InputError
from mora_jax.interop.tensors import TensorFiles

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
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)


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
            raise InputError(f"{files.folder}: tensor {name} is no part of an adapter of a known kind")
        else:
            _put(getattr(found, group), path, name, files)
    return found


def meaning(name: str) -> tuple[str, str, str]:
    """What a tensor's name says: the attribute of `Stored`, the module path, and for a factor its name in `FACTORS`.

    The first is empty for a name that is none of PEFT's.
    """
    factor, base = _FACTOR.fullmatch(name), _BASE.fullmatch(name)
    if factor is not None:
        kind = _kind(factor["name"], factor["leaf"])
        return ("", "", "") if kind is None else ("factors", factor["path"].removeprefix(PREFIX), kind)
    if base is None:
        return "", "", ""
    group = "biases" if base["leaf"] == "bias" else "frozen" if base["inner"] else "weights"
    return group, base["path"].removeprefix(PREFIX), ""


def _kind(name: str, leaf: str | None) -> str | None:
    """What a factor is called here; None for a bias that no method has."""
    return _KINDS[name] if leaf != "bias" else _KINDS.get(f"{name}.bias")


def _put(place: dict[str, str], key: str, name: str, files: TensorFiles) -> None:
    if key in place:
        raise InputError(f"{files.folder}: tensors {place[key]} and {name} are the same factor")
    place[key] = name
