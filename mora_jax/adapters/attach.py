"""Put adapters on the layers of a model, in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.adapter import Adapter
from mora_jax.adapters.config import FullConfig, MoRAConfig
from mora_jax.adapters.layers import ADAPTED, Adapted
from mora_jax.adapters.mora import unused_inputs
from mora_jax.adapters.projection import Projection
from mora_jax.adapters.registry import adapter_class
from mora_jax.adapters.targets import Place, has_adapter, places, select
from mora_jax.adapters.variables import AdapterParam, FullParam


@dataclass(frozen=True)
class Match:
    """One line of a report: a matrix (or a stack of them), its sizes, and what the adapter trains on it."""

    path: str
    layers: int
    in_features: int
    out_features: int
    trainable: int


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did; prints as a table.

    Attributes:
        method: name of the method.
        matches: the adapted layers.
        trainable, total: numbers of parameters, adapters included in both.
        warnings: what a user should know, one sentence each.
    """

    method: str
    matches: tuple[Match, ...]
    trainable: int
    total: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def percent(self) -> float:
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [("layer", "layers", "in", "out", "trainable")]
        rows += [
            (m.path, str(m.layers), str(m.in_features), str(m.out_features), f"{m.trainable:,}") for m in self.matches
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5))]).rstrip()
            for row in rows
        ]
        rule = "─" * max(len(line) for line in lines)
        lines = [lines[0], rule, *lines[1:], rule] if self.matches else []
        share = f"{self.trainable:,} of {self.total:,} parameters are trained ({self.percent:.3g} %)"
        lines.append(f"{self.method}: {share}")
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def attach(model: nnx.Module, config: Any, *, rngs: nnx.Rngs) -> AttachReport:
    """Puts an adapter on every layer that `config.targets` picks; with `FullConfig`, makes every parameter trainable.

    Works on any `nnx.Module` that holds `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` (where it is a product with a
    matrix), `nnx.Embed` (LoRA) or this library's stacked `Projection`. A fresh adapter changes no output.

    Args:
        model: changed in place; its own variables stay where they are.
        config: `LoRAConfig`, `MoRAConfig` or `FullConfig`.
        rngs: keys for the new parameters, and for dropout.

    Returns:
        A report of what matched; `print` it.

    Raises:
        ValueError: nothing matches, or a layer that matches can't carry this method or carries an adapter already.
        TypeError: `config` is no adapter configuration.
    """
    if isinstance(config, FullConfig):
        return _train_everything(model)
    method = adapter_class(config)
    selected = select(model, config.targets)
    for place, _ in selected:
        if has_adapter(place):
            raise ValueError(f"{place.title} carries an adapter already; merge it before attaching another")
        if place.is_embedding and not method.on_embeddings:
            raise ValueError(
                f"{place.title} is an embedding, for which {method.method} has no form; leave it out of targets"
            )
    for place, mask in selected:
        _put(place, mask, method, config, rngs)
    return report_of(model)


def report_of(model: nnx.Module) -> AttachReport:
    """The report on the adapters that `model` carries, wherever they came from.

    Raises:
        ValueError: it carries none.
    """
    matches, warnings, methods = [], [], []
    for place in places(model):
        if not has_adapter(place):
            continue
        adapter = adapter_at(place)
        size = sum(array.size for array in jax.tree.leaves(nnx.state(adapter, AdapterParam)))
        active = int(np.count_nonzero(np.asarray(adapter.scaling[...])))
        trainable = size * active // len(place.paths)
        matches.append(Match(place.title, active, place.in_features, place.out_features, trainable))
        warnings += _warnings(adapter.config, place)
        methods.append(adapter.method)
    if not matches:
        raise ValueError("the model carries no adapter")
    trainable = sum(match.trainable for match in matches)
    total = _count(model, nnx.Not(AdapterParam)) + trainable
    return AttachReport("+".join(dict.fromkeys(methods)), tuple(matches), trainable, total, tuple(warnings))


def adapter_at(place: Place) -> Adapter:
    """The adapter of a place that has one."""
    return place.layer.adapters[place.part] if isinstance(place.layer, Projection) else place.layer.adapter


