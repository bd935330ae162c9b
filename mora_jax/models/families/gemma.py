"""Gemma 1 to 3 (text): scaled embeddings; from 2 on norms before and after, local layers between global ones."""

from typing import Any

from mora_jax.models.config import DecoderConfig, TensorNames
from mora_jax.models.families.fields import (
    ATTENTION_BIAS,
    Family,
    Fields,
    layer_types,
    local_ropes,
    read_activation,
    read_biases,
    read_decoder,
    sliding_but_every,
    windows_of,
)

NAMES = TensorNames(
    post_attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)


def read_gemma(fields: Fields) -> DecoderConfig:
    """Gemma 1: scaled embeddings, norm weights that count from 1, a tied head."""
    activation = read_activation(fields, "hidden_act", "gelu_pytorch_tanh")  # its first files say "gelu" and mean tanh
    return _read_scaled(fields, activation="gelu_tanh" if activation == "gelu" else activation)


def read_gemma2(fields: Fields) -> DecoderConfig:
    """Gemma 2: as Gemma 1, with norms before and after, soft caps, a window in every other layer."""
    every = ["full_attention" if i % 2 else "sliding_attention" for i in range(fields.layers())]
    return _read_sliding(fields, layer_types(fields, every), softcaps=(50.0, 30.0))


def read_gemma3(fields: Fields) -> DecoderConfig:
    """Gemma 3: as Gemma 2 without caps, with norms on q and k, a window and other angles in five of six layers."""
    pattern = fields.integer("sliding_window_pattern", 6)
    types = layer_types(fields, sliding_but_every(pattern, fields.layers()))
    return _read_sliding(
        fields,
        types,
        (None, None),
        qk_norm="head",
        ropes=local_ropes(
            fields, fields.number("rope_theta", 1_000_000.0), fields.number("rope_local_base_freq", 10_000.0)
        ),
        layer_ropes=tuple(1 if kind == "sliding_attention" else 0 for kind in types),
    )


def _read_sliding(
    fields: Fields, types: list[str], softcaps: tuple[float | None, float | None], **family_fields: Any
) -> DecoderConfig:
    """Gemma 2 and 3: norms before and after, windows, a scale of scores of its own.

    Args:
        fields: the config.
        types: of the layers.
        softcaps: of the attention's scores and of the logits, where the config says nothing.
        **family_fields: as in `read_decoder`.
    """
    return _read_scaled(
        fields,
        names=NAMES,
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=fields.nullable(fields.number, "attn_logit_softcapping", softcaps[0]),
        final_softcap=fields.nullable(fields.number, "final_logit_softcapping", softcaps[1]),
        windows=windows_of(fields, types, fields.nullable(fields.integer, "sliding_window", 4096)),
        **family_fields,
    )


def _read_scaled(fields: Fields, **family_fields: Any) -> DecoderConfig:
    """All: norm weights count from 1, embeddings are scaled."""
    fields.only("use_bidirectional_attention", False)
    return read_decoder(
        fields,
        head_dim=256,
        norm_offset=1.0,
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        **read_biases(fields) | {"mlp_bias": False},
        **family_fields,
    )


FAMILIES = (
    Family(
        "GemmaForCausalLM",
        "gemma",
        read_gemma,
        "Gemma 1, CodeGemma",
        ATTENTION_BIAS,
        {"max_position_embeddings": 8192, "tie_word_embeddings": True},
    ),
    Family("Gemma2ForCausalLM", "gemma2", read_gemma2, "Gemma 2", ATTENTION_BIAS),
    Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        read_gemma3,
        "Gemma 3 (text)",
        ATTENTION_BIAS,
        # Files of models with images leave out much of their text_config.
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
        },
    ),
)
