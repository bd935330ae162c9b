"""LoRA and its relatives in the one form that files have: two factors and a scaling.

PiSSA and OLoRA train A and B from factors A₀ and B₀ that are subtracted again; the update `A B − A₀ B₀` is the product
`[A A₀] [B; −B₀]` of twice the rank, which needs no other base. How a method trains its factors is no matter for files.
ReMoRA is, at any moment, the MoRA of the kind whose turn it is. `trained_as` goes the other way, for an adapter that is
trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.base import Adapter
from mora_jax.adapters.config import (
    DoRAConfig,
    LoRAConfig,
    LoRAFAConfig,
    LoRAPlusConfig,
    MoRAConfig,
    OLoRAConfig,
    PiSSAConfig,
    ReMoRAConfig,
    RsLoRAConfig,
)
from mora_jax.adapters.methods.lora_init import is_start
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues


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


def trained_as(
    adapter_values: AdapterValues, method: LoRAConfig, kernel: Callable[[], np.ndarray], path: str
) -> AdapterValues:
    """A LoRA out of a file as an adapter of another method, which computes the same and is trained otherwise.

    LoRA+ and LoRA-FA take any LoRA. PiSSA and OLoRA take what they wrote: the half of the ranks that is their start is
    the start again. Where `method` is another function than the file's, the values come back as it is.

    Args:
        adapter_values: of one matrix.
        method: the configuration of the method; its rank, alpha and so on are of no matter.
        kernel: gives the base's `[in, out]`.
        path: where the matrix is, for messages.

    Raises:
        InputError: PiSSA or OLoRA, and the file holds no LoRA that started so from this base.
    """
    given, values = adapter_values.config, dict(adapter_values.values)
    if not isinstance(given, LoRAConfig) or type(given) is type(method):
        return adapter_values
    other = isinstance(given, RsLoRAConfig) or isinstance(method, RsLoRAConfig | DoRAConfig)
    if other and not isinstance(method, LoRAPlusConfig | LoRAFAConfig):
        return adapter_values
    rank, init = given.rank, given.init
    if isinstance(method, PiSSAConfig | OLoRAConfig):
        rank, init = rank // 2, method.init
        lora_a, lora_b = values["lora_a"], values["lora_b"]
        values |= {"lora_a": lora_a[:, :rank], "initial_a": lora_a[:, rank:]}
        values |= {"lora_b": lora_b[:rank], "initial_b": -lora_b[rank:]}
        first = values["initial_a"], values["initial_b"]
        if given.rank % 2 or not is_start(init, kernel(), *first, float(values["scaling"])):
            raise InputError(
                f"the LoRA on {path} did not start as {init} from this base, so there is no start to hold fixed; set "
                "adapter.method=lora to train all of it"
            )
    same = {name: getattr(given, name) for name in ("dropout", "targets", "use_dora", "bias")}
    ratio: dict[str, Any] = {"lr_ratio": method.lr_ratio} if isinstance(method, LoRAPlusConfig) else {}
    config = type(method)(rank=rank, alpha=float(values["scaling"]) * rank, init=init, **same, **ratio)
    return AdapterValues(config, values)
