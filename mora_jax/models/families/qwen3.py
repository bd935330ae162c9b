"""Qwen3 (dense): norms on the heads of q and k, a head size of its own."""

from mora_jax.models.config import DecoderConfig
from mora_jax.models.families.common import read_common
from mora_jax.models.families.hf_config import Fields
from mora_jax.models.families.qwen2 import upper_windows

ARCHITECTURE = "Qwen3ForCausalLM"
MODEL_TYPE = "qwen3"
BIAS_FIELDS = {"attention_bias": ("qkv", "out")}


def read(fields: Fields) -> DecoderConfig:
    """The decoder that a Qwen3 `config.json` describes."""
    bias = fields.flag("attention_bias", False)
    return read_common(
        fields,
        MODEL_TYPE,
        head_dim=128,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=upper_windows(fields),
    )
