"""Learning rates of their own for some arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.errors import InputError
from mora_jax.models import init_decoder
from mora_jax.training.config.load import check_together
from mora_jax.training.config.schema import Config, OptimizerConfig, lay_over
from mora_jax.training.optimizer import make_optimizer, make_schedule, scale_rates
from mora_jax.training.relora import Restarts, prune_moments
from mora_jax.training.state import flat_arrays
from mora_jax.training.update_rules import RULES, weight_masks
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


STACKS = {
    "layers.q.lora_a": jax.random.normal(jax.random.key(0), (2, 130, 140)),
    "layers.q.lora_b": jax.random.normal(jax.random.key(1), (2, 8, 140)),
    "layers.q.bias": jax.random.normal(jax.random.key(2), (2, 140)),
    "norm.scale": jnp.ones(6),
}


def updates_of(optimizer, params, steps=3):
    """What an optimizer makes of random gradients, step by step."""
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    results = []
    for step in range(steps):
        gradients = {
            name: jax.random.normal(jax.random.fold_in(jax.random.key(step), number), array.shape)
            for number, (name, array) in enumerate(sorted(params.items()))
        }
        updates, state = update(gradients, state, params)
        results.append(updates)
    return results, state


@pytest.mark.parametrize(
    ("decayed", "names"),
    [
        (False, "norm.scale layers.attention_norm.weight blocks.0.RMSNorm_0.scale input_layernorm.weight norm1.scale"),
        (True, "layers.normal_proj.kernel normalizer.kernel norm_proj.lora_a enormous.lora_b layers.q.kernel"),
    ],
)
def test_norms_are_told_by_the_end_of_a_step_of_a_path(decayed, names):
    arrays = {name: jnp.ones((2, 3)) for name in names.split()}
    assert weight_masks(arrays) == dict.fromkeys(arrays, decayed)


@pytest.mark.parametrize("name", RULES)
def test_optimizers_are_those_of_optax_on_each_matrix_alone(name):
    """Each layer of a stack gets what optax gives its matrix alone; vectors and weight decay included."""
    rate, decay = 0.01, 0.1
    config = OptimizerConfig(name=name, learning_rate=rate, schedule="constant", weight_decay=decay, clip_norm=None)
    params = {
        "layers.q.lora_a": STACKS["layers.q.lora_a"],
        "layers.q.lora_b": STACKS["layers.q.lora_b"],
        "layers.q.bias": STACKS["layers.q.bias"],
        "norm.scale": STACKS["norm.scale"],
    }
    ours, state = updates_of(make_optimizer(config, 10), params)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)

    def theirs(decay):
        adafactor = {"multiply_by_parameter_scale": False, "weight_decay_rate": None}
        return {
            "adamw": lambda: optax.adamw(rate, weight_decay=decay),
            "lion": lambda: optax.lion(rate, weight_decay=decay),
            "sgd": lambda: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate)),
            "adafactor": lambda: optax.chain(
                optax.adafactor(1.0, **adafactor), optax.scale(-1), optax.add_decayed_weights(decay), optax.scale(-rate)
            ),
            # Its own Adam for vectors has Nesterov's momentum; ours is that of `adamw`.
            "muon": lambda: (
                optax.contrib.muon(rate, weight_decay=decay, consistent_rms=0.2) if decay else optax.adam(rate)
            ),
        }[name]()

    for path, array in params.items():
        is_matrix = path.endswith(("lora_a", "lora_b"))
        optimizer = theirs(decay if is_matrix else 0.0)
        for layer in range(len(array)) if path.startswith("layers.") else [...]:
            state = optimizer.init(array[layer])
            for step in range(3):
                gradient = jax.random.normal(
                    jax.random.fold_in(jax.random.key(step), sorted(params).index(path)), array.shape
                )
                expected, state = optimizer.update(gradient[layer], state, array[layer])
                np.testing.assert_allclose(ours[step][path][layer], expected, rtol=2e-4, atol=1e-6)


def test_settings_of_an_optimizer_are_taken():
    params = {"q.lora_a": STACKS["layers.q.lora_b"][0]}
    options = {"learning_rate": 0.1, "schedule": "constant", "clip_norm": None}
    for name, changed, theirs in (
        ("sgd", {"momentum": 0.8}, optax.sgd(0.1, momentum=0.8)),
        ("lion", {"b1": 0.5, "b2": 0.7}, optax.lion(0.1, 0.5, 0.7, weight_decay=0.0)),
        ("muon", {"momentum": 0.5}, optax.contrib.muon(0.1, beta=0.5, consistent_rms=0.2)),
    ):
        ours, _ = updates_of(make_optimizer(OptimizerConfig(name=name, **options, **changed), 10), params)
        expected, _ = updates_of(theirs, params)
        usual, _ = updates_of(make_optimizer(OptimizerConfig(name=name, **options), 10), params)
        np.testing.assert_allclose(ours[2]["q.lora_a"], expected[2]["q.lora_a"], rtol=1e-4, atol=1e-6)
        assert not np.allclose(ours[2]["q.lora_a"], usual[2]["q.lora_a"], rtol=1e-2)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"optimizer.name": "sgd", "optimizer.b1": 0.9}, "does not use optimizer.b1, which is of adamw, lion, muon"),
        ({"optimizer.momentum": 0.9}, "does not use optimizer.momentum, which is of sgd, muon"),
        ({"optimizer.name": "lion", "optimizer.offload": True}, "optimizer.offload is of adamw alone"),
        ({"optimizer.name": "muon", "adapter.method": "full"}, "take it with an adapter"),
        ({"optimizer.name": "adafactor", "adapter.method": "relora"}, "take adamw, lion or sgd"),
        ({"optimizer.name": "adam"}, "did you mean 'adamw'"),
    ],
)
def test_what_an_optimizer_has_no_use_for_is_refused(settings, words):
    values = {"model.path": "m", "data.train": ("d",), "out": "o"} | settings
    with pytest.raises(InputError, match=words):
        check_together(lay_over(Config(), [(name, value, "config") for name, value in values.items()]))


@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_restarts_prune_the_moments_of_other_optimizers_too(name):
    config = OptimizerConfig(name=name, momentum=0.9 if name == "sgd" else None)
    _, state = updates_of(make_optimizer(config, 10), STACKS)
    pruned = prune_moments(state, STACKS, ["layers.q.lora_a"], 0.9)
    before, after = (optax.tree.get(state, "trace" if name == "sgd" else "mu") for state in (state, pruned))
    assert 0.08 < float((after["layers.q.lora_a"] != 0).mean()) < 0.12
    np.testing.assert_array_equal(after["layers.q.lora_b"], before["layers.q.lora_b"])
