"""Linen adapters folded into the kernels that they adapt."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn, nnx, traverse_util
from jax import Array

from mora_jax.adapters.base import Adapter, AdapterState
from mora_jax.adapters.config.patterns import config_at
from mora_jax.adapters.matrices import BIASES, KERNELS, Matrix, possible_matrices
from mora_jax.adapters.merge import folded
from mora_jax.adapters.methods.registry import new_adapter
from mora_jax.adapters.products.matmul import widened
from mora_jax.adapters.targets import Picker
from mora_jax.linen.matrices import array_path, layer_number
from mora_jax.linen.report import LinenReport
from mora_jax.linen.update import COLLECTION, FIXED, check_config, expected, in_words, scaled

Path = tuple[str, ...]

_REPORT = "give the report of the context in which the adapters were made, report="


@dataclass(frozen=True)
class LinenSite:
    """One adapted layer of a tree of variables, with what `adapters.sites.Site` has for merging.

    Attributes:
        path: its module path.
        matrix: its matrix.
        config: of its adapter.
        arrays: the adapter's, by name, each with the axes that `nn.scan` or `nn.vmap` put in front.
        params: all parameters by path, which are written to.
    """

    path: Path
    matrix: Matrix
    config: Any
    arrays: dict[str, Array]
    params: dict[Path, Any]

    @property
    def array(self) -> Array:
        """The layer's own array, out of any box."""
        return nn.meta.unbox(self.params[array_path(self.path, self.matrix.array)])

    @property
    def bias_name(self) -> str:
        """The name of the layer's bias, which may have none."""
        return next((name for name in BIASES if (*self.path, name) in self.params), "bias")

    @property
    def bias_array(self) -> Array | None:
        """The layer's own bias, out of any box, or None."""
        bias = self.params.get((*self.path, self.bias_name))
        return None if bias is None else nn.meta.unbox(bias)

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes in front."""
        return self.array.shape[: self.array.ndim - len(self.matrix.shape)]

    @property
    def adapter(self) -> Adapter:
        """The adapter as its own class has it."""
        check_config(self.config)
        adapter = nnx.eval_shape(lambda: new_adapter(self.config, self.matrix, nnx.Rngs(0), self.stack))
        arrays = scaled(self.config, self.arrays)
        for name, value in arrays.items():
            full = jnp.broadcast_to(value, self.stack) if name == "scaling" else value
            setattr(adapter, name, AdapterState(full))
        return adapter

    def kernel(self) -> Array:
        """The base's matrix, `[*stack, in, out]`."""
        return self.matrix.take(self.array)

    def put_kernel(self, kernel: Array) -> None:
        """Writes the base's matrix."""
        self._put(array_path(self.path, self.matrix.array), self.matrix.put(kernel))

    def bias(self) -> Array | None:
        """The base's bias, `[*stack, out]`, or None."""
        bias = self.bias_array
        return None if bias is None else self.matrix.take_bias(bias, len(self.stack))

    def add_to_bias(self, change: Array) -> None:
        """Adds `change [*stack, out]` to the bias; makes one where there is none."""
        bias, change = self.bias_array, self.matrix.put_bias(change)
        total = change.astype(self.array.dtype) if bias is None else (widened(bias) + change).astype(bias.dtype)
        self._put((*self.path, self.bias_name), total)

    def _put(self, path: Path, value: Array) -> None:
        self.params[path] = nn.meta.replace_boxed(self.params.get(path, value), value)


def layers_of(
    variables: Mapping[str, Any], configs: tuple[Any, ...], report: LinenReport | None = None
) -> Iterator[LinenSite]:
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
        name = path[-1] if path in params else next((name for name in KERNELS if (*path, name) in params), None)
        if name is None:
            raise ValueError(f"{where} has an adapter, but params hold no kernel for it")
        shape = nn.meta.unbox(params[array_path(path, name)]).shape
        picked = [
            config_at(config, ".".join(path))
            for config, picks in pickers
            if picks(".".join(path), is_linear=name != "embedding")
        ]
        known = None if report is None else report.matrix_at(path)
        config, matrix = _form(where, name, shape, arrays, picked, known)
        yield LinenSite(path, matrix, config, arrays, params)


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
    params: dict[Path, Any] = {}
    for site in layers_of(variables, configs, report):
        params = site.params
        had_bias = site.bias_array is not None
        _, kernel, change = folded(site.adapter, site.kernel(), site.bias())
        if kernel is not None:
            site.put_kernel(kernel)
        if change is not None:
            site.add_to_bias(change)
            if not had_bias:
                where = ".".join(site.path) or "the layer"
                warnings.warn(
                    f"{where} has no bias, and its adapter added one: give the plain layer use_bias=True, or it passes "
                    "over the bias that params now hold for it",
                    stacklevel=2,
                )
    return traverse_util.unflatten_dict(params)
