"""Llama and what differs from it in a few fields: biases, windows, norms on q and k, still layers, factors."""

from typing import Any

from mora_jax.models.config import DecoderConfig, TensorNames
from mora_jax.models.families.fields import (
    ATTENTION_BIAS,
    BIASES,
    Family,
    Fields,
    layer_types,
    one_rope,
    read_decoder,
    windows_of,
)
from mora_jax.models.rope import Rope


def read_mistral(fields: Fields) -> DecoderConfig:
    """Mistral: a sliding window in every layer, or none."""
    return read_decoder(fields, windows=fields.same_window(4096))


def read_ministral(fields: Fields) -> DecoderConfig:
    """Ministral 8B: a sliding window in the layers that the config names."""
    window = fields.window(4096)
    kind = "full_attention" if window is None else "sliding_attention"
    return read_decoder(fields, windows=windows_of(fields, layer_types(fields, [kind] * fields.layers()), window))


def read_ministral3(fields: Fields) -> DecoderConfig:
    """Ministral 3: yarn, and queries that grow with their position."""
    table = fields.table("rope_parameters")
    beta = None if table is None else table.nullable(table.number, "llama_4_scaling_beta", None)
    growth = None if table is None or beta is None else (beta, table.integer("original_max_position_embeddings"))
    return read_decoder(fields, head_dim=128, query_growth=growth, windows=fields.same_window(None))


def read_qwen2(fields: Fields) -> DecoderConfig:
    """Qwen2: biases of q, k and v; a sliding window in upper layers, or none."""
    return read_decoder(fields, qkv_bias=True, windows=_upper_windows(fields))


def read_qwen3(fields: Fields) -> DecoderConfig:
    """Qwen3: norms on each head of q and k; a sliding window in upper layers, or none."""
    return read_decoder(fields, head_dim=128, qk_norm="head", windows=_upper_windows(fields))


def _upper_windows(fields: Fields) -> tuple[int | None, ...]:
    """Windows from `use_sliding_window`: layers from `max_window_layers` on slide."""
    window = fields.window(4096) if fields.flag("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 28, least=0)
    sliding = [window is not None and layer >= first for layer in range(fields.layers())]
    types = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    return windows_of(fields, layer_types(fields, types), window)


def read_smollm3(fields: Fields) -> DecoderConfig:
    """SmolLM3: every fourth layer has no rotary positions, and may have a window."""
    layers = fields.layers()
    every = fields.integer("no_rope_layer_interval", 4)
    rotates = fields.value("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(rotates, list) or len(rotates) < layers or not set(rotates) <= {0, 1}:
        raise fields.bad("no_rope_layers", f"a list of 0 and 1 with one entry for each of the {layers} layers")
    window = fields.window(None) if fields.flag("use_sliding_window", False) else None
    slides = [window is not None and not on for on in rotates[:layers]]
    types = layer_types(fields, ["sliding_attention" if on else "full_attention" for on in slides])
    return read_decoder(fields, windows=windows_of(fields, types, window), **rotating(fields, rotates[:layers]))


def rotating(fields: Fields, rotates: list[Any]) -> dict[str, Any]:
    """The fields of a decoder some of whose layers don't rotate."""
    layer_ropes = tuple(0 if on else 1 for on in rotates)
    ropes = one_rope(fields), Rope(1.0, "none")
    return {"ropes": ropes[: 1 + max(layer_ropes)], "layer_ropes": layer_ropes}


def read_granite(fields: Fields) -> DecoderConfig:
    """Granite: factors on embeddings, scores, residuals and logits."""
    return read_decoder(
        fields,
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1 / fields.number("logits_scaling", 1.0),
    )


def read_seed_oss(fields: Fields) -> DecoderConfig:
    """Seed-OSS: heads of 128; biases of q, k and v, and a field for that of o."""
    return read_decoder(fields, head_dim=128)


def read_arcee(fields: Fields) -> DecoderConfig:
    """Arcee AFM: an MLP without gate, relu²."""
    return read_decoder(fields, gated=False, names=TensorNames(gate_up=("mlp.up_proj",)))


def read_helium(fields: Fields) -> DecoderConfig:
    """Helium: rotary pairs are neighbours."""
    return read_decoder(fields, head_dim=128, rotary_neighbours=True)


#: What Ministral 3 means by no rotary settings.
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

FAMILIES = (
    Family("LlamaForCausalLM", "llama", read_decoder, "Llama 2 and 3, SmolLM2, TinyLlama", BIASES),
    Family("MistralForCausalLM", "mistral", read_mistral, "Mistral 7B, Nemo, Small"),
    Family(
        "MinistralForCausalLM",
        "ministral",
        read_ministral,
        "Ministral 8B",
        defaults={"max_position_embeddings": 131072},
    ),
    Family(
        "Ministral3ForCausalLM",
        "ministral3",
        read_ministral3,
        "Ministral 3",
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "rope_parameters": _MINISTRAL3_ROPE},
    ),
    Family("Qwen2ForCausalLM", "qwen2", read_qwen2, "Qwen2, Qwen2.5"),
    Family("Qwen3ForCausalLM", "qwen3", read_qwen3, "Qwen3 (dense)", ATTENTION_BIAS),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        read_smollm3,
        "SmolLM3",
        BIASES,
        {"rope_theta": 2e6, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    ),
    Family("GraniteForCausalLM", "granite", read_granite, "Granite 3.x (dense)", BIASES),
    Family(
        "SeedOssForCausalLM",
        "seed_oss",
        read_seed_oss,
        "Seed-OSS",
        {"attention_bias": ("qkv",), "attention_out_bias": ("out",), "mlp_bias": ("gate_up", "down")},
        {"attention_bias": True, "max_position_embeddings": 524288},
    ),
    Family(
        "ArceeForCausalLM",
        "arcee",
        read_arcee,
        "Arcee AFM",
        BIASES,
        {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    Family(
        "HeliumForCausalLM",
        "helium",
        read_helium,
        "Helium",
        {"attention_bias": ("qkv",), "mlp_bias": ("gate_up", "down")},
        {"rms_norm_eps": 1e-8, "rope_theta": 1e5, "max_position_embeddings": 4096},
    ),
)
