"""Fold adapters into the weights that they adapt, and take them out again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.attach import add_adapter, take_adapter
from mora_jax.adapters.base import Adapter
from mora_jax.adapters.layers import to_adapted_class
from mora_jax.adapters.matching.targets import Holders, Place, adapted_places, holders_of, places
from mora_jax.adapters.matrices import add_to_bias, drop_bias
from mora_jax.adapters.products.quantization import quantized_format
from mora_jax.adapters.projection import OutputHead, Projection
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
        shared: by name, the parameters that other modules hold too; the layer has its own in their place.
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
        model: a module with adapters, in evaluation mode (`model.eval()`) where these have dropout; changed in place.

    Returns:
        What `unmerge` needs to take the adapters out again.

    Raises:
        ValueError: the model has no adapter, or several named ones, or no values, or a quantised base, or an adapter
            whose dropout is on or whose values are no numbers. Nothing is changed then.
    """
    refuse_banks(model, "merge")
    held = quantized_format(model)
    if held is not None:
        raise ValueError(
            f"the model's kernels are quantised (quantize={held}), which a merged weight wouldn't fit: save the "
            "adapter, and merge it into the model loaded without quantize, as mora-jax merge does"
        )
    found = adapted_places(model)
    if not found and not list(kept(model)):
        raise ValueError("the model has no adapter to merge")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))):
        raise ValueError("the model has shapes without values, so nothing can be merged: load its weights first")
    for place in found:
        _check_whole(place)
    biased = {id(place.layer): place.has_bias for place in found}  # before the first part of a layer gives it one
    holders = holders_of(model)
    merged = tuple(_merge(place, biased[id(place.layer)], holders) for place in found)
    restore(model, trained=True)
    return merged


def _check_whole(place: Place) -> None:
    """Refuses an adapter whose merged form would be another function than the layer computes, or none."""
    if getattr(place.layer, "dropping", False):
        raise ValueError(
            f"the dropout of the adapter on {place.title} is on, and a merged weight drops nothing: call model.eval() "
            "before merging"
        )
    for name, array in place.adapter.params().items():
        if not isinstance(array, jax.core.Tracer) and not bool(_finite(array)):
            raise ValueError(f"the adapter on {place.title} has values in {name} that are no finite numbers")


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


def _merge(place: Place, had_bias: bool, holders: Holders) -> Merged:
    adapter, layer = place.adapter, place.layer
    dropout = getattr(layer, "adapter_dropout", None)
    kernel = place.kernel()
    gain = adapter.gain(kernel)
    # A bias that the merge of another part has just made is none that the adapter knew.
    change = adapter.bias_change(place.bias() if had_bias else None)
    weight = adapter.merged(kernel) if _changes_kernel(adapter, gain) else None
    take_adapter(place)
    shared = _own_params(place, holders, kernel=weight is not None, bias=change is not None)
    _write(place, weight, change)
    before = kernel if adapter.transforms else None
    return Merged(place.paths, place.part, adapter, dropout, gain, before, change, had_bias, shared)


def _changes_kernel(adapter: Adapter, gain: Any) -> bool:
    return adapter.additive or adapter.transforms or gain is not None


def _own_params(place: Place, holders: Holders, *, kernel: bool, bias: bool) -> dict[str, nnx.Variable]:
    """Gives a layer copies of those parameters that a merge writes to and that others hold; returns what it had."""
    if isinstance(place.layer, Projection | OutputHead):
        return {}
    found: dict[str, nnx.Variable] = {}
    for name, value in list(vars(place.layer).items()):
        others = holders.get(id(value), {})
        if not isinstance(value, nnx.Param) or len(others) < 2 or not (bias if name == "bias" else kernel):
            continue
        found[name] = value
        setattr(place.layer, name, value.copy())
        del others[id(place.layer)]
        paths = ", ".join(others.values())
        warnings.warn(
            f"{place.title} shared its {name} with {paths}, which stays as it was; merged, {place.title} has one of "
            "its own",
            stacklevel=5,
        )
    return found


def _write(place: Place, weight: Any, change: Any) -> None:
    if weight is not None:
        place.put_kernel(weight)
    if change is None:
        return
    if isinstance(place.layer, Projection):
        place.layer.add_to_part_bias(place.part, change)
    else:
        add_to_bias(place.layer, change)


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
    """
    by_path = {(place.paths, place.part): place for place in places(model)}
    for entry in merged:
        place = by_path.get((entry.paths, entry.part))
        if place is None or place.adapter is not None:
            raise ValueError(f"{entry.paths[0]} is not as merging left it: absent, or adapted again")
        if entry.kernel is None and entry.gain is not None and not bool(jnp.all(entry.gain != 0)):
            raise ValueError(f"{entry.paths[0]}: a gain of 0 was merged, which can't be divided out again")
    for entry in merged:
        _unmerge(by_path[entry.paths, entry.part], entry)


def _unmerge(place: Place, entry: Merged) -> None:
    change, weight = entry.bias_change, entry.kernel
    if weight is None and _changes_kernel(entry.adapter, entry.gain):
        weight = entry.adapter.unmerged(place.kernel(), entry.gain)
    _write(place, weight, None if change is None or not entry.had_bias else -change)
    for name, value in entry.shared.items():
        setattr(place.layer, name, value)
    if change is not None and not entry.had_bias:
        drop_bias(place.layer)
    if isinstance(place.layer, Projection | OutputHead):
        add_adapter(place, entry.adapter, None)
    else:
        to_adapted_class(place.layer)
        place.layer.adapter, place.layer.adapter_dropout = entry.adapter, entry.dropout
