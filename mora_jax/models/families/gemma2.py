"""Gemma 2: norms before and after, soft caps, every other layer local."""

from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig, TensorNames
from mora_jax.models.families.common import layer_types, read_activation, read_common, windows_of
from mora_jax.models.families.hf_config import Fields

ARCHITECTURE = "Gemma2ForCausalLM"
MODEL_TYPE = "gemma2"
BIAS_FIELDS = {"attention_bias": ("qkv", "out")}

NAMES = TensorNames(
    post_attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)


def read(fields: Fields) -> DecoderConfig:
    """The decoder that a Gemma 2 `config.json` describes."""
    layers = fields.layers()
    types = layer_types(fields, ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)])
    return read_gemma(
        fields,
        MODEL_TYPE,
        types,
        attention_softcap=fields.nullable_number("attn_logit_softcapping", 50.0),
        final_softcap=fields.nullable_number("final_logit_softcapping", 30.0),
    )


def read_gemma(fields: Fields, family: str, types: list[str], **family_fields: Any) -> DecoderConfig:
    """What Gemma 2 and 3 share: norm weights count from 1, embeddings are scaled, the head is tied."""
    if fields.flag("use_bidirectional_attention", False):
        raise InputError(f"{fields.where}: use_bidirectional_attention is not supported")
    bias = fields.flag("attention_bias", False)
    return read_common(
        fields,
        family,
        head_dim=256,
        names=NAMES,
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        norm_offset=1.0,
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        windows=windows_of(fields, types, fields.nullable_integer("sliding_window", 4096)),
        qkv_bias=bias,
        out_bias=bias,
        **family_fields,
    )
