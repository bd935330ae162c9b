"""Gemma 2 and 3 (text): norms before and after, local layers between global ones, scaled embeddings."""

from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig, TensorNames
from mora_jax.models.families.fields import (
    Family,
    Fields,
    layer_types,
    read_activation,
    read_decoder,
    read_rope,
    windows_of,
)
from mora_jax.models.rope import Rope

NAMES = TensorNames(
    post_attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)


def read_gemma2(fields: Fields) -> DecoderConfig:
    """Gemma 2: soft caps, every other layer local."""
    every = ["full_attention" if i % 2 else "sliding_attention" for i in range(fields.layers())]
    return _read_gemma(fields, "gemma2", layer_types(fields, every), softcaps=(50.0, 30.0))


def read_gemma3(fields: Fields) -> DecoderConfig:
    """Gemma 3: norms on q and k, five local layers for each global one, a rotary table for either."""
    pattern = fields.integer("sliding_window_pattern", 6)
    every = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(fields.layers())]
    types = layer_types(fields, every)
    ropes = tuple(1 if kind == "sliding_attention" else 0 for kind in types)
    return _read_gemma(
        fields, "gemma3_text", types, (None, None), qk_norm=True, ropes=_ropes(fields), layer_ropes=ropes
    )


def _read_gemma(
    fields: Fields, family: str, types: list[str], softcaps: tuple[float | None, float | None], **family_fields: Any
) -> DecoderConfig:
    """Both: norm weights count from 1, embeddings are scaled, the head is tied.

    Args:
        fields: the config.
        family: as in `read_decoder`.
        types: of the layers.
        softcaps: of the attention's scores and of the logits, where the config says nothing.
        **family_fields: as in `read_decoder`.
    """
    if fields.flag("use_bidirectional_attention", False):
        raise InputError(f"{fields.where}: use_bidirectional_attention is not supported")
    bias = fields.flag("attention_bias", False)
    return read_decoder(
        fields,
        family,
        head_dim=256,
        names=NAMES,
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        norm_offset=1.0,
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=fields.nullable(fields.number, "attn_logit_softcapping", softcaps[0]),
        final_softcap=fields.nullable(fields.number, "final_logit_softcapping", softcaps[1]),
        windows=windows_of(fields, types, fields.nullable(fields.integer, "sliding_window", 4096)),
        qkv_bias=bias,
        out_bias=bias,
        **family_fields,
    )


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """The global table, which may be scaled, and the local one."""
    nothing = Fields({}, fields.where)
    both = fields.table("rope_parameters") or nothing
    if both.values and not set(both.values) <= {"full_attention", "sliding_attention"}:
        raise InputError(f"{both.where} must have the entries full_attention and sliding_attention alone")
    full = both.table("full_attention") or nothing
    scaling = fields.table("rope_scaling")
    if scaling is not None:
        full = Fields(full.values | scaling.values, scaling.where)
    local = both.table("sliding_attention") or nothing
    return (
        read_rope(full, fields, fields.number("rope_theta", 1_000_000.0)),
        read_rope(local, fields, fields.number("rope_local_base_freq", 10_000.0)),
    )


FAMILIES = (
    Family("Gemma2ForCausalLM", "gemma2", read_gemma2, {"attention_bias": ("qkv", "out")}),
    Family("Gemma3ForCausalLM", "gemma3_text", read_gemma3, {"attention_bias": ("qkv", "out")}),
)
