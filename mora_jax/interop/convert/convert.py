"""One adapter method into another: exact where the update allows it, else the nearest, and never silently lossy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.attach import adapters_of, detach
from mora_jax.adapters.config import MoRAConfig
from mora_jax.adapters.methods import mora
from mora_jax.adapters.targets import aligned, star
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues, first, install, lora_of
from mora_jax.interop.convert.low_rank import best_factors, best_factors_of_product, singular_values
from mora_jax.interop.convert.mora_fit import nearest_m
from mora_jax.interop.convert.updates import Update, updates_of

_SHOWN_RANKS = (8, 32, 128, 512)


def convert_to_lora(model: nnx.Module, *, rank: int | None = None) -> Conversion:
    """Replaces every adapter of a model by LoRA.

    Args:
        model: a model with adapters; changed in place.
        rank: of the new adapters, which then are the nearest of this rank in the Frobenius norm (Eckart and Young);
            None for exact ones, of the rank that each needs.

    Returns:
        What came out and the error of each matrix, 0 where the rank suffices.

    Raises:
        InputError: no rank is given, but the updates of a method have full rank; the message names the error of some.
    """
    return _replace_adapters(model, lambda updates: lora_values(updates, rank))


def convert_to_mora(model: nnx.Module, *, kind: str = "sharing", rank: int | None = None) -> Conversion:
    """Replaces every adapter of a model by the MoRA nearest to it in the Frobenius norm.

    Args:
        model: a model with adapters; changed in place.
        kind: one of `mora_jax.adapters.methods.mora.KINDS`.
        rank: the LoRA rank whose parameters MoRA's matrices take; None for the rank of the adapters.

    Returns:
        What came out and the error of each matrix.

    Raises:
        InputError: an embedding has an adapter, for which MoRA has no form, or the adapters have no rank and none is
            given.
    """
    return _replace_adapters(model, lambda updates: mora_values(updates, kind, rank))


def _replace_adapters(
    model: nnx.Module, convert: Callable[[list[Update]], tuple[dict[str, AdapterValues], Conversion]]
) -> Conversion:
    updates = list(updates_of(model))
    if not updates:
        raise InputError("the model has no adapter to convert")
    by_path, conversion = convert(updates)
    detach(model)
    install(model, by_path)
    return conversion


def peft_knows(model: nnx.Module) -> bool:
    """Whether PEFT has the methods of all adapters of a model, or a form of them, so that it loads them as they are."""
    return all(entry.config.in_peft for entry in adapters_of(model))


def lora_values(updates: Iterable[Update], rank: int | None) -> tuple[dict[str, AdapterValues], Conversion]:
    """The LoRA of each update, read one at a time; see `convert_to_lora`."""
    updates = list(updates)
    if rank is None:
        _refuse_loss(updates)
    by_path, rows = {}, []
    for update in updates:
        scaling = 1.0
        chosen = rank or update.exact_rank
        assert chosen is not None, "refused above"
        if update.product is None:
            factors = best_factors(update.kernel(), chosen)
        else:
            factors = best_factors_of_product(*update.product(), chosen)
            scaling = update.scaling
        by_path[update.path] = lora_of(factors.a, factors.b, scaling, update.dropout)
        size = abs(scaling)
        rows.append(_row(update, chosen, size * factors.norm, size * factors.error))
    what = "LoRA" if rank is None else f"LoRA of rank {rank}"
    return by_path, Conversion(what, tuple(rows))


def mora_values(updates: Iterable[Update], kind: str, rank: int | None) -> tuple[dict[str, AdapterValues], Conversion]:
    """The MoRA nearest to each update, read one at a time; see `convert_to_mora`."""
    by_path, rows = {}, []
    for update in updates:
        if update.is_embedding:
            raise InputError(f"{update.path} is an embedding, for which MoRA has no form; convert to lora instead")
        if not (rank or update.rank):
            raise InputError(
                f"{update.what} on {update.path} has no rank that says how large MoRA's matrices become: give a rank"
            )
        config = MoRAConfig(rank=rank or update.rank, kind=kind, dropout=update.dropout)
        q = mora.square_rank(update.in_features, update.out_features, config.rank, kind)
        kernel = update.kernel()
        m = nearest_m(kernel, q, kind)
        fitted = mora.delta_weight(jnp.asarray(m), update.in_features, update.out_features, kind)
        by_path[update.path] = AdapterValues(config, {"m": m})
        rows.append(_row(update, q, float(np.linalg.norm(kernel)), float(np.linalg.norm(kernel - fitted))))
    return by_path, Conversion(f"MoRA of kind {kind}", tuple(rows))


def _row(update: Update, size: int, norm: float, error: float) -> Row:
    return Row(update.path, update.in_features, update.out_features, size, norm, error)


def _refuse_loss(updates: list[Update]) -> None:
    """Raises an InputError that names errors at some ranks, if any update has no exact LoRA."""
    full = [update for update in updates if update.exact_rank is None]
    if not full:
        return
    spectra = [singular_values(update.kernel()) ** 2 for update in full]
    squares, most, errors = sum(values.sum() for values in spectra), max(map(len, spectra)), []
    for rank in (rank for rank in _SHOWN_RANKS if rank < most):
        left = sum(values[rank:].sum() for values in spectra)
        errors.append(f"{np.sqrt(left / squares) if squares else 0:.3g} at rank {rank}")
    at_all = f"; the relative error is {', '.join(errors)}" if errors else ""
    raise InputError(
        f"{full[0].what}: {len(full)} of {len(updates)} updates have full rank, {full[0].path} among them, so no small "
        f"LoRA is exact{at_all}; give a rank to accept its error"
    )


LOSSY = 0.1  # a relative error above it is warned of


@dataclass(frozen=True)
class Row:
    """One converted matrix.

    Attributes:
        path: its module path.
        in_features, out_features: its sizes.
        size: the rank of the LoRA, or the side of MoRA's matrix.
        norm: Frobenius norm of the update before.
        error: Frobenius norm of what the new update lacks of it.
    """

    path: str
    in_features: int
    out_features: int
    size: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """`error / norm`; 0 for an update of zero."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Conversion:
    """The rows of a conversion; prints as a table with a line for each type of module, layers together.

    Attributes:
        method: what came out, in words.
        rows: one a matrix.
        left_out: tensors that changed too but that no adapter of these targets holds, with the norm of their change.
    """

    method: str
    rows: tuple[Row, ...]
    left_out: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Relative Frobenius error over all matrices together."""
        norm = math.hypot(*(row.norm for row in self.rows))
        return math.hypot(*(row.error for row in self.rows)) / norm if norm else 0.0

    @property
    def warning(self) -> str | None:
        """A sentence where the new adapter lacks more than a tenth of the change (`LOSSY`), else None."""
        if self.error <= LOSSY:
            return None
        return (
            f"what was written differs from the change by {self.error:.3g} of its norm (more than {LOSSY:g}), so it "
            "will answer differently"
        )

    @property
    def left_out_share(self) -> float:
        """Norm of what was left out, relative to the norm of the whole change."""
        left = math.hypot(*self.left_out.values())
        total = math.hypot(left, *(row.norm for row in self.rows))
        return left / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        rows = [asdict(row) | {"relative_error": row.relative} for row in self.rows]
        return {
            "method": self.method,
            "relative_error": self.error,
            "matrices": rows,
            "left_out": dict(self.left_out),
            "left_out_share": self.left_out_share,
        }

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("matrix", "layers", "in", "out", "size", "norm", "error", "worst")]
        types: dict[tuple[str, int, int], list[Row]] = {}
        for row in self.rows:
            types.setdefault((star(row.path), row.in_features, row.out_features), []).append(row)
        for (path, inputs, outputs), rows in types.items():
            together, sizes = Conversion("", tuple(rows)), sorted({row.size for row in rows})
            size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
            numbers = math.hypot(*(row.norm for row in rows)), together.error, max(row.relative for row in rows)
            shown = (f"{number:.3g}" for number in numbers)
            cells.append((path, str(len(rows)), str(inputs), str(outputs), size, *shown))
        lines = aligned(cells)
        lines.append(f"{self.method}, {len(self.rows)} matrices: relative Frobenius error {self.error:.3g} in total")
        if self.left_out:
            names = sorted(self.left_out, key=lambda name: -self.left_out[name])
            lines.append(
                f"left out: {len(names)} other tensors changed too ({first(names)}), {self.left_out_share:.3g} of the "
                "whole change's norm"
            )
        return "\n".join(lines)
