"""Mistral, whose layers all have the same sliding window (or none)."""

from mora_jax.models.config import DecoderConfig
from mora_jax.models.families.common import read_common
from mora_jax.models.families.hf_config import Fields

ARCHITECTURE = "MistralForCausalLM"
MODEL_TYPE = "mistral"
BIAS_FIELDS: dict[str, tuple[str, ...]] = {}


def read(fields: Fields) -> DecoderConfig:
    """The decoder that a Mistral `config.json` describes."""
    window = fields.nullable_integer("sliding_window", 4096)
    return read_common(fields, MODEL_TYPE, windows=(window,) * fields.layers())
