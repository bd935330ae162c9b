"""LoRA on several matrices with one input, computed together."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mora_jax.adapters.products.fused import FusedLayout
from mora_jax.adapters.products.matmul import added, dot32, dot32_nt, dot32_tn

Array = jax.Array


def scaling_of(params: dict[str, Array]) -> Array:
    """The factor on the hidden features: `[]`, or `[rank]` where layers of a stack have their own ranks."""
    mask = params.get("rank_mask")
    return params["scaling"] if mask is None else params["scaling"] * mask


def initial_of(params: dict[str, Array] | None) -> dict[str, Array] | None:
    """The factors that the update is counted from, in place of the trained ones; None where it starts at zero."""
    if params is None or "initial_a" not in params:
        return None
    return params | {"lora_a": params["initial_a"], "lora_b": params["initial_b"]}


@dataclass(frozen=True)
class FusedLoRA:
    """LoRA on several matrices with one input, as one pair of products: A side by side, B block-diagonal.

    The backward is written out: autodiff compiles the contractions over tokens into transposed copies of the large
    operand.
    """

    layout: FusedLayout
    present: tuple[bool, ...]
    frozen_a: bool = False

    def _factors(self, params, dtype) -> tuple[Array, Array, Array]:
        """A `[in, R]`, B `[R, features]` in `dtype` and the scaling `[R]`, R the sum of the ranks."""
        used = [p for p in params if p is not None]
        lora_a = jnp.concatenate([p["lora_a"].astype(dtype) for p in used], axis=1)
        scaling = jnp.concatenate([jnp.broadcast_to(scaling_of(p), p["lora_a"].shape[1:]) for p in used])
        if len(params) == 1:
            return lora_a, used[0]["lora_b"].astype(dtype), scaling
        rows = []
        for i, p in enumerate(params):
            if p is not None:
                rank = p["lora_b"].shape[0]
                blocks = [jnp.zeros((rank, self.layout.part_features(j)), dtype) for j in range(len(params))]
                blocks[i] = p["lora_b"].astype(dtype)
                rows.append(self.layout.join(blocks))
        return lora_a, jnp.concatenate(rows, axis=0), scaling

    def _product(self, x: Array, params) -> tuple[Array, Array]:
        lora_a, lora_b, scaling = self._factors(params, x.dtype)
        hidden = (dot32(x, lora_a) * scaling).astype(x.dtype)
        return dot32(hidden, lora_b), hidden

    def forward(self, x: Array, params):
        """As `Delta.forward`."""
        y, hidden = self._product(x, params)
        first = tuple(initial_of(p) for p in params)
        if any(p is not None for p in first):
            # As a product of its own, so that a fresh update cancels to the last bit.
            y = y - self._product(x, first)[0]
        return y, (None if self.frozen_a else x, hidden, params)

    def moved(self, dparams):
        """As `Delta.moved`: the factors that are trained."""
        names = ("lora_b",) if self.frozen_a else ("lora_a", "lora_b")
        return tuple(None if d is None else {name: d[name] if name in names else None for name in d} for d in dparams)

    def tangent(self, residuals, dx: Array | None, dparams) -> Array | None:
        """As `Delta.tangent`."""
        x, hidden, params = residuals
        lora_a, lora_b, scaling = self._factors(params, hidden.dtype)
        by_name = {name: self._changes(name, params, dparams) for name in ("lora_a", "lora_b")}
        dhidden = [] if dx is None else [dot32(dx, lora_a)]
        if by_name["lora_a"] is not None:
            dhidden.append(dot32(x, self._factors(by_name["lora_a"], hidden.dtype)[0]))
        terms = [dot32((added(*dhidden) * scaling).astype(hidden.dtype), lora_b)] if dhidden else []
        if by_name["lora_b"] is not None:
            terms.append(dot32(hidden, self._factors(by_name["lora_b"], hidden.dtype)[1]))
        first = tuple(initial_of(p) for p in params)
        if dx is not None and any(p is not None for p in first):
            terms.append(-self._product(dx, first)[0])
        return added(*terms) if terms else None

    @staticmethod
    def _changes(name: str, params, dparams):
        """`params` with the changes of one factor in its place, zero where it does not change; None without any."""
        changed = [None if d is None else d[name] for d in dparams]
        if all(change is None for change in changed):
            return None
        return tuple(
            None if p is None else p | {name: jnp.zeros_like(p[name]) if d is None else d}
            for p, d in zip(params, changed, strict=True)
        )

    def backward(self, residuals, dy: Array):
        """As `Delta.backward`."""
        x, hidden, params = residuals
        dtype = hidden.dtype
        lora_a, lora_b, scaling = self._factors(params, dtype)
        dhidden = (dot32_nt(dy, lora_b) * scaling).astype(dtype)
        dx = dot32_nt(dhidden, lora_a)
        first = tuple(initial_of(p) for p in params)
        if any(p is not None for p in first):
            first_a, first_b, scaling = self._factors(first, dtype)
            dx = dx - dot32_nt((dot32_nt(dy, first_b) * scaling).astype(dtype), first_a)
        da = None if x is None else dot32_tn(x, dhidden)
        db = dot32_tn(hidden, dy)
        gradients: list[dict[str, Array | None] | None] = []
        start = 0
        for i, p in enumerate(params):
            if p is None:
                gradients.append(None)
                continue
            rows = slice(start, start + p["lora_b"].shape[0])
            start = rows.stop
            part = self.layout.take(db[rows].reshape(-1, *self.layout.out_shape), i)
            gradients.append(dict.fromkeys(p) | {"lora_a": None if da is None else da[:, rows], "lora_b": part})
        return dx, tuple(gradients)
