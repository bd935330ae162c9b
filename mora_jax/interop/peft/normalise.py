"""Adapters in the one form that files have, and back, for an adapter that is trained on.

How a method trains its factors is no matter for files: LoRA and its relatives are two factors and a scaling there, and
ReMoRA is, at any moment, the MoRA of the kind whose turn it is. The methods say it (`Adapter.in_file`); PiSSA and
OLoRA, whose start is subtracted again, become a product of twice the rank, which needs no other base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.base import Adapter
from mora_jax.adapters.methods.lora_init import is_start
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues


def plain(entry: AdapterEntry) -> AdapterEntry:
    """The entry in the form of files."""
    config, params = adapter_class(entry.config).in_file(entry.config, entry.params)
    return dataclasses.replace(entry, method=adapter_class(config).method, config=config, params=params)


def file_method(adapter: Adapter) -> str:
    """What an adapter's method becomes in a file."""
    return adapter.file_method or adapter.method


def trained_as(
    adapter_values: AdapterValues, method: Any, kernel: Callable[[], np.ndarray], path: str
) -> AdapterValues:
    """An adapter out of a file as one of another method, which computes the same and is trained otherwise.

    LoRA+ and LoRA-FA take any LoRA. PiSSA and OLoRA take what they wrote: the half of the ranks that is their start is
    the start again. Where `method` is another function than the file's, the values come back as they are.

    Args:
        adapter_values: of one matrix.
        method: the configuration of the method; its rank, alpha and so on are of no matter.
        kernel: gives the base's `[in, out]`.
        path: where the matrix is, for messages.

    Raises:
        InputError: PiSSA or OLoRA, and the file holds no LoRA that started so from this base.
    """
    given, values = adapter_values.config, dict(adapter_values.values)
    adapter = adapter_class(method)
    if type(given) is type(method) or not adapter.continues(method, given):
        return adapter_values
    rank, init = given.rank, given.init
    if adapter.holds_start:
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
    how = {name: getattr(method, name) for name in method.training_settings()}
    config = type(method)(rank=rank, alpha=float(values["scaling"]) * rank, init=init, **same, **how)
    return AdapterValues(config, values)
