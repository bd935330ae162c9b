"""Learning rates of their own for some arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.models import init_decoder
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.optimizer import make_optimizer, make_schedule, scale_rates, weight_masks
from mora_jax.training.relora import Restarts
from mora_jax.training.state import flat_arrays
from tests.models import tiny_experts
from tests.models.tiny import LLAMA

PARAMS = {"q.lora_a": jnp.ones((3, 2)), "q.lora_b": jnp.ones((2, 4)), "q.bias": jnp.ones(4)}
GRADIENTS = jax.tree.map(lambda x: x * 0.3, PARAMS)


def test_lora_plus_is_two_optimizers_with_one_clip():
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", weight_decay=0.1, clip_norm=0.5)
    found = make_optimizer(config, 10, mj.LoRAPlusConfig(lr_ratio=8.0).rates)
    ours = found.update(GRADIENTS, found.init(PARAMS), PARAMS)[0]
    norm = float(optax.tree.norm(GRADIENTS))
    for name, rate, decay in (("q.lora_a", 0.01, 0.1), ("q.lora_b", 0.08, 0.1), ("q.bias", 0.08, 0.0)):
        alone = optax.adamw(rate, weight_decay=decay)
        clipped, param = GRADIENTS[name] * 0.5 / norm, PARAMS[name]
        np.testing.assert_allclose(ours[name], alone.update(clipped, alone.init(param), param)[0], rtol=1e-5)


def test_moments_decay_and_eps_are_those_of_the_configuration():
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", b1=0.5, b2=0.8, eps=0.1, clip_norm=None)
    found, params = make_optimizer(config, 10), {"q.lora_a": jnp.ones(3)}
    state, first, second = found.init(params), np.zeros(3), np.zeros(3)
    for step, gradient in enumerate(np.array([[0.3, -2.0, 1e-3], [1.0, 0.5, 0.0]]), start=1):
        updates, state = found.update({"q.lora_a": jnp.asarray(gradient)}, state, params)
        first, second = 0.5 * first + 0.5 * gradient, 0.8 * second + 0.2 * gradient**2
        moved = first / (1 - 0.5**step) / (np.sqrt(second / (1 - 0.8**step)) + 0.1)
        np.testing.assert_allclose(updates["q.lora_a"], -0.01 * moved, rtol=1e-5)


@pytest.mark.parametrize("restarts", [None, Restarts(5, 47, 2, 0.9)])
def test_no_rate_falls_below_the_end(restarts):
    # Of these numbers of steps 37 times float32's 1 / 37 is more than 1.
    for schedule in ("linear", "cosine"):
        config = OptimizerConfig(learning_rate=3e-4, schedule=schedule, warmup_steps=10)
        rates = jax.jit(jax.vmap(make_schedule(config, 47, restarts)))(jnp.arange(60))
        assert rates.min() >= 0 and rates[46] < 1e-5, schedule
    config = OptimizerConfig(learning_rate=3e-4, schedule="linear", warmup_steps=10, min_ratio=0.25)
    rates = jax.jit(jax.vmap(make_schedule(config, 47)))(jnp.arange(60))
    assert rates[10:].min() >= np.float32(0.25 * 3e-4) and rates[40] > rates[46]
    np.testing.assert_allclose(rates[9:11], 3e-4, rtol=1e-6)


def test_other_arrays_keep_their_rate():
    assert mj.LoRAConfig().rates == {}
    updates, _ = scale_rates({"lora_b": 4.0}).update(GRADIENTS, optax.EmptyState())
    np.testing.assert_allclose(updates["q.lora_b"], 1.2)
    np.testing.assert_allclose(updates["q.lora_a"], 0.3)


@pytest.mark.parametrize("config", [mj.DoRAConfig(), mj.VeRAConfig(rank=3), mj.IA3Config(), mj.BitFitConfig()])
def test_weights_of_a_stack_decay_and_vectors_do_not(config):
    model = init_decoder(LLAMA, nnx.Rngs(0))
    mj.attach(model, config, rngs=nnx.Rngs(1))
    arrays = flat_arrays(mj.partition(model)[1])
    decaying = {name.rpartition(".")[2] for name, decays in weight_masks(arrays).items() if decays}
    assert decaying == ({"lora_a", "lora_b"} if isinstance(config, mj.DoRAConfig) else set())


def test_sinks_of_attention_and_biases_of_experts_do_not_decay():
    model = tiny_experts.ours("gpt_oss", nnx.Rngs(0))
    mj.attach(model, mj.FullConfig(), rngs=nnx.Rngs(1))
    arrays = flat_arrays(mj.partition(model)[1])
    assert any(name.endswith("sinks") for name in arrays)
    decaying = {name.rpartition(".")[2] for name, decays in weight_masks(arrays).items() if decays}
    assert decaying == {"kernel", "embedding"}


def test_a_ratio_is_positive():
    with pytest.raises(ValueError, match="lr_ratio must be a positive number, not 0"):
        mj.LoRAPlusConfig(lr_ratio=0)
