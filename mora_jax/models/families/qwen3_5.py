"""Qwen3.5 (dense): layers with linear attention between layers with attention, whose result has a gate."""

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig, DeltaConfig
from mora_jax.models.delta import GatedDelta
from mora_jax.models.families.fields import ATTENTION_BIAS, Family, Fields, layer_types, read_decoder


def read_qwen3_5(fields: Fields) -> DecoderConfig:
    """Qwen3.5: the gated delta rule in three of four layers; a quarter of each head rotates."""
    fields.only("attn_output_gate", True)
    every, layers = fields.integer("full_attention_interval", 4), fields.layers()
    kinds = ("full_attention", "linear_attention")
    types = layer_types(fields, [kinds[bool((i + 1) % every)] for i in range(layers)], kinds)
    delta = DeltaConfig(
        GatedDelta,
        key_heads=fields.integer("linear_num_key_heads", 16),
        value_heads=fields.integer("linear_num_value_heads", 32),
        key_dim=fields.integer("linear_key_head_dim", 128),
        value_dim=fields.integer("linear_value_head_dim", 128),
        window=fields.integer("linear_conv_kernel_dim", 4),
    )
    if delta.value_heads % delta.key_heads:
        raise InputError(
            f"{fields.where}: linear_num_value_heads ({delta.value_heads}) is not a multiple of linear_num_key_heads"
            f" ({delta.key_heads})"
        )
    fields.only("hidden_act", "silu")
    return read_decoder(
        fields,
        head_dim=256,
        rotary_factor=0.25,
        qk_norm="head",
        norm_offset=1.0,
        attention_gate=True,
        differing=tuple((("delta", delta),) if kind == "linear_attention" else () for kind in types),
    )


FAMILIES = (
    Family(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        read_qwen3_5,
        "Qwen3.5 (dense, text)",
        ATTENTION_BIAS,
        # Files of models with images leave out much of their text_config.
        {
            "vocab_size": 248320,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
        },
    ),
)
