"""The places of a model where an adapter can stand: matrices, with the way to their values, biases and adapters.

A `Site` is the same to `attach`, `merge`, reports and files, whatever holds the matrix: a part of the decoder's
`Projection`, a layer of Flax NNX or of a registered class, or the output head.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.base import Adapter
from mora_jax.adapters.config.common import Targets
from mora_jax.adapters.expert_projection import ExpertProjection
from mora_jax.adapters.layers import Adapted, adapted_class, to_adapted_class
from mora_jax.adapters.matrices import Matrix, bias_param, form_of, matrix_of, stack_of, weight_of
from mora_jax.adapters.products.explicit_mesh import cut_like, whole
from mora_jax.adapters.products.matmul import widened
from mora_jax.adapters.projection import OutputHead, Projection

# Newer Flax has them.
_NORMALISING = tuple(getattr(nnx, name) for name in ("WeightNorm", "SpectralNorm") if hasattr(nnx, name))


@dataclass(frozen=True)
class _Place:
    """What all sites have in common.

    Attributes:
        paths: its module path; for a stack one a layer: of a stacked projection in HuggingFace's names, of a layer
            made by `nnx.vmap` those that it would have in a list of layers (see `stacked_paths`).
        layer: the module that holds it.
        stack: the axes in front of the matrix that stand for layers, `()` for a single one.
        in_features, out_features: its sizes.
        aliases: the other paths of a module that the model uses in several places; of a stack its own, too. Of experts
            the names without a number, as PEFT and transformers have them.
    """

    paths: tuple[str, ...]
    layer: Any
    stack: tuple[int, ...]
    in_features: int
    out_features: int
    aliases: tuple[str, ...]

    @property
    def is_head(self) -> bool:
        """Whether it is the decoder's output head, whose logits get no bias."""
        return isinstance(self.layer, OutputHead)

    @property
    def is_embedding(self) -> bool:
        """Whether the matrix is an embedding table."""
        return isinstance(self.layer, nnx.Embed)

    @property
    def of_experts(self) -> bool:
        """Whether the matrices are those of experts, of which each row of the input has one."""
        return isinstance(self.layer, ExpertProjection)

    @property
    def kind(self) -> str:
        """What it is that `"all-linear"` doesn't mean; empty for a linear layer."""
        return ""

    @property
    def is_linear(self) -> bool:
        """Whether `"all-linear"` means it."""
        return not self.kind

    def names_in(self, targets: Targets) -> tuple[str, ...]:
        """The `aliases` that targets may mean."""
        return self.aliases

    @property
    def dtype(self) -> Any:
        """In which the matrix is stored."""
        return weight_of(self.layer).dtype

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias."""
        return bias_param(self.layer) is not None and not self.of_experts

    def drop_bias(self) -> None:
        """Takes away a bias that `add_to_bias` made."""
        self.layer.bias = nnx.data(None)
        self._say_bias(None)

    def _say_bias(self, shape: tuple[int, ...] | None) -> None:
        """Keeps what a layer says about its bias true."""
        if isinstance(self.layer, nnx.Einsum):
            self.layer.bias_shape = shape
        elif hasattr(self.layer, "use_bias"):
            self.layer.use_bias = shape is not None

    def index(self, layer: int) -> tuple[int, ...]:
        """Where the arrays of one of `paths` lie in arrays of the whole site."""
        return tuple(int(i) for i in np.unravel_index(layer, self.stack)) if self.stack else ()


@dataclass(frozen=True)
class PartSite(_Place):
    """A part of the decoder's `Projection`.

    Attributes:
        part: its name there.
        number: which of the parts it is.
    """

    layer: Projection
    part: str
    number: int

    def names_in(self, targets: Targets) -> tuple[str, ...]:
        """As in PEFT, `down_proj` means the dense MLP's alone where there is one beside the experts."""
        beside = self.of_experts and self.layer.path.endswith("{expert}")
        return tuple(name for name in self.aliases if not beside or name in targets)

    @property
    def title(self) -> str:
        """One path for the whole stack, `*` in place of the layer."""
        return self.layer.module_path(self.part, "*", "*")

    @property
    def adapter(self) -> Any:
        """The `Adapter` on it, or None."""
        return self.layer.adapters.get(self.part)

    @property
    def layout(self) -> dict[str, Any]:
        """For the class of an adapter, beside the sizes: the stack, and the names of sharded axes."""
        projection, alone = self.layer, len(self.layer.parts) == 1
        # Outputs go by their major axis that parts don't share.
        unshared = [name for i, name in enumerate(projection.axes[1:]) if i != projection.layout.part_axis or alone]
        layout = {"stack": self.stack, "axes": (projection.axes[0], (unshared or projection.axes[1:])[0])}
        return layout | ({"stack_axes": projection.stack_axes} if self.of_experts else {})

    @property
    def _region(self) -> tuple[Any, ...]:
        """Where it lies in arrays `[..., *out_shape]`."""
        return (..., *self.layer.part_slice(self.number))

    def kernel(self) -> jax.Array:
        """The base's matrix, `[*stack, in, out]`, in HuggingFace's order of features."""
        projection = self.layer

        def take(array: jax.Array) -> jax.Array:
            return projection.layout.take(projection.with_axes(array), self.number)

        if projection.quantized is None:
            return take(projection.kernel[...])
        return jax.tree.map(take, projection.kernel.get_value()).dense(projection.kernel.dtype, 1)

    def put_kernel(self, kernel: jax.Array) -> None:
        """Writes the base's matrix."""
        projection, shape = self.layer, self.layer.layout.part_shape(self.number)
        whole_kernel = projection.with_axes(projection.kernel[...])
        part = kernel.reshape(*kernel.shape[:-1], *shape).astype(whole_kernel.dtype)
        projection.kernel[...] = whole_kernel.at[self._region].set(part).reshape(projection.kernel.shape)

    def bias(self) -> jax.Array | None:
        """The base's bias, `[*stack, out]`, or None."""
        return None if self.layer.bias is None else self.layer.layout.take(self.layer.bias[...], self.number)

    def add_to_bias(self, change: jax.Array) -> None:
        """Adds `change [*stack, out]` to the bias; makes one where there is none."""
        projection, layout = self.layer, self.layer.layout
        if projection.bias is None:
            zeros = jnp.zeros((*self.stack, *layout.out_shape), projection.kernel.dtype)
            projection.bias = nnx.Param(zeros, axes=(*projection.stack_axes, *projection.axes[1:]))
        bias = projection.bias[...]
        total = bias[self._region].astype(jnp.float32) + change.reshape(*self.stack, *layout.part_shape(self.number))
        projection.bias[...] = bias.at[self._region].set(total.astype(bias.dtype))

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None, dropout: nnx.Dropout | None = None) -> None:
        """Puts an adapter on a site that has none; `rngs` has keys for its dropout, `dropout` is one that it had."""
        self.layer.adapters[self.part] = adapter

    def take_adapter(self) -> None:
        """Takes the adapter off."""
        del self.layer.adapters[self.part]


