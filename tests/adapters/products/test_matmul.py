"""The adapted product: its backward, and what it never does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import mora_jax as mj
from mora_jax.adapters.products.matmul import dot32_tn, row_dot
from mora_jax.adapters.projection import Part, Projection, TokenDropout
from mora_jax.adapters.sites import sites


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def projection(dtype=jnp.float32, *, bias: bool = True) -> Projection:
    """A fused projection of three matrices, as q, k and v are: 2 groups of 2 + 1 + 1 heads of 3 features."""
    made = Projection(
        (Part("q_proj", 2), Part("k_proj", 1), Part("v_proj", 1)),
        10,
        out_shape=(2, 4, 3),
        part_axis=1,
        axes=("embed", "kv_heads", "q_per_kv", "head_dim"),
        use_bias=bias,
        path="attn.{name}",
        dtype=dtype,
        rngs=nnx.Rngs(0),
        init_std=0.3,
    )
    if bias:
        made.bias[...] = jnp.asarray(random(9, 2, 4, 3), dtype)
    return made


CONFIGS = {
    "lora": mj.LoRAConfig(rank=3, alpha=6.0),
    "lora on two": mj.LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj")),
    "sharing": mj.MoRAConfig(rank=3),
    "rotation": mj.MoRAConfig(rank=3, kind="rotation", targets=("k_proj",)),
}


def adapted(name: str, dtype=jnp.float32):
    made = projection(dtype)
    mj.attach(made, CONFIGS[name], rngs=nnx.Rngs(1))
    graphdef, adapters, frozen = mj.partition(made)
    leaves, tree = jax.tree.flatten(adapters)
    filled = [jnp.asarray(random(i, *leaf.shape)) for i, leaf in enumerate(leaves)]
    return graphdef, jax.tree.unflatten(tree, filled), frozen


def by_hand(graphdef, adapters, frozen, x):
    """Each named matrix on its own, with autodiff-friendly plain products."""
    y = {}
    for site in sites(nnx.merge(graphdef, adapters, frozen)):
        y[site.part] = x @ site.kernel() + site.bias()
        if site.adapter is not None:
            y[site.part] = y[site.part] + x @ site.adapter.delta_weight()
    return y


def part_of(made, y, name):
    """The output of one matrix."""
    return made.layout.take(y, [part.name for part in made.parts].index(name))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    ("tokens", "features", "columns"), [(256, 160, 96), (128, 96, 8), (7, 8, 96), (64, 64, 64), (1, 5, 3), (0, 5, 3)]
)
@pytest.mark.parametrize("multiplies", [True, False])
def test_products_over_tokens(multiplies, tokens, features, columns, lead, dtype, monkeypatch):
    """Whatever stands around them: XLA can't compute every product of bfloat16 that it makes out of others."""
    monkeypatch.setattr("mora_jax.backend.multiplies_bfloat16", lambda: multiplies)
    x, y = (jnp.asarray(random(i, *lead, tokens, size), dtype) for i, size in enumerate((features, columns)))
    wide = np.asarray(x, np.float64), np.asarray(y, np.float64)
    expected = np.einsum("...ni,...no->...io", *wide)

    def turned_first(x, y):
        x = jnp.swapaxes(jnp.swapaxes(x, -1, -2) * 2, -1, -2)
        return dot32_tn(x, jnp.swapaxes(y, 0, -1).swapaxes(0, -1))

    forms = {
        dot32_tn: expected,
        lambda x, y: jnp.swapaxes(dot32_tn(x, y), -1, -2): np.swapaxes(expected, -1, -2),
        lambda x, y: 2 * jnp.swapaxes(dot32_tn(x, y), -1, -2): 2 * np.swapaxes(expected, -1, -2),
        lambda x, y: dot32_tn(x, y).sum(-1): expected.sum(-1),
        turned_first: 2 * expected,
        lambda x, y: jax.vmap(dot32_tn)(x[None], y[None])[0]: expected,
    }
    for form, known in forms.items():
        found = jax.jit(form)(x, y)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, known, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_equals_each_matrix_alone(name):
    graphdef, adapters, frozen = adapted(name)
    x = random(5, 2, 3, 10)
    made = nnx.merge(graphdef, adapters, frozen)
    y = made(x)
    assert y.shape == (2, 3, 2, 4, 3)
    for number, (part, expected) in enumerate(by_hand(graphdef, adapters, frozen, x).items()):
        np.testing.assert_allclose(part_of(made, y, part), expected, atol=1e-4)
        assert part_of(made, y, part).shape[-1] == made.layout.part_features(number)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_autodiff_of_plain_products(name):
    graphdef, adapters, frozen = adapted(name)
    x = random(5, 7, 10)
    target = {"q_proj": random(0, 7, 12), "k_proj": random(1, 7, 6), "v_proj": random(2, 7, 6)}

    def ours(adapters, x):
        made = nnx.merge(graphdef, adapters, frozen)
        y = made(x)
        return sum(jnp.sum(jnp.square(part_of(made, y, part)) * g) for part, g in target.items())

    def plain(adapters, x):
        y = by_hand(graphdef, adapters, frozen, x)
        return sum(jnp.sum(jnp.square(y[part]) * g) for part, g in target.items())

    found = jax.tree.leaves(jax.grad(ours, (0, 1))(adapters, x))
    expected = jax.tree.leaves(jax.grad(plain, (0, 1))(adapters, x))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_equals_forward(name):
    made = nnx.merge(*adapted(name))
    x = random(5, 7, 10)
    expected = np.asarray(made(x))
    mj.merge(made)
    assert not made.adapters
    np.testing.assert_allclose(made(x), expected, rtol=1e-5, atol=1e-5)


