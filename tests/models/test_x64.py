"""The decoder where JAX's float64 is on: integers and floats of Python have twice the width there."""

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.evaluation.generate import Generator
from mora_jax.models import decoder, read_config
from tests.models.tiny import LLAMA, fill_randomly, random_ids


def answers(layers: int) -> tuple[np.ndarray, list[np.ndarray]]:
    config = read_config(LLAMA | {"num_hidden_layers": layers, "head_dim": 8}, "config.json")
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj", "down_proj")), rngs=nnx.Rngs(1))
    fill_randomly(model)
    ids = random_ids(2, 7)
    logits, cache = model.extend(model.init_cache(2, 16), ids[:, :5])
    logits, cache = model.extend(cache, ids[:, 5:6])
    return np.asarray(logits), Generator(model).batch([list(ids[0]), list(ids[1][:4])], 4)


@pytest.mark.slow
def test_extend_and_generate_give_what_they_give_without():
    expected = answers(2)
    with jax.enable_x64(True):
        logits, tokens = answers(2)
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-4)
    for found, wanted in zip(tokens, expected[1], strict=True):
        np.testing.assert_array_equal(found, wanted)
