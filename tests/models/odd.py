"""Settings of every family that are none of its defaults: a table that the tests of families go through."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8,
}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
THETA = {"rope_type": "default", "rope_theta": 321.0}
#: No id of a tiny vocabulary's ends a text, and none is out of it.
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
HEADS = {"head_dim": 12, "rms_norm_eps": 3e-3}
BIASES = {"attention_bias": True, "mlp_bias": True}

#: By `model_type`.
ODD: dict[str, dict[str, Any]] = {
    "llama": HEADS | BIASES | {"num_key_value_heads": 1, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "mistral": HEADS | {"sliding_window": 5, "rope_parameters": THETA},
    "ministral": HEADS | {"sliding_window": 4, "layer_types": SLIDING, "rope_parameters": THETA},
    "ministral3": HEADS
    | {
        "sliding_window": 6,
        "tie_word_embeddings": True,
        "rope_parameters": YARN | {"llama_4_scaling_beta": 0.7, "original_max_position_embeddings": 8, "mscale": 0.7},
    },
    "qwen2": {
        "rms_norm_eps": 3e-3,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": SLIDING,
        "rope_parameters": YARN,
    },
    "qwen3": HEADS
    | {
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": SLIDING,
        "rope_parameters": THETA,
        "tie_word_embeddings": True,
    },
    "smollm3": HEADS
    | BIASES
    | {
        "no_rope_layers": [0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 5,
        "tie_word_embeddings": False,
        "rope_parameters": THETA,
    },
    "granite": HEADS
    | BIASES
    | {
        "embedding_multiplier": 3.3,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 3.0,
        "rope_parameters": THETA,
    },
    "seed_oss": HEADS | BIASES | {"attention_out_bias": True, "attention_bias": False, "rope_parameters": YARN},
    "arcee": HEADS | BIASES | {"rope_parameters": YARN, "tie_word_embeddings": True, "hidden_act": "gelu"},
    "helium": HEADS | BIASES | {"head_dim": 8, "rope_parameters": LLAMA3},
    "gemma": HEADS | {"attention_bias": True, "hidden_act": "gelu", "rope_parameters": THETA},
    "gemma2": {
        "head_dim": 12,
        "rms_norm_eps": 3e-3,
        "query_pre_attn_scalar": 7,
        "sliding_window": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "attention_bias": True,
    },
    "gemma3_text": {
        "head_dim": 12,
        "rms_norm_eps": 3e-3,
        "query_pre_attn_scalar": 7,
        "sliding_window": 4,
        "layer_types": SLIDING,
        "attention_bias": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 8.0},
            "sliding_attention": LOCAL,
        },
    },
    "gemma4_text": HEADS
    | {
        "num_hidden_layers": 7,
        "layer_types": [*SLIDING, *SLIDING[:1] * 2, *SLIDING[1:2] * 2],
        "global_head_dim": 20,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 97,
        "sliding_window": 4,
        "final_logit_softcapping": 3.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.4, "rope_theta": 9000.0},
            "sliding_attention": LOCAL,
        },
    },
    "phi3": {
        "rms_norm_eps": 3e-3,
        "sliding_window": 7,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 321.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.3, 2.1],
            "long_factor": [2.0, 3.5, 7.7],
        },
    },
    "glm": HEADS | {"rope_parameters": THETA | {"partial_rotary_factor": 0.7}, "tie_word_embeddings": True},
    "glm4": HEADS | {"attention_bias": True, "rope_parameters": THETA | {"partial_rotary_factor": 0.7}},
    "olmo2": HEADS | {"head_dim": 8, "attention_bias": True, "rope_parameters": YARN, "tie_word_embeddings": True},
    "olmo3": HEADS
    | {
        "head_dim": 8,
        "attention_bias": True,
        "sliding_window": 4,
        "layer_types": SLIDING,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL},
    },
    "exaone4": HEADS | {"sliding_window": 5, "sliding_window_pattern": 2, "rope_parameters": LLAMA3},
    "qwen3_5_text": HEADS
    | {
        "attention_bias": True,
        "num_hidden_layers": 5,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 7,
        "linear_conv_kernel_dim": 3,
        "tie_word_embeddings": True,
        "rope_parameters": THETA | {"partial_rotary_factor": 0.7, "mrope_section": [1, 2, 1]},
    },
    "gpt2": {
        "layer_norm_epsilon": 3e-3,
        "n_inner": 52,
        "activation_function": "relu",
        "scale_attn_weights": False,
        "tie_word_embeddings": False,
    },
    "gpt_neox": {
        "layer_norm_eps": 3e-3,
        "hidden_act": "gelu_fast",
        "use_parallel_residual": False,
        "rope_parameters": THETA | {"partial_rotary_factor": 0.5},
    },
    "starcoder2": {"norm_epsilon": 3e-3, "sliding_window": 5, "tie_word_embeddings": False, "rope_parameters": YARN},
    "nemotron": HEADS
    | BIASES
    | {"norm_eps": 3e-3, "hidden_act": "silu", "rope_parameters": THETA | {"partial_rotary_factor": 0.7}},
    "cohere2": {
        "layer_norm_eps": 3e-3,
        "sliding_window": 4,
        "layer_types": SLIDING,
        "logit_scale": 0.3,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": THETA,
    },
}
ODD = {name: IDS | fields for name, fields in ODD.items()}
ODD["gemma4_text-experts"] = ODD["gemma4_text"] | {
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 3,
    "moe_intermediate_size": 12,
}
