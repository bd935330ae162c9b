"""The places of a model where an adapter can stand: matrices, with the way to their values, biases and adapters.

A `Site` is the same to `attach`, `merge`, reports and files, whatever holds the matrix: a part of the decoder's
`Projection`, a layer of Flax NNX or of a registered class, the output head, or a Linen layer's arrays
(`mora_jax.linen.merging`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import jax
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


class Site(Protocol):
    """A matrix that could carry an adapter, or a stack of them.

    Attributes:
        paths: its module path; for a stack one a layer: of a stacked projection in HuggingFace's names, of a layer
            made by `nnx.vmap` those that it would have in a list of layers (see `stacked_paths`).
        aliases: the other paths of a module that the model uses in several places; of a stack its own, too.
        layer: the module that holds it.
        part: its name inside a `Projection`, else "".
        in_features, out_features: its sizes.
        is_head: whether it is the decoder's output head, whose logits get no bias.
    """

    paths: tuple[str, ...]
    layer: Any
    in_features: int
    out_features: int
    aliases: tuple[str, ...]
    part: str
    is_head: bool

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes in front of the matrix that stand for layers, `()` for a single one."""
        ...

    @property
    def is_embedding(self) -> bool:
        """Whether the matrix is an embedding table."""
        ...

    @property
    def kind(self) -> str:
        """What it is that `"all-linear"` doesn't mean; empty for a linear layer."""
        return "an embedding" if self.is_embedding else ""

    @property
    def is_linear(self) -> bool:
        """Whether `"all-linear"` means it."""
        return not self.kind

    @property
    def of_experts(self) -> bool:
        """Whether the matrices are those of experts, of which each row of the input has one."""
        return False

    def names_in(self, targets: Targets) -> tuple[str, ...]:
        """The `aliases` that targets may mean."""
        return self.aliases

    @property
    def title(self) -> str:
        """One path for the whole stack, `*` in place of the layer."""
        ...

    @property
    def adapter(self) -> Any:
        """The `Adapter` on it, or None."""
        ...

    @property
    def dtype(self) -> Any:
        """In which the matrix is stored."""
        ...

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias."""
        ...

    @property
    def layout(self) -> dict[str, Any]:
        """For the class of an adapter, beside the sizes: the stack, and the names of sharded axes."""
        ...

    def kernel(self) -> jax.Array:
        """The base's matrix, `[*stack, in, out]`."""
        ...

    def put_kernel(self, kernel: jax.Array) -> None:
        """Writes the base's matrix."""
        ...

    def bias(self) -> jax.Array | None:
        """The base's bias, `[*stack, out]`, or None."""
        ...

    def add_to_bias(self, change: jax.Array) -> None:
        """Adds `change [*stack, out]` to the bias; makes one where there is none."""
        ...

    def drop_bias(self) -> None:
        """Takes away a bias that `add_to_bias` made."""
        ...

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None, dropout: nnx.Dropout | None = None) -> None:
        """Puts an adapter on a site that has none; `rngs` has keys for its dropout, `dropout` is one that it had."""
        ...

    def take_adapter(self) -> None:
        """Takes the adapter off."""
        ...

    @property
    def stacked(self) -> bool:
        """Whether the matrix stands for several layers."""
        return bool(self.stack)

    def index(self, layer: int) -> tuple[int, ...]:
        """Where the arrays of one of `paths` lie in arrays of the whole site."""
        return tuple(int(i) for i in np.unravel_index(layer, self.stack)) if self.stack else ()