@dataclass(frozen=True)
class LayerSite(_Place):
    """A layer of Flax NNX, of a registered class, or the output head, with one matrix.

    Attributes:
        matrix: how the layer's array is the matrix.
    """

    matrix: Matrix
    part = ""

    @property
    def kind(self) -> str:
        return self.matrix.kind

    @property
    def title(self) -> str:
        """One path for the whole stack, `*` in place of the layer."""
        if not self.stack:
            return self.paths[0] or "(the model itself)"
        first, last = (path.split(".") for path in (self.paths[0], self.paths[-1]))
        return ".".join(a if a == b else "*" for a, b in zip(first, last, strict=True))

    @property
    def adapter(self) -> Any:
        """The `Adapter` on it, or None."""
        return self.layer.adapter if isinstance(self.layer, Adapted | OutputHead) else None

    @property
    def layout(self) -> dict[str, Any]:
        """For the class of an adapter, beside the sizes: the stack, and the names of sharded axes."""
        return {"stack": self.stack}

    @property
    def holds_layers(self) -> bool:
        """Whether what follows the axes in front is the layer that its attributes speak of."""
        shape = tuple(weight_of(self.layer).shape)
        layer_shape = self.layer.kernel_shape if isinstance(self.layer, nnx.Einsum) else self.matrix.shape
        return shape[len(shape) - len(self.matrix.shape) :] == tuple(layer_shape)

    def kernel(self) -> jax.Array:
        """The base's matrix, `[*stack, in, out]`."""
        return self.matrix.take(weight_of(self.layer)[...])

    def put_kernel(self, kernel: jax.Array) -> None:
        """Writes the base's matrix."""
        weight = weight_of(self.layer)
        weight[...] = cut_like(self.matrix.put(kernel), weight[...])

    def bias(self) -> jax.Array | None:
        """The base's bias, `[*stack, out]`, or None."""
        variable = bias_param(self.layer)
        return None if variable is None else self.matrix.take_bias(variable[...], len(self.stack))

    def add_to_bias(self, change: jax.Array) -> None:
        """Adds `change [*stack, out]` to the bias; makes one where there is none."""
        variable, change = bias_param(self.layer), self.matrix.put_bias(change)
        if variable is None:
            self.layer.bias = nnx.Param(change.astype(self.dtype))
            self._say_bias(change.shape[len(self.stack) :])
            return
        bias = variable[...]
        total = widened(whole(bias)) + whole(change).reshape(bias.shape)
        variable[...] = cut_like(total.astype(bias.dtype), bias)

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None, dropout: nnx.Dropout | None = None) -> None:
        """Puts an adapter on a site that has none; `rngs` has keys for its dropout, `dropout` is one that it had."""
        if self.is_head:
            self.layer.adapter = adapter
            return
        # The layer keeps its identity, so every reference to it in the user's model sees the adapter.
        to_adapted_class(self.layer)
        if dropout is None:
            self.layer.put_adapter(adapter, rngs)
        else:
            self.layer.adapter, self.layer.adapter_dropout = adapter, dropout

    def take_adapter(self) -> None:
        """Takes the adapter off."""
        if self.is_head:
            self.layer.adapter = nnx.data(None)
        else:
            self.layer.take_adapter()


