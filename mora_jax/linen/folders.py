"""Linen adapters as PEFT folders, the same that NNX models of the same module paths write and read.

A tree of variables is turned into an NNX model of plain layers at its module paths, which `mora_jax.interop` knows how
to save and to load. Layers under `nn.scan` or `nn.vmap` are one entry each there, with their number behind the module
that is stacked: `layers.0.attn.query`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path as Path_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn, nnx, traverse_util

from mora_jax.adapters.config.patterns import config_at, exactly, pattern_for
from mora_jax.adapters.matrices import BIASES, KERNELS, Matrix, possible_matrices
from mora_jax.adapters.products.matmul import wide
from mora_jax.adapters.report import VECTORS, AdapterEntry, adapters_of
from mora_jax.errors import InputError, refused
from mora_jax.interop.adapter_values import AdapterValues, install
from mora_jax.interop.peft import load, save
from mora_jax.interop.peft.lora import alpha_for
from mora_jax.linen.merging import Path, layers_of, plain_tree
from mora_jax.linen.report import LinenReport
from mora_jax.linen.update import COLLECTION, FIXED, check_config, expected, fresh


class _Tree(nnx.Module):
    """Modules under the names of a tree of parameters."""


class Place(NamedTuple):
    """An array of `params` that may be a layer's matrix.

    Attributes:
        path: the layer's module path.
        matrix: how it is one.
        array, bias: what the layer holds, with axes in front.
        lifts: behind how many components of the path the number of each axis in front is written.
    """

    path: Path
    matrix: Matrix
    array: jax.Array
    bias: jax.Array | None
    lifts: tuple[int, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes in front."""
        return self.array.shape[: self.array.ndim - len(self.matrix.shape)]

    def described(self) -> dict[str, Any]:
        """What a folder has to say of it: how its array is a matrix, and where the numbers of stacked layers belong."""
        return dataclasses.asdict(self.matrix) | {"lifts": self.lifts}

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """The path in files of each layer, with its place in the axes in front."""
        for index in np.ndindex(self.stack):
            parts = list(self.path)
            # From behind, the inner axes first: of two at one place the outer comes before the inner.
            for at, number in sorted(zip(self.lifts[::-1], index[::-1], strict=True), key=lambda pair: -pair[0]):
                parts.insert(at, str(number))
            yield index, ".".join(parts)


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
        layers = list(layers_of(variables, (config,), report))
    places, by_path = [], {}
    for layer in layers:
        lifts = () if report is None else report.lifts_at(layer.path)[: len(layer.stack)]
        if len(lifts) != len(layer.stack):
            raise InputError(
                f"{'.'.join(layer.path)} is a stack of layers {layer.stack}, and where their numbers belong is not "
                "known: give the report of the context in which they were made, report="
            )
        place = Place(layer.path, layer.matrix, layer.array, layer.bias_array, lifts)
        places.append(place)
        scaling = np.asarray(check_config(layer.config).scale(layer.config), np.float32)
        for index, name in place.names():
            values = {key: np.asarray(value[index]) for key, value in layer.arrays.items()}
            # The NNX model that is written has these layers alone, under names in which NNX sees other numbers.
            config = dataclasses.replace(layer.config, layers_to_transform=None)
            by_path[name] = AdapterValues(config, values | {"scaling": scaling})
    write_places(places, _arrays_of(variables), by_path, out, base_model_name_or_path, overwrite)


