"""Take adapters off the layers of a model, which leaves the frozen base."""

from __future__ import annotations

from flax import nnx

from mora_jax.adapters.projection import Projection
from mora_jax.adapters.targets import Place, has_adapter, places
from mora_jax.adapters.trained import kept, restore


def detach(model: nnx.Module) -> None:
    """Removes every adapter of `model`, in place, without folding anything in: the layers are plain again.

    No method touches the base, so the base is as it was, bit for bit; modules that were trained whole get their
    frozen values back.

    Raises:
        ValueError: the model has no adapter.
    """
    found = [place for place in places(model) if has_adapter(place)]
    if not found and not list(kept(model)):
        raise ValueError("the model has no adapter to remove")
    for place in found:
        take_adapter(place)
    restore(model, trained=False)


def take_adapter(place: Place) -> None:
    """Takes the adapter off one place."""
    if isinstance(place.layer, Projection):
        del place.layer.adapters[place.part]
    else:
        place.layer.take_adapter()
