"""Take adapters off the layers of a model, which leaves the frozen base."""

from __future__ import annotations

from flax import nnx

from mora_jax.adapters.attach import adapted_layers
from mora_jax.adapters.projection import Projection


def detach(model: nnx.Module) -> None:
    """Removes every adapter of `model`, in place, without folding anything in: the layers are plain again.

    Raises:
        ValueError: the model has no adapter.
    """
    layers = list(adapted_layers(model))
    if not layers:
        raise ValueError("the model has no adapter to remove")
    for layer in layers:
        if isinstance(layer, Projection):
            layer.remove_adapters()
        else:
            layer.take_adapter()
