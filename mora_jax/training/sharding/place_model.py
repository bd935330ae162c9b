"""Arrays made where they belong: a base read into its shards, adapters and optimizer states beside it."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx
from jax.sharding import Mesh, Sharding

from mora_jax.models.decoder import Decoder
from mora_jax.training.sharding.device_put import put
from mora_jax.training.sharding.rules import Placement


def base_shardings(mesh: Mesh, model: Decoder) -> Callable[[nnx.Variable], Sharding]:
    """Where each parameter of a base (of shapes alone) is stored on a mesh."""
    placement = Placement.of(mesh, nnx.state(model))
    return lambda variable: placement.stored(variable.get_metadata()["axes"], tuple(variable.shape))


def place_model(placement: Placement, model: Decoder) -> None:
    """Puts every array of a model where it is stored, one after the other; base weights are there already."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            array = node.get_value()
            axes = node.get_metadata().get("axes") or (None,) * array.ndim
            node.set_value(put(array, placement.stored(axes, array.shape)))
