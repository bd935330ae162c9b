"""A tiny decoder's sizes, HuggingFace folders with random weights, and random inputs and adapters."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import transformers
from flax import nnx
from safetensors.numpy import save_file

from mora_jax.adapters.base import AdapterParam
from mora_jax.models.families import FAMILIES

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
ARCHITECTURES = {family.model_type: family.architecture for family in FAMILIES}


def hf_config(model_type: str, **fields) -> transformers.PretrainedConfig:
    """The configuration of a tiny float32 model, as transformers makes it."""
    model_type = model_type.partition("-")[0]  # behind that one of several kinds
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | fields))
    config.architectures, config.dtype = [ARCHITECTURES[model_type]], "float32"
    return config


def write_config(folder: Path, changes: dict | None) -> None:
    """Replaces fields of a folder's `config.json` (None removes one)."""
    path = folder / "config.json"
    changes = changes or {}
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in changes}
    path.write_text(json.dumps(kept | {key: value for key, value in changes.items() if value is not None}))


def random_tensor(name: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """The float32 weight of this name, the same wherever it is made; a norm's is what it adds to the neutral value."""
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    return values * np.float32(0.3 if "norm" in name or name.endswith("bias") else SIZES["initializer_range"])


def hf_folder(folder: Path, model_type: str = "llama", changes: dict | None = None, **fields) -> Path:
    """A Llama or a Qwen2 with random weights; norms and biases are random too, so that nothing is at a neutral value.

    Args:
        folder: where to.
        model_type: `llama` or `qwen2`.
        changes: to its `config.json`, as in `write_config`.
        fields: of the configuration.
    """
    config = hf_config(model_type, **fields)
    config.save_pretrained(folder)
    write_config(folder, changes)
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    biases = model_type == "qwen2" or config.attention_bias
    shapes = {"model.embed_tokens": (config.vocab_size, width), "model.norm": (width,)}
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, width)
    biased = {}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        for part, out in {"q": queries, "k": keys, "v": keys}.items():
            shapes[f"{layer}.self_attn.{part}_proj"] = (out, width)
            biased |= {f"{layer}.self_attn.{part}_proj": out} if biases else {}
        shapes[f"{layer}.self_attn.o_proj"] = (width, queries)
        biased |= {f"{layer}.self_attn.o_proj": width} if biases and model_type == "llama" else {}
        shapes |= {f"{layer}.mlp.{part}_proj": (inner, width) for part in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj"] = (width, inner)
        shapes |= {f"{layer}.{part}_layernorm": (width,) for part in ("input", "post_attention")}
    tensors = {f"{name}.weight": random_tensor(f"{name}.weight", shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": random_tensor(f"{name}.bias", (size,)) for name, size in biased.items()}
    tensors = {name: value + np.float32("norm" in name) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Token ids of the tiny vocabulary, `[rows, length]`."""
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (rows, length))


def fill_randomly(model: nnx.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Gives every adapter parameter random values, so that a fresh adapter's zeros hide nothing."""
    draws = np.random.default_rng(seed)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, AdapterParam):
            node.set_value(scale * draws.standard_normal(node.shape).astype(np.float32))
