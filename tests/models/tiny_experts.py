"""Tiny models with experts in torch, with other settings than the defaults, for the tests marked `peers`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import transformers

from mora_jax.models import families
from mora_jax.models.decoder import Decoder
from mora_jax.models.init import init_decoder
from tests.models.tiny import random_tensor
from tests.peers import torch

if TYPE_CHECKING:
    from torch.nn import Module

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-4,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "truncate": False,
    "rope_theta": 1000.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": False,
        "head_dim": 10,
        "attention_bias": True,
    },
    "gpt_oss": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "swiglu_limit": 1.0,
        "swiglu_alpha": 1.3,
        "rope_parameters": YARN,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 3,
        "moe_intermediate_size": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 6,
        "head_dim": 8,
        "global_head_dim": 12,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 3.0,
    },
}
ARCHITECTURES = {family.model_type: family.architecture for family in families.FAMILIES}


def torch_model(family: str, **fields) -> Module:
    """A random float32 model, whose routers prefer some experts clearly."""
    config = transformers.AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | fields))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.tensor(random_tensor(name, parameter.shape)) * 1.5
            parameter.copy_(parameter + value if "norm" in name or "scale" in name else value)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
    return model


def saved(folder: Path, family: str, **fields) -> Path:
    """The model as transformers saves it."""
    torch_model(family, **fields).save_pretrained(folder)
    return folder


def ours(family: str, rngs, **fields) -> Decoder:
    """A random model of the same sizes, made here."""
    values = SIZES | {"architectures": [ARCHITECTURES[family]], "initializer_range": 0.2} | FAMILIES[family] | fields
    return init_decoder(values, rngs)


def tokens(rows: int = 2, length: int = 23) -> np.ndarray:
    return np.random.default_rng(0).integers(1, SIZES["vocab_size"], (rows, length))
