"""Which layers of a model an adapter goes on: the places that could carry one, and the rule that picks among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from mora_jax.adapters.config.common import Targets
from mora_jax.adapters.layers import Adapted, adapted_class
from mora_jax.adapters.matching.forms import FORMS, bias_param, kernel_of
from mora_jax.adapters.matching.naming import nearest, quoted, summary
from mora_jax.adapters.matching.registered import recognise
from mora_jax.adapters.matching.unknown import LINEN, unknown_matrices, why_unknown
from mora_jax.adapters.matrices import bias_of, matrix_of, matrix_shape, put_matrix, stack_of
from mora_jax.adapters.projection import OutputHead, Projection
from mora_jax.adapters.stacks import stacked_paths


@dataclass(frozen=True)
class Place:
    """A matrix that could carry an adapter.

    Attributes:
        paths: its module path; for a stack one a layer: of a stacked projection in HuggingFace's names, of a layer
            made by `nnx.vmap` those that it would have in a list of layers (see `stacked_paths`).
        aliases: the other paths of a module that the model uses in several places; of a stack its own, too.
        layer: the module that holds it.
        part: its name inside a `Projection`, else "".
        in_features, out_features: its sizes.
    """

    paths: tuple[str, ...]
    layer: Any
    part: str
    in_features: int
    out_features: int
    aliases: tuple[str, ...] = ()

    @property
    def is_embedding(self) -> bool:
        """Whether the matrix is an embedding table."""
        return isinstance(self.layer, nnx.Embed)

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes in front of the matrix that stand for layers, `()` for a single one."""
        if isinstance(self.layer, Projection):
            return () if self.layer.num_layers is None else (self.layer.num_layers,)
        return () if isinstance(self.layer, OutputHead) else stack_of(self.layer)

    @property
    def stacked(self) -> bool:
        """Whether the matrix stands for several layers."""
        return bool(self.stack)

    def index(self, layer: int) -> tuple[int, ...]:
        """Where the arrays of one of `paths` lie in arrays of the whole place."""
        return tuple(int(i) for i in np.unravel_index(layer, self.stack)) if self.stack else ()

    @property
    def adapter(self) -> Any:
        """The `Adapter` on it, or None."""
        if isinstance(self.layer, Projection):
            return self.layer.adapters.get(self.part)
        return self.layer.adapter if isinstance(self.layer, Adapted | OutputHead) else None

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias."""
        return bias_param(self.layer) is not None

    @property
    def dtype(self) -> Any:
        """In which the matrix is stored."""
        layer = self.layer
        if isinstance(layer, Projection | OutputHead):
            return layer.kernel.dtype
        return (layer.embedding if self.is_embedding else kernel_of(layer)).dtype

    def kernel(self) -> jax.Array:
        """The base's matrix, `[*layers, in, out]`."""
        if isinstance(self.layer, Projection):
            return self.layer.part_weight(self.part)
        if isinstance(self.layer, OutputHead):
            return self.layer.kernel[...].T
        return matrix_of(self.layer)

    def put_kernel(self, kernel: jax.Array) -> None:
        """Writes the base's matrix."""
        if isinstance(self.layer, Projection):
            self.layer.put_part_weight(self.part, kernel)
        elif isinstance(self.layer, OutputHead):
            self.layer.kernel[...] = kernel.T
        else:
            put_matrix(self.layer, kernel)

    @property
    def layout(self) -> dict[str, Any]:
        """What the class of an adapter for it takes beside the sizes: the stack, and the names of sharded axes."""
        stack = {"num_layers": self.stack} if self.stack else {}
        return stack | ({"axes": self.layer.part_axes(self.part)} if isinstance(self.layer, Projection) else {})

    def bias(self) -> jax.Array | None:
        """The base's bias, `[*layers, out]`, or None."""
        if not self.has_bias:
            return None
        if isinstance(self.layer, Projection):
            return self.layer.part_bias(self.part)
        return bias_of(self.layer)

    @property
    def title(self) -> str:
        """One path for the whole stack, `*` in place of the layer."""
        if isinstance(self.layer, Projection):
            return self.layer.module_path(self.part, "*")
        if self.stack:
            first, last = (path.split(".") for path in (self.paths[0], self.paths[-1]))
            same = {i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a == b}
            return ".".join(name if i in same else "*" for i, name in enumerate(first))
        return self.paths[0] or "(the model itself)"


