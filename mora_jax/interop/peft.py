"""Adapters as PEFT folders, and MoRA in its authors' layout of them."""

import collections
import dataclasses
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mora_jax.adapters.attach import AdapterEntry, adapters_of
from mora_jax.adapters.config import MoRAConfig
from mora_jax.adapters.mora import square_rank
from mora_jax.adapters.targets import Place, has_adapter, places
from mora_jax.errors import InputError
from mora_jax.interop.folders import new_folder
from mora_jax.interop.hub import local_folder
from mora_jax.interop.install import Filling, first, install, short_targets
from mora_jax.interop.peft_config import AdapterFile, lora_fields, mora_fields, read_adapter_config
from mora_jax.interop.tensors import TensorFiles
from mora_jax.models.init import read_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<path>.+)\.(?P<factor>lora_[AB]|lora_embedding_[AB])(\.default)?(\.weight)?")


def save_adapter(model: nnx.Module, out: str | os.PathLike[str], *, base_model_name_or_path: str | None = None) -> None:
    """Writes the adapters of a model as a PEFT folder.

    Args:
        model: a model with LoRA or with MoRA adapters.
        out: the folder; must not exist, or be empty, or hold an earlier adapter and nothing else.
        base_model_name_or_path: what the folder names as its base; None for where the model was loaded from.

    Raises:
        InputError: when the model has no adapter, adapters of several methods, or `out` cannot be used.
    """
    entries = list(adapters_of(model))
    if not entries:
        raise InputError("the model has no adapter to save: attach one, or save the model with save_pretrained")
    methods = sorted({entry.method for entry in entries})
    if len(methods) > 1:
        raise InputError(f"one folder holds one method, but the model has adapters of {', '.join(methods)}")
    if methods[0] not in ("lora", "mora"):
        raise InputError(f"adapters of the method {methods[0]} have no PEFT folder format here")
    base = base_model_name_or_path or getattr(model, "name_or_path", None)
    fields = _fields(entries, model, base)
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        tensors |= _tensors(entry)
    with new_folder(out, replace=frozenset({CONFIG_NAME, WEIGHTS_NAME})) as folder:
        text = json.dumps(fields, indent=2, sort_keys=True)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def _fields(entries: list[AdapterEntry], model: nnx.Module, base: str | None) -> dict[str, Any]:
    """The config's fields; ranks below the highest and alphas that differ go into the patterns.

    `r` is the highest rank, and `lora_alpha` gives the commonest scaling there: loaders that read no patterns make
    room by the one and scale by the other.
    """
    targets = short_targets(
        (entry.path for entry in entries), (path for place in places(model) for path in place.paths)
    )
    rank = max(entry.config.rank for entry in entries)
    ranks = {entry.path: entry.config.rank for entry in entries if entry.config.rank != rank}
    dropout = max(entry.config.dropout for entry in entries)
    config = dataclasses.replace(entries[0].config, rank=rank, dropout=dropout)
    if isinstance(config, MoRAConfig):
        kinds = sorted({entry.config.kind for entry in entries})
        if len(kinds) > 1:
            raise InputError(f"one folder holds one kind of MoRA, but the model has {', '.join(kinds)}")
        return mora_fields(config, targets=targets, ranks=ranks, base=base)
    # From the scaling that is really used, which may differ by layer.
    scalings = {entry.path: float(entry.params["scaling"]) for entry in entries}
    alpha_of = {entry.path: round(scalings[entry.path] * entry.config.rank, 6) for entry in entries}
    alpha = round(collections.Counter(scalings.values()).most_common(1)[0][0] * rank, 6)
    alphas = {path: value for path, value in alpha_of.items() if value != alpha}
    return lora_fields(config, targets=targets, alpha=alpha, ranks=ranks, alphas=alphas, base=base)


def _tensors(entry: AdapterEntry) -> dict[str, np.ndarray]:
    """The tensors of one adapted matrix under their names in files."""
    path = _PREFIX + entry.path
    if entry.method == "mora":
        matrix = np.ascontiguousarray(entry.params["m"], dtype=np.float32)
        return {f"{path}.lora_A.weight": matrix, f"{path}.lora_B.weight": matrix.copy()}
    names = ("lora_embedding_A", "lora_embedding_B") if entry.is_embedding else ("lora_A.weight", "lora_B.weight")
    return {
        f"{path}.{name}": np.ascontiguousarray(entry.params[factor].T, dtype=np.float32)
        for name, factor in zip(names, ("lora_a", "lora_b"), strict=True)
    }


