"""Kernels in a tree of arrays, the adapters for them, and the tree with the adapters merged in."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mora_jax.adapters.base import as_rngs
from mora_jax.adapters.config.common import MethodConfig
from mora_jax.adapters.config.patterns import config_at, value_at
from mora_jax.adapters.matrices import BIASES, KERNELS, Matrix, possible_matrices
from mora_jax.adapters.methods.registry import adapter_class, array_shapes, fresh_arrays
from mora_jax.adapters.report import VECTORS, AttachReport, Match, grouped, report_on, why_left
from mora_jax.adapters.targets import Picker
from mora_jax.linen.matrices import layer_number
from mora_jax.linen.tree_sites import Arrays, Path, TreeSite, scaled

Adapters = dict[str, Arrays]
Einsums = Mapping[str, str]
Owner = tuple[str, int, int]


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


def sites_of(tree: Any, einsums: Einsums | None = None) -> list[TreeSite]:
    """Every leaf of a tree that may be the kernel of a layer; keys are numbers of leaves.

    Args:
        tree: of any nodes; leaves that are no arrays are passed over.
        einsums: as for `init`.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    numbers = {_names(keys): i for i, (keys, leaf) in enumerate(leaves) if is_array(leaf)}
    sites = []
    for names, i in numbers.items():
        keys, leaf = leaves[i]
        above, array_name = names[:-1], "".join(names[-1:])
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.inexact) or array_name in (*VECTORS, "offset"):
            continue
        named_kernel = array_name in KERNELS
        if array_name == "b" and any((*above, name) in numbers for name in KERNELS):
            continue
        path = above if named_kernel and above else names
        bias_key = next((numbers[*above, name] for name in BIASES if named_kernel and (*above, name) in numbers), None)
        bias = None if bias_key is None else leaves[bias_key][1]
        name, shape = ".".join(path), None if bias is None else bias.shape
        equation = value_at((einsums or {}).items(), name, None)
        matrix, why = _matrix(array_name, leaf.shape, shape, _owner(tree, keys), equation, name)
        stack = tuple(leaf.shape[: leaf.ndim - len(matrix.shape)])
        if shape is not None and shape[: len(stack)] != stack:  # no stack after all, such as PyTorch's convolutions
            why = why or _several(name, leaf.shape)
        lifts = tuple(_lift(leaves, numbers, path, stack[: axis + 1]) for axis in range(len(stack)))
        sites.append(TreeSite(path, matrix, leaf, i, bias, bias_key, lifts, why))
    return sites


def _names(keys: tuple[Any, ...]) -> tuple[str, ...]:
    """The components of a leaf's path; Haiku's names and those of flat checkpoints are taken apart."""
    path = jax.tree_util.keystr(keys, simple=True, separator=".").replace("/", ".")
    names = [part for part in path.split(".") if part not in ("", "~")]
    if names and names[-1] in ("value", "raw_value"):  # a variable of NNX
        names.pop()
    return tuple(names[1:] if names[:1] == ["params"] else names)


def _label(key: Any) -> Any:
    """The key or number in one of jax's keys."""
    return key.key if hasattr(key, "key") else key.idx


def _owner(tree: Any, keys: tuple[Any, ...]) -> Owner:
    """The class of Equinox whose array a leaf is, or the nearest that it extends, else empty; of a convolution its
    groups and the axes of one kernel, else 0."""
    node = tree
    for key in keys[:-1]:
        try:
            node = getattr(node, key.name) if hasattr(key, "name") else node[_label(key)]
        except (AttributeError, KeyError, IndexError, TypeError):
            return "", 0, 0
    owner = next((base.__name__ for base in type(node).__mro__ if base.__module__.startswith("equinox.nn.")), "")
    return (owner, node.groups, node.num_spatial_dims + 2) if "Conv" in owner else (owner, 0, 0)


def _matrix(
    last: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, owner: Owner, equation: str | None, path: str
) -> tuple[Matrix, str]:
    """How the last axes of an array are a matrix, and what to say where that is a guess.

    Args:
        last: the array's own name, or empty.
        shape, bias: of the array, and of the layer's bias.
        owner: as from `_owner`.
        equation: an einsum that says it.
        path: of the layer, for messages.
    """
    if equation is not None:
        right = equation.replace(" ", "").partition("->")[0].partition(",")[2]
        matrix = Matrix.of_einsum("kernel", equation, shape[len(shape) - len(right) :])
        if matrix is None:
            raise ValueError(f"einsums: {equation!r} for {path} {list(shape)} is no product with one matrix")
        return matrix, ""
    kind, groups, axes = owner
    if kind == "Embedding" or last.startswith("embedding"):
        return Matrix.plain("embedding", shape[-2:]), ""
    if groups:  # [out, in / groups, *window]; inputs in the order of Flax
        return Matrix("kernel", tuple(shape[-axes:]), (*range(2, axes), 1), (0,), (0,), groups), ""
    if kind or last.startswith("weight"):  # [out, in], as in PyTorch
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


