"""What the families share: the fields that all their configs have, and layer types."""

import json
import reprlib
from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig
from mora_jax.models.families.hf_config import Fields
from mora_jax.models.families.rope import read_rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


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


def read_common(fields: Fields, family: str, *, head_dim: int | None = None, **family_fields: Any) -> DecoderConfig:
    """A `DecoderConfig` as a plain Llama-like family has it, with a family's own fields laid over.

    Args:
        fields: the config.
        family: the family's name.
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
        values["ropes"] = (read_rope(fields),)
    return DecoderConfig(**values)
