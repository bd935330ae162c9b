"""LoRA and its relatives in the one form that files have: two factors and a scaling.

PiSSA and OLoRA train A and B from factors A₀ and B₀ that are subtracted again; the update `A B − A₀ B₀` is the product
`[A A₀] [B; −B₀]` of twice the rank, which needs no other base. How a method trains its factors is no matter for files.
ReMoRA is, at any moment, the MoRA of the kind whose turn it is.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mora_jax.adapters.adapter import Adapter
from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.config import LoRAConfig, MoRAConfig, ReMoRAConfig, RsLoRAConfig


def plain(entry: AdapterEntry) -> AdapterEntry:
    """The entry in the form of files; entries of methods that have but one come back as they are."""
    config = entry.config
    if not isinstance(config, ReMoRAConfig):
        return plain_lora(entry)
    kind = config.kinds[int(entry.params["turn"])]
    same = {name: getattr(config, name) for name in ("rank", "dropout", "targets", "use_dora")}
    params = {name: value for name, value in entry.params.items() if name != "turn"}
    return dataclasses.replace(entry, method="mora", config=MoRAConfig(kind=kind, **same), params=params)


def file_method(adapter: Adapter) -> str:
    """What an adapter's method becomes in a file: LoRA's relatives are LoRA or rsLoRA there, ReMoRA is MoRA."""
    if isinstance(adapter.config, ReMoRAConfig):
        return "mora"
    if not isinstance(adapter.config, LoRAConfig):
        return adapter.method
    return "rslora" if isinstance(adapter.config, RsLoRAConfig) else "lora"


def plain_lora(entry: AdapterEntry) -> AdapterEntry:
    """The entry as LoRA or rsLoRA, with or without a magnitude; entries of other methods come back as they are."""
    config, params = entry.config, dict(entry.params)
    if not isinstance(config, LoRAConfig):
        return entry
    first_a, first_b = params.pop("initial_a", None), params.pop("initial_b", None)
    rank = params["lora_a"].shape[1]
    if first_a is not None and first_b is not None:
        params["lora_a"] = np.concatenate([params["lora_a"], first_a[:, :rank]], axis=1)
        params["lora_b"] = np.concatenate([params["lora_b"], -first_b[:rank]], axis=0)
        rank *= 2
    plain = RsLoRAConfig if isinstance(config, RsLoRAConfig) else LoRAConfig
    same = {name: getattr(config, name) for name in ("alpha", "dropout", "targets", "use_dora", "bias")}
    method = "rslora" if plain is RsLoRAConfig else "lora"
    return dataclasses.replace(entry, method=method, config=plain(rank=rank, **same), params=params)
