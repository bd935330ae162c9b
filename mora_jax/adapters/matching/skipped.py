"""What `attach` passed over: the matrices of a model that carry no adapter, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from mora_jax.adapters.base import AdapterParam, known
from mora_jax.adapters.matching.naming import star, summary
from mora_jax.adapters.matching.targets import Picker, Place, places
from mora_jax.adapters.matching.unknown import unknown_matrices, why_unknown
from mora_jax.adapters.projection import OutputHead

UNNAMED = "not among the targets"


@dataclass(frozen=True)
class Skipped:
    """Matrices without an adapter, for one reason.

    Attributes:
        paths: of their modules, `*` in place of numbers.
        kind: the class of the modules; empty for layers that could have been adapted.
        parameters: how many numbers they hold.
        reason: why they were passed over.
        asked: whether the targets name them all the same.
    """

    paths: tuple[str, ...]
    kind: str
    parameters: int
    reason: str
    asked: bool = False

    def __str__(self) -> str:
        kind = f" ({self.kind})" if self.kind else ""
        return f"not adapted: {summary(self.paths)}{kind}, {self.parameters:,} parameters: {self.reason}"


def skipped(model: nnx.Module, config: Any) -> tuple[Skipped, ...]:
    """The matrices of an adapted model that have no adapter, those of one class and reason together.

    Args:
        model: adapted with `config`; it may be abstract.
        config: of the method.
    """
    return grouped(_matrices(model, config), Picker(config))


def grouped(matrices: Iterable[tuple[str, str, int, str]], picks: Picker) -> tuple[Skipped, ...]:
    """Puts matrices of one reason together: each is a path, a class, a size and a reason.

    The class is empty for a layer that could be adapted.
    """
    found: dict[tuple[str, str, bool], tuple[list[str], int]] = {}
    for path, kind, size, reason in matrices:
        key = kind, reason, bool(kind) and picks.names(path)
        paths, total = found.get(key, ([], 0))
        found[key] = [*paths, path], total + size
    return tuple(
        Skipped(tuple(dict.fromkeys(map(star, paths))), kind, size, reason, asked)
        for (kind, reason, asked), (paths, size) in found.items()
    )


def _matrices(model: nnx.Module, config: Any) -> Iterator[tuple[str, str, int, str]]:
    """Path, class, size and reason of every matrix that is frozen and has no adapter."""
    found, picks = list(places(model)), Picker(config)
    adapted = {key: place.title for place in found if place.adapter is not None for key in _params(place.layer)}
    seen: set[int] = set()
    for place in found:
        keys, left = _params(place.layer), _left_out(place, config)
        if left and place.adapter is None and not place.part and keys & adapted.keys():
            title = adapted[next(iter(keys & adapted.keys()))]
            yield place.title, "", 0, f"their matrix is that of {title}, too"
        elif left and not _trained_whole(place.layer) and (place.part or not keys & seen):
            head = isinstance(place.layer, OutputHead)
            embedding = place.is_embedding
            named = [name for name in (left[0], *place.aliases) if picks.in_any_layer(name, is_embedding=embedding)]
            why = why_left(picks, named[0] if named else left[0], is_embedding=embedding, is_head=head)
            yield place.title, "", len(left) * place.in_features * place.out_features, why
        seen |= keys
    for path, module, size in unknown_matrices(model, {id(place.layer) for place in found}, seen):
        yield path, type(module).__name__, size, why_unknown(module)


def _params(module: nnx.Module) -> set[int]:
    """The identities of the base's parameters that a module holds itself."""
    return {id(value) for value in vars(module).values() if isinstance(value, nnx.Param)}


def _left_out(place: Place, config: Any) -> list[str]:
    """The paths of a place that carry no adapter."""
    adapter = place.adapter
    if adapter is None:
        return list(place.paths)
    if not place.stacked:
        return []
    scaling = adapter.scaling.get_value()
    if not known(scaling):
        picks = Picker(config)
        return [path for path in place.paths if not picks(path, is_embedding=place.is_embedding)]
    layers = np.asarray(scaling).reshape(len(place.paths), -1)
    return [path for path, values in zip(place.paths, layers, strict=True) if not values.any()]


def _trained_whole(layer: nnx.Module) -> bool:
    return any(isinstance(value, AdapterParam) for value in vars(layer).values())


def why_left(picks: Picker, path: str, *, is_embedding: bool, is_head: bool = False) -> str:
    """Why a rule leaves out a layer that could be adapted."""
    targets = picks.config.targets
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    if everything and is_embedding:
        return "an embedding, which all-linear leaves out"
    if everything and (is_head or path.rpartition(".")[2] == "lm_head"):
        return "the output head, which all-linear leaves out"
    layers = picks.config.layers_to_transform
    if layers is not None and picks.in_any_layer(path, is_embedding=is_embedding):
        return "outside layers_to_transform"
    return UNNAMED
