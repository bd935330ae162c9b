"""The section `adapter` of the configuration: the settings of all methods, which their configurations declare, and its
way to a method's own configuration and back."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from mora_jax.adapters.config.common import MethodConfig, Pattern, Targets
from mora_jax.adapters.methods.registry import CONFIGS
from mora_jax.errors import InputError
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
        defaults = {method: config.field(name).default for method, config in configs.items()}
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


def adapter_config(section: AdapterConfig, steps: int | None = None) -> Any:
    """The section as the method's own configuration.

    Args:
        section: the section `adapter`.
        steps: of the run, for methods with a schedule; None where the schedule is no matter.

    Raises:
        InputError: a value that the method refuses.
    """
    config = section.config_class
    said = {name: getattr(section, name) for name in config.settings()}
    values: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        if values.get(name):
            values[name] = tuple(_pair(text, name, kind) for text in values[name])
    try:
        return config.for_run(values, steps)
    except ValueError as error:
        raise InputError(f"config: adapter: {error}") from None


def adapter_settings(config: Any) -> dict[str, Any]:
    """The other way: a method's own configuration as values of the section `adapter`, by key.

    Raises:
        InputError: it is no configuration of a method, or has a setting that the section has no key for.
    """
    method = next((name for name, found in CONFIGS.items() if found is type(config)), None)
    if method is None:
        raise InputError(
            f"the adapter's configuration should be one of a method, such as LoRAConfig(rank=8), and is "
            f"{type(config).__name__}"
        )
    known = config.settings()
    values: dict[str, Any] = {"method": method}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in known:
            if field.name.endswith("_pattern"):
                value = tuple(f"{pattern}={number:g}" for pattern, number in value) or None
            elif value == ():
                value = None
            values[field.name] = value
        elif field.init and value != field.default and "by_run" not in field.metadata:
            raise InputError(f"adapter: {type(config).__name__}({field.name}={value!r}) can't be set for a run")
    return values


def _pair(text: str, name: str, kind: type) -> tuple[str, Any]:
    """One entry of a pattern: a regular expression may hold "=", its value can't."""
    pattern, _, value = text.rpartition("=")
    try:
        return pattern, kind(value)
    except ValueError:
        example = r"q_proj=16" if kind is int else r"q_proj=32.0"
        raise InputError(f'adapter.{name}: {text!r} should read "REGEX=NUMBER", such as "{example}"') from None
