"""Values of a HuggingFace `config.json`, with one clear line for each bad one."""

import json
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
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Family(NamedTuple):
    """A model family.

    Attributes:
        architecture: the name of its class in transformers.
        model_type: its short name there.
        read: the decoder that its `config.json` describes.
        bias_fields: those of its config that announce biases, each with the projections that get them.
    """

    architecture: str
    model_type: str
    read: Callable[["Fields"], DecoderConfig]
    bias_fields: Mapping[str, tuple[str, ...]] = MappingProxyType({})


class Fields:
    """A `config.json` as checked values by name. A null counts as absent, except in `nullable`."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        """Takes the parsed JSON object; `where` begins every error message."""
        self.values = values
        self.where = where

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is _MISSING:
            raise InputError(f"{self.where}: {name} is missing")
        return value

    def bad(self, name: str, wanted: str) -> InputError:
        """The error for a value that is not what it should be."""
        return InputError(f"{self.where}: {name} must be {wanted}, found {reprlib.repr(self.values.get(name))}")

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
        return None if self.values.get(name, default) is None else read(name, default)


def read_decoder(fields: Fields, family: str, *, head_dim: int | None = None, **family_fields: Any) -> DecoderConfig:
    """A `DecoderConfig` as a plain Llama-like family has it, with a family's own fields laid over.

    Args:
        fields: the config.
        family: the family's `model_type`.
        head_dim: its size where the config states none; None for hidden_size / num_attention_heads.
        **family_fields: fields of `DecoderConfig`.
    """
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    hidden = fields.integer("hidden_size")
    if heads % kv_heads:
        raise InputError(
            f"{fields.where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
        )
    if head_dim is None and fields.values.get("head_dim") is None and hidden % heads:
        raise InputError(f"{fields.where}: hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})")
    head_dim = fields.integer("head_dim", head_dim or hidden // heads)
    if head_dim % 2:
        raise InputError(f"{fields.where}: head_dim ({head_dim}) must be even for rotary embeddings")
    layers = fields.layers()
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": fields.integer("max_position_embeddings", 2048),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "initializer_range": fields.number("initializer_range", 0.02),
        "attention_scale": head_dim**-0.5,
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
        values["ropes"] = (_one_rope(fields),)
    return DecoderConfig(**values)


def read_activation(fields: Fields, name: str = "hidden_act", default: str = "silu") -> str:
    """The MLP's activation."""
    if name in fields.values and fields.values[name] is None:
        raise fields.bad(name, f"one of {', '.join(sorted(_ACTIVATIONS))}")
    value = fields.text(name, default)
    if value not in _ACTIVATIONS:
        raise InputError(
            f"{fields.where}: {name} {reprlib.repr(value)} is not supported; supported are"
            f" {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[value]


def layer_types(fields: Fields, default: list[str]) -> list[str]:
    """For each layer "full_attention" or "sliding_attention", from `layer_types` or a family's rule."""
    types = fields.values.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or len(types) != len(default):
        raise fields.bad("layer_types", f"a list with one entry for each of the {len(default)} layers")
    unknown = sorted({reprlib.repr(kind) for kind in types if kind not in ("full_attention", "sliding_attention")})
    if unknown:
        raise InputError(
            f"{fields.where}: layer_types has {', '.join(unknown[:3])}; supported are full_attention and"
            " sliding_attention"
        )
    return types


def windows_of(fields: Fields, types: list[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer: `window` where it slides."""
    if window is None and "sliding_attention" in types:
        raise InputError(f"{fields.where}: layer_types has sliding_attention but there is no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _one_rope(fields: Fields) -> Rope:
    """The rotary table of a family without local layers, from `rope_scaling` or the newer `rope_parameters`."""
    table = fields.table("rope_scaling") or fields.table("rope_parameters") or Fields({}, fields.where)
    nested = [name for name, value in table.values.items() if isinstance(value, dict)]
    if nested:
        raise InputError(f"{table.where}: settings per layer type ({', '.join(nested)}) do not exist in this family")
    return read_rope(table, fields, fields.number("rope_theta", 10_000.0))


def read_rope(table: Fields, fields: Fields, theta: float) -> Rope:
    """A rotary table from its settings.

    Args:
        table: the rotary settings.
        fields: the whole config.
        theta: the base wavelength where the settings state none.

    Raises:
        InputError: for a kind that is not supported, or a setting that is missing or bad.
    """
    kind = table.text("rope_type", table.text("type", "default"))
    theta = table.number("rope_theta", theta)
    if kind not in KINDS:
        raise InputError(f"{table.where}: rope type {kind!r} is not supported; supported are {', '.join(KINDS)}")
    for settings in (table, fields):
        if settings.number("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(f"{settings.where}: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=table.number("factor"))
    original = table.integer("original_max_position_embeddings", fields.integer("max_position_embeddings"))
    original = fields.integer("original_max_position_embeddings", original)
    shared: dict[str, Any] = {"theta": theta, "kind": kind, "original_positions": original}
    if kind == "llama3":
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        if high <= low:
            raise table.bad("high_freq_factor", f"above low_freq_factor ({low})")
        return Rope(**shared, factor=table.number("factor"), low_freq_factor=low, high_freq_factor=high)
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