#: A matrix that could carry an adapter, or a stack of them.
Site = PartSite | LayerSite


def sites(model: nnx.Module) -> Iterator[Site]:
    """Every matrix of `model` that could carry an adapter, in the order of the module tree, shared modules once."""
    names: dict[int, list[str]] = {}
    _collect_paths(model, (), (), names)
    nodes = [node for _, node in nnx.iter_graph(model)]
    wrapped = [node.layer_instance for node in nodes if isinstance(node, _NORMALISING)]
    normalised = {id(node) for layer in wrapped for _, node in nnx.iter_graph(layer)}
    for node in nodes:
        if isinstance(node, Projection):
            for number, part in enumerate(node.parts):
                paths, sizes = node.module_paths(part.name), (node.in_features, node.layout.part_features(number))
                aliases = node.names(part.name) if isinstance(node, ExpertProjection) else ()
                yield PartSite(paths, node, node.stack, *sizes, aliases, part.name, number)
        elif isinstance(node, OutputHead):
            yield LayerSite((node.path,), node, (), node.matrix.in_features, node.matrix.out_features, (), node.matrix)
        elif isinstance(node, Adapted) or (isinstance(node, nnx.Module) and adapted_class(type(node)) is not None):
            matrix = matrix_of(node)
            if matrix is None or id(node) in normalised:
                continue
            first, *others = sorted(names[id(node)], key=lambda path: (path.count("."), path))
            path_in_files = getattr(node, "path", None)  # the decoder's embedding knows its name in files
            if isinstance(path_in_files, str):
                first, others = path_in_files, [first, *others]
            paths, aliases = (first,), tuple(others)
            if stack := stack_of(node):
                paths, aliases = stacked_paths(model, first, stack), (first, *others)
            yield LayerSite(paths, node, stack, matrix.in_features, matrix.out_features, aliases, matrix)


def adapted_sites(model: nnx.Module) -> list[Site]:
    """The sites of `model` that carry an adapter."""
    return [site for site in sites(model) if site.adapter is not None]