def _lift(leaves: list[Any], numbers: Mapping[Path, int], path: Path, axes: tuple[int, ...]) -> int:
    """How many components of a path lead to the first node whose arrays all have these axes in front."""

    def all_stacked(above: Path) -> bool:
        inside = (leaves[i][1].shape for names, i in numbers.items() if names[: len(above)] == above)
        return all(shape[: len(axes)] == axes for shape in inside)

    return next((end for end in range(len(path)) if all_stacked(path[:end])), len(path))


def selected(tree: Any, config: Any, einsums: Einsums | None = None) -> list[TreeSite]:
    """The kernels of a tree that a configuration picks, each with its own.

    Raises:
        TypeError, ValueError: as `init`.
    """
    check_config(config)
    sites, picks = sites_of(tree, einsums), Picker(config, layer_number)
    names = [site.name for site in sites]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"several arrays of the tree are at {doubled!r}, so adapters can't be told apart there")
    picked = [site for site in sites if picks(site.name, is_linear=site.matrix.is_linear)]
    if not sites:
        raise ValueError("the tree has no kernel: no array of floats with two axes or more")
    picks.check(names, [name or "(the array itself)" for name in names], any_picked=bool(picked))
    method = adapter_class(config)
    for site in picked:
        if site.why:
            raise ValueError(site.why)
        if jnp.issubdtype(site.array.dtype, jnp.complexfloating):
            raise ValueError(f"{site.name} is {site.array.dtype}, and adapters have no complex form; leave it out")
        if site.matrix.is_embedding:
            method.check_embedding(site.name)
    config = method.configure_for_shapes(config, [site.matrix.sizes for site in picked])
    return [replace(site, config=config_at(config, site.name)) for site in picked]


def adapted_sites(tree: Any, adapters: Adapters, config: Any, einsums: Einsums | None) -> list[tuple[TreeSite, Arrays]]:
    """The picked kernels with their adapters' arrays, as the adapters' class takes them.

    What isn't trained has no gradient.

    Raises:
        TypeError, ValueError: as `merge`.
    """
    sites = selected(tree, config, einsums)
    missing = {site.name for site in sites} ^ set(adapters)
    if missing:
        name = sorted(missing)[0]
        how = "is no kernel that the configuration picks" if name in adapters else "is missing among the adapters"
        raise ValueError(f"{name} {how}: give the tree and the configuration that init was called with")
    adapted = []
    for site in sites:
        given, (trained, fixed) = dict(adapters[site.name]), array_shapes(site.config, site.matrix)
        shapes = {name: tuple(np.shape(value)) for name, value in given.items()}
        expected = {name: (*site.stack, *shape) for name, shape in (trained | fixed).items()}
        if shapes != expected:
            raise ValueError(f"the adapter of {site.name} has arrays {shapes}; {site.config} asks for {expected}")
        given |= {name: jax.lax.stop_gradient(given[name]) for name in fixed}
        adapted.append((site, scaled(site.config, given, site.stack)))
    return adapted


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
    rngs, sites = as_rngs(rngs), selected(params, config, einsums)
    _report(sites, sites, config, 0).warn(stacklevel=3)
    fresh = {site.name: fresh_arrays(site.config, site.matrix, rngs, site.kernel()) for site in sites}
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
    shapes = {site.name: array_shapes(site.config, site.matrix) for site in selected(params, config, einsums)}
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
    return _report(sites_of(params, einsums), selected(params, config, einsums), config, total)


def _report(sites: list[TreeSite], picked: list[TreeSite], config: Any, base: int) -> AttachReport:
    picks, adapted, left = Picker(config, layer_number), {}, []
    for site in picked:
        layers, shapes = math.prod(site.stack), array_shapes(site.config, site.matrix)[0].values()
        trained = layers * sum(map(math.prod, shapes))
        adapted[site.name] = Match(site.name, layers, *site.matrix.sizes, trained), site.config
    for site in sites:
        if site.name not in adapted:
            why = why_left(picks, site.name, kind=site.matrix.kind)
            left.append((site.name, "", math.prod((*site.stack, *site.matrix.sizes)), why))
    return report_on(adapter_class(config).method, list(adapted.values()), grouped(left, picks), base)


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
    for site, arrays in adapted_sites(params, adapters, config, einsums):
        leaves[site.key] = site.merged(arrays)
        if site.bias is not None:
            leaves[site.bias_key] = site.merged_bias(arrays)
    return jax.tree.unflatten(treedef, leaves)
