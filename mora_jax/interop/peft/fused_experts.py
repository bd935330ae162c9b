"""LoRA on experts in PEFT's folders: one pair of factors for all experts of a layer, or one for each.

transformers holds the experts of a layer as one parameter, `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`. PEFT
names these in `target_parameters`, and writes for E experts of rank r `lora_A [E · r, in]`, expert by expert, and
`lora_B [out, r · E]`, rank by rank. The adapter of the first parameter lies in the `base_layer` of the second's.
Where gate and up have adapters of their own they become one of both ranks together, whose B is zero elsewhere: exactly
the same function, and what PEFT makes of folders with a tensor for each expert (`gate_proj`, `up_proj`, `down_proj`).
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from mora_jax.adapters.base import host
from mora_jax.adapters.config.patterns import targets_for
from mora_jax.adapters.expert_projection import ExpertProjection
from mora_jax.adapters.report import AdapterEntry, entries_of
from mora_jax.adapters.sites import adapted_sites
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import plain
from mora_jax.interop.peft.format import PREFIX
from mora_jax.interop.peft.stored import meaning
from mora_jax.interop.safetensors_io import TensorFiles
from mora_jax.models.decoder import Decoder

_A, _B = "lora_A.weight", "lora_B.weight"


def expert_projections(model: nnx.Module) -> list[ExpertProjection]:
    """Those of a model, in the order in which transformers holds them: gate and up, then down."""
    projections = [node for _, node in nnx.iter_graph(model) if isinstance(node, ExpertProjection)]
    return sorted(projections, key=lambda projection: -len(projection.matrices))


def _parameter(model: nnx.Module, projection: ExpertProjection, layer: int) -> str:
    """The path of a projection's parameter in transformers."""
    assert isinstance(model, Decoder)
    return f"{model.config.names.layer.format(layer=projection.number(layer))}.{projection.parameter}"


def unfused(
    model: nnx.Module, files: TensorFiles, parameters: Iterable[str], where: str
) -> tuple[TensorFiles, dict[str, str]]:
    """A folder's tensors with a pair for each expert, and the paths of these, each with that of its parameter.

    Has gate and up of the model's experts seen as the folder holds them: as one matrix where `parameters` name it.

    Raises:
        InputError: a parameter that is none of experts, or whose factors are missing or don't fit.
    """
    projections = expert_projections(model)
    held = {meaning(name)[1] for name in files.shapes}
    paths = {}
    matched = set()
    for projection in projections:
        layers = {layer: _parameter(model, projection, layer) for layer in range(projection.stack[0])}
        for name, (layer, path) in itertools.product(parameters, layers.items()):
            if path == name or path.endswith(f".{name}"):
                paths[path] = projection, layer
                matched.add(name)
        if len(projection.matrices) > 1:
            together = any(path in paths for path in layers.values())
            projection.see(whole=together or not held.isdisjoint(projection.module_paths(projection.whole)))
    if unknown := sorted(set(parameters) - matched):
        raise InputError(f"{where}: target_parameters names {unknown[0]}, which is no parameter of the model's experts")
    views, experts = {}, {}
    for path, (projection, layer) in paths.items():
        module, _, name = path.rpartition(".")
        others = [other for other in paths if other != path and other.startswith(f"{module}.")]
        inner = ".base_layer" if others and len(projection.matrices) > 1 else ""
        count, part = projection.stack[1], projection.parts[0].name
        names = {kind: f"{PREFIX}{module}{inner}.{kind}" for kind in (_A, _B)}
        if missing := [name for name in names.values() if name not in files]:
            raise InputError(f"{files.folder}: tensor {missing[0]} is missing, of the adapter on {path}")
        rank, over = divmod(files.shapes[names[_A]][0], count)
        wanted = {_A: (count * rank, projection.in_features), _B: (projection.layout.features, count * rank)}
        for kind, shape in wanted.items():
            if over or files.shapes[names[kind]] != shape:
                raise InputError(
                    f"{files.folder}: tensor {names[kind]} has shape {list(files.shapes[names[kind]])}, but {count} "
                    f"experts of {projection.in_features} by {projection.layout.features} imply {list(shape)}"
                )
            for expert in range(count):
                one = projection.module_path(part, layer, expert)
                experts[one] = path
                views[f"{PREFIX}{one}.{kind}"] = _View(names[kind], expert, count, rank)
    return (_Unfused(files, views) if views else files), experts


@dataclasses.dataclass(frozen=True)
class _View:
    """A factor of one expert in a tensor for all."""

    name: str
    expert: int
    count: int
    rank: int

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """Of a whole tensor the expert's `[r, in]`, or `[out, r]`."""
        if self.name.endswith(_A):
            return tensor[self.expert * self.rank : (self.expert + 1) * self.rank]
        return tensor[:, self.expert :: self.count]


class _Unfused(TensorFiles):
    """Tensors of which some are seen as several; one such is in memory at a time, with its pair."""

    def __init__(self, files: TensorFiles, views: Mapping[str, _View]):
        self.folder, self._files, self._views = files.folder, files, views
        fused = {view.name for view in views.values()}
        self.shapes = {name: shape for name, shape in files.shapes.items() if name not in fused}
        for name, view in views.items():
            rows, columns = files.shapes[view.name]
            self.shapes[name] = (view.rank, columns) if name.endswith(_A) else (rows, view.rank)
        self._last: dict[str, np.ndarray] = {}

    def read(self, name: str) -> np.ndarray:
        view = self._views.get(name)
        if view is None:
            return self._files.read(name)
        if view.name not in self._last:
            if len(self._last) > 1:
                self._last.clear()
            self._last[view.name] = self._files.read(view.name)
        return view.take(self._last[view.name])

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.read(name)[index] if name in self._views else self._files.read_part(name, index)


