"""The stack's own backward against JAX's: the same gradients, and no copy of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.adapters.products.matmul import adapted_dot
from mora_jax.models.layer_scan import run_stack

L, D = 4, 6


def body(x, layer, shared, given=()):
    y = x + shared["scale"] * jnp.tanh(adapted_dot(None, x, layer["frozen"], None, None) @ layer["trained"])
    return y if not given else y + jnp.sin(y * given["seen"]) * given["other"]


def inputs(width: int = D):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), jnp.float32)  # noqa: E731
    layers = {"frozen": draw(L, width, width), "trained": draw(L, width, width), "index": jnp.arange(L)}
    return draw(5, width), layers, {"scale": jnp.float32(0.7)}


def plain(x, layers, shared, given=()):
    for i in range(L):
        x = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], layers), shared, given)
    return x


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_same_value_and_gradients(remat):
    x, layers, shared = inputs()

    def ours(x, trained):
        return jnp.sum(run_stack(body, remat, x, layers | {"trained": trained}, shared) ** 2)

    def theirs(x, trained):
        return jnp.sum(plain(x, layers | {"trained": trained}, shared) ** 2)

    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, layers["trained"])
    expected = jax.value_and_grad(theirs, (0, 1))(x, layers["trained"])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours(x, layers["trained"]), expected[0], rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_earlier_layers_give_gets_the_sum_of_gradients(remat):
    x, layers, shared = inputs()
    given = {"seen": jnp.linspace(0.5, 2.0, 5 * D).reshape(5, D), "other": jnp.float32(0.4)}

    def ours(x, given):
        return jnp.sum(run_stack(body, remat, x, layers, shared, given) ** 2)

    found = jax.jit(jax.grad(ours, (0, 1)))(x, given)
    expected = jax.grad(lambda x, given: jnp.sum(plain(x, layers, shared, given) ** 2), (0, 1))(x, given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_weights_of_several_kinds_can_be_trained_at_once():
    x, layers, shared = inputs()
    weights = {name: layers[name] for name in ("frozen", "trained")}
    found = jax.grad(lambda w: jnp.sum(run_stack(body, "none", x, layers | w, shared) ** 2))(weights)
    expected = jax.grad(lambda w: jnp.sum(plain(x, layers | w, shared) ** 2))(weights)
    for name in weights:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_frozen_weights_are_not_copied(remat):
    width = 256
    x, layers, shared = inputs(width)

    def loss(adapters, layers):
        def thin(x, layer, shared, given):
            product = adapted_dot(None, x, layer["frozen"], None, None)
            return x + shared["scale"] * jnp.tanh(product) * layer["gain"]

        kept = {"frozen": layers["frozen"], "gain": adapters}
        return jnp.sum(run_stack(thin, remat, x, kept, shared) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((L, 1)), layers).compile()
    # A stacked copy of the weights would be L · width² numbers; one layer at a time may be in flight.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * L * width * width * 4
