"""Fold adapters into the weights that they adapt, and take them out again."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from mora_jax.adapters.base import Adapter
from mora_jax.adapters.products.quantization import quantized_format
from mora_jax.adapters.projection import OutputHead, Projection
from mora_jax.adapters.sites import Holders, Site, adapted_sites, holders_of, sites
from mora_jax.adapters.slots import refuse_banks
from mora_jax.adapters.trainable_base import kept, restore


@dataclass(frozen=True)
class Merged:
    """What was folded into one place, enough to take it out again.

    Attributes:
        paths: the place's paths.
        part: its name in a projection, else "".
        adapter: the adapter.
        dropout: the layer's dropout, if any.
        gain: factors on outputs `[*layers, out]` that were multiplied in, or None.
        kernel: the kernel `[*layers, in, out]` as it was, where a merged one does not tell it; else None.
        bias_change: what was added to the bias, `[*layers, out]`, or None.
        had_bias: whether the layer had a bias before.
        shared: by name, the parameters that other modules hold too; the layer has its own in their site.
    """

    paths: tuple[str, ...]
    part: str
    adapter: Adapter
    dropout: Any
    gain: Any
    kernel: Any
    bias_change: Any
    had_bias: bool
    shared: dict[str, nnx.Variable] = field(default_factory=dict)


def merge(model: nnx.Module) -> tuple[Merged, ...]:
    """Folds every adapter of `model` into its base layer, in place; the layers are plain again afterwards.

    The kernel becomes `gain ⊙ T (K(W) + ΔW)` (see `Adapter`), taken in float32 and rounded once to the dtype of the
    weight; modules that were trained whole get their trained values, in the dtype they had. A parameter that another
    module holds too (a tied embedding) stays as it is for that module: the layer gets one of its own, with a warning.

    Args:
        model: a module with adapters, in evaluation mode (`model.eval()`) where these have dropout; changed in site.

    Returns:
        What `unmerge` needs to take the adapters out again.

    Raises:
        ValueError: the model has no adapter, or several named ones, or no values, or a quantised base, or an adapter
            whose dropout is on or whose values are no numbers, or jax traces a function and the model is from outside.
            Nothing is changed then.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=1)
        >>> model.layers[0].adapter.lora_b[...] = jnp.ones((2, 4))
        >>> x = jnp.ones((1, 6))
        >>> adapted = model(x)
        >>> _ = mj.merge(model)
        >>> bool(jnp.allclose(model(x), adapted, atol=1e-5)), type(model.layers[0]).__name__
        (True, 'Linear')
    """
    refuse_banks(model, "merge")
    held = quantized_format(model)
    if held is not None:
        raise ValueError(
            f"the model's kernels are quantised (quantize={held}), which a merged weight wouldn't fit: save the "
            "adapter, and merge it into the model loaded without quantize, as mora-jax merge does"
        )
    adapted = adapted_sites(model)
    if not adapted and not list(kept(model)):
        raise ValueError("the model has no adapter to merge")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))):
        raise ValueError("the model has shapes without values, so nothing can be merged: load its weights first")
    for site in adapted:
        _check_whole(site)
    biased = {id(site.layer): site.has_bias for site in adapted}  # before the first part of a layer gives it one
    holders = holders_of(model)
    merged = tuple(_merge(site, biased[id(site.layer)], holders) for site in adapted)
    restore(model, trained=True)
    return merged


def _check_whole(site: Site) -> None:
    """Refuses an adapter whose merged form would be another function than the layer computes, or none."""
    if getattr(site.layer, "dropping", False):
        raise ValueError(
            f"the dropout of the adapter on {site.title} is on, and a merged weight drops nothing: call model.eval() "
            "before merging"
        )
    try:
        nnx.update(site.adapter, nnx.state(site.adapter))
    except TraceContextError:
        raise ValueError(
            "the model was made outside the function that jax traces, and can't be changed inside: give the function "
            "its state as an argument, or a copy, nnx.merge(graphdef, state, copy=True)"
        ) from None
    for name, array in site.adapter.params().items():
        finite = _finite(array)  # traced while a function is, also where the array is none of its arguments
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise ValueError(f"the adapter on {site.title} has values in {name} that are no finite numbers")


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


def _merge(site: Site, had_bias: bool, holders: Holders) -> Merged:
    adapter, layer = site.adapter, site.layer
    dropout = getattr(layer, "adapter_dropout", None)
    kernel = site.kernel()
    # A bias that the merge of another part has just made is none that the adapter knew.
    change = adapter.bias_change(site.bias() if had_bias else None)
    gain = adapter.gain(kernel)
    weight = adapter.merged(kernel) if _changes_kernel(adapter, gain) else None
    site.take_adapter()
    shared = _own_params(site, holders, kernel=weight is not None, bias=change is not None)
    _write(site, weight, change)
    before = kernel if adapter.transforms else None
    return Merged(site.paths, site.part, adapter, dropout, gain, before, change, had_bias, shared)


def _changes_kernel(adapter: Adapter, gain: Any) -> bool:
    return adapter.additive or adapter.transforms or gain is not None


def _own_params(site: Site, holders: Holders, *, kernel: bool, bias: bool) -> dict[str, nnx.Variable]:
    """Gives a layer copies of those parameters that a merge writes to and that others hold; returns what it had."""
    if isinstance(site.layer, Projection | OutputHead):
        return {}
    originals: dict[str, nnx.Variable] = {}
    for name, value in list(vars(site.layer).items()):
        others = holders.get(id(value), {})
        if not isinstance(value, nnx.Param) or len(others) < 2 or not (bias if name == "bias" else kernel):
            continue
        originals[name] = value
        setattr(site.layer, name, value.copy())
        del others[id(site.layer)]
        paths = ", ".join(others.values())
        warnings.warn(
            f"{site.title} shared its {name} with {paths}, which stays as it was; merged, {site.title} has one of "
            "its own",
            stacklevel=5,
        )
    return originals


def _write(site: Site, weight: Any, change: Any) -> None:
    if weight is not None:
        site.put_kernel(weight)
    if change is not None:
        site.add_to_bias(change)


def unmerge(model: nnx.Module, merged: tuple[Merged, ...]) -> None:
    """Takes adapters out of the weights that `merge` folded them into, and puts them back beside them.

    The update is subtracted and gains are divided out, in float32, so weights come back up to rounding. Kernels that
    were transformed, and parameters that other modules hold too, are those again, bit for bit. Modules that were
    trained whole keep their trained values, frozen.

    Args:
        model: a model whose weights are as `merge` left them.
        merged: what `merge` returned.

    Raises:
        ValueError: a place that the model lacks or that carries an adapter, or a gain of 0, which can't be undone.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=1)
        >>> mj.unmerge(model, mj.merge(model))
        >>> sorted(nnx.to_pure_dict(nnx.state(model, mj.AdapterParam))['layers'][0]['adapter'])
        ['lora_a', 'lora_b']
    """
    by_path = {(site.paths, site.part): site for site in sites(model)}
    for entry in merged:
        site = by_path.get((entry.paths, entry.part))
        if site is None or site.adapter is not None:
            raise ValueError(f"{entry.paths[0]} is not as merging left it: absent, or adapted again")
        if entry.kernel is None and entry.gain is not None and not bool(jnp.all(entry.gain != 0)):
            raise ValueError(f"{entry.paths[0]}: a gain of 0 was merged, which can't be divided out again")
    for entry in merged:
        _unmerge(by_path[entry.paths, entry.part], entry)


def _unmerge(site: Site, entry: Merged) -> None:
    change, weight = entry.bias_change, entry.kernel
    if weight is None and _changes_kernel(entry.adapter, entry.gain):
        weight = entry.adapter.unmerged(site.kernel(), entry.gain)
    _write(site, weight, None if change is None or not entry.had_bias else -change)
    for name, value in entry.shared.items():
        setattr(site.layer, name, value)
    if change is not None and not entry.had_bias:
        site.drop_bias()
    site.put_adapter(entry.adapter, None, entry.dropout)
