"""Gradients agree with torch's, for every weight of a model: each step of the forward pass has its own backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.interop.tensor_map import tensor_plan
from tests.models.tiny import random_ids
from tests.models.tiny_torch import hf_model, save_torch
from tests.peers import torch

pytestmark = pytest.mark.peers

IDS = random_ids(2, 10)
CASES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 4, "use_sliding_window": True}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_weight(name, tmp_path):
    model_type, fields = CASES[name]
    reference = hf_model(model_type, **fields, num_hidden_layers=3)
    model, _ = mj.load_pretrained(save_torch(tmp_path, reference), dtype="float32")
    cotangent = np.random.default_rng(0).standard_normal((2, 10, 97)).astype(np.float32)
    (reference(torch.tensor(IDS)).logits * torch.tensor(cotangent)).sum().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}

    mj.attach(model, mj.FullConfig(), rngs=nnx.Rngs(0))
    graphdef, weights, rest = mj.partition(model)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(nnx.merge(graphdef, w, rest)(IDS) * cotangent)))(weights)
    found = {
        piece.name: piece.take(np.asarray(entry.parameter[...]))
        for entry in tensor_plan(nnx.merge(graphdef, gradient, rest))
        for piece in entry.pieces
    }
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-4 * np.abs(array).max(), rtol=2e-4, err_msg=name)