def places(model: nnx.Module) -> Iterator[Place]:
    """Every matrix of `model` that could carry an adapter, in the order of the module tree, shared modules once."""
    names: dict[int, list[str]] = {}
    _collect_paths(model, (), (), names)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Projection):
            for part in node.parts:
                layers = [None] if node.num_layers is None else range(node.num_layers)
                paths = tuple(node.module_path(part.name, layer) for layer in layers)
                yield Place(paths, node, part.name, node.in_features, node.part_features(part.name))
        elif isinstance(node, OutputHead):
            vocab, features = node.kernel.shape
            yield Place((node.path,), node, "", features, vocab)
        elif isinstance(node, nnx.Module) and (isinstance(node, Adapted) or _can_adapt(node)):
            shape = matrix_shape(node)
            if shape is not None:
                first, *others = sorted(names[id(node)], key=lambda path: (path.count("."), path))
                own = getattr(node, "path", None)  # the decoder's embedding knows its name in files
                if isinstance(own, str):
                    first, others = own, [first, *others]
                stack = stack_of(node)
                if not stack:
                    yield Place((first,), node, "", *shape, aliases=tuple(others))
                    continue
                paths = stacked_paths(model, first, stack)
                yield Place(paths, node, "", *shape, aliases=(first, *others))


def _can_adapt(node: nnx.Module) -> bool:
    if type(node) in FORMS or adapted_class(type(node)) is None:
        return recognise(node)
    return True


def by_path(found: Iterable[Place]) -> dict[str, tuple[Place, int]]:
    """Places by module path, each with the number of the path's layer in its stack.

    Raises:
        ValueError: two have one path, so that no file and no rule could tell them apart.
    """
    known: dict[str, tuple[Place, int]] = {}
    for place in found:
        for layer, path in enumerate(place.paths):
            if path in known:
                raise ValueError(f"two layers have the path {path}, as a name with a dot in it is split: rename one")
            known[path] = place, layer
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


def adapted_places(model: nnx.Module) -> list[Place]:
    """The places of `model` that carry an adapter."""
    return [place for place in places(model) if place.adapter is not None]


def layer_number(path: str) -> int | None:
    """The number of the layer that a module path is in: its first component that is a number, behind a name."""
    return next((int(name) for name in path.split(".")[1:] if name.isdecimal()), None)


def matcher(targets: Targets) -> Callable[[str, bool], bool]:
    """A predicate on (module path, whether it is an embedding) for a rule.

    A sequence of names matches a path whose last components are the name. A string is a regular expression for the
    whole path, but a plain name in a string works as a name. `"all-linear"` is every linear layer but the output head.

    Raises:
        ValueError: an invalid regular expression.
    """
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return lambda path, is_embedding: not is_embedding and path.rpartition(".")[2] != "lm_head"
    if isinstance(targets, str) and not re.fullmatch(r"\w+", targets):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets {targets!r} is no regular expression: {error}") from None
        return lambda path, is_embedding: pattern.fullmatch(path) is not None
    names: Sequence[str] = (targets,) if isinstance(targets, str) else targets
    return lambda path, is_embedding: any(named(path, name) for name in names)


def named(path: str, name: str) -> bool:
    """Whether a module path is a name, or ends with it."""
    return path == name or path.endswith("." + name)


