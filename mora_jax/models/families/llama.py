"""Llama 2 and 3.x, SmolLM2, TinyLlama."""

from mora_jax.models.config import DecoderConfig
from mora_jax.models.families.common import read_common
from mora_jax.models.families.hf_config import Fields

ARCHITECTURE = "LlamaForCausalLM"
MODEL_TYPE = "llama"
BIAS_FIELDS = {"attention_bias": ("qkv", "out"), "mlp_bias": ("gate_up", "down")}


def read(fields: Fields) -> DecoderConfig:
    """The decoder that a Llama `config.json` describes."""
    attention_bias = fields.flag("attention_bias", False)
    return read_common(
        fields,
        MODEL_TYPE,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
