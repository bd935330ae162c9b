"""Values of a HuggingFace `config.json`, with one clear line for each bad one."""

import dataclasses
import json
import math
import reprlib
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig
from mora_jax.models.rope import KINDS, Rope, yarn_attention_factor

_MISSING = object()
#: The largest whole number: that of int32, in which sizes and ids are stored.
_LARGEST = 2**31 - 1
#: The most layers; a description has some fields of every layer, before any tensor is looked at.
_MOST_LAYERS = 10_000
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


class Family(NamedTuple):
    """A model family.

    Attributes:
        architecture: the name of its class in transformers.
        model_type: its short name there.
        read: the decoder that its `config.json` describes.
        title: the models that it is known by.
        bias_fields: those of its config that announce biases, each with the projections that get them.
        defaults: what fields that are absent mean, where that isn't what they mean in Llama.
        aliases: its own names of Llama's fields.
        read_dense: quantised formats of its files that are read as the numbers that they stand for.
        beside: beginnings of the names of tensors that are no part of the text model, such as those of a vision tower.
        older: beginnings of names in older files, each with what it is now.
    """

    architecture: str
    model_type: str
    read: Callable[["Fields"], DecoderConfig]
    title: str
    bias_fields: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    defaults: Mapping[str, Any] = MappingProxyType({})
    aliases: Mapping[str, str] = MappingProxyType({})
    read_dense: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    older: Mapping[str, str] = MappingProxyType({})


ATTENTION_BIAS = MappingProxyType({"attention_bias": ("qkv", "out")})
BIASES = MappingProxyType({**ATTENTION_BIAS, "mlp_bias": ("gate_up", "down")})


