"""Fold adapters into the weights that they adapt."""

from __future__ import annotations

from flax import nnx

from mora_jax.adapters.attach import adapted_layers
from mora_jax.adapters.projection import Projection


def merge(model: nnx.Module) -> None:
    """Folds every adapter of `model` into its base layer, in place; the layers are plain again afterwards.

    The sum is taken in float32 and rounded once to the dtype of the weight.

    Raises:
        ValueError: the model has no adapter.
    """
    layers = list(adapted_layers(model))
    if not layers:
        raise ValueError("the model has no adapter to merge")
    for layer in layers:
        if isinstance(layer, Projection):
            layer.merge_adapters()
        else:
            delta = layer.adapter.delta_weight()
            layer.add_to_kernel(delta)
            layer.take_adapter()
