"""Linen adapters folded into the kernels that they adapt."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax import traverse_util

from mora_jax.adapters.config.patterns import config_at
from mora_jax.adapters.matrices import Matrix
from mora_jax.adapters.products.matmul import widened
from mora_jax.adapters.targets import Picker
from mora_jax.linen.matrices import layer_number
from mora_jax.linen.report import LinenReport
from mora_jax.linen.update import COLLECTION, FIXED, check_config, expected, in_words, scaled

Array = jax.Array
Path = tuple[str, ...]

_REPORT = "give the report of the context in which the adapters were made, report="


class Layer(NamedTuple):
    """One adapted layer of a tree of variables.

    Attributes:
        path: its module path.
        matrix: its matrix.
        config: of its adapter.
        arrays: the adapter's, by name, each with the axes that `nn.scan` or `nn.vmap` put in front.
        kernel, bias: the layer's own arrays, out of any box; the bias may be None.
    """

    path: Path
    matrix: Matrix
    config: Any
    arrays: dict[str, Array]
    kernel: Array
    bias: Array | None

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes in front."""
        return self.kernel.shape[: self.kernel.ndim - len(self.matrix.shape)]


def layers_of(
    variables: Mapping[str, Any], configs: tuple[Any, ...], report: LinenReport | None = None
) -> Iterator[Layer]:
    """The adapted layers among variables.

    Args:
        variables: `{"params": …, "adapters": …}`.
        configs: what the adapters were made with. Each layer takes the first one of its method that picks it.
        report: of the context in which the variables were made; None where shapes say how kernels are matrices.

    Raises:
        ValueError: no adapters, a layer without kernel or without a config, shapes that deny the config, or an array
            that shapes alone don't make a matrix of.
    """
    params = traverse_util.flatten_dict(plain_tree(variables["params"]))
    found: dict[Path, dict[str, Array]] = {}
    for collection in (COLLECTION, FIXED):
        for path, value in traverse_util.flatten_dict(plain_tree(variables.get(collection, {}))).items():
            found.setdefault(path[:-1], {})[path[-1]] = nn.meta.unbox(value)
    if not found:
        raise ValueError(f"the variables hold no collection {COLLECTION!r}, so there is nothing to merge or save")
    pickers = []
    for config in configs:
        check_config(config)
        pickers.append((config, Picker(config, layer_number)))
    for path, arrays in found.items():
        where = ".".join(path) or "the layer"
        name = next((name for name in ("kernel", "embedding") if (*path, name) in params), None)
        if name is None:
            raise ValueError(f"{where} has an adapter, but params hold no kernel for it")
        array, bias = nn.meta.unbox(params[*path, name]), params.get((*path, "bias"))
        picked = [
            config_at(config, ".".join(path))
            for config, picks in pickers
            if picks(".".join(path), is_embedding=name == "embedding")
        ]
        known = None if report is None else report.matrix_at(path)
        config, matrix = _form(where, name, array.shape, arrays, picked, known)
        yield Layer(path, matrix, config, arrays, array, None if bias is None else nn.meta.unbox(bias))


def plain_tree(tree: Any) -> Any:
    """A tree of dictionaries, frozen or not, as plain ones."""
    return {name: plain_tree(child) for name, child in tree.items()} if isinstance(tree, Mapping) else tree


def _form(
    where: str, name: str, shape: tuple[int, ...], arrays: Mapping[str, Array], configs: list[Any], known: Matrix | None
) -> tuple[Any, Matrix]:
    """The configuration of a layer, and its matrix."""
    matrices = possible_matrices(name, shape) if known is None else [known]
    given = ", ".join(sorted(arrays))
    for config in configs:
        forms = [(matrix, wanted) for matrix in matrices if (wanted := _expected(config, matrix)) is not None]
        if not any(set(wanted) == set(arrays) for _, wanted in forms):
            continue
        fitting = [
            matrix
            for matrix, wanted in forms
            if {key: (*shape[: len(shape) - len(matrix.shape)], *size) for key, size in wanted.items()}
            == {key: value.shape for key, value in arrays.items()}
        ]
        if len({(matrix.shape, matrix.in_features) for matrix in fitting}) == 1:
            return config, fitting[0]
        if fitting:
            raise ValueError(f"{where}: {name} {shape} can be taken as a matrix in several ways; {_REPORT}")
        key, size = next((k, s) for k, s in forms[-1][1].items() if arrays[k].shape != s)
        raise ValueError(
            f"{where}: {key} is {arrays[key].shape}; {in_words(config)} over {name} {shape} asks for {size}"
            + ("" if len(shape) == 2 or known is not None else f"; else {_REPORT}")
        )
    raise ValueError(f"{where} holds {given}, but none of the configurations that were given makes them there")


def possible_matrices(name: str, shape: tuple[int, ...]) -> list[Matrix]:
    """How an array may be a matrix: some axes in front, then those that are contracted, then the others."""
    if name == "embedding":
        return [Matrix.plain(name, shape[-2:])]
    return [
        Matrix.plain(name, shape[lead:], inputs)
        for lead in range(len(shape) - 1)
        for inputs in range(1, len(shape) - lead)
    ]


def _expected(config: Any, matrix: Matrix) -> dict[str, tuple[int, ...]] | None:
    try:
        trained, fixed = expected(config, matrix)
    except ValueError:  # the method has no form for a matrix of this size
        return None
    return trained | fixed


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
    """
    params = traverse_util.flatten_dict(plain_tree(variables["params"]))
    for layer in layers_of(variables, configs, report):
        kernel, bias = _merged(layer)
        for name, value in ((layer.matrix.array, kernel), ("bias", bias)):
            if value is not None:
                boxed = params.get((*layer.path, name), value)
                params[*layer.path, name] = nn.meta.replace_boxed(boxed, value)
        if layer.bias is None and bias is not None:
            where = ".".join(layer.path) or "the layer"
            warnings.warn(
                f"{where} has no bias, and its adapter added one: give the plain layer use_bias=True, or it passes "
                "over the bias that params now hold for it",
                stacklevel=2,
            )
    return traverse_util.unflatten_dict(params)


def _merged(layer: Layer) -> tuple[Array, Array | None]:
    """The layer's kernel and bias with the adapter in them; no bias where it stays as it is."""
    config, matrix, method = layer.config, layer.matrix, check_config(layer.config)

    def one(kernel: Array, bias: Array | None, arrays: dict[str, Array]) -> tuple[Array, Array | None]:
        params = scaled(config, arrays)
        merged = method.merged_kernel(config, params, kernel).astype(kernel.dtype)
        added = method.added_bias(config, params, bias)
        if added is None:
            return merged, None
        return merged, added.astype(kernel.dtype) if bias is None else (widened(bias) + added).astype(bias.dtype)

    for _ in layer.stack:
        one = jax.vmap(one)
    flat_bias = None if layer.bias is None else matrix.take_bias(layer.bias, len(layer.stack))
    kernel, bias = one(matrix.take(layer.kernel), flat_bias, dict(layer.arrays))
    return matrix.put(kernel), None if bias is None else matrix.put_bias(bias)
