"""What a layer of somebody else's class computes: an einsum of its input with a parameter, under names of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import nnx


@dataclass(frozen=True)
class LayerForm:
    """The names that a class of layers has for what `nnx.Einsum` calls `kernel`, `einsum_str` and `bias`.

    Attributes:
        kernel: the attribute that holds the matrix, an `nnx.Param`.
        einsum: the equation of input and kernel (`"...i,io->...o"`), or the attribute that holds it.
        bias: the attribute that holds the bias, an `nnx.Param` laid out as the output is, or None.
    """

    kernel: str
    einsum: str
    bias: str | None = None

    def equation(self, layer: nnx.Module) -> Any:
        """The equation of one layer."""
        return self.einsum if "->" in self.einsum else getattr(layer, self.einsum, None)


EINSUM = LayerForm("kernel", "einsum_str", "bias")
# Registered classes; `registered.py` fills it.
FORMS: dict[type, LayerForm] = {}


def form_of(layer: Any) -> LayerForm | None:
    """The form of an einsum's layer, Flax's or a registered one, adapted or not; None for another layer."""
    if isinstance(layer, nnx.Einsum):
        return EINSUM
    return next((FORMS[base] for base in type(layer).__mro__ if base in FORMS), None)


def kernel_of(layer: Any) -> nnx.Variable:
    """The parameter that holds the matrix of a layer which is no embedding."""
    form = form_of(layer)
    return getattr(layer, "kernel" if form is None else form.kernel)


def bias_param(layer: Any) -> nnx.Variable | None:
    """The parameter that holds the bias of a layer, or None."""
    form = form_of(layer)
    name = "bias" if form is None else form.bias
    return None if name is None else getattr(layer, name, None)


def equation_of(layer: Any) -> str | None:
    """The einsum that a layer computes with its kernel; None for layers that are none."""
    form = form_of(layer)
    equation = None if form is None else form.equation(layer)
    return equation.replace(" ", "") if isinstance(equation, str) else None