def by_path(all_sites: Iterable[Site]) -> dict[str, tuple[Site, int]]:
    """Sites by module path, each with the number of the path's layer in its stack.

    Raises:
        ValueError: two have one path, so that no file and no rule could tell them apart.
    """
    known: dict[str, tuple[Site, int]] = {}
    for site in all_sites:
        for layer, path in enumerate(site.paths):
            if path in known:
                raise ValueError(f"two layers have the path {path}, as a name with a dot in it is split: rename one")
            known[path] = site, layer
    return known


def _collect_paths(node: Any, path: tuple[str, ...], above: tuple[int, ...], names: dict[int, list[str]]) -> None:
    """Notes every way that leads to each module; `above` keeps a module that refers to its owner from looping."""
    if isinstance(node, nnx.Module):
        if id(node) in above:
            return
        names.setdefault(id(node), []).append(".".join(path))
        above = (*above, id(node))
    for name, child in _children(node):
        if isinstance(child, nnx.Module | list | tuple | dict):
            _collect_paths(child, (*path, name), above, names)


def _children(node: Any) -> list[tuple[str, Any]]:
    """What a module or a container holds, by name."""
    if isinstance(node, nnx.List | list | tuple):
        return [(str(i), child) for i, child in enumerate(node)]
    held = vars(node) if isinstance(node, nnx.Module) else node if isinstance(node, dict) else {}
    return [(str(name), child) for name, child in held.items()]


Holders = dict[int, dict[int, str]]


def holders_of(model: nnx.Module) -> Holders:
    """By identity of a variable: its path in each module (or container) that holds it, by that one's identity."""
    holders: Holders = {}
    for path, node in nnx.iter_graph(model):
        for name, value in _children(node):
            if isinstance(value, nnx.Variable):
                holders.setdefault(id(value), {})[id(node)] = ".".join(map(str, (*path, name)))
    return holders


def stacked_paths(model: nnx.Module, path: str, stack: tuple[int, ...]) -> tuple[str, ...]:
    """One path for each layer of a stack, numbers where they would stand if the stack were a list.

    The number of an axis follows the outermost module on the way in which every parameter has that axis: a block made
    by `nnx.vmap` at `blocks`, with a layer `q`, has the paths `blocks.0.q`, `blocks.1.q`, …, like the blocks of
    `nnx.List` at the same place.

    Args:
        model: the whole.
        path: of the layer in it.
        stack: the axes of its arrays in front.
    """
    names = path.split(".") if path else []
    depths = _depths_on_the_way(model, names, stack)
    lifts = [next(i for i, depth in enumerate(depths) if depth > axis) for axis in range(len(stack))]
    return tuple(name for _, name in numbered(names, lifts, stack))


def numbered(
    path: Sequence[str], lifts: Sequence[int], stack: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], str]]:
    """One path for each layer of a stack, with its place in the axes in front.

    Args:
        path: of all of them, in its components.
        lifts: behind how many components the number of each axis is written.
        stack: the sizes of the axes.
    """
    for index in np.ndindex(stack):
        parts = list(path)
        # From behind, the inner axes first: of two at one place the outer comes before the inner.
        for at, number in sorted(zip(lifts[::-1], index[::-1], strict=True), key=lambda pair: -pair[0]):
            parts.insert(at, str(number))
        yield index, ".".join(parts)


def _depths_on_the_way(model: nnx.Module, names: list[str], stack: tuple[int, ...]) -> list[int]:
    """How many axes of the stack every parameter has in front, in the model and in each node on the path."""
    node: Any = model
    depths = [_depth(node, stack)]
    for name in names:
        node = dict(_children(node))[name]
        depths.append(_depth(node, stack) if isinstance(node, nnx.Module) else depths[-1])
    return [*depths[:-1], len(stack)]


def _depth(node: nnx.Module, stack: tuple[int, ...]) -> int:
    depth = len(stack)
    for leaf in jax.tree.leaves(nnx.state(node, nnx.Param)):
        same = [a == b for a, b in zip(leaf.shape, stack, strict=False)]
        depth = min(depth, same.index(False) if False in same else len(same))
    for _, inner in nnx.iter_graph(node):
        # Shapes may agree by chance; layers say how many axes are their own.
        known = isinstance(inner, nnx.Linear | nnx.LinearGeneral | nnx.Embed) or form_of(inner) is not None
        if known and matrix_of(inner) is not None:
            depth = min(depth, len(stack_of(inner)))
    return depth
