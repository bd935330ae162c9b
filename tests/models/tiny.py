"""A tiny decoder's sizes, and random inputs and adapters for it."""

import numpy as np
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


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Token ids of the tiny vocabulary, `[rows, length]`."""
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (rows, length))


def fill_randomly(model: nnx.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Gives every adapter parameter random values, so that a fresh adapter's zeros hide nothing."""
    draws = np.random.default_rng(seed)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, AdapterParam):
            node.set_value(scale * draws.standard_normal(node.shape).astype(np.float32))
