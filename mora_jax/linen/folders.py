"""Linen adapters as PEFT folders, the same that NNX models of the same module paths write and read.

A tree of variables is turned into an NNX model of plain layers at its module paths, which `mora_jax.interop` knows how
to save and to load. Layers under `nn.scan` or `nn.vmap` are one entry each there, with their number behind the module
that is stacked: `layers.0.attn.query`.
"""

import json
import os
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from mora_jax.adapters.config.patterns import config_at, exactly, pattern_for
from mora_jax.adapters.matrices import Matrix, bias_param, possible_matrices, weight_of
from mora_jax.adapters.methods.registry import array_shapes, fresh_arrays
from mora_jax.adapters.products.matmul import wide
from mora_jax.adapters.report import AdapterEntry, adapters_of
from mora_jax.errors import InputError, refused
from mora_jax.interop.adapter_values import AdapterValues, install
from mora_jax.interop.peft import load, save
from mora_jax.interop.peft.lora import alpha_for
from mora_jax.linen.merging import adapted_sites, sites_of
from mora_jax.linen.report import LinenReport
from mora_jax.linen.tree_sites import Arrays, Path, TreeSite
from mora_jax.linen.update import COLLECTION, FIXED, check_config


class _Tree(nnx.Module):
    """Modules under the names of a tree of parameters."""


def save_adapter(
    variables: Mapping[str, Any],
    out: str | os.PathLike[str],
    config: Any,
    *,
    report: LinenReport | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters of a Linen model as a PEFT folder, as `mora_jax.save_adapter` does for NNX.

    Args:
        variables: `{"params": …, "adapters": …}`.
        out: the folder, as for `mora_jax.save_adapter`.
        config: what the adapters were made with.
        report: what `adapted` gave; needed for layers under `nn.scan` or `nn.vmap`, and where shapes alone don't say
            how a kernel is a matrix. What it says of them goes into the folder, so that loading needs none.
        base_model_name_or_path: what the folder names as its base.
        overwrite: replace the adapter that is in `out`; files that belong to none stay there.

    Raises:
        InputError: as `mora_jax.save_adapter`, or the variables don't fit the configuration.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> from flax import linen as nn
        >>> from mora_jax.linen import LoRADense, save_adapter
        >>> model = nn.Sequential([LoRADense(4, rank=2, alpha=16.0)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 6)))
        >>> save_adapter(variables, "linen-adapter", mj.LoRAConfig(rank=2, alpha=16.0))
    """
    with refused():
        layers = list(adapted_sites(variables, (config,), report))
    adapted = []
    for site, arrays in layers:
        lifts = () if report is None else report.lifts_at(site.path)[: len(site.stack)]
        if len(lifts) != len(site.stack):
            raise InputError(
                f"{site.name} is a stack of layers {site.stack}, and where their numbers belong is not known: give the "
                "report of the context in which they were made, report="
            )
        adapted.append((replace(site, lifts=lifts), arrays))
    write_sites(adapted, sites_of(variables), out, base_model_name_or_path, overwrite)


def write_sites(
    adapted: list[tuple[TreeSite, Arrays]],
    others: list[TreeSite],
    out: str | os.PathLike[str],
    base_model_name_or_path: str | None,
    overwrite: bool,
) -> None:
    """Writes adapters on arrays as a PEFT folder.

    Args:
        adapted: the adapted arrays, each with the arrays `[*stack, …]` of its adapter.
        others: all arrays, among which targets have to name the adapted ones.
        out, base_model_name_or_path, overwrite: as for `save_adapter`.
    """
    by_path = {}
    for site, arrays in adapted:
        # The NNX model that is written has these layers alone, under names in which NNX sees other numbers.
        config = replace(site.config, layers_to_transform=None)
        for index, name in site.names():
            by_path[name] = AdapterValues(config, {key: np.asarray(value[index]) for key, value in arrays.items()})
    model = _as_nnx([site for site, _ in adapted], others)
    install(model, by_path)
    save.save_adapter(
        model,
        out,
        base_model_name_or_path=base_model_name_or_path,
        overwrite=overwrite,
        linen_layers={site.name: site.described() for site, _ in adapted},
    )


def load_adapter(
    variables: Mapping[str, Any], path: str | os.PathLike[str], *, report: LinenReport | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads the adapter of a PEFT folder for a Linen model.

    Args:
        variables: `{"params": …}` of the plain model.
        path: the folder or hub id, as for `mora_jax.load_adapter`; written from Linen or from NNX.
        report: what `adapted` gave for the model, with any configuration; needed for folders that were written of NNX
            models, where neither shapes nor a bias say how a kernel is a matrix.

    Returns:
        The configuration for `adapted`, and the variables with the adapters among them. Its dropout is the one that the
        adapter was trained with.

    Raises:
        InputError: as `mora_jax.load_adapter`, or Linen has no form of what the folder holds.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from mora_jax.adapters.config import LoRAConfig
        >>> from mora_jax.linen import adapted, load_adapter, save_adapter
        >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)]), jnp.ones((3, 8))
        >>> with adapted(LoRAConfig(rank=2)):
        ...     variables = model.init(jax.random.key(0), x)
        >>> folder = tempfile.mkdtemp()
        >>> save_adapter(variables, folder, LoRAConfig(rank=2))
        >>> config, variables = load_adapter({"params": variables["params"]}, folder)
        >>> with adapted(config):
        ...     model.apply(variables, x).shape
        (3, 4)
    """
    given, described = load.tensor_shapes(path), _described(path)
    config, arrays = read_sites([_placed(site, given, report, described) for site in sites_of(variables)], path)
    collections: dict[str, dict[Path, jax.Array]] = {COLLECTION: {}, FIXED: {}}
    for where, parts in arrays.items():
        for collection, values in zip(collections, parts, strict=True):
            collections[collection] |= {(*where, name): value for name, value in values.items()}
    trees = {name: traverse_util.unflatten_dict(arrays) for name, arrays in collections.items() if arrays}
    return config, dict(variables) | trees


