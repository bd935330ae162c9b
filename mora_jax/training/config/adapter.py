"""The section `adapter` of the configuration: the settings of all methods, which their configurations declare."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from mora_jax.adapters.config.common import MethodConfig, Pattern, Targets
from mora_jax.adapters.methods.registry import CONFIGS
from mora_jax.training.config.key import TEXTS, key

# What says which adapter a run starts from; methods know nothing of it.
START = frozenset({"path", "strict"})
# The keys of the section that each method reads. One that changes the base starts from no adapter.
METHOD_KEYS: Mapping[str, frozenset[str]] = {
    name: frozenset(config.settings()) | (frozenset() if config.changes_base else START)
    for name, config in CONFIGS.items()
}
_FEW = 3  # methods that a key's description names


def _declared() -> Iterator[tuple[str, Any, Any]]:
    """The keys of all methods, in order: name, type and field."""
    holders: dict[str, dict[str, type[MethodConfig]]] = {}
    for method, config in CONFIGS.items():
        for name in config.settings():
            holders.setdefault(name, {})[method] = config
    for name, configs in holders.items():
        first = next(iter(configs.values()))
        annotation = typing.get_type_hints(first)[name]
        defaults = {method: _default(config, name) for method, config in configs.items()}
        metadata = first.field(name).metadata
        own = len(set(defaults.values())) > 1
        default = None if own or defaults[next(iter(configs))] == () or "unset" in metadata else defaults.popitem()[1]
        kind = _type(annotation)
        described = next((words for config in configs.values() if (words := config.described(name))), "")
        doc = _sentence(described, list(configs), name)
        if own:
            doc = f"{doc[:-1]}; none: the method's own, {_listed(defaults)}."
        elif "unset" in metadata:
            doc = f"{doc[:-1]}; none: {metadata['unset']}."
        choices = metadata.get("run_choices", metadata.get("choices")) if kind is str else None
        limits = first.limits(name)
        bounds = limits.bounds if limits is not None else {}
        yield name, kind | None if default is None else kind, key(default, doc, choices=choices, **bounds)


def _default(config: type[MethodConfig], name: str) -> Any:
    return config.field(name).default


def _type(annotation: Any) -> Any:
    """The type of a key for a setting of this type."""
    if annotation == Pattern:
        return TEXTS
    if isinstance(annotation, types.UnionType) and annotation != Targets:
        return next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    return annotation


def _sentence(described: str, methods: list[str], name: str) -> str:
    """A setting's description as one sentence, with the methods that have it where they are few."""
    words = re.sub(r"[,;]? \(?see `mora_jax[\w.]+`\)?", "", described).replace("`", "").rstrip(".")
    words = words if len(methods) <= _FEW else words[:1].upper() + words[1:]
    shape = f"; given as REGEX={name.removesuffix('_pattern').upper()}" if name.endswith("_pattern") else ""
    return f"{', '.join(methods)}: {words}{shape}." if len(methods) <= _FEW else f"{words}{shape}."


def _listed(defaults: Mapping[str, Any]) -> str:
    """Defaults that differ: the commonest, then the others with their methods."""
    values = list(defaults.values())
    usual = max(values, key=values.count)
    others = [f"{method} {_shown(value)}" for method, value in defaults.items() if value != usual]
    return f"{_shown(usual)} ({', '.join(others)})"


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


# Typed as Any, for its attributes are known only here.
_Settings: Any = dataclasses.make_dataclass(
    "_Settings",
    [("method", str, key("lora", "The fine-tuning method.", choices=tuple(CONFIGS))), *_declared()],
    frozen=True,
)


@dataclasses.dataclass(frozen=True)
class AdapterConfig(_Settings):
    """Section `adapter`: what is trained. Its keys beside `method` and these are the settings of the methods."""

    path: str | None = key(None, "An adapter folder to start from; it says rank, targets and the rest.")
    strict: bool = key(
        False, "Whether an adapter.path that names another base model is refused; it is warned of otherwise."
    )

    @property
    def config_class(self) -> type[MethodConfig]:
        """The class of the method's own configuration, which says what is asked about the method."""
        return CONFIGS[self.method]
