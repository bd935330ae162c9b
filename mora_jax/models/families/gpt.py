"""GPT-2, GPT-NeoX, StarCoder 2, Nemotron, Cohere: norms that take the mean away, and mostly an MLP without gate."""

from typing import Any

from mora_jax.models.config import DecoderConfig, TensorNames
from mora_jax.models.families.fields import (
    ATTENTION_BIAS,
    BIASES,
    Family,
    Fields,
    layer_types,
    read_decoder,
    sliding_but_every,
    windows_of,
)
from mora_jax.models.families.llama import rotating
from mora_jax.models.rope import Rope

_ALL_BIASES: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
_PLAIN: dict[str, Any] = {"norm": "layer", "norm_bias": True, "gated": False}


def read_gpt2(fields: Fields) -> DecoderConfig:
    """GPT-2: LayerNorm, learned positions, biases, no gate; `c_attn` in one; matrices `[in, out]` in files (Conv1D)."""
    fields.only("add_cross_attention", False)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    names = TensorNames(
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        layer="transformer.h.{layer}",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        gate_up=("mlp.c_fc",),
        down="mlp.c_proj",
        turned=True,
    )
    scales: dict[str, Any] = {} if fields.flag("scale_attn_weights", True) else {"attention_scale": 1.0}
    return read_decoder(
        fields,
        names=names,
        intermediate_size=fields.integer("intermediate_size", 4 * hidden),
        num_kv_heads=heads,
        ropes=(Rope(1.0, "none"),),
        rotary_dim=0,
        **scales,
        **_PLAIN,
        **_ALL_BIASES,
    )


def read_gpt_neox(fields: Fields) -> DecoderConfig:
    """GPT-NeoX: LayerNorm, biases, no gate; `query_key_value` in one; partial rotary; parallel residuals, or not."""
    names = TensorNames(
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head_tensor="embed_out.weight",
        layer="gpt_neox.layers.{layer}",
        qkv=("attention.query_key_value",),
        by_head=True,
        out="attention.dense",
        gate_up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
    )
    return read_decoder(
        fields,
        names=names,
        num_kv_heads=fields.integer("num_attention_heads"),
        rotary_factor=fields.number("rotary_pct", 0.25),
        parallel=fields.flag("use_parallel_residual", True),
        mlp_bias=True,
        **_PLAIN,
    )


def read_starcoder2(fields: Fields) -> DecoderConfig:
    """StarCoder 2: LayerNorm, biases, no gate; a sliding window, or none."""
    names = TensorNames(gate_up=("mlp.c_fc",), down="mlp.c_proj")
    return read_decoder(fields, names=names, windows=fields.same_window(None), **_PLAIN)


def read_nemotron(fields: Fields) -> DecoderConfig:
    """Nemotron: LayerNorm whose weights count from 1, no gate, relu², partial rotary."""
    names = TensorNames(gate_up=("mlp.up_proj",))
    return read_decoder(fields, names=names, rotary_factor=0.5, norm_offset=1.0, **_PLAIN)


def read_cohere2(fields: Fields) -> DecoderConfig:
    """Cohere 2: one LayerNorm for attention and MLP, side by side; no rotation without window; scaled logits."""
    pattern = fields.integer("sliding_window_pattern", 4)
    types = layer_types(fields, sliding_but_every(pattern, fields.layers()))
    rotates = [kind == "sliding_attention" for kind in types]
    return read_decoder(
        fields,
        names=TensorNames(mlp_norm=None),
        norm="layer",
        parallel=True,
        rotary_neighbours=True,
        windows=windows_of(fields, types, fields.window(4096)),
        logit_scale=fields.number("logit_scale", 0.0625),
        **rotating(fields, rotates),
    )


FAMILIES = (
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        read_gpt2,
        "GPT-2",
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
        },
        aliases={
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
    ),
    Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        read_gpt_neox,
        "GPT-NeoX, Pythia",
        ATTENTION_BIAS,
        {"rms_norm_eps": 1e-5, "hidden_act": "gelu", "attention_bias": True},
        {"rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base"},
        older={"embed_out.": "lm_head."},
    ),
    Family(
        "Starcoder2ForCausalLM",
        "starcoder2",
        read_starcoder2,
        "StarCoder 2",
        {"use_bias": ("qkv", "out", "gate_up", "down")},
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "use_bias": True,
        },
        {"rms_norm_eps": "norm_epsilon"},
    ),
    Family(
        "NemotronForCausalLM",
        "nemotron",
        read_nemotron,
        "Nemotron-4, Minitron",
        BIASES,
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "relu2"},
        {"rms_norm_eps": "norm_eps"},
    ),
    Family(
        "Cohere2ForCausalLM",
        "cohere2",
        read_cohere2,
        "Command R7B, Command A",
        ATTENTION_BIAS,
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": True},
        {"rms_norm_eps": "layer_norm_eps"},
    ),
)