def read_sites(sites: list[TreeSite], path: str | os.PathLike[str]) -> tuple[Any, dict[Path, tuple[Arrays, Arrays]]]:
    """Reads the adapter of a PEFT folder for arrays.

    Args:
        sites: every array that may be a layer's matrix.
        path: the folder.

    Returns:
        The configuration, and by module path the arrays that are trained and those that are not.
    """
    given, described = load.tensor_shapes(path), _described(path)
    if modules := load.whole_modules(path):
        raise InputError(
            f"{path}: it trains {', '.join(modules)} whole, for which a tree of parameters has no form; leave that away"
        )
    # Where the folder says that the numbers of stacked layers are written, they are.
    lifts = [described[site.name][1] if site.name in described else site.lifts for site in sites]
    sites = [
        replace(site, lifts=at) if len(at) == len(site.stack) else site for site, at in zip(sites, lifts, strict=True)
    ]
    known = {name: (site, index) for site in sites for index, name in site.names()}
    model = _as_nnx([site for site in sites if any(name in given for _, name in site.names())], sites)
    load.load_adapter(model, path)
    adapters: dict[Path, dict[tuple[int, ...], AdapterEntry]] = {}
    for entry in adapters_of(model):
        site, index = known[entry.path]
        adapters.setdefault(site.path, {})[index] = entry
    by_path = {site.path: site for site in sites}
    config = _one_config({path: list(entries.values()) for path, entries in adapters.items()})
    return config, {
        where: _stacked(by_path[where], entries, config_at(config, ".".join(where)))
        for where, entries in adapters.items()
    }


