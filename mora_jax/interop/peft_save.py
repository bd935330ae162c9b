"""Adapters into PEFT folders, and MoRA into its authors' layout of them."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import numpy as np
from flax import nnx

from mora_jax.adapters.attach import AdapterEntry, adapters_of
from mora_jax.adapters.config import LoRAConfig, MoRAConfig, RsLoRAConfig
from mora_jax.adapters.targets import places
from mora_jax.errors import InputError
from mora_jax.interop.base_values import base_bias, base_names, trained_weights
from mora_jax.interop.folders import new_folder
from mora_jax.interop.install import short_targets
from mora_jax.interop.peft_config import extra_fields, lora_fields, mora_fields
from mora_jax.interop.peft_names import CONFIG_NAME, EMBEDDING_FACTORS, FACTORS, PREFIX, WEIGHTS_NAME
from mora_jax.interop.plain import plain_lora
from mora_jax.interop.stream import write_float32
from mora_jax.models.decoder import Decoder


def save_adapter(
    model: nnx.Module,
    out: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    write: bool = True,
) -> None:
    """Writes the adapters of a model as a PEFT folder.

    Tensors are gathered from the devices and written one after the other, so a model that was trained sharded never has
    its adapters in one memory twice.

    Args:
        model: a model with adapters of MoRA, or of LoRA and its relatives (PiSSA and OLoRA become LoRA of twice the
            rank).
        out: the folder; must not exist, or be empty, or hold an earlier adapter and nothing else.
        base_model_name_or_path: what the folder names as its base; None for where the model was loaded from.
        write: False on all processes but one of those that hold parts of the adapters: all have to call this.

    Raises:
        InputError: when the model has no adapter, adapters of several methods, or `out` cannot be used.
    """
    # Two passes over the model: names, sizes and scalings first, so that none of the arrays has to stay.
    shapes: dict[str, tuple[int, ...]] = {}
    entries = []
    for entry, tensors in _gathered(model):
        shapes |= {name: tensor.shape for name, tensor in tensors.items()}
        entries.append(dataclasses.replace(entry, params={"scaling": entry.params["scaling"]}))
    main = _main_entries(entries)
    whole = {PREFIX + name: tensor.shape for name, tensor in trained_weights(model)}
    base = base_model_name_or_path or getattr(model, "name_or_path", None)
    fields = _fields(main, model, base) | {"modules_to_save": _saved_modules(model, list(whole))}
    if _tied(model) and _trains_table(model, main, whole):
        fields["ensure_weight_tying"] = True
    if not write:
        for _ in _all_tensors(model):
            pass  # gathered for the process that writes
        return
    with new_folder(out, replace=frozenset({CONFIG_NAME, WEIGHTS_NAME})) as folder:
        text = json.dumps(extra_fields(model) | fields, indent=2, sort_keys=True)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        write_float32(folder / WEIGHTS_NAME, shapes | whole, _all_tensors(model))


def _tied(model: nnx.Module) -> TypeGuard[Decoder]:
    return isinstance(model, Decoder) and model.config.tie_embeddings


def _trains_table(model: Decoder, entries: list[AdapterEntry], whole: Iterable[str]) -> bool:
    return any(entry.is_embedding for entry in entries) or f"{PREFIX}{model.config.names.embedding}.weight" in whole


def _all_tensors(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    for _, tensors in _gathered(model):
        yield from tensors.items()
    for name, tensor in trained_weights(model):
        yield PREFIX + name, tensor


def _main_entries(entries: list[AdapterEntry]) -> list[AdapterEntry]:
    """The entries of the one method that a folder holds; biases that are trained beside it are no method of theirs."""
    if not entries:
        raise InputError("the model has no adapter to save: attach one, or save the model with save_pretrained")
    main = [entry for entry in entries if entry.method != "bitfit"]
    methods = sorted({entry.method for entry in main})
    if len(methods) > 1:
        raise InputError(f"one folder holds one method, but the model has adapters of {', '.join(methods)}")
    if not main or not isinstance(main[0].config, LoRAConfig | MoRAConfig):
        raise InputError(
            f"{entries[0].method} can't be written as a PEFT folder: convert it to LoRA with a rank, or merge it"
        )
    if len(main) < len(entries) and main[0].config.bias != "all":
        raise InputError(f"one folder holds one method, but the model has adapters of bitfit, {methods[0]}")
    return main


def _gathered(model: nnx.Module) -> Iterator[tuple[AdapterEntry, dict[str, np.ndarray]]]:
    """Each adapted matrix with its tensors under their names in files."""
    where = {path: (place, layer) for place in places(model) for layer, path in enumerate(place.paths)}
    for entry in map(plain_lora, adapters_of(model)):
        path, params = PREFIX + entry.path, entry.params
        names = EMBEDDING_FACTORS if entry.is_embedding else FACTORS
        tensors: dict[str, np.ndarray] = {}
        if "m" in params:
            tensors |= {f"{path}.{names['a']}": params["m"], f"{path}.{names['b']}": params["m"]}
        if "lora_a" in params:
            tensors |= {f"{path}.{names['a']}": params["lora_a"].T, f"{path}.{names['b']}": params["lora_b"].T}
            if entry.is_embedding and _tied(model):
                head = f"{PREFIX}{model.config.names.head}"
                tensors |= {f"{head}.{FACTORS['a']}": params["lora_b"], f"{head}.{FACTORS['b']}": params["lora_a"]}
        if "magnitude" in params:
            tensors[f"{path}.{names['magnitude']}"] = params["magnitude"]
        if "bias" in params:
            inner = "bias" if entry.method == "bitfit" else "base_layer.bias"
            tensors[f"{path}.{inner}"] = base_bias(*where[entry.path]) + params["bias"]
        yield entry, tensors


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
    if len({entry.config.use_dora for entry in entries}) > 1:
        raise InputError("one folder holds LoRA with or without DoRA's magnitude, but the model has both")
    # From the scaling that is really used, which may differ by layer.
    scalings = {entry.path: float(entry.params["scaling"]) for entry in entries}
    power = 0.5 if isinstance(config, RsLoRAConfig) else 1.0
    alpha_of = {entry.path: _alpha(scalings[entry.path], entry.config.rank, power) for entry in entries}
    alpha = _alpha(collections.Counter(scalings.values()).most_common(1)[0][0], rank, power)
    alphas = {path: value for path, value in alpha_of.items() if value != alpha}
    return lora_fields(config, targets=targets, alpha=alpha, ranks=ranks, alphas=alphas, base=base)


def _alpha(scaling: float, rank: int, power: float) -> float:
    """The alpha of a scaling; rounded, since scalings are kept in float32."""
    return round(scaling * math.pow(rank, power), 6)


def _saved_modules(model: nnx.Module, names: list[str]) -> list[str] | None:
    """The shortest names that PEFT takes for exactly these modules: it takes any module whose path ends so."""
    if not names:
        return None
    saved = {name.removeprefix(PREFIX).rpartition(".")[0] for name in names}
    possible = {name.rpartition(".")[0] for name in base_names(model)}
    short = set()
    for path in saved:
        last = path.rpartition(".")[2]
        short.add(last if {other for other in possible if other.endswith(last)} <= saved else path)
    return sorted(short)