@dataclass(frozen=True)
class PartSite(Site):
    """A part of the decoder's `Projection`."""

    paths: tuple[str, ...]
    layer: Projection
    part: str
    in_features: int
    out_features: int
    is_embedding = False
    is_head = False

    @property
    def stack(self) -> tuple[int, ...]:
        return self.layer.stack

    @property
    def of_experts(self) -> bool:
        return isinstance(self.layer, ExpertProjection)

    @property
    def aliases(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of experts the names without a number, as PEFT and transformers have them."""
        return self.layer.names(self.part) if isinstance(self.layer, ExpertProjection) else ()

    def names_in(self, targets: Targets) -> tuple[str, ...]:
        """As in PEFT, `down_proj` means the dense MLP's alone where there is one beside the experts."""
        beside = self.of_experts and self.layer.path.endswith("{expert}")
        return tuple(name for name in self.aliases if not beside or name in targets)

    @property
    def title(self) -> str:
        return self.layer.module_path(self.part, "*", "*")

    @property
    def adapter(self) -> Any:
        return self.layer.adapters.get(self.part)

    @property
    def dtype(self) -> Any:
        return self.layer.kernel.dtype

    @property
    def has_bias(self) -> bool:
        return self.layer.bias is not None and not self.of_experts

    @property
    def layout(self) -> dict[str, Any]:
        layout = {"num_layers": self.stack or None, "axes": self.layer.part_axes(self.part)}
        return layout | ({"stack_axes": self.layer.stack_axes} if self.of_experts else {})

    def kernel(self) -> jax.Array:
        return self.layer.part_weight(self.part)

    def put_kernel(self, kernel: jax.Array) -> None:
        self.layer.put_part_weight(self.part, kernel)

    def bias(self) -> jax.Array | None:
        return self.layer.part_bias(self.part)

    def add_to_bias(self, change: jax.Array) -> None:
        self.layer.add_to_part_bias(self.part, change)

    def drop_bias(self) -> None:
        self.layer.bias = nnx.data(None)

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None, dropout: nnx.Dropout | None = None) -> None:
        self.layer.add_adapter(self.part, adapter)

    def take_adapter(self) -> None:
        del self.layer.adapters[self.part]


@dataclass(frozen=True)
class LayerSite(Site):
    """A layer of Flax NNX, of a registered class, or the output head, with one matrix."""

    paths: tuple[str, ...]
    layer: Any
    matrix: Matrix
    aliases: tuple[str, ...] = ()
    part = ""

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Inputs of the matrix."""
        return self.matrix.in_features

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Outputs of the matrix."""
        return self.matrix.out_features

    @property
    def stack(self) -> tuple[int, ...]:
        return () if self.is_head else stack_of(self.layer)

    @property
    def is_head(self) -> bool:  # type: ignore[override]
        """Whether it is the decoder's output head."""
        return isinstance(self.layer, OutputHead)

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.layer, nnx.Embed)

    @property
    def kind(self) -> str:
        return self.matrix.kind

    @property
    def title(self) -> str:
        if not self.stack:
            return self.paths[0] or "(the model itself)"
        first, last = (path.split(".") for path in (self.paths[0], self.paths[-1]))
        return ".".join(a if a == b else "*" for a, b in zip(first, last, strict=True))

    @property
    def adapter(self) -> Any:
        return self.layer.adapter if isinstance(self.layer, Adapted | OutputHead) else None

    @property
    def dtype(self) -> Any:
        return weight_of(self.layer).dtype

    @property
    def has_bias(self) -> bool:
        return bias_param(self.layer) is not None

    @property
    def layout(self) -> dict[str, Any]:
        return {"num_layers": self.stack or None}

    @property
    def holds_layers(self) -> bool:
        """Whether what follows the axes in front is the layer that its attributes speak of."""
        shape = tuple(weight_of(self.layer).shape)
        own = self.layer.kernel_shape if isinstance(self.layer, nnx.Einsum) else self.matrix.shape
        return shape[len(shape) - len(self.matrix.shape) :] == tuple(own)

    def kernel(self) -> jax.Array:
        return self.matrix.take(weight_of(self.layer)[...])

    def put_kernel(self, kernel: jax.Array) -> None:
        weight = weight_of(self.layer)
        weight[...] = cut_like(self.matrix.put(kernel), weight[...])

    def bias(self) -> jax.Array | None:
        variable = bias_param(self.layer)
        return None if variable is None else self.matrix.take_bias(variable[...], len(self.stack))

    def add_to_bias(self, change: jax.Array) -> None:
        variable, change = bias_param(self.layer), self.matrix.put_bias(change)
        if variable is None:
            self.layer.bias = nnx.Param(change.astype(self.dtype))
            self._say_bias(change.shape[len(self.stack) :])
            return
        bias = variable[...]
        total = widened(whole(bias)) + whole(change).reshape(bias.shape)
        variable[...] = cut_like(total.astype(bias.dtype), bias)

    def drop_bias(self) -> None:
        self.layer.bias = nnx.data(None)
        self._say_bias(None)

    def _say_bias(self, shape: tuple[int, ...] | None) -> None:
        """Keeps what a layer says about its bias true."""
        if isinstance(self.layer, nnx.Einsum):
            self.layer.bias_shape = shape
        elif hasattr(self.layer, "use_bias"):
            self.layer.use_bias = shape is not None

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None, dropout: nnx.Dropout | None = None) -> None:
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
        if self.is_head:
            self.layer.adapter = nnx.data(None)
        else:
            self.layer.take_adapter()