def _stacked(site: TreeSite, entries: Mapping[tuple[int, ...], AdapterEntry], config: Any) -> tuple[Arrays, Arrays]:
    """The arrays of a site's adapter, those that are trained and those that are not.

    Layers of a stack that the folder leaves out get a fresh adapter, which changes nothing.
    """
    kernels, (trained, fixed) = site.kernel(), array_shapes(config, site.matrix)
    arrays = {
        name: np.zeros((*site.stack, *shape), wide(site.array.dtype)) for name, shape in (trained | fixed).items()
    }
    for index in np.ndindex(site.stack):
        layer: Mapping[str, Any] = (
            entries[index].params
            if index in entries
            else ChainMap(*fresh_arrays(config, site.matrix, nnx.Rngs(params=jax.random.key(0)), kernels[index]))
        )
        for name, array in arrays.items():
            array[index] = layer[name]
    values = {name: jnp.asarray(array) for name, array in arrays.items()}
    return {name: values[name] for name in trained}, {name: values[name] for name in fixed}


def _described(path: str | os.PathLike[str]) -> dict[str, tuple[Matrix, tuple[int, ...]]]:
    """What a folder says of its layers, by module path; nothing where it was written from NNX."""
    file = load.local_folder(path) / save.LINEN_NAME
    if not file.exists():
        return {}
    try:
        layers = json.loads(file.read_text(encoding="utf-8"))
        return {path: (_matrix(said), tuple(said["lifts"])) for path, said in layers.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file} is not what mora_jax.linen.save_adapter writes: {error}") from None


def _matrix(said: Mapping[str, Any]) -> Matrix:
    shape, contracted, free, bias_axes = (tuple(said[name]) for name in ("shape", "contracted", "free", "bias_axes"))
    return Matrix(said["array"], shape, contracted, free, bias_axes, said.get("groups", 0))


def _placed(
    site: TreeSite, given: Mapping[str, Any], report: LinenReport | None, described: Mapping[str, Any]
) -> TreeSite:
    """A site as the file and the report say that it is a matrix, or a stack of them."""
    if report is None and site.name in described:
        matrix, lifts = described[site.name]
        if (matrix.array, matrix.shape) == (site.matrix.array, site.array.shape[len(lifts) :]):
            return replace(site, matrix=matrix, lifts=lifts)
    if report is not None and (known := report.matrix_at(site.path)) is not None:
        axes = site.array.ndim - len(known.shape)
        return replace(site, matrix=known, lifts=report.lifts_at(site.path)[:axes])
    lifts, shapes = (), given.get(site.name)
    if shapes is None:
        ends = range(len(site.path) + 1)
        layer = next(((at, name) for at in ends for name in given if _is_layer(name, site.path, at)), None)
        if layer is None:
            return site
        lifts, shapes = layer[:1], given[layer[1]]
    lead = len(lifts)
    fitting = [
        matrix
        for matrix in possible_matrices(site.matrix.array, site.array.shape)
        if site.array.ndim - len(matrix.shape) == lead
        and _fits(matrix, shapes)
        and (site.bias is None or site.bias.shape[lead:] == matrix.shape[len(matrix.contracted) :])
    ]
    if len(fitting) != 1 and site.array.ndim > 2 + lead:
        how = "several ways" if fitting else "no way that fits the folder"
        raise InputError(
            f"{site.name}: the shape {site.array.shape} of its {site.matrix.array} can be taken as a matrix in {how}; "
            "give the report of a context in which the model ran, report="
        )
    return replace(site, matrix=fitting[0], lifts=lifts) if fitting else site


def _is_layer(name: str, path: Path, at: int) -> bool:
    """Whether a path in a file is one with a layer's number behind `at` components."""
    parts = name.split(".")
    return len(parts) == len(path) + 1 and parts[at].isdecimal() and (*parts[:at], *parts[at + 1 :]) == path


