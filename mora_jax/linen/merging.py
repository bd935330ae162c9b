"""Linen adapters folded into the kernels that they adapt."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flax import linen as nn, traverse_util

from mora_jax.adapters.config.patterns import config_at
from mora_jax.adapters.matrices import BIASES, KERNELS, Matrix, possible_matrices
from mora_jax.adapters.methods.registry import array_shapes
from mora_jax.adapters.report import VECTORS
from mora_jax.adapters.targets import Picker
from mora_jax.linen.matrices import layer_number
from mora_jax.linen.report import LinenReport
from mora_jax.linen.tree_sites import Arrays, Path, TreeSite, scaled
from mora_jax.linen.update import COLLECTION, FIXED, check_config, in_words

_REPORT = "give the report of the context in which the adapters were made, report="


def sites_of(variables: Mapping[str, Any]) -> list[TreeSite]:
    """Every array among the parameters that may be a matrix, taken as one in the first way that its shape allows."""
    flat = traverse_util.flatten_dict(plain_tree(variables["params"]))
    params = {path: nn.meta.unbox(value) for path, value in flat.items()}
    sites = []
    for key, array in params.items():
        if np.ndim(array) >= 2 and key[-1] not in VECTORS:
            path = key[:-1] if key[-1] in KERNELS else key
            bias = (*path, next((name for name in BIASES if (*path, name) in params), "bias"))
            sites.append(TreeSite(path, Matrix.plain(key[-1], array.shape), array, key, params.get(bias), bias))
    return sites


def adapted_sites(
    variables: Mapping[str, Any], configs: tuple[Any, ...], report: LinenReport | None = None
) -> Iterator[tuple[TreeSite, Arrays]]:
    """The adapted layers among variables, each with the arrays of its adapter.

    Args:
        variables: `{"params": …, "adapters": …}`.
        configs: what the adapters were made with. Each layer takes the first one of its method that picks it.
        report: of the context in which the variables were made; None where shapes say how kernels are matrices.

    Raises:
        ValueError: no adapters, a layer without kernel or without a config, shapes that deny the config, or an array
            that shapes alone don't make a matrix of.
    """
    by_key = {site.key: site for site in sites_of(variables)}
    adapters: dict[Path, Arrays] = {}
    for collection in (COLLECTION, FIXED):
        for path, value in traverse_util.flatten_dict(plain_tree(variables.get(collection, {}))).items():
            adapters.setdefault(path[:-1], {})[path[-1]] = nn.meta.unbox(value)
    if not adapters:
        raise ValueError(f"the variables hold no collection {COLLECTION!r}, so there is nothing to merge or save")
    for config in configs:
        check_config(config)
    pickers = [(config, Picker(config, layer_number)) for config in configs]
    for path, arrays in adapters.items():
        key = next((key for key in (path, *((*path, name) for name in KERNELS)) if key in by_key), None)
        if key is None:
            raise ValueError(f"{'.'.join(path) or 'the layer'} has an adapter, but params hold no kernel for it")
        site, linear = by_key[key], key[-1] != "embedding"
        picked = [config_at(config, site.name) for config, picks in pickers if picks(site.name, is_linear=linear)]
        site = _fitted(site, arrays, picked, None if report is None else report.matrix_at(path))
        yield site, scaled(site.config, arrays, site.stack)


def plain_tree(tree: Any) -> Any:
    """A tree of dictionaries, frozen or not, as plain ones."""
    return {name: plain_tree(child) for name, child in tree.items()} if isinstance(tree, Mapping) else tree


def _fitted(site: TreeSite, arrays: Arrays, configs: list[Any], known: Matrix | None) -> TreeSite:
    """A site with the configuration and the matrix, `known` or not, that the arrays of its adapter fit."""
    where, name, shape = site.name or "the layer", site.key[-1], site.array.shape
    matrices = possible_matrices(name, shape) if known is None else [known]
    given = ", ".join(sorted(arrays))
    for config in configs:
        forms = [(matrix, wanted) for matrix in matrices if (wanted := _expected(config, matrix, shape)) is not None]
        if not any(set(wanted) == set(arrays) for _, wanted in forms):
            continue
        held = {key: value.shape for key, value in arrays.items()}
        fitting = [matrix for matrix, wanted in forms if wanted == held]
        if len({(matrix.shape, matrix.in_features) for matrix in fitting}) == 1:
            return replace(site, config=config, matrix=fitting[0])
        if fitting:
            raise ValueError(f"{where}: {name} {shape} can be taken as a matrix in several ways; {_REPORT}")
        key, size = next((k, s) for k, s in forms[-1][1].items() if held[k] != s)
        raise ValueError(
            f"{where}: {key} is {held[key]}; {in_words(config)} over {name} {shape} asks for {size}"
            + ("" if len(shape) == 2 or known is not None else f"; else {_REPORT}")
        )
    raise ValueError(f"{where} holds {given}, but none of the configurations that were given makes them there")


def _expected(config: Any, matrix: Matrix, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]] | None:
    """The shapes of an adapter's arrays over an array of a shape, axes of a stack in front."""
    try:
        trained, fixed = array_shapes(config, matrix)
    except ValueError:  # the method has no form for a matrix of this size
        return None
    stack = shape[: len(shape) - len(matrix.shape)]
    return {key: (*stack, *size) for key, size in (trained | fixed).items()}


def merge(variables: Mapping[str, Any], *configs: Any, report: LinenReport | None = None) -> dict[str, Any]:
    """Folds the adapters into the kernels: the `params` of a plain model that computes the same.

    Args:
        variables: `{"params": …, "adapters": …}`, also with axes that `nn.scan` or `nn.vmap` put in front.
        *configs: what the adapters were made with; the alpha and the kind are not in the arrays. Each layer
            takes the first one of its method whose `targets` name it.
        report: what `adapted` gave; needed where the shapes alone don't say how a kernel is a matrix (`nn.Einsum` with
            other than inputs first).

    Returns:
        `params` with new kernels in their own dtype, the sum taken in float32 (float64 where the kernel is). Auto-named
        `LoRADense_0` keeps its name; `rename_layers` turns it back. A layer without a bias to which the adapter adds
        one (BitFit) gets it, with a warning: the plain model needs `use_bias=True` there.

    Raises:
        ValueError: no adapters, a layer without kernel or without a config, or shapes that deny the config.

    Examples:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> from mora_jax.linen import LoRADense, merge
        >>> layer, x = LoRADense(4, rank=2, alpha=16.0), jnp.ones((1, 6))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> variables["adapters"]["lora_b"] += 1.0
        >>> merged = merge(variables, mj.LoRAConfig(rank=2, alpha=16.0))
        >>> bool(jnp.allclose(nn.Dense(4).apply({"params": merged}, x), layer.apply(variables, x), atol=1e-5))
        True
    """
    params = traverse_util.flatten_dict(plain_tree(variables["params"]))
    for site, arrays in adapted_sites(variables, configs, report):
        for key, value in ((site.key, site.merged(arrays)), (site.bias_key, site.merged_bias(arrays))):
            if value is not None:
                params[key] = nn.meta.replace_boxed(params.get(key, value), value)
        if site.bias is None and site.bias_key in params:
            warnings.warn(
                f"{site.name or 'the layer'} has no bias, and its adapter added one: give the plain layer "
                "use_bias=True, or it passes over the bias that params now hold for it",
                stacklevel=2,
            )
    return traverse_util.unflatten_dict(params)
