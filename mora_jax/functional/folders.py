"""Adapters of a tree as PEFT folders, as those of NNX and Linen models at the same paths are written and read."""

import os
from typing import Any

from mora_jax.functional.tree import Adapters, Einsums, adapted_sites, check_config, sites_of
from mora_jax.linen.folders import read_sites, write_sites


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
    adapted = adapted_sites(params, adapters, config, einsums)
    write_sites(adapted, sites_of(params, einsums), out, base_model_name_or_path, overwrite)


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
    config, arrays = read_sites(sites_of(params, einsums), path)
    check_config(config)
    return config, {".".join(where): trained | fixed for where, (trained, fixed) in arrays.items()}
