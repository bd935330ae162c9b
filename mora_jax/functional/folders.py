"""Adapters of a tree as PEFT folders, as those of NNX and Linen models at the same paths are written and read."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.functional.tree import Adapters, Einsums, TreeKernel, check_config, kernels_of, matched
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.linen.folders import Place, read_places, write_places


def save(
    params: Any,
    adapters: Adapters,
    out: str | os.PathLike[str],
    config: Any,
    *,
    einsums: Einsums | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes adapters as a PEFT folder.

    Layers of a stack are one entry each, with their number behind the node that is stacked: `layers.0.attn.q`.

    Args:
        params: as for `merge`.
        adapters: as for `merge`.
        config: as for `merge`.
        einsums: as for `init`.
        out: the folder; one that holds something is refused without `overwrite`.
        base_model_name_or_path: what the folder names as its base.
        overwrite: replace the adapter that is in `out`; files that belong to none stay there.

    Raises:
        TypeError, ValueError: as `merge`.
        InputError: `out` can't be used.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> params = {"mlp": {"kernel": jnp.ones((6, 4))}}
        >>> config = mj.LoRAConfig(rank=2)
        >>> adapters = mj.functional.init(params, config, rngs=0)
        >>> mj.functional.save(params, adapters, "saved-tree", config)
    """
    leaves = jax.tree.leaves(params)
    places, by_path = [], {}
    for kernel, arrays in matched(params, adapters, config, einsums):
        place = _place(kernel, leaves)
        places.append(place)
        for index, name in place.names():
            values = {key: np.asarray(value[index]) for key, value in arrays.items()}
            # Layer numbers count otherwise in the model that is written.
            by_path[name] = AdapterValues(dataclasses.replace(kernel.config, layers_to_transform=None), values)
    others = [_place(kernel, leaves) for kernel in kernels_of(params, einsums)]
    write_places(places, others, by_path, out, base_model_name_or_path, overwrite)


def load(params: Any, path: str | os.PathLike[str], *, einsums: Einsums | None = None) -> tuple[Any, Adapters]:
    """Reads the adapter of a PEFT folder for a tree.

    Args:
        params: the tree.
        path: the folder or hub id; written from a tree, from NNX or from Linen.
        einsums: as for `init`.

    Returns:
        The configuration, and the adapters.

    Raises:
        InputError: as `mora_jax.load_adapter`, or a tree has no form of what the folder holds.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> params = {"mlp": {"kernel": jnp.ones((6, 4))}}
        >>> config = mj.LoRAConfig(rank=2)
        >>> adapters = mj.functional.init(params, config, rngs=0)
        >>> mj.functional.save(params, adapters, "tree-adapter", config, overwrite=True)
        >>> config, adapters = mj.functional.load(params, "tree-adapter")
        >>> sorted(adapters)
        ['mlp']
    """
    leaves = jax.tree.leaves(params)
    config, arrays = read_places([_place(kernel, leaves) for kernel in kernels_of(params, einsums)], path)
    check_config(config)
    return config, {".".join(where): trained | fixed for where, (trained, fixed) in arrays.items()}


def _place(kernel: TreeKernel, leaves: list[Any]) -> Place:
    bias = None if kernel.bias is None else jnp.asarray(leaves[kernel.bias])
    lifts = (kernel.lifts,) * len(kernel.stack)
    return Place(tuple(kernel.path.split(".")), kernel.matrix, jnp.asarray(leaves[kernel.leaf]), bias, lifts)