def dots(jaxpr) -> list:
    """Every matrix product in a jaxpr, the nested ones too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for inner in jaxprs_in_params(equation.params):
            found += dots(inner)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_no_product_is_promoted_and_no_frozen_weight_gets_a_gradient(name):
    graphdef, adapters, frozen = adapted(name, jnp.bfloat16)
    x = jnp.asarray(random(5, 7, 10), jnp.bfloat16)

    def loss(adapters, frozen):
        return jnp.sum(nnx.merge(graphdef, adapters, frozen)(x).astype(jnp.float32) ** 2)

    traced = jax.make_jaxpr(jax.grad(loss))(adapters, frozen)
    products = dots(traced.jaxpr)
    assert products
    for product in products:
        assert [v.aval.dtype for v in product.invars] == [jnp.bfloat16] * 2, product
        assert product.outvars[0].aval.dtype == jnp.float32
        # The gradient of the frozen kernel would be the only product with its shape.
        assert product.outvars[0].aval.shape not in ((10, 24), (24, 10))


def test_dropout_draws_a_mask_for_each_matrix():
    made = projection(bias=False)
    mj.attach(made, mj.LoRAConfig(rank=10, alpha=10.0, dropout=0.5), rngs=nnx.Rngs(1))
    for adapter in made.adapters.values():
        # The update hands the (dropped) input through: A is the identity, B sums.
        adapter.lora_a[...] = jnp.eye(10)
        adapter.lora_b[...] = jnp.ones_like(adapter.lora_b[...])
    x = jnp.ones((64, 10))
    base = made.kernel[...].reshape(10, -1).sum(0).reshape(2, 4, 3)
    quiet = made(x) - base
    np.testing.assert_allclose(quiet, 10.0, atol=1e-4)
    noisy = made(x, token_dropout=TokenDropout.of(jax.random.key(0), 1, 64)) - base
    sums = {name: np.asarray(part_of(made, noisy, name))[:, 0] for name in ("q_proj", "k_proj", "v_proj")}
    for values in sums.values():
        np.testing.assert_allclose(values / 2, np.round(values / 2), atol=1e-3)  # kept features count twice
        assert 8.0 < values.mean() < 12.0
    assert np.abs(sums["q_proj"] - sums["k_proj"]).max() > 1


def test_each_row_times_its_own_matrix_in_both_modes():
    x, w, dx, dw, dy = (
        random(0, 3, 4, 5),
        random(1, 3, 5, 2),
        random(2, 3, 4, 5),
        random(3, 3, 5, 2),
        random(4, 3, 4, 2),
    )
    value, slope = jax.jit(lambda *at: jax.jvp(row_dot, at[:2], at[2:]))(x, w, dx, dw)
    _, of_w = jax.jit(lambda w, dw: jax.jvp(lambda w: row_dot(x, w), (w,), (dw,)))(w, dw)
    back = jax.jit(lambda *at: jax.vjp(row_dot, *at)[1](dy))(x, w)
    np.testing.assert_allclose(value, x @ w, atol=1e-5)
    np.testing.assert_allclose(slope, dx @ w + x @ dw, atol=1e-5)
    np.testing.assert_allclose(of_w, x @ dw, atol=1e-5)
    np.testing.assert_allclose(back[0], dy @ w.swapaxes(1, 2), atol=1e-5)
    np.testing.assert_allclose(back[1], x.swapaxes(1, 2) @ dy, atol=1e-5)