def _put(place: Place, mask: tuple[bool, ...], method: Any, config: Any, rngs: nnx.Rngs) -> None:
    if isinstance(place.layer, Projection):
        assert place.part is not None, "a place in a projection is one of its parts"
        projection = place.layer
        adapter = method(
            place.in_features,
            place.out_features,
            config,
            rngs=rngs,
            num_layers=projection.num_layers,
            layer_mask=None if all(mask) else np.array(mask),
            axes=projection.part_axes(place.part),
        )
        projection.add_adapter(place.part, adapter)
        return
    if place.is_embedding:
        adapter = method.for_embedding(place.in_features, place.out_features, config, rngs=rngs)
    else:
        adapter = method(place.in_features, place.out_features, config, rngs=rngs)
    # The layer keeps its identity, so every reference to it in the user's model sees the adapter.
    place.layer.__class__ = ADAPTED[type(place.layer)]
    place.layer.put_adapter(adapter, rngs)


def _count(model: nnx.Module, *filters) -> int:
    state = nnx.state(model, nnx.All(nnx.Param, *filters))
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def _warnings(config: Any, place: Place) -> list[str]:
    if not isinstance(config, MoRAConfig):
        return []
    unused = unused_inputs(place.in_features, place.out_features, config.rank, config.kind)
    if not unused:
        return []
    why = "" if config.kind == "truncation" else " (in > out, as in the authors' code)"
    return [
        f"{config.kind} at rank {config.rank} ignores {unused} of the {place.in_features} inputs of {place.title}{why}"
    ]


def _train_everything(model: nnx.Module) -> AttachReport:
    """Turns every `nnx.Param` into a trained float32 master. Shared parameters stay shared."""
    masters: dict[int, FullParam] = {}
    trainable = 0
    for _, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Module):
            continue
        for name, value in list(vars(node).items()):
            if not isinstance(value, nnx.Param) or isinstance(value, AdapterParam):
                continue
            if id(value) not in masters:
                array = value[...]
                if not jnp.issubdtype(array.dtype, jnp.floating):
                    continue
                axes = value.get_metadata().get("axes")
                metadata = {} if axes is None else {"axes": axes}
                masters[id(value)] = FullParam(array.astype(jnp.float32), **metadata)
                trainable += array.size
            setattr(node, name, masters[id(value)])
    if not masters:
        raise ValueError("the model has no parameters to train")
    return AttachReport("full", (), trainable, _count(model))


@dataclass(frozen=True)
class AdapterEntry:
    """One adapted matrix of one layer, without the stacking and fusing of memory.

    Attributes:
        path: module path; HuggingFace's for the decoder's layers.
        method: name of the method.
        config: the method's configuration.
        in_features, out_features: sizes of the matrix.
        is_embedding: whether the matrix is an embedding table.
        params: arrays by name (`lora_a [in, r]`, `lora_b [r, out]`, `m [q, q]`, `scaling []`), as numpy.
    """

    path: str
    method: str
    config: Any
    in_features: int
    out_features: int
    is_embedding: bool
    params: dict[str, np.ndarray]


def adapters_of(model: nnx.Module) -> Iterator[AdapterEntry]:
    """Every adapted matrix of `model`, one entry a layer; layers that a stacked adapter leaves out don't occur."""
    for place in places(model):
        if not has_adapter(place):
            continue
        adapter = adapter_at(place)
        arrays = {name: np.asarray(value) for name, value in adapter.params().items()}
        for i, path in enumerate(place.paths):
            params = {name: value[i] for name, value in arrays.items()} if place.stacked else arrays
            if params["scaling"] != 0:
                yield AdapterEntry(
                    path,
                    adapter.method,
                    adapter.config,
                    place.in_features,
                    place.out_features,
                    place.is_embedding,
                    params,
                )


def adapted_layers(model: nnx.Module) -> Iterator[Any]:
    """The modules that hold adapters: `Projection`s with any, and adapted layers."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Adapted) or (isinstance(node, Projection) and len(node.adapters)):
            yield node