def sites(model: nnx.Module) -> Iterator[Site]:
    """Every matrix of `model` that could carry an adapter, in the order of the module tree, shared modules once."""
    names: dict[int, list[str]] = {}
    _collect_paths(model, (), (), names)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Projection):
            for part in node.parts:
                paths = node.module_paths(part.name)
                yield PartSite(paths, node, part.name, node.in_features, node.part_features(part.name))
        elif isinstance(node, OutputHead):
            yield LayerSite((node.path,), node, node.matrix)
        elif isinstance(node, Adapted) or (isinstance(node, nnx.Module) and adapted_class(type(node)) is not None):
            matrix = matrix_of(node)
            if matrix is None:
                continue
            first, *others = sorted(names[id(node)], key=lambda path: (path.count("."), path))
            own = getattr(node, "path", None)  # the decoder's embedding knows its name in files
            if isinstance(own, str):
                first, others = own, [first, *others]
            if stack := stack_of(node):
                yield LayerSite(stacked_paths(model, first, stack), node, matrix, (first, *others))
            else:
                yield LayerSite((first,), node, matrix, tuple(others))


def adapted_sites(model: nnx.Module) -> list[Site]:
    """The sites of `model` that carry an adapter."""
    return [site for site in sites(model) if site.adapter is not None]


def by_path(found: Iterable[Site]) -> dict[str, tuple[Site, int]]:
    """Sites by module path, each with the number of the path's layer in its stack.

    Raises:
        ValueError: two have one path, so that no file and no rule could tell them apart.
    """
    known: dict[str, tuple[Site, int]] = {}
    for site in found:
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
    if isinstance(node, nnx.List | list | tuple):
        children: Any = enumerate(node)
    elif isinstance(node, nnx.Module):
        children = vars(node).items()
    elif isinstance(node, dict):
        children = node.items()
    else:
        return
    for name, child in children:
        if isinstance(child, nnx.Module | list | tuple | dict):
            _collect_paths(child, (*path, str(name)), above, names)


Holders = dict[int, dict[int, str]]


def holders_of(model: nnx.Module) -> Holders:
    """By identity of a variable: its path in each module (or container) that holds it, by that one's identity."""
    found: Holders = {}
    for path, node in nnx.iter_graph(model):
        children: dict[Any, Any] = {}
        if isinstance(node, nnx.Module | dict):
            children = node if isinstance(node, dict) else vars(node)
        elif isinstance(node, list | tuple):
            children = dict(enumerate(node))
        for name, value in children.items():
            if isinstance(value, nnx.Variable):
                found.setdefault(id(value), {})[id(node)] = ".".join(map(str, (*path, name)))
    return found


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
    numbered = []
    for numbers in product(*(range(size) for size in stack)):
        parts: list[str] = []
        done = 0
        for i, depth in enumerate(depths):
            parts += names[i - 1 : i] if i else []
            parts += [str(number) for number in numbers[done:depth]]
            done = max(done, depth)
        numbered.append(".".join(parts))
    return tuple(numbered)


def _depths_on_the_way(model: nnx.Module, names: list[str], stack: tuple[int, ...]) -> list[int]:
    """How many axes of the stack every parameter has in front, in the model and in each node on the path."""
    node: Any = model
    depths = [_depth(node, stack)]
    for name in names:
        node = node[int(name)] if isinstance(node, list | tuple | nnx.List) else _child(node, name)
        depths.append(_depth(node, stack) if isinstance(node, nnx.Module) else depths[-1])
    return [*depths[:-1], len(stack)]


def _child(node: Any, name: str) -> Any:
    if isinstance(node, dict):
        return next(value for key, value in node.items() if str(key) == name)
    return vars(node)[name]


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