def load_adapter(model: nnx.Module, path: str | os.PathLike[str], *, strict: bool = False) -> None:
    """Attaches the adapter in a PEFT folder to a model and fills it with the folder's values.

    Nothing is changed when the folder does not fit the model.

    Args:
        model: a model without adapters; changed in place.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`, or a hub id.
        strict: refuse an adapter that names another base model, instead of warning.

    Raises:
        InputError: when the folder is incomplete, does not fit, or means something that is not supported.
    """
    folder = local_folder(path)
    file = read_adapter_config(read_json(folder / CONFIG_NAME), str(folder / CONFIG_NAME))
    files = _open(folder)
    all_places = list(places(model))
    if any(has_adapter(place) for place in all_places):
        raise InputError("the model carries an adapter already: merge it, or load the base model again")
    _check_base(model, file, strict)
    stored = _stored(files)
    chosen = [
        (place, [index for index, where in enumerate(place.paths) if _is_target(file, place, where)])
        for place in all_places
    ]
    chosen = [(place, layers) for place, layers in chosen if layers]
    _check_claims(stored, chosen, file)
    fillings: dict[str, Filling] = {}
    for place, layers in chosen:
        fillings |= _fillings(place, layers, stored, files, file)
    install(model, fillings)


def _open(folder: Path) -> TensorFiles:
    if (folder / WEIGHTS_NAME).exists():
        return TensorFiles(folder, [folder / WEIGHTS_NAME])
    if (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{folder} has only adapter_model.bin, a pickle, which can run code when loaded: load it with "
            "peft and save it again, which writes safetensors"
        )
    raise InputError(f"{folder} has no {WEIGHTS_NAME}")


def _check_base(model: nnx.Module, file: AdapterFile, strict: bool) -> None:
    wanted, have = file.values.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if not wanted or not have or Path(wanted).name == Path(have).name:
        return
    message = f"{file.where}: the adapter was made for {wanted}, the model is {have}"
    if strict:
        raise InputError(f"{message}; give that model, or load without strict")
    warnings.warn(message, stacklevel=4)


def _stored(files: TensorFiles) -> dict[str, dict[str, str]]:
    """For each module path the names of its tensors by factor."""
    stored: dict[str, dict[str, str]] = {}
    for name in sorted(files.shapes):
        match = _KEY.fullmatch(name)
        if match is None:
            raise InputError(f"{files.folder}: tensor {name} is neither lora_A nor lora_B of a module")
        path = match["path"].removeprefix(_PREFIX)
        factors, factor = stored.setdefault(path, {}), match["factor"][-1].lower()
        if factor in factors:
            raise InputError(f"{files.folder}: tensors {factors[factor]} and {name} are the same factor")
        factors[factor] = name
    return stored


def _is_target(file: AdapterFile, place: Place, path: str) -> bool:
    everything = str(file.values.get("target_modules")).lower() == "all-linear"
    return file.matches(path) and not (place.is_embedding and everything)


def _check_claims(stored: dict[str, dict[str, str]], chosen: list[tuple[Place, list[int]]], file: AdapterFile) -> None:
    """Every tensor belongs to a target, and every target has its tensors."""
    claimed = [place.paths[layer] for place, layers in chosen for layer in layers]
    if not claimed:
        raise InputError(f"{file.where}: target_modules {file.values.get('target_modules')!r} match no layer")
    extra = [path for path in stored if path not in set(claimed)]
    if extra:
        raise InputError(
            f"{file.where}: the tensors of {len(extra)} modules belong to no target that the model has: {first(extra)}"
        )
    needed = {"a"} if file.kind is not None else {"a", "b"}
    missing = [
        f"{path} ({', '.join(f'lora_{f.upper()}' for f in sorted(needed - set(stored.get(path, ()))))})"
        for path in claimed
        if needed - set(stored.get(path, ()))
    ]
    if missing:
        raise InputError(f"{file.where}: {len(missing)} targets lack tensors: {first(missing)}")


def _fillings(
    place: Place, layers: list[int], stored: dict[str, dict[str, str]], files: TensorFiles, file: AdapterFile
) -> dict[str, Filling]:
    """The checked arrays of a place by path, in this library's orientation."""
    fillings = {}
    for layer in layers:
        path = place.paths[layer]
        config, names = file.config(path), stored[path]
        if isinstance(config, MoRAConfig):
            side = square_rank(place.in_features, place.out_features, config.rank, config.kind)
            matrix = _read(files, names["a"], (side, side))
            if "b" in names and not np.array_equal(matrix, _read(files, names["b"], (side, side))):
                raise InputError(f"{files.folder}: {names['a']} and {names['b']} differ, but MoRA has one matrix")
            fillings[path] = Filling(config, {"m": matrix})
            continue
        factor_a = _read(files, names["a"], (config.rank, place.in_features))
        factor_b = _read(files, names["b"], (place.out_features, config.rank))
        scaling = np.asarray(config.alpha / config.rank, np.float32)
        fillings[path] = Filling(config, {"lora_a": factor_a.T, "lora_b": factor_b.T, "scaling": scaling})
    return fillings


def _read(files: TensorFiles, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if files.shapes[name] != shape:
        raise InputError(
            f"{files.folder}: tensor {name} has shape {list(files.shapes[name])}, but the base layer and the "
            f"config imply {list(shape)}"
        )
    return files.read(name).astype(np.float32)
