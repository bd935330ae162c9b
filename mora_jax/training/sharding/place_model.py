"""Arrays made where they belong: a base read into its shards, adapters and optimizer states beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

from flax import nnx
from jax.sharding import Sharding

from mora_jax.models.decoder import Decoder
from mora_jax.training.config.schema import MeshConfig
from mora_jax.training.sharding.device_put import put
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import Placement


def is_spread(config: MeshConfig, mesh: tuple[int, ...]) -> bool:
    """Whether arrays are placed on a mesh of these sizes while they are made; `pmap` copies them later."""
    return math.prod(mesh) > 1 and not config.pmap


def base_shardings(mesh: tuple[int, ...], model: Decoder) -> Callable[[nnx.Variable], Sharding]:
    """Where each parameter of a base (of shapes alone) is stored on a mesh of these sizes."""
    placement = Placement.of(make_mesh(*mesh), nnx.state(model))
    return lambda variable: placement.stored(variable.get_metadata()["axes"], tuple(variable.shape))


def place_model(mesh: tuple[int, ...], model: Decoder) -> None:
    """Puts every array of a model where it is stored, one after the other; base weights are there already."""
    placement = Placement.of(make_mesh(*mesh), nnx.state(model))
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            array = node.get_value()
            axes = node.get_metadata().get("axes") or (None,) * array.ndim
            node.set_value(put(array, placement.stored(axes, array.shape)))
