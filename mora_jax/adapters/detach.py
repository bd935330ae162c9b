"""Take adapters off the layers of a model, which leaves the frozen base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def undone_on_error(model: nnx.Module) -> Iterator[None]:
    """Puts every module of `model` back to the class and the attributes that it had, when what is done inside fails."""
    before = [(node, type(node), dict(vars(node))) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    try:
        yield
    except BaseException:
        for node, kind, attributes in before:
            object.__setattr__(node, "__class__", kind)
            vars(node).clear()
            vars(node).update(attributes)
        raise
