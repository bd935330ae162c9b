"""Tiny HuggingFace models with random weights, made by transformers in torch."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from flax import nnx

from mora_jax.adapters.variables import AdapterParam

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"]}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def hf_model(model_type: str, seed: int = 0, **fields) -> torch.nn.Module:
    """A random float32 model; norms and biases are random too, so that nothing is left at a neutral value."""
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | fields))
    config.architectures = [ARCHITECTURES[model_type]]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def hf_folder(folder: Path, model: torch.nn.Module, config: dict | None = None, **save) -> Path:
    """Saves a model; `config` replaces fields of its `config.json` (None removes one)."""
    model.save_pretrained(folder, **save)
    if config:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def hf_logits(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits of transformers, float32 `[B, T, V]`."""
    with torch.no_grad():
        attention_mask = None if mask is None else torch.tensor(mask)
        return model(torch.tensor(ids), attention_mask=attention_mask).logits.float().numpy()


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Token ids of the tiny vocabulary, `[rows, length]`."""
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (rows, length))


def fill_randomly(model: nnx.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Gives every adapter parameter random values, so that a fresh adapter's zeros hide nothing."""
    draws = np.random.default_rng(seed)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, AdapterParam):
            node.set_value(scale * draws.standard_normal(node.shape).astype(np.float32))
