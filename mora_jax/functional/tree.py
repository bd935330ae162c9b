"""Kernels in a tree of arrays, the adapters for them, and the tree with the adapters merged in."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mora_jax.adapters.base import as_rngs, over_layers
from mora_jax.adapters.config.common import MethodConfig
from mora_jax.adapters.config.patterns import config_at, value_at
from mora_jax.adapters.matrices import BIASES, KERNELS, Matrix, possible_matrices
from mora_jax.adapters.methods.registry import adapter_class, fresh_arrays
from mora_jax.adapters.products.matmul import widened
from mora_jax.adapters.report import VECTORS, AttachReport, Match, grouped, why_left
from mora_jax.adapters.targets import Picker
from mora_jax.linen.matrices import layer_number

Arrays = dict[str, Array]
Adapters = dict[str, Arrays]
Einsums = Mapping[str, str]


@dataclass(frozen=True)
class TreeKernel:
    """A kernel in a tree, and the adapter that it is to get.

    Attributes:
        path: of its layer, with dots.
        leaf: which of the tree's leaves it is.
        matrix: how its last axes are a matrix.
        stack: the axes in front.
        dtype: of the array.
        bias: which leaf is the layer's bias, or None.
        lifts: behind how many components of the path files have the number of each layer of a stack.
        why: where the shape alone doesn't say how it is a matrix, what to say; else empty.
        config: the method's configuration for this path; None before it was picked.
    """

    path: str
    leaf: int
    matrix: Matrix
    stack: tuple[int, ...]
    dtype: Any
    bias: int | None
    lifts: int
    why: str = ""
    config: Any = None

    @property
    def method(self) -> Any:
        """The adapter's class."""
        return adapter_class(self.config)

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs."""
        return self.matrix.in_features, self.matrix.out_features

    def fresh(self, kernel: Array, rngs: nnx.Rngs) -> tuple[Arrays, Arrays]:
        """New arrays, those that are trained and those that stay as they are; `kernel` is the leaf."""
        return fresh_arrays(self.config, self.matrix, rngs, lambda: self.matrix.take(kernel), self.dtype, self.stack)

    @functools.cached_property
    def shapes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The shapes of `fresh`."""
        kernel = jax.ShapeDtypeStruct((*self.stack, *self.matrix.shape), self.dtype)
        return jax.eval_shape(lambda kernel: self.fresh(kernel, nnx.Rngs(0)), kernel)

    def params(self, adapters: Adapters) -> Arrays:
        """The arrays as the adapter's class takes them; what isn't trained has no gradient."""
        given, (trained, fixed) = dict(adapters[self.path]), self.shapes
        shapes = {name: tuple(np.shape(value)) for name, value in given.items()}
        expected = {name: tuple(value.shape) for name, value in (trained | fixed).items()}
        if shapes != expected:
            raise ValueError(f"the adapter of {self.path} has arrays {shapes}; {self.config} asks for {expected}")
        given |= {name: jax.lax.stop_gradient(given[name]) for name in fixed}
        dtype = jnp.result_type(jnp.float32, *given.values())
        return given | {"scaling": jnp.full(self.stack, self.method.scale(self.config), dtype)}

    def merged(self, kernel: Array, params: Arrays) -> Array:
        """The leaf with its adapter in it. The backward pass makes the update again, and keeps none."""

        def one(params: Arrays, kernel: Array) -> Array:
            return self.method.merged_kernel(self.config, params, kernel).astype(kernel.dtype)

        run = jax.checkpoint(lambda *operands: over_layers(len(self.stack), one, operands))
        return self.matrix.put(run(params, self.matrix.take(kernel)))

    def merged_bias(self, bias: Array, params: Arrays) -> Array:
        """The bias with what the adapter does to it."""

        def one(params: Arrays, bias: Array) -> Array:
            change = self.method.added_bias(self.config, params, bias)
            return bias if change is None else (widened(bias) + change).astype(bias.dtype)

        rows = over_layers(len(self.stack), one, (params, self.matrix.take_bias(bias, len(self.stack))))
        return self.matrix.put_bias(rows).reshape(bias.shape)


