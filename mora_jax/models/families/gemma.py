"""Gemma 1 to 4 (text): scaled embeddings; from 2 on norms before and after, local layers between global ones."""

import dataclasses
from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig, ExpertsConfig, LayerInputConfig, TensorNames
from mora_jax.models.experts import ExpertsBeside
from mora_jax.models.families.experts import read_experts
from mora_jax.models.families.fields import (
    ATTENTION_BIAS,
    Family,
    Fields,
    layer_types,
    local_ropes,
    read_activation,
    read_decoder,
    sliding_but_every,
    windows_of,
)
from mora_jax.models.layer_inputs import LayerInput, LayerInputs

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
    return _read_sliding(fields, layer_types(fields, sliding_but_every(2, fields.layers())), softcaps=(50.0, 30.0))


def read_gemma3(fields: Fields) -> DecoderConfig:
    """Gemma 3: as Gemma 2 without caps, with norms on q and k, a window and other angles in five of six layers."""
    fields.only("attn_logit_softcapping", None)  # transformers has the field and no use for it
    pattern = fields.integer("sliding_window_pattern", 6)
    types = layer_types(fields, sliding_but_every(pattern, fields.layers()))
    return _read_sliding(
        fields,
        types,
        (None, None),
        qk_norm="head",
        **local_ropes(fields, types, fields.number("rope_theta", 1e6), fields.number("rope_local_base_freq", 1e4)),
    )


def read_gemma4(fields: Fields) -> DecoderConfig:
    """Gemma 4: global layers have other heads; layers have inputs of their own, upper ones share keys and values."""
    if fields.value("use_bidirectional_attention") != "vision":  # that of images' tokens alone
        fields.only("use_bidirectional_attention", None)
    layers = fields.layers()
    types = [*layer_types(fields, sliding_but_every(6, layers))[:-1], "full_attention"]
    unshared = layers - fields.integer("num_kv_shared_layers", 0, least=0)
    last = {kind: i for i, kind in enumerate(types[: max(unshared, 0)])}
    if unshared < layers and set(last) != set(types):
        raise InputError(
            f"{fields.where}: num_kv_shared_layers ({layers - unshared}) leaves no layer of each kind with keys and"
            " values"
        )
    heads = _head_sizes(fields, types)
    head_dim, kv_heads = fields.integer("head_dim", 256), fields.integer("num_key_value_heads")
    inner, doubled = fields.integer("intermediate_size"), fields.flag("use_double_wide_mlp", False)
    alike = fields.flag("attention_k_eq_v", False)
    differing, wide = [], 0
    for i, (kind, (size, count)) in enumerate(zip(types, heads, strict=True)):
        values: dict[str, Any] = {}
        if (size, count) != (head_dim, kv_heads):
            values |= {"head_dim": size, "rotary_dim": size, "num_kv_heads": count}
        if kind == "full_attention":
            wide = size
        if i >= unshared:
            values |= {"keys_of": last[kind]} | ({"intermediate_size": 2 * inner} if doubled else {})
        elif alike and kind == "full_attention":
            values["values_are_keys"] = True
        if unshared < layers and i == last[kind]:
            values["keys_used"] = i
        differing.append(tuple(values.items()))
    width = fields.integer("hidden_size_per_layer_input", 256, least=0)
    if width and fields.integer("vocab_size_per_layer_input", 262144) != fields.integer("vocab_size"):
        raise InputError(f"{fields.where}: vocab_size_per_layer_input other than vocab_size is not supported")
    if fields.table("rope_parameters") is None:
        fields = fields.replaced("rope_parameters", _GEMMA4_ROPES)
    experts = _read_experts(fields) if fields.flag("enable_moe_block", False) else None
    return read_decoder(
        fields,
        head_dim=256,
        names=NAMES if experts is None else dataclasses.replace(NAMES, mlp_norm=None),
        experts=experts,
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        attention_scale=1.0,
        final_softcap=fields.nullable(fields.number, "final_logit_softcapping", None),
        qk_norm="head",
        value_norm=True,
        layer_scale=True,
        layer_input=LayerInputConfig(LayerInputs, LayerInput, width) if width else None,
        windows=windows_of(fields, types, fields.integer("sliding_window", 512)),
        differing=tuple(differing) if any(differing) else (),
        **local_ropes(fields, types, 1e6, 1e4, 0 if wide == head_dim else wide),
    )


def _read_experts(fields: Fields) -> ExpertsConfig:
    return read_experts(
        fields,
        "num_experts",
        "moe_intermediate_size",
        per_token="top_k_experts",
        layer=ExpertsBeside,
        router="router.proj",
        router_scales=True,
        path="experts.{name}.{expert}",  # no end of it is that of a path in the dense MLP
        parameters="experts",
        fused="stacked",
        norms=(
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm_1",
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm_2",
        ),
    )


def _head_sizes(fields: Fields, types: list[str]) -> list[tuple[int, int]]:
    """For each layer the size of its heads and how many keys and values there are: those of global layers have names of
    their own, or `per_layer_config` says it, by layer."""
    plain = fields.integer("head_dim", 256), fields.integer("num_key_value_heads")
    by_layer = fields.table("per_layer_config")
    if by_layer is None:
        count = fields.nullable(fields.integer, "num_global_key_value_heads", None)
        count = count if count and fields.flag("attention_k_eq_v", False) else plain[1]
        size = fields.integer("global_head_dim", 512)
        sizes = [(size, count) if kind == "full_attention" else plain for kind in types]
    else:
        settings = {number.lstrip("0") or "0": by_layer.table(number) for number in by_layer.values}
        sizes = []
        for i in range(len(types)):
            layer = settings.get(str(i)) or Fields({}, by_layer.where)
            if others := set(layer.values) - {"head_dim", "num_key_value_heads"}:
                raise InputError(f"{layer.where}: {', '.join(sorted(others))} by layer is not supported")
            sizes.append((layer.integer("head_dim", plain[0]), layer.integer("num_key_value_heads", plain[1])))
    heads = fields.integer("num_attention_heads")
    for i, (size, count) in enumerate(sizes):
        if size % 2 or heads % count:
            raise InputError(
                f"{fields.where}: layer {i} has {heads} heads of {size} numbers and {count} for keys: the size must be"
                " even, and the first number a multiple of the last"
            )
    if len({size for (size, _), kind in zip(sizes, types, strict=True) if kind == "full_attention"}) > 1:
        raise InputError(f"{fields.where}: global layers with heads of several sizes are not supported")
    return sizes


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
        windows=windows_of(fields, types, fields.window(4096)),
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
        **family_fields,
    )


#: What Gemma 4 means by no rotary settings.
_GEMMA4_ROPES = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

#: What Gemma 3 and 4 mean by sizes that are absent: files of models with images leave out much of their text_config.
_SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}

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
        _SIZES | {"vocab_size": 262208, "num_hidden_layers": 26},
    ),
    Family(
        "Gemma4ForCausalLM",
        "gemma4_text",
        read_gemma4,
        "Gemma 4 (text)",
        ATTENTION_BIAS,
        _SIZES | {"vocab_size": 262144, "num_hidden_layers": 30},
    ),
)
