"""Logits of every family against its definition, written out in numpy and float64 from the tensors of a checkpoint.

`make test-peers` compares with transformers; this holds what a family is without torch.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mora_jax.interop.save import tensors_of
from tests.models.test_packing import FAMILIES, model_of
from tests.models.tiny import SIZES, random_ids

ROWS, LENGTH = 2, 9
IDS = random_ids(ROWS, LENGTH)
SEGMENTS = np.array([[1] * 6 + [0] * 3, [1] * 9])
HEADS, GROUPS = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
#: The base of the rotary angles and what positions are divided by, for each kind of layer.
GEMMA3 = {"full_attention": (9000.0, 8.0), "sliding_attention": (100.0, 1.0)}
# What each layer's window is, from the definition of the fields in test_packing.py.
WINDOWS = {"Mistral": (4, 4), "Qwen2": (None, 4), "Qwen3": (3, 3), "Gemma2": (4, None), "Gemma3": (4, None)}


def randomised(family):
    """A model none of whose norms and biases is at a neutral value."""
    model = model_of(family)
    draws = np.random.default_rng(0)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param):
            node.set_value(node.get_value() + jnp.asarray(0.1 * draws.normal(size=node.shape), node.dtype))
    return model


def norm(x, weight, gemma):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (weight + gemma)


def turned(x, theta, factor):
    """`x [T, H]` of one head, its pairs (j, j + H/2) turned by position · theta^(-2j/H) / factor."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] / factor * theta ** (-np.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )


def one_row(family, tensors, ids):
    """Logits `[T, V]` of a row without padding."""
    gemma = family.startswith("Gemma")
    fields = SIZES | FAMILIES[family]
    size = fields.get("head_dim", SIZES["hidden_size"] // HEADS)
    score_cap, logit_cap = fields.get("attn_logit_softcapping"), fields.get("final_logit_softcapping")
    scale = fields.get("query_pre_attn_scalar", size) ** -0.5
    x = tensors["model.embed_tokens.weight"][ids] * (math.sqrt(SIZES["hidden_size"]) if gemma else 1.0)
    for layer in range(2):
        held = {name.removeprefix(f"model.layers.{layer}."): value for name, value in tensors.items()}

        def product(x, name, held=held):
            return x @ held[f"{name}.weight"].T + held.get(f"{name}.bias", 0.0)

        window = WINDOWS.get(family, (None, None))[layer]
        theta, factor = 10_000.0, 1.0
        if family == "Gemma3":
            theta, factor = GEMMA3["full_attention" if window is None else "sliding_attention"]
        h = norm(x, held["input_layernorm.weight"], gemma)
        q, k, v = (product(h, f"self_attn.{name}_proj").reshape(len(ids), -1, size) for name in "qkv")
        if "self_attn.q_norm.weight" in held:
            q, k = norm(q, held["self_attn.q_norm.weight"], gemma), norm(k, held["self_attn.k_norm.weight"], gemma)
        mixed = np.zeros((len(ids), HEADS, size))
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = scale * turned(q[:, head], theta, factor) @ turned(k[:, group], theta, factor).T
            if score_cap is not None:
                scores = score_cap * np.tanh(scores / score_cap)
            for t in range(len(ids)):
                first = 0 if window is None else max(0, t - window + 1)
                p = np.exp(scores[t, first : t + 1])
                mixed[t, head] = p / p.sum() @ v[first : t + 1, group]
        out = product(mixed.reshape(len(ids), -1), "self_attn.o_proj")
        if gemma:
            x = x + norm(out, held["post_attention_layernorm.weight"], gemma)
            h = norm(x, held["pre_feedforward_layernorm.weight"], gemma)
        else:
            x = x + out
            h = norm(x, held["post_attention_layernorm.weight"], gemma)
        gate = product(h, "mlp.gate_proj")
        if gemma:
            gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        out = product(gate * product(h, "mlp.up_proj"), "mlp.down_proj")
        x = x + (norm(out, held["post_feedforward_layernorm.weight"], gemma) if gemma else out)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    logits = norm(x, tensors["model.norm.weight"], gemma) @ head.T
    return logits if logit_cap is None else logit_cap * np.tanh(logits / logit_cap)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    model = randomised(family)
    graphdef, state = nnx.split(model)
    found = jax.jit(lambda state: nnx.merge(graphdef, state)(IDS, SEGMENTS))(state)
    tensors = {name: np.float64(value) for name, value in tensors_of(model)}
    for row in range(ROWS):
        length = int(SEGMENTS[row].sum())
        expected = one_row(family, tensors, IDS[row, :length])
        np.testing.assert_allclose(found[row, :length], expected, rtol=0, atol=2e-4 * np.abs(expected).max())
