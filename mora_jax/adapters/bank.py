"""Several adapters of one form on one matrix, in numbered slots; which slot a row of the batch uses is data.

A bank of N slots holds the factors of its adapters stacked, `[N, …]` behind the layer axis. A forward pass picks the
factors of every row (`[B, …]`, B rows) and multiplies row by row; no update is ever made dense. Writing or clearing a
slot, and choosing slots, change arrays and no structure (slots.py).

LoRA of a lower rank is padded with zeros to the bank's, which is exact, and each slot has its own scaling. MoRA's
square can't be padded: its side and kind fix what it multiplies.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mora_jax.adapters.base import Params
from mora_jax.adapters.methods.lora import LoRAConfig
from mora_jax.adapters.methods.mora import MoRAConfig, square_rank, update
from mora_jax.adapters.products.matmul import Dot, dot
from mora_jax.adapters.slots import Bank as Bank, use as use


def _multiplied(product: Dot, x: Array, w: Array) -> Array:
    """`x [N, in]` by one matrix `[in, out]`, or by each row's `[B, in, out]`, as `[N, out]`."""
    if w.ndim == 2:
        return product(x, w)
    return jax.vmap(product)(_by_row(x, w.shape[0]), w).reshape(len(x), w.shape[-1])


def _by_row(x: Array, rows: int) -> Array:
    """`[N, features]` → `[B, N / B, features]`."""
    if len(x) % rows:
        raise ValueError(f"slots are chosen for {rows} rows, which don't divide {len(x)} inputs of a layer")
    return x.reshape(rows, -1, x.shape[-1])


def _scaled(x: Array, scaling: Array) -> Array:
    return x * scaling if scaling.ndim == 0 else (_by_row(x, len(scaling)) * scaling[:, None, None]).reshape(x.shape)


class LoRABank(Bank):
    """Slots of LoRA: `lora_a [*layers, N, in, rank]` and `lora_b [*layers, N, rank, out]`."""

    method: ClassVar[str] = "lora"
    factors: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")
    config: LoRAConfig

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig, **options: Any):
        super().__init__(in_features, out_features, config, **options)
        self.lora_a = self._factor(in_features, config.rank, axes=(self.axes[0], "rank"))
        self.lora_b = self._factor(config.rank, out_features, axes=("rank", self.axes[1]))

    @classmethod
    def delta(cls, config: LoRAConfig, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        hidden = _scaled(_multiplied(product, x, Bank.pick(params, "lora_a")), Bank.pick_scaling(params))
        return _multiplied(product, hidden.astype(x.dtype), Bank.pick(params, "lora_b"))


class MoRABank(Bank):
    """Slots of MoRA of one kind: `m [*layers, N, q, q]`."""

    method: ClassVar[str] = "mora"
    factors: ClassVar[tuple[str, ...]] = ("m",)
    config: MoRAConfig

    def __init__(self, in_features: int, out_features: int, config: MoRAConfig, **options: Any):
        super().__init__(in_features, out_features, config, **options)
        q = square_rank(in_features, out_features, config.rank, config.kind)
        self.m = self._factor(q, q, axes=("square_out", "square_in"))

    @classmethod
    def delta(cls, config: MoRAConfig, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        scaling = Bank.pick_scaling(params)
        picked = Bank.pick(params, "m") * scaling.reshape(*scaling.shape, 1, 1)
        turned = jnp.swapaxes(picked, -1, -2)
        q = turned.shape[-1]
        return update(
            x, q, out_features, config.kind, lambda sums: _multiplied(product, sums, turned[..., : sums.shape[-1], :])
        )