def fused(model: nnx.Module) -> Iterator[tuple[AdapterEntry, dict[str, np.ndarray]]]:
    """The adapters on experts, a layer's as one: an entry with its rank and scaling, and its tensors by their names."""
    places = [place for place in adapted_sites(model) if place.of_experts]
    adapted = [node for node in expert_projections(model) if len(node.adapters)]
    for projection in adapted:
        entries = {
            place.part: {entry.path: entry for entry in map(plain, entries_of(place))}
            for place in places
            if place.layer is projection
        }
        down = [other for other in adapted if other.numbers == projection.numbers and len(other.matrices) == 1]
        later = _layers(down[0]) if down and projection is not down[0] else set()
        count = projection.stack[1]
        for layer in sorted(_layers(projection)):
            by_expert = [
                {part: by_path.get(projection.module_path(part, layer, expert)) for part, by_path in entries.items()}
                for expert in range(count)
            ]
            path = _parameter(model, projection, layer)
            entry, lora_a, lora_b = _joined(projection, by_expert, path)
            module = f"{PREFIX}{path.rpartition('.')[0]}{'.base_layer' if layer in later else ''}"
            a, b = lora_a.swapaxes(1, 2).reshape(-1, lora_a.shape[1]), lora_b.transpose(2, 1, 0)
            yield entry, {f"{module}.{_A}": a, f"{module}.{_B}": b.reshape(len(b), -1)}


def _layers(projection: ExpertProjection) -> set[int]:
    """The numbers of the layers in which any expert has an adapter."""
    scalings = [host(adapter.scaling[...]) for adapter in projection.adapters.values()]
    return {int(layer) for scaling in scalings for layer in np.flatnonzero(scaling.any(axis=1))}


def _joined(
    projection: ExpertProjection, by_expert: list[dict[str, AdapterEntry | None]], path: str
) -> tuple[AdapterEntry, np.ndarray, np.ndarray]:
    """One adapter `[E, in, R]`, `[E, R, out]` of those of a layer's experts, by part; None for one that has none."""
    present = [entry for parts in by_expert for entry in parts.values() if entry is not None]
    first = present[0]
    ranks = {
        part: max((entry.config.rank for parts in by_expert if (entry := parts[part]) is not None), default=0)
        for part in by_expert[0]
    }
    scaling, rank = float(first.params["scaling"]), sum(ranks.values())
    names = [part.name for part in projection.parts]
    lora_a = np.zeros((len(by_expert), projection.in_features, rank), np.float32)
    lora_b = np.zeros((len(by_expert), rank, *projection.layout.out_shape), np.float32)
    for expert, parts in enumerate(by_expert):
        start = 0
        for part, entry in parts.items():
            if entry is not None:
                rows = slice(start, start + entry.config.rank)
                lora_a[expert, :, rows] = entry.params["lora_a"]
                factor = float(entry.params["scaling"]) / scaling
                where: Any = (expert, rows, *projection.part_slice(names.index(part)))
                lora_b[where] = (entry.params["lora_b"] * factor).reshape(lora_b[where].shape)
            start += ranks[part]
    config = dataclasses.replace(first.config, rank=rank, dropout=0.0)
    params, features = {"scaling": first.params["scaling"]}, projection.layout.features
    joined = dataclasses.replace(first, path=path, config=config, out_features=features, params=params)
    return joined, lora_a, lora_b.reshape(len(by_expert), rank, -1)


def parameter_names(model: nnx.Module, adapted: Iterable[str]) -> list[str]:
    """`target_parameters` for exactly the `adapted` ones of a model's experts."""
    adapted = list(adapted)
    projections = expert_projections(model)
    possible = {_parameter(model, one, layer): one.parameter for one in projections for layer in range(one.stack[0])}
    short = targets_for(adapted, possible)
    if isinstance(short, str):
        return sorted(adapted)
    ends = {name.rpartition(".")[2]: name for name in possible.values()}
    return sorted(ends.get(name, name) for name in short)


def each(model: nnx.Module) -> Iterator[AdapterEntry]:
    """The adapters on experts one by one, as vLLM and transformers before version 5 hold them."""
    for place in adapted_sites(model):
        projection: Any = place.layer
        for entry in map(plain, entries_of(place)) if isinstance(projection, ExpertProjection) else ():
            if not projection.seen_whole or "lora_b" not in entry.params:
                yield entry
                continue
            lora_b = entry.params["lora_b"].reshape(-1, *projection.layout.out_shape)
            for matrix, where in projection.matrix_slices():
                columns = lora_b[(slice(None), *where)].reshape(len(lora_b), -1)
                path = f"{entry.path.rpartition('.')[0]}.{matrix.name}"
                params = {**entry.params, "lora_b": columns}
                yield dataclasses.replace(entry, path=path, out_features=columns.shape[1], params=params)
