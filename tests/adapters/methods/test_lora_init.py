"""Where LoRA's factors start: against numpy's decompositions, and against peft."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.eva import input_grams, set_directions, start_from_inputs
from mora_jax.adapters.methods.lora_init import is_start
from mora_jax.models import init_decoder
from tests.models.tiny import LLAMA, random_ids
from tests.peers import peft, torch


def linear(seed=0, sizes=(9, 6)):
    return nnx.Linear(*sizes, use_bias=False, rngs=nnx.Rngs(seed))


@pytest.mark.peers
@pytest.mark.parametrize("config", [mj.PiSSAConfig(rank=3, alpha=6.0), mj.OLoRAConfig(rank=3, alpha=6.0)])
def test_the_start_and_its_base_are_those_of_peft(config):
    layer = linear()
    mj.attach(layer, config, rngs=nnx.Rngs(1))
    ours = {name: np.asarray(value) for name, value in layer.adapter.params().items()}
    module = torch.nn.Sequential(torch.nn.Linear(9, 6, bias=False))
    module[0].weight.data = torch.tensor(np.asarray(layer.kernel[...]).T.copy())
    theirs = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=config.init)
    wrapped = peft.get_peft_model(module, theirs).base_model.model[0]
    a, b = (getattr(wrapped, name)["default"].weight.detach().numpy().T for name in ("lora_A", "lora_B"))
    np.testing.assert_allclose(ours["lora_a"] @ ours["lora_b"], a @ b, atol=1e-5)
    # Their base is ours without what the update starts from.
    corrected = layer.kernel[...] - ours["scaling"] * ours["initial_a"] @ ours["initial_b"]
    np.testing.assert_allclose(corrected, wrapped.base_layer.weight.detach().numpy().T, atol=1e-5)
    x = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    layer.adapter.lora_a[...] = jnp.asarray(a)
    layer.adapter.lora_b[...] = jnp.asarray(1.5 * b)
    wrapped.lora_B["default"].weight.data *= 1.5
    np.testing.assert_allclose(layer(x), wrapped(torch.tensor(x)).detach().numpy(), atol=1e-5)


def test_pissa_takes_the_best_low_rank_part():
    layer = linear()
    mj.attach(layer, mj.PiSSAConfig(rank=2, alpha=6.0), rngs=nnx.Rngs(1))
    u, sigma, vt = np.linalg.svd(np.float64(layer.kernel[...]), full_matrices=False)
    p = layer.adapter.params()
    np.testing.assert_allclose(3.0 * p["lora_a"] @ p["lora_b"], (u[:, :2] * sigma[:2]) @ vt[:2], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(p["lora_a"], axis=0), np.sqrt(sigma[:2] / 3.0), rtol=1e-5)


def test_bfloat16_starts_as_the_base_bit_for_bit():
    layer = nnx.Linear(9, 6, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 9)), jnp.bfloat16)
    kernel, before = np.asarray(layer.kernel[...]), np.asarray(layer(x))
    mj.attach(layer, mj.PiSSAConfig(rank=3), rngs=nnx.Rngs(1))
    assert np.abs(layer.adapter.lora_b[...]).max() > 0.1
    np.testing.assert_array_equal(layer(x), before)
    np.testing.assert_array_equal(layer.kernel[...], kernel)


def test_orthogonal_factors_cancel():
    layer = linear()
    mj.attach(layer, mj.LoRAConfig(rank=4, init="orthogonal"), rngs=nnx.Rngs(1))
    a, b = np.asarray(layer.adapter.lora_a[...]), np.asarray(layer.adapter.lora_b[...])
    assert min(np.abs(a).max(), np.abs(b).max()) > 0.05
    np.testing.assert_allclose(a @ b, 0.0, atol=1e-7)


def test_gaussian_has_the_deviation_of_peft():
    layer = linear(sizes=(400, 6))
    mj.attach(layer, mj.LoRAConfig(rank=8, init="gaussian"), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(np.std(layer.adapter.lora_a[...]), 1 / 8, rtol=0.05)
    assert not np.any(layer.adapter.lora_b[...])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (mj.PiSSAConfig(rank=7), "kernel of 9 by 6, which has no rank 7"),
        (mj.LoRAConfig(rank=3, init="orthogonal"), "must be even, not 3"),
    ],
)
def test_ranks_that_do_not_fit(config, words):
    with pytest.raises(ValueError, match=words):
        mj.attach(linear(), config, rngs=nnx.Rngs(1))


def test_eva_takes_the_principal_directions_of_what_layers_read():
    model, ids = init_decoder(LLAMA, nnx.Rngs(0)), random_ids(3, 9)
    before = np.asarray(model(ids))
    config = mj.LoRAConfig(rank=4, init="eva", targets=("q_proj", "down_proj"), layers_to_transform=(0, 2))
    mj.attach(model, config, rngs=nnx.Rngs(1))
    start_from_inputs(model, lambda model: model(ids))
    np.testing.assert_array_equal(model(ids), before)
    # The first layer's attention reads the normed embeddings.
    x = np.float64(model.embed_tokens.embedding[...])[ids.reshape(-1)]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(model.layers.attention_norm.weight[0])
    np.testing.assert_allclose(
        input_grams(model, lambda m: m(ids))["model.layers.0.self_attn.q_proj"], x.T @ x, atol=0.05
    )
    found = np.asarray(model.layers.self_attn.qkv_proj.adapters["q_proj"].lora_a[...])[0]
    _, _, vt = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(np.abs(vt[:4] @ found), np.eye(4), atol=0.02)


def test_a_matrix_of_zeros_starts_from_zeros():
    kernel, a, b = np.zeros((6, 5)), np.zeros((6, 2)), np.zeros((2, 5))
    assert is_start("pissa", kernel, a, b, 1.0) and is_start("olora", kernel, a, b, 1.0)
    assert not is_start("pissa", kernel, a + 1, b, 1.0)


def test_eva_needs_lora_and_room():
    with pytest.raises(ValueError, match="carries no LoRA"):
        start_from_inputs(linear(), lambda model: model(jnp.ones((1, 9))))
    layer = linear(sizes=(3, 6))
    mj.attach(layer, mj.LoRAConfig(rank=4, init="eva"), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="reads 3 features, fewer than the rank 4"):
        set_directions(layer, {"": np.eye(3)})