def check_config(config: Any) -> None:
    """Refuses a configuration that has no form in a tree of arrays.

    Raises:
        TypeError: it is no adapter configuration.
        ValueError: the method, or one of its settings, has none.
    """
    refusal = isinstance(config, MethodConfig) and not hasattr(config, "widths") and config.tree_refusal
    if refusal:
        raise ValueError(refusal)
    adapter_class(config)
    name = type(config).__name__.removesuffix("Config")
    if config.biases_alone or config.bias != "none":
        raise ValueError(f"{name} is to train biases, which are leaves of your tree: give those to your optimizer")
    if config.trainable_tokens:
        raise ValueError("trainable_tokens has no form in a tree: adapt the table, or give it to your optimizer")
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save names {config.modules_to_save[0]!r}, which is a part of your tree: give it to your "
            "optimizer"
        )


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, with values or without."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def kernels_of(tree: Any, einsums: Einsums | None = None) -> list[TreeKernel]:
    """Every leaf of a tree that may be the kernel of a layer.

    Args:
        tree: of any nodes; leaves that are no arrays are passed over.
        einsums: as for `init`.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {_names(keys): i for i, (keys, leaf) in enumerate(leaves) if is_array(leaf)}
    kernels = []
    for names, i in named.items():
        keys, leaf = leaves[i]
        above, own = names[:-1], "".join(names[-1:])
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.inexact) or own in (*VECTORS, "offset"):
            continue
        named_kernel = own in KERNELS
        if own == "b" and any((*above, name) in named for name in KERNELS):
            continue
        layer = above if named_kernel and above else names
        bias = next((named[*above, name] for name in BIASES if named_kernel and (*above, name) in named), None)
        shape = None if bias is None else leaves[bias][1].shape
        equation = value_at((einsums or {}).items(), ".".join(layer), None)
        matrix, why = _matrix(names[-1:], leaf.shape, shape, *_owner(tree, keys), equation, ".".join(layer))
        stack = tuple(leaf.shape[: leaf.ndim - len(matrix.shape)])
        if shape is not None and shape[: len(stack)] != stack:  # no stack after all, such as PyTorch's convolutions
            why = why or _several(".".join(layer), leaf.shape)
        ends = range(len(layer))
        lifts = next((end for end in ends if _all_stacked(leaves, named, layer[:end], stack)), len(layer))
        kernels.append(TreeKernel(".".join(layer), i, matrix, stack, leaf.dtype, bias, lifts, why))
    return kernels


def _names(keys: tuple[Any, ...]) -> tuple[str, ...]:
    """The components of a leaf's path; Haiku's names and those of flat checkpoints are taken apart."""
    names: list[str] = []
    for key in keys:
        text = str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))
        names += [part for part in text.replace("/", ".").split(".") if part not in ("", "~")]
    if names and names[-1] in ("value", "raw_value"):  # a variable of NNX
        names.pop()
    return tuple(names[1:] if names[:1] == ["params"] else names)


def _owner(tree: Any, keys: tuple[Any, ...]) -> tuple[str, int, int]:
    """The class of Equinox whose array a leaf is, or the nearest that it extends, else empty; of a convolution its
    groups and the axes of one kernel, else 0."""
    node = tree
    for key in keys[:-1]:
        try:
            node = (
                getattr(node, key.name)
                if hasattr(key, "name")
                else node[getattr(key, "key", getattr(key, "idx", None))]
            )
        except (AttributeError, KeyError, IndexError, TypeError):
            return "", 0, 0
    owner = next((base.__name__ for base in type(node).__mro__ if base.__module__.startswith("equinox.nn.")), "")
    return (owner, node.groups, node.num_spatial_dims + 2) if "Conv" in owner else (owner, 0, 0)


def _matrix(
    name: tuple[str, ...],
    shape: tuple[int, ...],
    bias: tuple[int, ...] | None,
    owner: str,
    groups: int,
    axes: int,
    equation: str | None,
    path: str,
) -> tuple[Matrix, str]:
    """How the last axes of an array are a matrix, and what to say where that is a guess.

    Args:
        name: of the array.
        shape, bias: of the array, and of the layer's bias.
        owner, groups, axes: as from `_owner`.
        equation: an einsum that says it.
        path: of the layer, for messages.
    """
    if equation is not None:
        right = equation.replace(" ", "").partition("->")[0].partition(",")[2]
        matrix = Matrix.of_einsum("kernel", equation, shape[len(shape) - len(right) :])
        if matrix is None:
            raise ValueError(f"einsums: {equation!r} for {path} {list(shape)} is no product with one matrix")
        return matrix, ""
    last = name[-1] if name else ""
    if owner == "Embedding" or last.startswith("embedding"):
        return Matrix.plain("embedding", shape[-2:]), ""
    if groups:  # [out, in / groups, *window]; inputs in the order of Flax
        return Matrix("kernel", tuple(shape[-axes:]), (*range(2, axes), 1), (0,), (0,), groups), ""
    if owner or last.startswith("weight"):  # [out, in], as in PyTorch
        return Matrix("kernel", tuple(shape[-2:]), (1,), (0,), (0,)), ""
    plain = Matrix.plain("kernel", shape[-2:])
    if len(shape) == 2:
        return plain, ""
    ends = ((one, one.shape[len(one.contracted) :]) for one in possible_matrices("kernel", shape))
    fitting = [one for one, outputs in ends if bias == (*shape[: len(shape) - len(one.shape)], *outputs)]
    if len(fitting) == 1:
        return fitting[0], ""
    return plain, _several(path, shape)


def _several(path: str, shape: tuple[int, ...]) -> str:
    return (
        f"{path} has the shape {list(shape)}, which can be a matrix in several ways: say which, as in "
        f"einsums={{{path!r}: '...i,io->...o'}} for kernels [in, out] stacked along the axes in front"
    )


def _all_stacked(
    leaves: list[Any], named: Mapping[tuple[str, ...], int], above: tuple[str, ...], stack: tuple[int, ...]
) -> bool:
    """Whether all arrays under a path have the axes of a stack in front."""
    inside = [leaves[i][1].shape for names, i in named.items() if names[: len(above)] == above]
    return all(shape[: len(stack)] == stack for shape in inside)


def selected(tree: Any, config: Any, einsums: Einsums | None = None) -> list[TreeKernel]:
    """The kernels of a tree that a configuration picks, each with its own.

    Raises:
        TypeError, ValueError: as `init`.
    """
    check_config(config)
    kernels, picks = kernels_of(tree, einsums), Picker(config, layer_number)
    paths = [kernel.path for kernel in kernels]
    if doubled := next((path for path in paths if paths.count(path) > 1), None):
        raise ValueError(f"several arrays of the tree are at {doubled!r}, so adapters can't be told apart there")
    picked = [kernel for kernel in kernels if picks(kernel.path, is_linear=kernel.matrix.is_linear)]
    if not kernels:
        raise ValueError("the tree has no kernel: no array of floats with two axes or more")
    picks.check(paths, [path or "(the array itself)" for path in paths], found=bool(picked))
    method = adapter_class(config)
    for kernel in picked:
        if kernel.why:
            raise ValueError(kernel.why)
        if jnp.issubdtype(kernel.dtype, jnp.complexfloating):
            raise ValueError(f"{kernel.path} is {kernel.dtype}, and adapters have no complex form; leave it out")
        if kernel.matrix.is_embedding and not method.on_embeddings:
            raise ValueError(
                f"{kernel.path} is an embedding, for which {method.method} has no form; leave it out of targets"
            )
    config = method.configure_for_shapes(config, [kernel.sizes for kernel in picked])
    return [replace(kernel, config=config_at(config, kernel.path)) for kernel in picked]


def matched(tree: Any, adapters: Adapters, config: Any, einsums: Einsums | None) -> list[tuple[TreeKernel, Arrays]]:
    """The picked kernels with their adapters' arrays.

    Raises:
        TypeError, ValueError: as `merge`.
    """
    kernels = selected(tree, config, einsums)
    missing = {kernel.path for kernel in kernels} ^ set(adapters)
    if missing:
        path = sorted(missing)[0]
        how = "is no kernel that the configuration picks" if path in adapters else "is missing among the adapters"
        raise ValueError(f"{path} {how}: give the tree and the configuration that init was called with")
    return [(kernel, kernel.params(adapters)) for kernel in kernels]


def init(params: Any, config: Any, *, rngs: nnx.Rngs | int | Array, einsums: Einsums | None = None) -> Adapters:
    """Fresh adapters for the kernels of a tree that `config.targets` picks. They change nothing yet.

    Kernels are found by their paths: `mlp.0` for `{"mlp": [{"kernel": …}]}`, `mlp.linear_1` for Haiku's
    `"mlp/~/linear_1"`; `params` in front and the name of a layer's own array (`kernel`, `w`, `weight`, `embedding`)
    at the end are left away. Two axes are `[in, out]`, or `[out, in]` in a `weight` (Equinox, PyTorch); a bias beside
    a kernel with more axes says which are inputs.

    Args:
        params: any tree of arrays; leaves that are none are passed over.
        config: of a method (see `mora_jax.adapters.config`).
        rngs: keys for the new arrays; a seed or a key stands for `nnx.Rngs` of it.
        einsums: by path, or its end, or a regular expression for it, the einsum of a layer's input and kernel:
            `{"layers.*": "...i,io->...o"}` for kernels `[in, out]` stacked along the axes in front. Only for arrays
            whose shape leaves that open; `merge`, `apply`, `save` and `load` then take it, too.

    Returns:
        `{path: {name: array}}`, float32, or float64 where the kernel is. Methods with arrays that aren't trained
        (LoRA-FA, PiSSA, OLoRA, VeRA, RandLoRA) have these there, too, see `trainable`.

    Raises:
        TypeError: `config` is no adapter configuration, or `rngs` is none.
        ValueError: nothing matches, the method has no form for a tree, or a shape doesn't say what is an input.

    Warns:
        UserWarning: the rank is higher than a kernel can use.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> params = {"mlp": {"kernel": jnp.ones((6, 4))}}
        >>> config = mj.LoRAConfig(rank=2)
        >>> adapters = mj.functional.init(params, config, rngs=0)
        >>> jax.tree.map(jnp.shape, adapters)
        {'mlp': {'lora_a': (6, 2), 'lora_b': (2, 4)}}
    """
    rngs, leaves = as_rngs(rngs), jax.tree.leaves(params)
    kernels = selected(params, config, einsums)
    _report(kernels, kernels, config, 0).warn(stacklevel=3)
    fresh = {kernel.path: kernel.fresh(jnp.asarray(leaves[kernel.leaf]), rngs) for kernel in kernels}
    return {path: trained | fixed for path, (trained, fixed) in fresh.items()}


def trainable(params: Any, config: Any, *, einsums: Einsums | None = None) -> dict[str, dict[str, bool]]:
    """Which arrays of `init` are trained, in the tree's own form.

    The others get no gradient, but weight decay would change them:
    `optax.masked(optax.adamw(1e-4), mj.functional.trainable(params, config))`.

    Args:
        params: as for `init`; shapes are enough.
        config: as for `init`.
        einsums: as for `init`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> params = {"mlp": {"kernel": jnp.ones((6, 4))}}
        >>> mj.functional.trainable(params, mj.LoRAFAConfig(rank=2))
        {'mlp': {'lora_b': True, 'lora_a': False}}
    """
    shapes = {kernel.path: kernel.shapes for kernel in selected(params, config, einsums)}
    return {path: dict.fromkeys(yes, True) | dict.fromkeys(no, False) for path, (yes, no) in shapes.items()}


def report(params: Any, config: Any, *, einsums: Einsums | None = None) -> AttachReport:
    """What `init` would adapt and what it would pass over; `print` it.

    Args:
        params: as for `init`; shapes are enough.
        config: as for `init`.
        einsums: as for `init`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> params = {"mlp": {"kernel": jnp.ones((6, 4))}}
        >>> config = mj.LoRAConfig(rank=2)
        >>> mj.functional.report(params, config).trainable
        20
    """
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params) if is_array(leaf))
    return _report(kernels_of(params, einsums), selected(params, config, einsums), config, total)


def _report(kernels: list[TreeKernel], picked: list[TreeKernel], config: Any, total: int) -> AttachReport:
    matches, notes, beyond, picks = [], [], [], Picker(config, layer_number)
    for kernel in picked:
        trained = sum(math.prod(value.shape) for value in kernel.shapes[0].values())
        matches.append(Match(kernel.path, math.prod(kernel.stack), *kernel.sizes, trained))
        notes += kernel.config.warnings(kernel.path, *kernel.sizes)
        beyond.append(kernel.config.beyond(kernel.path, *kernel.sizes))
    taken = {kernel.path for kernel in picked}
    left = (
        (
            one.path,
            "",
            math.prod((*one.stack, *one.sizes)),
            why_left(picks, one.path, kind=one.matrix.kind),
        )
        for one in kernels
        if one.path not in taken
    )
    trained = sum(match.trainable for match in matches)
    method = adapter_class(config).method
    more = tuple(notes), grouped(left, picks), tuple(filter(None, beyond))
    return AttachReport(method, tuple(matches), trained, total + trained, *more)


def merge(params: Any, adapters: Adapters, config: Any, *, einsums: Einsums | None = None) -> Any:
    """The tree with the adapters merged in: same nodes, same types, kernels in their own dtype.

    Plain JAX, to be differentiated by `adapters` (and by `params`) under any transformation. The update is taken in
    float32, and the backward pass keeps none.

    Args:
        params: the tree.
        adapters: for it, as from `init`.
        config: what they were made with.
        einsums: as for `init`.

    Raises:
        TypeError, ValueError: as `init`; or adapters of other paths or shapes.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> params = {"mlp": {"kernel": jnp.ones((6, 4))}}
        >>> config = mj.LoRAConfig(rank=2)
        >>> adapters = mj.functional.init(params, config, rngs=0)
        >>> jax.tree.map(jnp.shape, mj.functional.merge(params, adapters, config))
        {'mlp': {'kernel': (6, 4)}}
    """
    leaves, treedef = jax.tree.flatten(params)
    for kernel, arrays in matched(params, adapters, config, einsums):
        leaves[kernel.leaf] = kernel.merged(jnp.asarray(leaves[kernel.leaf]), arrays)
        if kernel.bias is not None:
            leaves[kernel.bias] = kernel.merged_bias(leaves[kernel.bias], arrays)
    return jax.tree.unflatten(treedef, leaves)
