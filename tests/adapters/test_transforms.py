"""Adapted layers under what people put around them: `nnx.tabulate`, forward mode, remat, vmap, abstract models."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.base import Adapter
from tests.adapters.test_attach import IDS, Model, fill
from tests.adapters.test_conformance import CASES, PROGRAMS

EMBEDDED = mj.LoRAConfig(rank=2, use_dora=True, dropout=0.25, targets=("embed", "first", "query", "einsum"))


def subclasses(kind):
    for one in kind.__subclasses__():
        yield one
        yield from subclasses(one)


def test_tabulate_leaves_every_method_as_it_was():
    """`nnx.tabulate` sets every function of a class anew, and a static method would come back as a plain function."""
    model = Model(nnx.Rngs(0))
    mj.attach(model, EMBEDDED, rngs=nnx.Rngs(1))
    table = nnx.tabulate(model, IDS, console_kwargs={"width": 200})
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    shown = {row for row in rows if row and row[0].isalpha() and not row.startswith("attention")}
    layers = {"embed", "embed/attend", "blocks/0", "blocks/1", "einsum", "norm"}
    assert shown == layers, "layers, and nothing of what goes on in them"
    for kind in subclasses(Adapter):
        static = [n for n in dir(kind) if isinstance(inspect.getattr_static(kind, n), staticmethod) and n[0] != "_"]
        assert not static, f"{kind.__name__}.{static} would not survive nnx.tabulate"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_all_methods_work_after_tabulate(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    mj.attach(layer, CASES[name], rngs=nnx.Rngs(1))
    layer = fill(layer)
    expected = layer(x)
    nnx.tabulate(layer, x)
    np.testing.assert_array_equal(layer(x), expected)
    mj.merge(layer)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    mj.attach(layer, CASES[name], rngs=nnx.Rngs(1))


X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)


def trained_layer(config):
    """A layer with random adapters, as a function of its adapters and its input."""
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    mj.attach(layer, config, rngs=nnx.Rngs(1))
    graphdef, adapters, frozen = mj.partition(fill(layer))
    return adapters, lambda adapters, x: jnp.sum(jnp.tanh(nnx.merge(graphdef, adapters, frozen)(x)))


def direction(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


def dot(left, right):
    return sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_forward_mode(name):
    """Along a direction it agrees with reverse mode, and differentiates the gradient as finite differences do."""
    adapters, f = trained_layer(CASES[name])
    at = (adapters, X)
    along = direction(at, 1)
    gradient = jax.jit(jax.grad(f, (0, 1)))

    @jax.jit
    def forward(at, along):
        return jax.jvp(f, at, along)[1], jax.jvp(jax.grad(f, (0, 1)), at, along)[1]

    slope, bent = forward(at, along)
    np.testing.assert_allclose(slope, dot(gradient(*at), along), rtol=1e-4, atol=1e-4)
    if getattr(CASES[name], "use_dora", False):
        return  # the norm counts as a constant in each derivative, so that the gradient's differences see more
    steps = [gradient(*jax.tree.map(lambda v, d, s=s: v + s * 4e-3 * d, at, along)) for s in (1, -1)]
    differences = jax.tree.map(lambda up, down: (up - down) / 8e-3, *steps)
    for a, b in zip(jax.tree.leaves(bent), jax.tree.leaves(differences), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("name", ["lora", "mora", "ia3 on inputs"])
def test_jacobians_agree(name):
    adapters, f = trained_layer(CASES[name])
    forward, backward = jax.jit(lambda *at: (jax.jacfwd(f)(*at), jax.grad(f)(*at)))(adapters, X)
    for a, b in zip(jax.tree.leaves(forward), jax.tree.leaves(backward), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "mora rotation", "dora", "hira"])
def test_under_remat_vmap_and_nnx(name):
    """Gradients under `jax.checkpoint`; several adapters at once under `jax.vmap`; `nnx.jit` over `nnx.grad`."""
    adapters, f = trained_layer(CASES[name])
    gradient = jax.jit(jax.grad(f))
    plain = gradient(adapters, X)
    rematerialised = jax.jit(jax.grad(jax.checkpoint(f)))(adapters, X)
    several = [direction(adapters, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    at_once = jax.jit(jax.vmap(jax.grad(f), (0, None)))(stacked, X)
    for a, b in zip(jax.tree.leaves(rematerialised), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for i, one in enumerate(several):
        for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(gradient(one, X)), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)

    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    mj.attach(layer, CASES[name], rngs=nnx.Rngs(1))
    layer = fill(layer)

    @nnx.jit
    def by_nnx(layer, x):
        loss = nnx.remat(lambda layer, x: jnp.sum(jnp.tanh(layer(x))))
        return nnx.grad(loss, argnums=nnx.DiffState(0, mj.AdapterParam))(layer, x)

    for a, b in zip(jax.tree.leaves(by_nnx(layer, X)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
