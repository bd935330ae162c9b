"""Adapters out of PEFT folders, and MoRA out of its authors' layout of them."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mora_jax.adapters.attach import undone_on_error
from mora_jax.adapters.base import host
from mora_jax.adapters.config.common import MethodConfig
from mora_jax.adapters.sites import Site, by_path, sites
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues, first, install
from mora_jax.interop.hub import local_folder
from mora_jax.interop.peft.config import AdapterFile, format_of, keep_extra_fields, read_adapter_config
from mora_jax.interop.peft.format import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Target,
    read_tensor,
)
from mora_jax.interop.peft.normalise import trained_as
from mora_jax.interop.peft.restarted_base import has_own_base, own_base, with_kind
from mora_jax.interop.peft.stored import Stored, stored_tensors, unknown
from mora_jax.interop.safetensors_io import TensorFiles
from mora_jax.interop.tensor_map import (
    base_bias,
    base_names,
    loose_biases,
    put_trained_weights,
    tensor_plan,
    train_own_weights,
)
from mora_jax.models.decoder import Decoder
from mora_jax.models.init import read_json
from mora_jax.paths import found_path

Chosen = dict[str, tuple[Site, int]]


def load_adapter(
    model: nnx.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = False,
    kind: str | None = None,
    method: MethodConfig | None = None,
) -> None:
    """Attaches the adapter in a PEFT folder to a model and fills it with the folder's values.

    Nothing is changed when the folder does not fit the model.

    Args:
        model: a model without adapters; changed in place.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`, or a hub id.
        strict: refuse an adapter that names another base model, instead of warning.
        kind: the kind of a MoRA adapter, where its file has an older one (see `mora_jax.interop.peft.restarted_base`).
        method: how a LoRA is to be trained on, which files don't say: `LoRAPlusConfig()`, `LoRAFAConfig()`, or
            `PiSSAConfig()` or `OLoRAConfig()` for what these have written (see `mora_jax.interop.peft.normalise`).

    Raises:
        InputError: when the folder is incomplete, does not fit, or means something that is not supported.
    """
    folder = local_folder(path)
    where = str(folder / CONFIG_NAME)
    values = with_kind(read_json(folder / CONFIG_NAME), kind, where)
    file = read_adapter_config(values, where)
    own = not isinstance(model, Decoder)
    file = dataclasses.replace(file, whole_components=own)
    files = _open(folder)
    all_places = list(sites(model))
    if any(place.adapter is not None for place in all_places):
        raise InputError("the model carries an adapter already: merge it, or load the base model again")
    _check_base(model, file, strict)
    base = own_base(model, folder, files, kind_is_known=kind is not None or not values.get("use_mora"))
    stored = stored_tensors(files)
    known = set(base_names(model)) if own else set()
    if stray := [stored.others[name] for name in stored.others if name not in known]:
        raise unknown(files, stray[0])
    _drop_tied_head(model, stored, files, file)
    try:
        everything = by_path(all_places)
    except ValueError as error:
        raise InputError(str(error)) from None
    chosen = {path: where for path, where in everything.items() if _is_target(file, where[0], path)}
    _check_factors(stored, chosen, file)
    found = [place for place, _ in chosen.values()]
    shared = file.format.shared(file.values, stored.shared, files, found)
    values_by_path = {}
    for path, (place, layer) in chosen.items():
        target = Target(path, place, layer, stored.factors[path], files, shared)
        values_by_path[path] = file.format.read(file.values, target)
    if method is not None:
        values_by_path = _trained_as(values_by_path, method, all_places)
    loose = loose_biases(model) if file.bias == "all" else set()
    _add_biases(values_by_path, stored, everything, loose, files, file)
    _check_frozen(stored, chosen, files)
    whole = _whole_weights(model, stored, loose, files, file)
    if base is not None:
        assert isinstance(model, Decoder), "checked with its tensors"
        base.put(model)
    with undone_on_error(model):
        if own:
            train_own_weights(model, whole)
        modules = () if own else tuple(sorted({name.rpartition(".")[0].rpartition(".")[2] for name in whole}))
        install(model, values_by_path, modules_to_save=modules)
        if whole:
            put_trained_weights(model, whole)
    keep_extra_fields(model, file)


def _trained_as(
    values_by_path: dict[str, AdapterValues], method: MethodConfig, found: list[Site]
) -> dict[str, AdapterValues]:
    changed = {}
    for place in found:
        kernels = functools.cache(lambda place=place: host(place.kernel()))
        for layer, path in enumerate(place.paths):
            if path in values_by_path:
                at = place.index(layer)
                kernel = functools.partial(lambda kernels, at: kernels()[at], kernels, at)
                changed[path] = trained_as(values_by_path[path], method, kernel, path)
    return changed


def tensor_shapes(path: str | os.PathLike[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the tensors in a PEFT folder: by module path, then by the keys of `Format.tensor_names`.

    Raises:
        InputError: the folder is incomplete, or a name is none of PEFT's.
    """
    files = _open(local_folder(path))
    return {
        module: {kind: files.shapes[name] for kind, name in names.items()}
        for module, names in stored_tensors(files).factors.items()
    }


def whole_modules(path: str | os.PathLike[str]) -> list[str]:
    """The names of the modules that the adapter in a PEFT folder trains whole."""
    return read_json(local_folder(path) / CONFIG_NAME).get("modules_to_save") or []


def needs_base(path: str | os.PathLike[str]) -> bool:
    """Whether an adapter, or the change that it makes, is only known beside the values of its base.

    So it is with magnitudes, gains, biases, modules that are trained whole, factors that start from the
    base, and adapters that come with a base.
    """
    if has_own_base(local_folder(path)):
        return True
    where = local_folder(path) / CONFIG_NAME
    values = read_json(where)
    return format_of(values, str(where)).needs_base(values)


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
    if not wanted or not have or _names(wanted) & _names(have):
        return
    message = f"{file.where}: the adapter was made for {wanted}, the model is {have}"
    if strict:
        raise InputError(f"{message}; give that model, or load without strict")
    warnings.warn(message, stacklevel=4)


def _names(path: str) -> set[str]:
    """What a model is called: by the path as it is given, and by the folder that a link leads to."""
    return {Path(path).name, Path(found_path(path)).resolve().name}


def _drop_tied_head(model: nnx.Module, stored: Stored, files: TensorFiles, file: AdapterFile) -> None:
    """With a tied head PEFT trains the table alone, or stores the head's share of it too; here they are one."""
    if not isinstance(model, Decoder) or not model.config.tie_embeddings:
        return
    table, head = model.config.names.embedding, model.config.names.head
    trained = {*stored.factors, *stored.weights}
    if table not in trained and head in trained:
        raise InputError(
            f"{file.where}: it trains {head} alone, which the model ties to {table}: in PEFT they part then, which is "
            "not supported; merge the adapter in PEFT"
        )
    if table not in trained:
        return
    if not file.values.get("ensure_weight_tying"):
        raise InputError(
            f"{file.where}: it trains {table}, to which the model ties its head; without ensure_weight_tying PEFT "
            "leaves the head as it was, which is not supported"
        )
    factors, given = stored.factors.pop(head, {}), stored.factors.get(table, {})
    if "magnitude" in given:
        raise InputError(
            f"{file.where}: it trains {table} with DoRA, and the model ties its head to that: PEFT gives the head a "
            "magnitude of its own, which is not supported; merge the adapter in PEFT"
        )
    pairs = [(factors[one], given[other]) for one, other in (("a", "b"), ("b", "a")) if one in factors]
    same = all(np.array_equal(files.read(one), files.read(other).T) for one, other in pairs)
    whole = stored.weights.pop(head, None)
    if whole is not None and table in stored.weights:
        same = same and np.array_equal(files.read(whole), files.read(stored.weights[table]))
    if not same:
        raise InputError(f"{files.folder}: the tensors of {head} are not those of {table}, to which the model ties it")
    stored.frozen.pop(head, None)


def _is_target(file: AdapterFile, place: Site, path: str) -> bool:
    everything = str(file.values.get("target_modules")).lower() == "all-linear"
    return file.matches(path) and not (place.is_embedding and everything)


def _check_factors(stored: Stored, chosen: Chosen, file: AdapterFile) -> None:
    """Every factor belongs to a target, and every target has its factors."""
    if not chosen:
        raise InputError(f"{file.where}: target_modules {file.values.get('target_modules')!r} match no layer")
    extra = [path for path in stored.factors if path not in chosen]
    if extra:
        raise InputError(
            f"{file.where}: the tensors of {len(extra)} modules belong to no target that the model has: {first(extra)}"
        )
    needed, allowed = file.format.tensors(file.values)
    short = {kind: name.removesuffix(".weight") for kind, name in file.format.tensor_names.items()}
    missing, unwanted = [], []
    for path in chosen:
        have = set(stored.factors.get(path, ()))
        if needed - have:
            missing.append(f"{path} ({', '.join(short[kind] for kind in sorted(needed - have))})")
        unwanted += [stored.factors[path][kind] for kind in sorted(have - allowed)]
    if missing:
        raise InputError(f"{file.where}: {len(missing)} targets lack tensors: {first(missing)}")
    if unwanted:
        raise InputError(f"{file.where}: by its config the adapter has no {first(unwanted)}")


def _add_biases(
    values_by_path: dict[str, AdapterValues],
    stored: Stored,
    everything: Chosen,
    loose: set[str],
    files: TensorFiles,
    file: AdapterFile,
) -> None:
    """Adds the change of every stored bias; adapters hold changes, files hold biases."""
    for path, name in stored.biases.items():
        if file.saves(path) or f"{path}.bias" in loose:
            continue
        wanted = file.bias == "all" or (file.bias == "lora_only" and path in values_by_path)
        place, layer = everything.get(path, (None, 0))
        if not wanted or place is None or not place.has_bias:
            why = f"bias is {file.bias!r}" if not wanted else "the model has no such bias"
            raise InputError(f"{files.folder}: tensor {name} belongs to nothing: {why}")
        change = read_tensor(files, name, (place.out_features,)) - base_bias(place, layer)
        before = values_by_path.get(path, AdapterValues(None, {}))
        values_by_path[path] = before._replace(values=dict(before.values) | {"bias": change})
    if file.bias == "none":
        return
    expected = [
        path
        for path, (place, _) in everything.items()
        if place.has_bias and not place.is_embedding and (file.bias == "all" or path in values_by_path)
    ]
    expected += [name.removesuffix(".bias") for name in loose]
    missing = [path for path in expected if path not in stored.biases]
    if missing:
        raise InputError(f"{file.where}: bias is {file.bias!r}, but the biases of {len(missing)} modules are missing")


def _check_frozen(stored: Stored, chosen: Chosen, files: TensorFiles) -> None:
    """PEFT puts the table itself beside an adapter on embeddings; another table than ours is another base."""
    for path, name in stored.frozen.items():
        if path not in chosen:
            raise InputError(f"{files.folder}: tensor {name} belongs to no target that the model has")
        kernel = chosen[path][0].kernel()
        table = read_tensor(files, name, tuple(kernel.shape) if chosen[path][0].is_embedding else kernel.shape[::-1])
        if isinstance(kernel, jax.Array):
            ours = np.asarray(kernel, np.float32)
            if not np.allclose(ours if chosen[path][0].is_embedding else ours.T, table, rtol=1e-2, atol=1e-3):
                raise InputError(f"{files.folder}: tensor {name} is not the base model's: the base was trained too")


def _whole_weights(
    model: nnx.Module, stored: Stored, loose: set[str], files: TensorFiles, file: AdapterFile
) -> dict[str, np.ndarray]:
    """The tensors of base parameters that are trained themselves, by name in base checkpoints."""

    def saved_whole(name: str) -> bool:
        return file.saves(name.rpartition(".")[0])

    given = {f"{path}.weight": name for path, name in stored.weights.items()}
    given |= {f"{path}.bias": name for path, name in stored.biases.items() if file.saves(path)}
    given |= {f"{path}.bias": name for path, name in stored.biases.items() if f"{path}.bias" in loose}
    saved = file.values.get("modules_to_save")
    plan = tensor_plan(model)
    known = {piece.name for entry in plan for piece in entry.pieces}
    given |= stored.others
    extra = [stored for name, stored in given.items() if name not in known or not (saved_whole(name) or name in loose)]
    if extra:
        why = f"modules_to_save is {saved}" if saved else "modules_to_save is not set"
        raise InputError(f"{files.folder}: {len(extra)} tensors belong to nothing ({why}): {first(extra)}")
    missing = sorted(name for name in known if saved_whole(name) and name not in given)
    if missing or (saved and not any(map(saved_whole, given))):
        raise InputError(f"{file.where}: modules_to_save is {saved}, but there is no tensor {first(missing)}".rstrip())
    values: dict[str, np.ndarray] = {}
    for entry in plan:
        pieces = [piece for piece in entry.pieces if piece.name in given]
        if pieces and len(pieces) < len(entry.pieces):
            raise InputError(
                f"{file.where}: modules_to_save {saved} names {pieces[0].name}, which is stored together with others "
                "that are not named"
            )
        values |= {piece.name: read_tensor(files, given[piece.name], piece.shape) for piece in pieces}
    return values
