"""What a model carries: a report for people, and one entry a layer for files."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from mora_jax.adapters.base import Adapter, AdapterParam, host, known
from mora_jax.adapters.layers import Adapted
from mora_jax.adapters.matching.naming import aligned, summary, wrapped
from mora_jax.adapters.matching.skipped import Skipped, skipped
from mora_jax.adapters.matching.targets import adapted_places
from mora_jax.adapters.products.quantization import QuantizedParam, packed_sizes
from mora_jax.adapters.projection import OutputHead, Projection
from mora_jax.adapters.slots import refuse_banks
from mora_jax.adapters.trainable_base import kept


@dataclass(frozen=True)
class Match:
    """One line of a report: a matrix (or a stack of them), its sizes, and what is trained on it.

    For a module that is trained whole, `layers`, `in_features` and `out_features` are 0.

    Attributes:
        path: the path of the module, a `*` where several layers have the same sizes.
        layers: number of matrices, 1 where none are stacked.
        in_features: inputs of each.
        out_features: outputs of each.
        trainable: number of parameters that are trained on all of them.
    """

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
        matches: the adapted layers, and the modules that are trained whole.
        trainable: number of parameters that are trained.
        total: number of parameters, those of adapters included.
        warnings: what a user should know, one sentence each.
        skipped: matrices without an adapter, those of one reason together.
        beyond: of `warnings` those on a rank that is higher than a layer can use.
    """

    method: str
    matches: tuple[Match, ...]
    trainable: int
    total: int
    warnings: tuple[str, ...] = field(default=())
    skipped: tuple[Skipped, ...] = field(default=())
    beyond: tuple[str, ...] = field(default=())

    def warn(self, *, stacklevel: int) -> None:
        """Says as warnings what was asked for and isn't so: targets without a form, ranks that layers can't use."""
        for one in self.skipped:
            if one.asked:
                what = f"targets name what can't be adapted: {summary(one.paths)}, {one.reason}"
                warnings.warn(what, stacklevel=stacklevel)
        if self.beyond:
            more = f" (and {len(self.beyond) - 1} more layers)" if len(self.beyond) > 1 else ""
            warnings.warn(self.beyond[0] + more, stacklevel=stacklevel)

    @property
    def percent(self) -> float:
        """`trainable` in percent of `total`."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [("layer", "layers", "in", "out", "trainable")]
        for m in self.matches:
            layers, inputs, outputs = (str(n) if m.layers else "" for n in (m.layers, m.in_features, m.out_features))
            rows.append((m.path, layers, inputs, outputs, f"{m.trainable:,}"))
        lines = aligned(rows)
        rule = "─" * max(len(line) for line in lines)
        lines = [lines[0], rule, *lines[1:], rule] if self.matches else []
        share = f"{self.trainable:,} of {self.total:,} parameters are trained ({self.percent:.3g} %)"
        lines.append(f"{self.method}: {share}")
        lines += [line for one in self.skipped for line in wrapped(str(one))]
        lines += [line for text in self.warnings for line in wrapped(f"warning: {text}")]
        return "\n".join(lines)


def report_of(model: nnx.Module, config: Any = None) -> AttachReport:
    """The report on the adapters that `model` carries, wherever they came from.

    Args:
        model: with adapters.
        config: what they were attached with; with it the report says what was passed over.

    Raises:
        ValueError: it carries none.
    """
    matches, notes, beyond, methods = [], [], [], []
    for place in adapted_places(model):
        adapter = place.adapter
        # A bank has a scaling for each of its slots, too.
        active = int(np.count_nonzero(_used(adapter.scaling).reshape(*adapter.layers, -1).any(-1)))
        matches.append(Match(place.title, active, place.in_features, place.out_features, _trainable(adapter)))
        about = place.title, place.in_features, place.out_features
        notes += adapter.config.warnings(*about)
        beyond.append(adapter.config.beyond(*about))
        methods.append(adapter.method)
    if not matches:
        raise ValueError("the model carries no adapter")
    seen: set[int] = set()
    for paths, module, values in kept(model):
        masters = [getattr(module, name) for name in values]
        size = sum(master.get_value().size for master in masters if id(master) not in seen)
        seen.update(id(master) for master in masters)
        matches.append(Match(", ".join(paths) or "(the model itself)", 0, 0, 0, size))
    trainable = sum(match.trainable for match in matches)
    total = count(model, nnx.Not(AdapterParam)) + trainable
    passed_over = () if config is None else skipped(model, config)
    method = "+".join(dict.fromkeys(methods))
    return AttachReport(
        method, tuple(matches), trainable, total, tuple(notes), passed_over, tuple(filter(None, beyond))
    )


def _trainable(adapter: Adapter) -> int:
    """Trained numbers that have an effect: none in layers that are left out, or beyond a layer's rank."""
    state = nnx.state(adapter, AdapterParam)
    active = _used(adapter.scaling).reshape(-1)
    total = 0
    for path, variable in nnx.to_flat_state(state):
        total += _used_of(str(path[-1]), variable.get_value().size // len(active), adapter, active)
    return total


def _used_of(name: str, size: int, adapter: Adapter, active: np.ndarray) -> int:
    mask = getattr(adapter, "rank_mask", None)
    if mask is None or name not in ("lora_a", "lora_b"):
        return size * int(active.sum())
    ranks = _used(mask).sum(-1).reshape(-1)
    return int((ranks * active).sum()) * (size // mask.shape[-1])


def _used(state: nnx.Variable) -> np.ndarray:
    """Where a scaling or a mask is not zero; everywhere, where it was handed to a function that is being traced."""
    array = state.get_value()
    return np.asarray(array) != 0 if known(array) else np.ones(array.shape, bool)


def count(model: nnx.Module, *filters) -> int:
    """How many numbers the parameters of a model have; quantised ones count as what they stand for."""
    state = nnx.state(model, nnx.All(nnx.Param, *filters))
    kernels = nnx.state(model, nnx.All(QuantizedParam, *filters))
    packed = sum(packed_sizes(model).values()) if jax.tree.leaves(kernels) else 0
    return sum(leaf.size for leaf in jax.tree.leaves(state)) + packed


@dataclass(frozen=True)
class AdapterEntry:
    """One adapted matrix of one layer, without the stacking and fusing of memory.

    Attributes:
        path: module path; HuggingFace's for the decoder's layers.
        method: name of the method.
        config: the method's configuration, with the rank of this layer.
        in_features, out_features: sizes of the matrix.
        is_embedding: whether the matrix is an embedding table.
        params: arrays by name (`lora_a [in, r]`, `lora_b [r, out]`, `m [q, q]`, `scaling []`, `magnitude [out]`,
            `bias [out]`, …), as numpy.
    """

    path: str
    method: str
    config: Any
    in_features: int
    out_features: int
    is_embedding: bool
    params: dict[str, np.ndarray]


def adapters_of(model: nnx.Module) -> Iterator[AdapterEntry]:
    """Every adapted matrix of `model`, one entry a layer; layers that a stacked adapter leaves out don't occur.

    Raises:
        ValueError: the model has several named adapters.
    """
    refuse_banks(model, "take")
    for place in adapted_places(model):
        adapter = place.adapter
        # Through a copy: an array keeps what it once gathered from its devices for as long as it lives.
        arrays = {name: host(value.copy()) for name, value in adapter.params().items()}
        for i, path in enumerate(place.paths):
            params = {name: value[place.index(i)] for name, value in arrays.items()}
            if params["scaling"] == 0:
                continue
            config = adapter.config
            mask = params.pop("rank_mask", None)
            if mask is not None:
                rank = int(mask.sum())
                params |= {"lora_a": params["lora_a"][:, :rank], "lora_b": params["lora_b"][:rank]}
                config = dataclasses.replace(config, rank=rank)
            sizes = place.in_features, place.out_features
            yield AdapterEntry(path, adapter.method, config, *sizes, place.is_embedding, params)


def adapted_layers(model: nnx.Module) -> Iterator[Any]:
    """The modules that hold adapters: `Projection`s with any, adapted layers, an adapted head."""
    for _, node in nnx.iter_graph(model):
        adapted_head = isinstance(node, OutputHead) and node.adapter is not None
        if isinstance(node, Adapted) or adapted_head or (isinstance(node, Projection) and len(node.adapters)):
            yield node
