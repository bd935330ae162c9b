"""Matrices in layers that no adapter can stand beside, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flax import nnx

from mora_jax.adapters.base import Adapter, AdapterParam
from mora_jax.adapters.layers import ADAPTED, Adapted
from mora_jax.adapters.matching.forms import FORMS
from mora_jax.adapters.matching.registered import difference, guess
from mora_jax.adapters.trainable_base import named_modules

LINEN = "a Linen module in nnx.bridge.ToNNX: put adapters on the Linen module, with mora_jax.linen.adapted"
VECTORS = ("bias", "scale", "mean", "var")  # as Flax calls them; a stack of these is no matrix


def unknown_matrices(
    model: nnx.Module, known: set[int], seen: set[int] | None = None
) -> Iterator[tuple[str, nnx.Module, int]]:
    """Path, module, and how many numbers are in its matrices.

    Args:
        model: of any kind.
        known: the identities of layers that could carry adapters.
        seen: those of parameters that are counted elsewhere; others are added.
    """
    seen = set() if seen is None else seen
    for named, module in named_modules(model):
        if id(module) in known or isinstance(module, Adapter | Adapted):
            continue
        size = sum(math.prod(shape) for shape in _shapes(module, seen))
        if size:
            yield named[0] or "(the model itself)", module, size


def _shapes(module: nnx.Module, seen: set[int]) -> Iterator[tuple[int, ...]]:
    """The shapes of the matrices that a module holds itself and that were not `seen`, whose ids it notes."""
    for name, value in vars(module).items():
        if not isinstance(value, nnx.Param) or isinstance(value, AdapterParam) or id(value) in seen:
            continue
        seen.add(id(value))
        stacked = (value.get_metadata().get("axes") or ("",))[0] == "layers"
        if name not in VECTORS and len(value.shape) - stacked > 1:
            yield value.shape


def why_unknown(layer: nnx.Module) -> str:
    """Why a layer with a matrix, for which there is no adapted form, has none."""
    kind = type(layer)
    if isinstance(layer, nnx.bridge.ToNNX):
        return LINEN
    base = next((one for one in kind.__mro__ if one in ADAPTED), None)
    if base is not None and kind.__call__ is not base.__call__:
        return f"its class overrides the call of {base.__name__}" + (
            " and does not go on to super().__call__" if base.__module__.startswith("flax.") else ""
        )
    form = guess(layer) if base is None else FORMS.get(base)
    if base is None and form is None:
        return "a class without adapters, see mj.register_layer"
    return (difference(layer, form) if form is not None else "") or "no product with one matrix"
