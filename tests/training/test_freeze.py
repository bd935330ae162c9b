"""`train_adapters`: whole models go in, adapters alone change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import mora_jax as mj
from mora_jax.linen import LoRADense, MoRADense
from mora_jax.training.freeze import adapter_labels, train_adapters

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
Y = X[:, ::-1] * 2.0


def nnx_model():
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(6, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)
    model = nnx.Sequential(*layers)
    mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    return model


@pytest.mark.parametrize("layer", [LoRADense(6, 2, 4.0), MoRADense(6, 2, "rotation")], ids=["lora", "mora"])
@pytest.mark.parametrize("wrap", [dict, freeze], ids=["dict", "frozen"])
def test_linen_adapters_learn_and_params_stay(layer, wrap):
    variables = wrap(layer.init(jax.random.key(0), X))
    # Weight decay would change the frozen parameters, if they were let in.
    optimizer = train_adapters(optax.adamw(0.05, weight_decay=0.1))
    state = optimizer.init(variables)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(variables["adapters"]))

    @jax.jit
    def step(variables, state):
        loss, gradients = jax.value_and_grad(lambda v: jnp.mean((layer.apply(v, X) - Y) ** 2))(variables)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state, loss

    trained, losses = variables, []
    for _ in range(20):
        trained, state, loss = step(trained, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, trained["params"], variables["params"])
    for before, after in zip(jax.tree.leaves(variables["adapters"]), jax.tree.leaves(trained["adapters"]), strict=True):
        assert not np.array_equal(before, after)


def test_clipping_sees_the_adapters_alone():
    layer = LoRADense(6, 2, 4.0)
    variables = layer.init(jax.random.key(0), X)
    gradients = jax.tree.map(jnp.ones_like, variables)
    gradients["params"] = jax.tree.map(lambda g: 1e6 * g, gradients["params"])
    clip = train_adapters(optax.clip_by_global_norm(1.0))
    updates, _ = clip.update(gradients, clip.init(variables), variables)
    assert optax.tree.norm(updates["params"]) == 0
    np.testing.assert_allclose(optax.tree.norm(updates["adapters"]), 1.0, rtol=1e-6)


def test_nnx_state_and_nnx_optimizer():
    model = nnx_model()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    labels = adapter_labels(nnx.state(model, nnx.Param))
    assert sorted(jax.tree.leaves(labels)) == ["frozen"] * 6 + ["trained"] * 4

    optimizer = nnx.Optimizer(model, train_adapters(optax.adamw(0.05)), wrt=nnx.Param)

    def loss(model):
        return jnp.mean((model(X) - Y) ** 2)

    start = loss(model)
    for _ in range(3):
        gradients = nnx.grad(loss)(model)
        optimizer.update(model, gradients)
    assert loss(model) < start
    after = nnx.state(model)
    trained, frozen = nnx.split_state(after, mj.AdapterParam, ...)
    trained_before, frozen_before = nnx.split_state(before, mj.AdapterParam, ...)
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained, trained_before)
    assert all(jax.tree.leaves(changed))


def test_a_tree_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no adapter among the parameters"):
        train_adapters(optax.sgd(1.0)).init({"params": {"kernel": jnp.ones(3)}})
    with pytest.raises(ValueError, match="no adapter among the parameters"):
        train_adapters(optax.sgd(1.0)).init(nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
