"""What a Linen model was given, and what it was not."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn, traverse_util

from mora_jax.adapters.matrices import Matrix
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.adapters.report import VECTORS, AttachReport, Match, grouped, report_on, why_left
from mora_jax.adapters.targets import Picker, named
from mora_jax.linen.matrices import KINDS, REASONS, array_path, layer_number
from mora_jax.linen.registered import form_of
from mora_jax.linen.update import COLLECTION, title

Path = tuple[str, ...]


@dataclass
class _Seen:
    """A module that ran.

    Attributes:
        kind: its class.
        lifts: behind how many components of its path `nn.scan` and `nn.vmap` stand, one entry each.
        matrix: the one that an adapter goes on, or could.
        config: of its adapter; None where it has none.
        why: why it can't have one.
    """

    kind: type[nn.Module]
    lifts: tuple[int, ...]
    matrix: Matrix | None = None
    config: Any = None
    why: str = ""


class LinenReport:
    """What `adapted` did with the models that ran inside it so far; prints as a table, as that of `mora_jax.attach`.

    A function that `jax.jit` compiled in an earlier context of the same configuration doesn't run Python, so this
    report doesn't see its layers.
    """

    def __init__(self, config: Any):
        self.config = config
        self._seen: dict[Path, _Seen] = {}
        self._params: dict[Path, tuple[int, ...]] = {}
        self._adapters: dict[Path, int] = {}
        self._finished = False

    def meet(self, module: nn.Module) -> None:
        """Notes a module that runs."""
        if module.path not in self._seen or not self._seen[module.path].matrix:
            self.note(module.path, module)

    def note(
        self, path: Path, module: nn.Module, matrix: Matrix | None = None, config: Any = None, why: str = ""
    ) -> None:
        """Notes a layer: with an adapter of this configuration, without one, or `why` it can't have one."""
        before = self.matrix_at(path)
        if config and matrix and before and before.shape == matrix.shape and before.contracted != matrix.contracted:
            raise ValueError(f"{title(path)} contracts other axes of its kernel from call to call: leave it out")
        self._seen[path] = _Seen(type(module), _lifts(module), matrix, config, why)

    def finish(self, module: nn.Module) -> None:
        """Takes the sizes of all parameters, when a model's outermost call has ended."""
        assert module.scope is not None, "a module that has just run"
        self._finished = True
        variables = module.scope.root.variables()
        for path, value in traverse_util.flatten_dict(variables.get("params", {})).items():
            self._params[path] = jax.tree.leaves(value)[0].shape
        for path, value in traverse_util.flatten_dict(variables.get(COLLECTION, {})).items():
            self._adapters[path] = jax.tree.leaves(value)[0].size

    def matrix_at(self, path: Path) -> Matrix | None:
        """How the layer at a module path is a matrix; None where none ran there."""
        seen = self._seen.get(path)
        return None if seen is None else seen.matrix

    def lifts_at(self, path: Path) -> tuple[int, ...]:
        """Behind how many components of a path the axes of `nn.scan` and `nn.vmap` belong.

        One that shares its variables, as nn.RNN does, has an entry and no axis: then the first entries are taken.
        """
        return self._seen[path].lifts if path in self._seen else ()

    def _stack(self, path: Path) -> tuple[int, ...]:
        """The axes in front of an adapted layer's array."""
        seen = self._seen[path]
        assert seen.matrix is not None, "an adapted layer"
        shape = self._params.get(array_path(path, seen.matrix.array), seen.matrix.shape)
        return shape[: len(shape) - len(seen.matrix.shape)]

    def check(self, picks: Picker) -> None:
        """Refuses targets that matched nothing, by the rule of `mora_jax.attach`.

        Raises:
            ValueError: as `Picker.check`; or layers of one stack were to be told apart.
        """
        if not self._finished:
            return  # nothing was traced to its end: what ran was compiled before, or failed
        could = [".".join(path) for path, seen in self._seen.items() if seen.matrix is not None]
        others = {".".join(path): seen for path, seen in self._seen.items() if seen.matrix is None}
        targets = self.config.targets
        for name in (targets,) if isinstance(targets, str) else targets:
            other = next((path for path in others if named(path, name)), None)
            if other is not None and not any(named(path, name) for path in could):
                kind = others[other].kind.__name__
                raise ValueError(f"targets name {other} ({kind}), which can't be adapted: {_reason(others[other])}")
        adapted = [path for path, seen in self._seen.items() if seen.config is not None]
        picks.check(could, [path or "(the model itself)" for path in could], any_picked=bool(adapted))
        self.table.warn(stacklevel=5)  # from the `with` statement, above contextlib's and this context's own frames
        if self.config.layers_to_transform is not None:
            stacked = next((path for path in adapted if self._stack(path)), None)
            if stacked is not None:
                raise ValueError(
                    f"{'.'.join(stacked)} is a stack of {math.prod(self._stack(stacked))} layers under nn.scan or "
                    "nn.vmap, among which layers_to_transform can't choose"
                )

    @property
    def table(self) -> AttachReport:
        """The report as that of `mora_jax.attach`."""
        adapted = []
        for path, seen in self._seen.items():
            if seen.config is not None and seen.matrix is not None:
                trained = sum(size for name, size in self._adapters.items() if name[:-1] == path)
                line = Match(title(path), math.prod(self._stack(path)), *seen.matrix.sizes, trained)
                adapted.append((line, seen.config))
        method, left = adapter_class(self.config).method, grouped(self._left(), Picker(self.config, layer_number))
        return report_on(method, adapted, left, sum(map(math.prod, self._params.values())))

    def _left(self) -> Iterator[tuple[str, str, int, str]]:
        """Path, class, size and reason of the matrices without an adapter."""
        picks, unknown = Picker(self.config, layer_number), dict[Path, int]()
        for path, seen in self._seen.items():
            if seen.matrix is not None and seen.config is None:
                size = math.prod((*self._stack(path), *seen.matrix.sizes))
                why = why_left(picks, ".".join(path), kind=seen.matrix.kind)
                yield title(path), "", size, why
        for (*above, name), shape in self._params.items():
            path = (*above, name) if (*above, name) in self._seen else tuple(above)
            layer = self._seen.get(path)
            lifts = 0 if layer is None else len(layer.lifts)
            if name not in VECTORS and len(shape) - lifts > 1 and (layer is None or layer.matrix is None):
                unknown[path] = unknown.get(path, 0) + math.prod(shape)
        for path, size in unknown.items():
            layer = self._seen.get(path)
            yield title(path), "" if layer is None else layer.kind.__name__, size, _reason(layer)

    def __str__(self) -> str:
        if not self._seen:
            return "no layer was traced in this context: what ran, if anything, was compiled before"
        return str(self.table)


def _reason(seen: _Seen | None) -> str:
    if seen is None:
        return "no module that ran holds it"
    if seen.why:
        return seen.why
    if issubclass(seen.kind, KINDS) or form_of(seen.kind) is not None:
        return "its class computes its product in a way of its own"
    return REASONS.get(seen.kind, "a class without adapters, see mora_jax.linen.register_layer")


def _lifts(module: nn.Module) -> tuple[int, ...]:
    """Where in the path the transformations with an axis stand, by Flax's names for scopes such as `scan(layers)`."""
    assert module.scope is not None, "a module that runs"
    names = module.scope.debug_path
    above = len(names) - len(module.path)  # a transformation of the model itself has a name and no component
    return tuple(
        index + 1 - above for index, name in enumerate(names) for _ in range(name.count("scan(") + name.count("vmap("))
    )
