"""ReLoRA's and ReMoRA's state in files: an adapter, and beside it in `base-model` the base as its restarts left it.

That is the layout of the MoRA authors' training script, which writes the base after every restart: the state of a
`LlamaModel` with its adapters in place, so names lack `model.`, weights under adapters are called `base_layer.weight`,
M is beside them, and there is no output head. Its `adapter_config.json` keeps the `mora_type` of the run's start,
while every restart goes on to the next type. Files written here have the type of the moment, and in `base-model` a
model with plain names that `transformers` loads.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from mora_jax.adapters.methods.mora import KINDS
from mora_jax.adapters.sites import sites
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import first
from mora_jax.interop.peft.lora import KIND_FIELD
from mora_jax.interop.safetensors_io import TensorFiles, open_checkpoint
from mora_jax.interop.tensor_map import tensor_plan
from mora_jax.models.decoder import Decoder

BASE_FOLDER = "base-model"
_FACTOR = re.compile(r"\.lora_(A|B)\.[^.]+\.weight$")
_COPY = re.compile(r"\.modules_to_save\.[^.]+\.")  # trained whole: the adapter's file has it too
_MARK = "restarted"  # the attribute of a model whose base is not the one that its path names


def has_own_base(folder: Path) -> bool:
    """Whether an adapter's folder holds a base of its own."""
    return (folder / BASE_FOLDER).is_dir()


def with_kind(values: dict[str, Any], kind: str | None, where: str) -> dict[str, Any]:
    """The fields of an `adapter_config.json` with another kind of MoRA, for files whose `mora_type` is out of date.

    Raises:
        InputError: no such kind, or the adapter is no MoRA.
    """
    if kind is None:
        return values
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if not values.get("use_mora") and KIND_FIELD not in values:
        raise InputError(f"{where}: it is no MoRA adapter, so it has no kind; leave the kind away")
    return values | {KIND_FIELD: kind}


@dataclasses.dataclass(frozen=True)
class OwnBase:
    """The base in an adapter's folder, checked against the model that will take it.

    Attributes:
        files: its tensors.
        names: their names in the files, by name in base checkpoints.
    """

    files: TensorFiles
    names: Mapping[str, str]

    def put(self, model: Decoder) -> None:
        """Gives the model these weights, one parameter at a time, in the dtypes that it has."""
        for entry in tensor_plan(model):
            if any(piece.name in self.names for piece in entry.pieces):
                entry.put(lambda name: self.files.read(self.names[name]))
        setattr(model, _MARK, True)


def own_base(model: nnx.Module, folder: Path, adapter: TensorFiles, *, kind_is_known: bool) -> OwnBase | None:
    """The base in an adapter's folder, or None.

    Args:
        model: that the adapter is loaded into.
        folder: the adapter's.
        adapter: its tensors.
        kind_is_known: whether it is no MoRA, or the caller names its kind.

    Raises:
        InputError: the base does not fit the model, or nobody says which kind of MoRA the adapter has.
    """
    if not has_own_base(folder):
        return None
    where = folder / BASE_FOLDER
    if not isinstance(model, Decoder):
        raise InputError(f"{where}: only this library's decoder can take a base from an adapter's folder")
    files = open_checkpoint(where)
    config = model.config
    shapes = {piece.name: piece.shape for entry in tensor_plan(model) for piece in entry.pieces}
    start = config.names.embedding.rpartition(".")[0] + "."
    names, unknown, wrapped = {}, [], False
    for stored in files.shapes:
        if _FACTOR.search(stored):
            wrapped = True
        elif not (_COPY.search(stored) or stored.endswith("rotary_emb.inv_freq")):
            name = stored.replace(".base_layer.", ".").replace(".original_module.", ".")
            name = f"{config.names.head}.weight" if name == config.names.head_tensor else name
            name = name if name in shapes else start + name
            if name in shapes:
                names[name] = stored
            elif not (stored == f"{config.names.head}.weight" and config.tie_embeddings):
                unknown.append(stored)
    missing = [name for name in shapes if name not in names and name != f"{config.names.head}.weight"]
    if missing or unknown:
        what = f"lacks {first(missing)}" if missing else f"has {first(unknown)}, which the model has not"
        raise InputError(f"{where}: it is not the base of this model: it {what}")
    for name, stored in names.items():
        if files.shapes[stored] != shapes[name]:
            sizes = f"{list(files.shapes[stored])}, the model's is {list(shapes[name])}"
            raise InputError(f"{where}: it is not the base of this model: tensor {stored} has shape {sizes}")
    if wrapped and not kind_is_known and _trained(adapter):
        raise InputError(
            f"{folder}: the MoRA authors' code changes the kind at each restart (sharing, grouped, grouped_tile, "
            "strided_interleave, and again) and does not write it down: give the kind that the run ended with"
        )
    return OwnBase(files, names)


def _trained(adapter: TensorFiles) -> bool:
    """Whether any M is not zero: right after a restart the kind makes no difference."""
    return any(name.endswith(".lora_A.weight") and np.any(adapter.read(name)) for name in adapter.shapes)


def has_other_base(model: nnx.Module) -> bool:
    """Whether the adapters of a model mean nothing on the base that its path names: that base was trained too."""
    return getattr(model, _MARK, False) or any(hasattr(place.adapter, "renew") for place in sites(model))
