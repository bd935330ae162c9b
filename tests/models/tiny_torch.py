"""The tiny HuggingFace models in torch, for the tests marked `peers`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import transformers

from tests.models.tiny import hf_config, random_tensor, write_config
from tests.peers import torch

if TYPE_CHECKING:
    from torch.nn import Module


def hf_model(model_type: str, seed: int = 0, **fields) -> Module:
    """A random float32 model, with the weights of `tiny.hf_folder`."""
    config = hf_config(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.tensor(random_tensor(name, parameter.shape, seed))
            parameter.copy_(parameter + value if "norm" in name or "scale" in name else value)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(1 + torch.tensor(random_tensor(name, buffer.shape, seed)))
    return model


def save_torch(folder: Path, model: Module, config: dict | None = None, **save) -> Path:
    """Saves a model as transformers does; `config` replaces fields of its `config.json` (None removes one)."""
    model.save_pretrained(folder, **save)
    write_config(folder, config)
    return folder


def load_torch(folder: Path) -> Module:
    """A folder's model, in float32."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    return model.eval()


def hf_logits(model: Module, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits of transformers, float32 `[B, T, V]`; of rows with padding, which are NaN there, as of texts alone."""
    with torch.no_grad():
        if mask is None:
            return model(torch.tensor(ids)).logits.float().numpy()
        logits = np.full((*ids.shape, model.config.vocab_size), np.nan, np.float32)
        for row, seen in enumerate(mask.astype(bool)):
            logits[row, seen] = model(torch.tensor(ids[row : row + 1, seen])).logits[0].float().numpy()
        return logits
