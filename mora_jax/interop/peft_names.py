"""The names of tensors in PEFT's files: what each belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mora_jax.errors import InputError
from mora_jax.interop.tensors import TensorFiles

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# What the files call a value of an adapter, for matrices and for embedding tables, by its name here.
FACTORS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
EMBEDDING_FACTORS = {"a": "lora_embedding_A", "b": "lora_embedding_B", "magnitude": "lora_magnitude_vector"}

_FACTOR = re.compile(
    r"(?P<path>.+)\.(lora_(?P<matrix>[AB])|lora_embedding_(?P<table>[AB])|lora_(?P<vector>magnitude)_vector)"
    r"(\.default)?(\.weight)?"
)
_BASE = re.compile(r"(?P<path>.+?)(?P<inner>\.base_layer)?\.(?P<leaf>weight|bias)")


@dataclass
class Stored:
    """The tensors of an adapter's file.

    Attributes:
        factors: for each module path, the file's names by `FACTORS`.
        biases: for each module path, the file's name of its bias.
        weights: for each module path, the file's name of its whole weight.
        frozen: as `weights`, for the copies of base weights that PEFT saves beside adapters on embeddings.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
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
        factor = _FACTOR.fullmatch(name)
        if factor is not None:
            kind = "magnitude" if factor["vector"] else (factor["matrix"] or factor["table"]).lower()
            _put(found.factors.setdefault(factor["path"].removeprefix(PREFIX), {}), kind, name, files)
            continue
        base = _BASE.fullmatch(name)
        if base is None:
            raise InputError(f"{files.folder}: tensor {name} is neither lora_A nor lora_B of a module")
        path = base["path"].removeprefix(PREFIX)
        if base["leaf"] == "bias":
            _put(found.biases, path, name, files)
        else:
            _put(found.frozen if base["inner"] else found.weights, path, name, files)
    return found


def _put(place: dict[str, str], key: str, name: str, files: TensorFiles) -> None:
    if key in place:
        raise InputError(f"{files.folder}: tensors {place[key]} and {name} are the same factor")
    place[key] = name