class Fields:
    """A `config.json` as checked values by Llama's names. A null counts as absent, except in `nullable`."""

    def __init__(self, values: dict[str, Any], where: str = "config.json", family: Family | None = None):
        """Takes the parsed JSON object; `where` begins every error message. `family` has defaults and names."""
        self.values = values
        self.where = where
        self.family = family

    def name(self, name: str) -> str:
        """What the file calls a field."""
        return name if self.family is None else self.family.aliases.get(name, name)

    def value(self, name: str, default: Any = None) -> Any:
        """As the file has it, null too; where it has none, the family's default, or else `default`."""
        if self.family is not None:
            default = self.family.defaults.get(name, default)
        return self.values.get(self.name(name), default)

    def replaced(self, name: str, value: Any) -> "Fields":
        """With another value of a field."""
        return Fields(self.values | {name: value}, self.where, self.family)

    def _get(self, name: str, default: Any) -> Any:
        value = self.value(name, default)
        if value is None:
            value = default
        if value is _MISSING:
            raise InputError(f"{self.where}: {self.name(name)} is missing")
        return value

    def bad(self, name: str, wanted: str) -> InputError:
        """The error for a value that is not what it should be."""
        name = self.name(name)
        return InputError(f"{self.where}: {name} must be {wanted}, found {reprlib.repr(self.values.get(name))}")

    def only(self, name: str, supported: Any) -> None:
        """Refuses an option whose value is another than the one that is supported."""
        if (value := self.value(name, supported)) not in (supported, None):
            raise InputError(
                f"{self.where}: {self.name(name)} {reprlib.repr(value)} is not supported; supported is"
                f" {json.dumps(supported)}"
            )

    def integer(self, name: str, default: Any = _MISSING, *, least: int = 1, most: int = _LARGEST) -> int:
        """A whole number from `least`, which is 1 or 0, to `most`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.bad(name, "a positive whole number" if least else "a whole number, 0 or more")
        if value > most:
            raise self.bad(name, f"at most {most}")
        return value

    def layers(self) -> int:
        """The number of layers."""
        return self.integer("num_hidden_layers", most=_MOST_LAYERS)

    def window(self, default: int | None) -> int | None:
        """How many positions back a layer with a sliding window sees; None for no such layer."""
        return self.nullable(self.integer, "sliding_window", default)

    def same_window(self, default: int | None) -> tuple[int | None, ...]:
        """That window for every layer."""
        return (self.window(default),) * self.layers()

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A positive number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise self.bad(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return self._of_type(bool, name, default, "true or false")

    def text(self, name: str, default: Any = _MISSING) -> str:
        """A string."""
        return self._of_type(str, name, default, "a string")

    def table(self, name: str) -> "Fields | None":
        """A JSON object, or None when there is none."""
        value = self._of_type((dict, type(None)), name, None, "an object")
        return None if value is None else Fields(value, f"{self.where}: {name}")

    def _of_type(self, kind: Any, name: str, default: Any, wanted: str) -> Any:
        value = self._get(name, default)
        if not isinstance(value, kind):
            raise self.bad(name, wanted)
        return value

    def nullable(self, read: Callable[[str, Any], Any], name: str, default: Any) -> Any:
        """What `read`, `integer` or `number`, gives; None where the file, or else `default`, has none."""
        return None if self.value(name, default) is None else read(name, default)


def read_decoder(
    fields: Fields, *, head_dim: int | None = None, rotary_factor: float | None = None, **family_fields: Any
) -> DecoderConfig:
    """A `DecoderConfig` as a plain Llama-like family has it, with a family's own fields laid over.

    Args:
        fields: the config.
        head_dim: its size where the config states none; None for hidden_size / num_attention_heads.
        rotary_factor: the part of a head that rotates where the config states none; None where all of it has to.
        **family_fields: fields of `DecoderConfig`.
    """
    assert fields.family is not None
    heads = fields.integer("num_attention_heads")
    kv_heads = family_fields.get("num_kv_heads") or fields.integer("num_key_value_heads", heads)
    hidden = fields.integer("hidden_size")
    if heads % kv_heads:
        raise InputError(
            f"{fields.where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
        )
    if head_dim is None and fields.values.get("head_dim") is None and hidden % heads:
        raise InputError(f"{fields.where}: hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})")
    head_dim = fields.integer("head_dim", head_dim or hidden // heads)
    rotary_dim = head_dim
    if "rotary_dim" not in family_fields:
        if head_dim % 2:
            raise InputError(f"{fields.where}: head_dim ({head_dim}) must be even for rotary embeddings")
        rotary_dim = int(head_dim * _rotary_factor(fields, rotary_factor))
        if rotary_dim % 2:
            raise InputError(f"{fields.where}: an even number of each head has to rotate, not {rotary_dim}")
    layers = fields.layers()
    announced, usual = fields.family.bias_fields.items(), fields.family.defaults
    biased = {place for name, places in announced if fields.flag(name, usual.get(name, False)) for place in places}
    values: dict[str, Any] = {
        "family": fields.family.model_type,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": family_fields.get("intermediate_size") or fields.integer("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "max_positions": fields.integer("max_position_embeddings", 2048),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "initializer_range": fields.number("initializer_range", 0.02),
        "attention_scale": head_dim**-0.5,
        "qkv_bias": "qkv" in biased,
        "out_bias": "out" in biased,
        "mlp_bias": "gate_up" in biased,
        "windows": (None,) * layers,
        "layer_ropes": (0,) * layers,
        "source": json.dumps(fields.values),
    }
    values |= family_fields
    if "activation" not in values:
        values["activation"] = read_activation(fields)
    if "tie_embeddings" not in values:
        values["tie_embeddings"] = fields.flag("tie_word_embeddings", False)
    if "ropes" not in values:
        values["ropes"] = (one_rope(fields, rotary_dim),)
    return DecoderConfig(**values)


def read_activation(fields: Fields, name: str = "hidden_act", default: str = "silu") -> str:
    """The MLP's activation."""
    if fields.value(name, default) is None:
        raise fields.bad(name, f"one of {', '.join(sorted(_ACTIVATIONS))}")
    value = fields.text(name, default)
    if value not in _ACTIVATIONS:
        raise InputError(
            f"{fields.where}: {fields.name(name)} {reprlib.repr(value)} is not supported; supported are"
            f" {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[value]


def sliding_but_every(number: int, layers: int) -> list[str]:
    """For each layer "sliding_attention", but for each that is a multiple of `number`, counted from 1."""
    return ["sliding_attention" if (i + 1) % number else "full_attention" for i in range(layers)]


def layer_types(
    fields: Fields, default: list[str], kinds: tuple[str, str] = ("full_attention", "sliding_attention")
) -> list[str]:
    """For each layer one of `kinds`, from `layer_types` or a family's rule."""
    types = fields.values.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or len(types) != len(default):
        raise fields.bad("layer_types", f"a list with one entry for each of the {len(default)} layers")
    unknown = sorted({reprlib.repr(kind) for kind in types if kind not in kinds})
    if unknown:
        raise InputError(
            f"{fields.where}: layer_types has {', '.join(unknown[:3])}; supported are {' and '.join(kinds)}"
        )
    return types


def windows_of(fields: Fields, types: list[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer: `window` where it slides."""
    if window is None and "sliding_attention" in types:
        raise InputError(f"{fields.where}: layer_types has sliding_attention but sliding_window is null or turned off")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rotary_factor(fields: Fields, default: float | None) -> float:
    """The part of a head that rotates; refused where it is not 1 and the family knows none (`default` is None)."""
    tables = [table for name in ("rope_scaling", "rope_parameters") if (table := fields.table(name)) is not None]
    for settings in (*tables, fields):
        factor = settings.number("partial_rotary_factor", default or 1.0)
        if default is None and factor != 1:
            raise InputError(f"{settings.where}: partial_rotary_factor other than 1 is not supported")
        if factor > 1:
            raise settings.bad("partial_rotary_factor", "at most 1")
        if "partial_rotary_factor" in settings.values:
            return factor
    return default or 1.0


def one_rope(fields: Fields, rotary_dim: int = 0) -> Rope:
    """The rotary table of a family without local layers, from `rope_scaling` or the newer `rope_parameters`."""
    table = fields.table("rope_scaling") or fields.table("rope_parameters") or Fields({}, fields.where)
    nested = [name for name, value in table.values.items() if isinstance(value, dict)]
    if nested:
        raise InputError(f"{table.where}: settings per layer type ({', '.join(nested)}) do not exist in this family")
    return read_rope(table, fields, fields.number("rope_theta", 10_000.0), rotary_dim)


def local_ropes(fields: Fields, types: list[str], theta: float, local_theta: float, width: int = 0) -> dict[str, Any]:
    """The fields of a decoder with a table for layers that see everything, which may be scaled, and one for those that
    slide.

    Args:
        fields: the config.
        types: of the layers.
        theta, local_theta: their base wavelengths where `rope_parameters` states none.
        width: how many numbers of a head the first is of, where that isn't what the model has; else 0.
    """
    nothing = Fields({}, fields.where)
    both = fields.table("rope_parameters") or nothing
    if both.values and not set(both.values) <= {"full_attention", "sliding_attention"}:
        raise InputError(f"{both.where} must have the entries full_attention and sliding_attention alone")
    full = both.table("full_attention") or nothing
    scaling = fields.table("rope_scaling")
    if scaling is not None:
        full = Fields(full.values | scaling.values, scaling.where)
    local = both.table("sliding_attention") or nothing
    ropes = dataclasses.replace(read_rope(full, fields, theta), width=width), read_rope(local, fields, local_theta)
    return {"ropes": ropes, "layer_ropes": tuple(int(kind == "sliding_attention") for kind in types)}


def read_rope(table: Fields, fields: Fields, theta: float, rotary_dim: int = 0) -> Rope:
    """A rotary table from its settings.

    Args:
        table: the rotary settings.
        fields: the whole config.
        theta: the base wavelength where the settings state none.
        rotary_dim: how many numbers of a head rotate; 0 where longrope is not supported.

    Raises:
        InputError: for a kind that is not supported, or a setting that is missing or bad.
    """
    kind = table.text("rope_type", table.text("type", "default"))
    theta = table.number("rope_theta", theta)
    if kind not in KINDS or (kind == "longrope" and not rotary_dim):
        raise InputError(f"{table.where}: rope type {kind!r} is not supported; supported are {', '.join(KINDS)}")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=table.number("factor"))
    if kind == "proportional":
        turning = table.number("partial_rotary_factor", 1.0)
        return Rope(theta, kind, factor=table.number("factor", 1.0), turning=turning)
    original = table.integer("original_max_position_embeddings", fields.integer("max_position_embeddings"))
    original = fields.integer("original_max_position_embeddings", original)
    shared: dict[str, Any] = {"theta": theta, "kind": kind, "original_positions": original}
    if kind == "llama3":
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        if high <= low:
            raise table.bad("high_freq_factor", f"above low_freq_factor ({low})")
        return Rope(**shared, factor=table.number("factor"), low_freq_factor=low, high_freq_factor=high)
    if kind == "longrope":
        return _longrope(table, fields, rotary_dim, shared)
    if "factor" not in table.values:
        raise InputError(f"{table.where}: factor is missing")
    factor = table.number("factor", fields.integer("max_position_embeddings") / original)
    mscales = (table.nullable(table.number, name, None) for name in ("mscale", "mscale_all_dim"))
    return Rope(
        **shared,
        factor=factor,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        truncate=table.flag("truncate", True),
        attention_factor=table.number("attention_factor", yarn_attention_factor(factor, *mscales)),
    )


def _longrope(table: Fields, fields: Fields, rotary_dim: int, shared: dict[str, Any]) -> Rope:
    factors: dict[str, Any] = {}
    for name in ("short_factor", "long_factor"):
        values: Any = table.values.get(name)
        numbers = isinstance(values, list) and all(
            isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values
        )
        if not numbers or len(values) != rotary_dim // 2:
            raise table.bad(name, f"a list of {rotary_dim // 2} positive numbers")
        factors[f"{name}s"] = tuple(map(float, values))
    original = shared["original_positions"]
    factor = table.number("factor", fields.integer("max_position_embeddings", 2048) / original)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(**shared, **factors, attention_factor=table.number("attention_factor", grown))
