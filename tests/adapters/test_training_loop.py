"""The training loops of docs/own_models.md on models that a call changes: masks advance and averages are kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj

X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
Y = np.float32(X[:, ::-1] * 2.0)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float = 0.5):
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(16, 6, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.gelu(self.first(self.norm(x)))))


def loss_of(model):
    return jnp.mean((model(X) - Y) ** 2)


def train(model, optimizer, steps):
    """The documented loop; returns the model and the losses."""
    graphdef, adapters, state, frozen = nnx.split(model, mj.AdapterParam, mj.mutable_state, ...)
    opt_state = optimizer.init(adapters)

    @jax.jit
    def step(adapters, state, opt_state, frozen):
        def loss(adapters):
            model = nnx.merge(graphdef, adapters, state, frozen, copy=True)
            return loss_of(model), nnx.state(model, mj.mutable_state)

        (value, new_state), gradients = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, opt_state = optimizer.update(gradients, opt_state, adapters)
        return optax.apply_updates(adapters, updates), new_state, opt_state, value

    losses = []
    for _ in range(steps):
        adapters, state, opt_state, value = step(adapters, state, opt_state, frozen)
        losses.append(float(value))
    assert step._cache_size() == 1
    return nnx.merge(graphdef, adapters, state, frozen), losses


@pytest.mark.parametrize(
    "config", [mj.LoRAConfig(rank=2, dropout=0.5), mj.MoRAConfig(rank=2)], ids=["adapter_dropout", "model_dropout"]
)
def test_masks_advance_and_statistics_are_kept(config):
    model = Net(nnx.Rngs(0), rate=0.0 if config.dropout else 0.5)
    mj.attach(model, config, rngs=nnx.Rngs(1))
    if config.dropout:  # B starts at zero, where the adapter's dropout has no effect
        model.first.adapter.lora_b[...] = jax.random.normal(jax.random.key(2), (2, 16))
    model, losses = train(model, optax.sgd(0.0), 4)
    assert len(set(losses)) == 4  # nothing learns, so that losses differ by their masks alone
    mean = np.zeros(6)
    for _ in range(4):
        mean = 0.9 * mean + 0.1 * X.mean(0)
    np.testing.assert_allclose(model.norm.mean[...], mean, atol=1e-6)


def test_agrees_with_the_optimizer_of_flax():
    losses, models = [], []
    for _ in range(2):
        models.append(Net(nnx.Rngs(0)))
        mj.attach(models[-1], mj.LoRAConfig(rank=2, dropout=0.1), rngs=nnx.Rngs(1))
    base = np.array(models[1].first.kernel[...])
    models[0], first = train(models[0], optax.adam(1e-2), 5)
    optimizer = nnx.Optimizer(models[1], optax.adam(1e-2), wrt=mj.AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, mj.AdapterParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(models[1], optimizer)) for _ in range(5)]
    np.testing.assert_allclose(losses, first, rtol=1e-5)
    np.testing.assert_array_equal(models[1].first.kernel[...], base)
    assert int(models[0].drop.rngs.count[...]) == int(models[1].drop.rngs.count[...]) == 5
    for model in models:
        model.eval()
    np.testing.assert_allclose(models[0](X), models[1](X), atol=1e-5)


def test_state_is_what_a_call_changes():
    model = Net(nnx.Rngs(0))
    mj.attach(model, mj.VeRAConfig(rank=2, targets=("last",)), rngs=nnx.Rngs(1))
    _, adapters, state, frozen = nnx.split(model, mj.AdapterParam, mj.mutable_state, ...)
    assert {path[0] for path, _ in nnx.to_flat_state(state)} == {"norm", "drop"}
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) > sum(leaf.size for leaf in jax.tree.leaves(state))
    plain = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    mj.attach(plain, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    assert not jax.tree.leaves(nnx.state(plain, mj.mutable_state))