def _fits(matrix: Matrix, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensors of a file may belong to a matrix of this size; those of MoRA say nothing about it."""
    down, up = shapes.get("a"), shapes.get("b")
    if down is None or up is None or down == up == (down[0],) * 2:
        return True
    return (down[-1], up[0]) == matrix.sizes


def _as_nnx(adapted: list[TreeSite], others: list[TreeSite]) -> nnx.Module:
    """An NNX model of plain layers at the paths of files; those that are to carry adapters have their values."""
    model: Any = _Tree()
    taken = {site.path for site in adapted}
    sites = [*adapted, *(site for site in others if site.path not in taken)]
    for site in sorted(sites, key=lambda site: len(site.path)):  # a layer that is the root comes first
        matrices, biases = (site.kernel(), site.bias_rows()) if site.path in taken else (None, None)
        for index, name in site.names():
            kernel, bias = (None if array is None else array[index] for array in (matrices, biases))
            layer = _layer(site.matrix, kernel, bias)
            if not name:
                model = layer
                continue
            *above, attribute = name.split(".")
            node = model
            for part in above:
                if not hasattr(node, part):
                    setattr(node, part, _Tree())
                node = getattr(node, part)
            setattr(node, attribute, layer)
    return model


def _layer(matrix: Matrix, kernel: jax.Array | None, bias: jax.Array | None) -> Any:
    def make() -> Any:
        rngs = nnx.Rngs(0)
        if matrix.is_embedding:
            return nnx.Embed(*matrix.sizes, rngs=rngs)
        if not matrix.groups:
            return nnx.Linear(*matrix.sizes, use_bias=bias is not None, rngs=rngs)
        *window, channels, out = (matrix.shape[axis] for axis in (*matrix.contracted, *matrix.free))
        how: dict[str, Any] = {"feature_group_count": matrix.groups, "use_bias": bias is not None, "rngs": rngs}
        return nnx.Conv(channels * matrix.groups, out, tuple(window), **how)

    layer = nnx.eval_shape(make)
    for variable, value in ((weight_of(layer), kernel), (bias_param(layer), bias)):
        if variable is not None and value is not None:
            variable.set_value(value.reshape(variable.shape))
    return layer


def _one_config(adapters: Mapping[Path, list[AdapterEntry]]) -> Any:
    """The configuration that gives every path the method, rank and scaling of its entries."""
    ranks, alphas, feedforward, plain = {}, {}, [], set()
    for where, entries in adapters.items():
        path, first = ".".join(where), entries[0]
        if "bias" in first.params and not first.config.biases_alone:
            raise InputError(f"{path} trains a bias beside its adapter, which Linen layers don't have")
        if any((e.config, e.params["scaling"]) != (first.config, first.params["scaling"]) for e in entries):
            raise InputError(f"{path} is one stack, whose layers have to agree in their ranks and scalings")
        changes: dict[str, Any] = {"targets": "all-linear"}
        if hasattr(first.config, "rank_pattern"):
            ranks[path], changes["rank"] = first.config.rank, 1
        if hasattr(first.config, "alpha_pattern"):
            scaling, power = first.params["scaling"][()], first.config.scale_power
            alphas[path] = alpha_for(scaling, first.config.rank, power)
            changes["alpha"] = 1.0
        if hasattr(first.config, "feedforward"):
            feedforward += [path] if first.config.feedforward else []
            changes["feedforward"] = ()
        plain.add(replace(first.config, **changes))
    if len(plain) > 1:
        raise InputError("the folder holds adapters of several configurations, but Linen takes one at a time")
    changes = {"targets": exactly(".".join(where) for where in adapters)}
    for name, values in (("rank", ranks), ("alpha", alphas)):
        if values:
            changes[name] = max(values.values(), key=list(values.values()).count)
            changes[f"{name}_pattern"] = pattern_for(values, changes[name])
    if feedforward:
        changes["feedforward"] = tuple(feedforward)
    config = replace(plain.pop(), **changes)
    with refused():
        check_config(config)
    return config
