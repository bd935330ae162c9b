"""OFT's blocks: their sizes, the series, and a fresh rotation that changes no bit."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.methods.oft import block_shape
from tests.adapters.formulas import FORMULAS

CONFIGS = {
    **{f"{terms} terms": mj.OFTConfig(4, num_cayley_neumann_terms=terms) for terms in (2, 3, 4, 6)},
    "by inverse": mj.OFTConfig(blocks=4, use_cayley_neumann=False),
    "shared": mj.OFTConfig(6, block_share=True),
    "one block": mj.OFTConfig(64),
}


def draw(*shape, seed=0):
    return (0.3 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("case", CONFIGS)
def test_is_the_formula_and_merges(case):
    layer, x = nnx.Linear(12, 5, rngs=nnx.Rngs(0)), draw(7, 12)
    kernel = np.float64(layer.kernel[...])
    mj.attach(layer, CONFIGS[case], rngs=nnx.Rngs(1))
    layer.adapter.oft_r[...] = jnp.asarray(draw(*layer.adapter.oft_r.shape, seed=1))
    params = {"oft_r": np.float64(layer.adapter.oft_r[...])}
    expected = x @ FORMULAS["oft"](kernel, None, params, CONFIGS[case], params)[0]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    mj.merge(layer)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_fresh_rotation_changes_no_bit(case, dtype):
    layer, x = nnx.Linear(12, 5, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)), draw(7, 12)
    plain = np.float32(layer(x))
    mj.attach(layer, CONFIGS[case], rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(np.float32(layer(x)), plain)


def test_exact_rotations_keep_lengths():
    layer, x = nnx.Linear(12, 12, use_bias=False, rngs=nnx.Rngs(0)), draw(7, 12)
    layer.kernel[...] = jnp.eye(12)
    mj.attach(layer, CONFIGS["by inverse"], rngs=nnx.Rngs(1))
    layer.adapter.oft_r[...] = 5 * jnp.asarray(draw(*layer.adapter.oft_r.shape, seed=1))
    assert np.abs(layer(x) - x).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(layer(x), axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "features", "shape"),
    [
        (mj.OFTConfig(32), 576, (18, 32)),
        (mj.OFTConfig(32), 40, (1, 40)),
        (mj.OFTConfig(5), 12, (3, 4)),
        (mj.OFTConfig(5), 42, (7, 6)),
        (mj.OFTConfig(blocks=5), 12, (4, 3)),
        (mj.OFTConfig(blocks=2), 7, None),
        (mj.OFTConfig(2), 7, None),
    ],
)
def test_sizes_that_divide(config, features, shape):
    if shape is None and config.blocks == 2:
        shape = (1, 7)
    if shape is None:
        with pytest.raises(ValueError, match="blocks of 2 of 7 inputs come to blocks of 1, which can't be rotated"):
            block_shape(config, features)
        return
    assert block_shape(config, features) == shape


def test_another_size_is_said():
    model = nnx.Linear(12, 5, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="block_size 5 doesn't divide 12 inputs, so it is 4 there"):
        mj.attach(model, mj.OFTConfig(5), rngs=nnx.Rngs(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mj.attach(nnx.Linear(12, 5, rngs=nnx.Rngs(0)), mj.OFTConfig(32), rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    "settings", [{"block_size": 0}, {"blocks": -1}, {"num_cayley_neumann_terms": 1}, {"block_share": 1}, {"bias": "x"}]
)
def test_settings_that_can_not_be(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        mj.OFTConfig(**settings)
