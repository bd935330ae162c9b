"""Tiny HuggingFace models with random weights, made by transformers in torch."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.models.tiny import SIZES

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