def write_places(
    places: list[Place],
    others: list[Place],
    by_path: Mapping[str, AdapterValues],
    out: str | os.PathLike[str],
    base_model_name_or_path: str | None,
    overwrite: bool,
) -> None:
    """Writes adapters on arrays as a PEFT folder.

    Args:
        places: the adapted arrays.
        others: all arrays, among which targets have to name the adapted ones.
        by_path: the adapters by the paths of files.
        out, base_model_name_or_path, overwrite: as for `save_adapter`.
    """
    taken = {place.path for place in places}
    model = _as_nnx(places, [place for place in others if place.path not in taken])
    install(model, by_path)
    save.save_adapter(
        model,
        out,
        base_model_name_or_path=base_model_name_or_path,
        overwrite=overwrite,
        linen_layers={".".join(place.path): place.described() for place in places},
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
    given = load.tensor_shapes(path)
    described = _described(load.local_folder(path) / save.LINEN_NAME)
    places = [_placed(place, given, report, described) for place in _arrays_of(variables)]
    config, arrays = read_places(places, path)
    collections: dict[str, dict[Path, jax.Array]] = {COLLECTION: {}, FIXED: {}}
    for where, parts in arrays.items():
        for collection, values in zip(collections, parts, strict=True):
            collections[collection] |= {(*where, name): value for name, value in values.items()}
    trees = {name: traverse_util.unflatten_dict(arrays) for name, arrays in collections.items() if arrays}
    return config, dict(variables) | trees


def read_places(
    places: list[Place], path: str | os.PathLike[str]
) -> tuple[Any, dict[Path, tuple[dict[str, jax.Array], dict[str, jax.Array]]]]:
    """Reads the adapter of a PEFT folder for arrays.

    Args:
        places: every array that may be a layer's matrix.
        path: the folder.

    Returns:
        The configuration, and by module path the arrays that are trained and those that are not.
    """
    given = load.tensor_shapes(path)
    if whole := load.whole_modules(path):
        raise InputError(
            f"{path}: it trains {', '.join(whole)} whole, for which a tree of parameters has no form; leave that away"
        )
    known = {name: (place, index) for place in places for index, name in place.names()}
    model = _as_nnx([place for place in places if any(name in given for _, name in place.names())], places)
    load.load_adapter(model, path)
    found: dict[Path, dict[tuple[int, ...], AdapterEntry]] = {}
    for entry in adapters_of(model):
        place, index = known[entry.path]
        found.setdefault(place.path, {})[index] = entry
    by_path = {place.path: place for place in places}
    config = _one_config({path: list(entries.values()) for path, entries in found.items()})
    arrays = {}
    for where, entries in found.items():
        place = by_path[where]
        own = config_at(config, ".".join(where))
        kernels = place.matrix.take(place.array)
        # Layers of a stack that the folder leaves out get a fresh adapter, which changes nothing.
        layers = {
            index: fresh(own, place.matrix, jax.random.key(0), kernels[index])
            for index in np.ndindex(place.stack)
            if index not in entries
        }
        parts: tuple[dict[str, jax.Array], dict[str, jax.Array]] = {}, {}
        for number, names in enumerate(expected(own, place.matrix)):
            for name, shape in names.items():
                stacked = np.zeros((*place.stack, *shape), np.float32)
                for index in np.ndindex(place.stack):
                    held = entries[index].params if index in entries else layers[index][number]
                    stacked[index] = held[name]
                parts[number][name] = jnp.asarray(stacked, wide(place.array.dtype))
        arrays[where] = parts
    return config, arrays


def _arrays_of(variables: Mapping[str, Any]) -> list[Place]:
    """Every array among the parameters that may be a matrix, taken as one in the first way that its shape allows."""
    params = {
        path: nn.meta.unbox(value)
        for path, value in traverse_util.flatten_dict(plain_tree(variables["params"])).items()
    }
    places = []
    for path, array in params.items():
        if array.ndim >= 2 and path[-1] not in VECTORS:
            layer = path[:-1] if path[-1] in KERNELS else path
            bias = next((params[*layer, name] for name in BIASES if (*layer, name) in params), None)
            places.append(Place(layer, Matrix.plain(path[-1], array.shape), array, bias, ()))
    return places


def _described(file: Path_) -> dict[str, Any]:
    """What a folder says of its layers, by module path; nothing where it was written from NNX."""
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


def _placed(place: Place, given: Mapping[str, Any], report: LinenReport | None, described: Mapping[str, Any]) -> Place:
    """A place as the file and the report say that it is a matrix, or a stack of them."""
    if report is None and (said := described.get(".".join(place.path))) is not None:
        given_place = place._replace(matrix=said[0], lifts=said[1])
        ends = place.array.shape[len(given_place.lifts) :]
        if (given_place.matrix.array, given_place.matrix.shape) == (place.matrix.array, ends):
            return given_place
    known = None if report is None else report.matrix_at(place.path)
    if known is not None and report is not None:
        axes = place.array.ndim - len(known.shape)
        return place._replace(matrix=known, lifts=report.lifts_at(place.path)[:axes])
    own = ".".join(place.path)
    lifts: tuple[int, ...] = ()
    if own in given:
        shapes = given[own]
    else:
        numbered = [
            (at, name) for at in range(len(place.path) + 1) for name in given if _is_layer(name, place.path, at)
        ]
        if not numbered:
            return place
        lifts, shapes = (numbered[0][0],), given[numbered[0][1]]
    lead = len(lifts)
    fitting = [
        matrix
        for matrix in possible_matrices(place.matrix.array, place.array.shape)
        if place.array.ndim - len(matrix.shape) == lead
        and _fits(matrix, shapes)
        and (place.bias is None or place.bias.shape[lead:] == matrix.shape[len(matrix.contracted) :])
    ]
    if len(fitting) != 1 and place.array.ndim > 2 + lead:
        how = "several ways" if fitting else "no way that fits the folder"
        raise InputError(
            f"{own}: the shape {place.array.shape} of its {place.matrix.array} can be taken as a matrix in {how}; give "
            "the report of a context in which the model ran, report="
        )
    return place._replace(matrix=fitting[0], lifts=lifts) if fitting else place


def _is_layer(name: str, path: Path, at: int) -> bool:
    """Whether a path in a file is one with a layer's number behind `at` components."""
    parts = name.split(".")
    return len(parts) == len(path) + 1 and parts[at].isdecimal() and (*parts[:at], *parts[at + 1 :]) == path


def _fits(matrix: Matrix, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensors of a file may belong to a matrix of this size; those of MoRA say nothing about it."""
    down, up = shapes.get("a"), shapes.get("b")
    if down is None or up is None or down == up == (down[0],) * 2:
        return True
    return (down[-1], up[0]) == (matrix.in_features, matrix.out_features)


def _as_nnx(adapted: list[Place], others: list[Place]) -> nnx.Module:
    """An NNX model of plain layers at the paths of files; those that are to carry adapters have their values."""
    model: Any = _Tree()
    taken = {place.path for place in adapted}
    for place in [*adapted, *(place for place in others if place.path not in taken)]:
        matrices = place.matrix.take(place.array) if place.path in taken else None
        biases = (
            None if place.bias is None or matrices is None else place.matrix.take_bias(place.bias, len(place.stack))
        )
        for index, name in place.names():
            kernel = None if matrices is None else matrices[index]
            layer = _layer(place.matrix, kernel, None if biases is None else biases[index])
            if not name:
                return layer
            *above, own = name.split(".")
            node = model
            for part in above:
                if not hasattr(node, part):
                    setattr(node, part, _Tree())
                node = getattr(node, part)
            setattr(node, own, layer)
    return model


def _layer(matrix: Matrix, kernel: jax.Array | None, bias: jax.Array | None) -> Any:
    sizes = matrix.in_features, matrix.out_features
    if matrix.is_embedding:
        layer: Any = nnx.eval_shape(lambda: nnx.Embed(*sizes, rngs=nnx.Rngs(0)))
        if kernel is not None:
            layer.embedding.set_value(kernel)
        return layer

    def make() -> Any:
        how: dict[str, Any] = {"use_bias": bias is not None, "rngs": nnx.Rngs(0)}
        if not matrix.groups:
            return nnx.Linear(*sizes, **how)
        *window, channels, out = (matrix.shape[axis] for axis in (*matrix.contracted, *matrix.free))
        return nnx.Conv(channels * matrix.groups, out, tuple(window), feature_group_count=matrix.groups, **how)

    layer = nnx.eval_shape(make)
    if kernel is not None:
        layer.kernel.set_value(kernel.reshape(layer.kernel.shape))
    if bias is not None:
        layer.bias.set_value(bias)
    return layer


def _one_config(found: Mapping[Path, list[AdapterEntry]]) -> Any:
    """The configuration that gives every path the method, rank and scaling of its entries."""
    ranks, alphas, feedforward, plain = {}, {}, [], set()
    for where, entries in found.items():
        path, first = ".".join(where), entries[0]
        if "bias" in first.params and not first.config.biases_alone:
            raise InputError(f"{path} trains a bias beside its adapter, which Linen layers don't have")
        if any((e.config, e.params["scaling"]) != (first.config, first.params["scaling"]) for e in entries):
            raise InputError(f"{path} is one stack, whose layers have to agree in their ranks and scalings")
        changes: dict[str, Any] = {"targets": "all-linear"}
        if hasattr(first.config, "rank_pattern"):
            ranks[path], changes["rank"] = first.config.rank, 1
        if hasattr(first.config, "alpha_pattern"):
            scaling, power = float(first.params["scaling"]), first.config.scale_power
            alphas[path] = alpha_for(scaling, first.config.rank, power)
            changes["alpha"] = 1.0
        if hasattr(first.config, "feedforward"):
            feedforward += [path] if first.config.feedforward else []
            changes["feedforward"] = ()
        plain.add(dataclasses.replace(first.config, **changes))
    if len(plain) > 1:
        raise InputError("the folder holds adapters of several configurations, but Linen takes one at a time")
    changes = {"targets": exactly(".".join(where) for where in found)}
    for name, values in (("rank", ranks), ("alpha", alphas)):
        if values:
            changes[name] = max(values.values(), key=list(values.values()).count)
            changes[f"{name}_pattern"] = pattern_for(values, changes[name])
    if feedforward:
        changes["feedforward"] = tuple(feedforward)
    config = dataclasses.replace(plain.pop(), **changes)
    with refused():
        check_config(config)
    return config
