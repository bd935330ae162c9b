"""Mixtral, Qwen3-MoE and GPT-OSS, whose layers have experts."""

from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig, ExpertsConfig
from mora_jax.models.experts import Experts, balance
from mora_jax.models.families.fields import (
    ATTENTION_BIAS,
    Family,
    Fields,
    layer_types,
    read_decoder,
    sliding_but_every,
    windows_of,
)

_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def read_experts(
    fields: Fields,
    count: str,
    width: str,
    *,
    per_token: str = "num_experts_per_tok",
    layer: Any = Experts,
    **options: Any,
) -> ExpertsConfig:
    """The experts of a config; `count`, `width` and `per_token` are its names of how many there are, of their inner
    size, and of how many a token has."""
    experts, chosen = fields.integer(count), fields.integer(per_token)
    if chosen > experts:
        raise InputError(f"{fields.where}: {per_token} ({chosen}) is more than {count} ({experts})")
    return ExpertsConfig(layer, balance, experts, chosen, fields.integer(width), **options)


def read_mixtral(fields: Fields) -> DecoderConfig:
    """Mixtral: experts, whose weights for a token add up to 1; a sliding window in every layer, or none."""
    experts = read_experts(
        fields,
        "num_local_experts",
        "intermediate_size",
        router="block_sparse_moe.gate",
        path="block_sparse_moe.experts.{expert}.{name}",
        names=("w1", "w3", "w2"),
    )
    return read_decoder(fields, windows=fields.same_window(None), experts=experts)


def read_qwen3_moe(fields: Fields) -> DecoderConfig:
    """Qwen3-MoE: experts; norms on each head of q and k."""
    window = fields.window(4096) if fields.flag("use_sliding_window", False) else None
    step, dense = fields.integer("decoder_sparse_step", 1), fields.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise fields.bad("mlp_only_layers", "a list of layer numbers")
    differing = tuple((("experts", None),) if i in dense or (i + 1) % step else () for i in range(fields.layers()))
    count = "num_experts" if "num_experts" in fields.values else "num_local_experts"  # transformers renames it
    normalize = fields.flag("norm_topk_prob", False)
    experts = read_experts(fields, count, "moe_intermediate_size", normalize=normalize)
    return read_decoder(
        fields,
        qk_norm="head",
        windows=(window,) * fields.layers(),
        experts=experts,
        differing=differing if any(differing) else (),
    )


def read_gpt_oss(fields: Fields) -> DecoderConfig:
    """GPT-OSS: experts with biases and a clamped gate; attention sinks; every other layer local; yarn."""
    if not any(fields.table(name) for name in ("rope_scaling", "rope_parameters")):
        fields = fields.replaced("rope_scaling", _YARN)
    experts = read_experts(
        fields,
        "num_local_experts",
        "intermediate_size",
        router_bias=True,
        bias=True,
        limit=fields.number("swiglu_limit", 7.0),
        sigmoid_scale=fields.number("swiglu_alpha", 1.702),
        router="mlp.router",
        fused="interleaved",
    )
    return read_decoder(
        fields,
        head_dim=64,
        attention_sinks=True,
        windows=windows_of(fields, layer_types(fields, sliding_but_every(2, fields.layers())), fields.window(128)),
        experts=experts,
    )


FAMILIES = (
    Family(
        "MixtralForCausalLM", "mixtral", read_mixtral, "Mixtral", defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6}
    ),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", read_qwen3_moe, "Qwen3-MoE", ATTENTION_BIAS),
    Family(
        "GptOssForCausalLM",
        "gpt_oss",
        read_gpt_oss,
        "GPT-OSS",
        ATTENTION_BIAS,
        {"rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "attention_bias": True},
        read_dense=("mxfp4",),
    ),
)