class Picker:
    """The rule of a configuration: which module paths its `targets` and `layers_to_transform` pick.

    Args:
        config: of a method.
        number: the number of the layer that a module path is in, or None.

    Raises:
        ValueError: `targets` is an invalid regular expression.
    """

    def __init__(self, config: Any, number: Callable[[str], int | None] = layer_number):
        self.config = config
        self._number = number
        self._matches = matcher(config.targets)

    def __call__(self, path: str, aliases: Sequence[str] = (), *, is_embedding: bool = False) -> bool:
        """Whether a path is picked; `aliases` are other names of the same layer that `targets` may give."""
        layers = self.config.layers_to_transform
        in_layer = layers is None or self._number(path) in layers
        return in_layer and any(self.in_any_layer(name, is_embedding=is_embedding) for name in (path, *aliases))

    def in_any_layer(self, path: str, *, is_embedding: bool = False) -> bool:
        """Whether the rule would pick a path if it named no layers."""
        return self._matches(path, is_embedding) and not set(path.split(".")) & set(self.config.modules_to_save)

    def names(self, path: str) -> bool:
        """Whether the rule picks a path by what it says, not as one of all linear layers."""
        targets = self.config.targets
        return self(path) and not (isinstance(targets, str) and targets.lower() == "all-linear")

    def check(self, paths: Sequence[str], titles: Sequence[str], *, found: bool) -> None:
        """Refuses a rule that matches nothing, in whole or in part.

        Args:
            paths: of everything in the model that could carry an adapter.
            titles: the same for people.
            found: whether the rule picked anything.

        Raises:
            ValueError: nothing was picked (lists what could have been), or a name of a list or a layer number matches
                nothing.
        """
        targets = self.config.targets
        could = summary(titles) or "none: the model has no linear layer"
        absent = sorted(set(self.config.layers_to_transform or ()) - {self._number(path) for path in paths})
        if absent:
            raise ValueError(f"layers_to_transform names layer {absent[0]}, which the model does not have")
        if not found:
            near = nearest(targets if isinstance(targets, str) else targets[0], [*paths, "all-linear"])
            if isinstance(targets, str) and any(re.search(targets, path) for path in paths):
                near = f"; an expression has to match the whole path, as '.*({targets}).*' would"
            raise ValueError(f"targets {quoted(targets)} match no layer; layers that could have matched: {could}{near}")
        for name in () if isinstance(targets, str) else targets:
            if not any(named(path, name) for path in paths):
                near = nearest(name, paths)
                raise ValueError(f"target {name!r} matches no layer; layers that could have matched: {could}{near}")


def select(model: nnx.Module, config: Any) -> list[tuple[Place, tuple[bool, ...]]]:
    """The places that a configuration picks, each with one truth value a path.

    Raises:
        ValueError: as `Picker.check`.
    """
    picks = Picker(config)
    found, seen = [], []
    for place in places(model):
        seen.append(place)
        if place.stacked:
            mask = tuple(picks(path, place.aliases, is_embedding=place.is_embedding) for path in place.paths)
        else:
            mask = (any(picks(p, is_embedding=place.is_embedding) for p in (*place.paths, *place.aliases)),)
        if any(mask):
            found.append((place, mask))
    by_path(seen)
    paths = [path for place in seen for path in (*place.paths, *place.aliases)]
    try:
        picks.check(paths, [place.title for place in seen], found=bool(found))
    except ValueError:
        for path, module, _ in unknown_matrices(model, {id(place.layer) for place in seen}):
            if picks(path) and config.targets != "all-linear":
                kind = type(module).__name__
                raise ValueError(
                    f"targets name {path} ({kind}), which can't be adapted: {why_unknown(module)}"
                ) from None
        linen = [path for path, node in nnx.iter_graph(model) if isinstance(node, nnx.bridge.ToNNX)]
        if linen and not seen:
            name = ".".join(map(str, linen[0])) or "the model"
            raise ValueError(f"the model has no linear layer of Flax NNX, and {name} is {LINEN}") from None
        raise
    return found
