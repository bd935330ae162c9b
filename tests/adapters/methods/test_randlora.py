"""RandLoRA's random bases, and what its matrices can be."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.methods.randlora import BASES, random_bases


@pytest.mark.parametrize("kind", BASES)
def test_bases_have_their_sizes_and_unit_deviation(kind):
    a, b = random_bases(5, (33, 64), 0, kind)
    assert (a.shape, b.shape) == ((5, 33), (64, 7, 5))
    for base in (a, b):
        assert base.dtype == np.float32
        np.testing.assert_allclose(np.std(base, ddof=1), 1.0, atol=5e-3)  # dense ones are rounded to bfloat16
        assert (len(np.unique(base)) == 3) == (kind != "dense")
    np.testing.assert_array_equal(random_bases(5, (64, 33), 0, kind)[1], b)
    assert not np.array_equal(random_bases(5, (33, 64), 1, kind)[0], a)


@pytest.mark.peers
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("rank, widths, seed", [(5, (33, 64), 0), (8, (96, 64), 2**33 + 7)])
def test_bases_are_those_of_peft(kind, rank, widths, seed):
    """Bit for bit: drawn by torch's generator, in bfloat16 where they are dense."""
    peft, torch = (pytest.importorskip(name, reason="the extra peers is not installed") for name in ("peft", "torch"))
    model = torch.nn.Sequential(torch.nn.Linear(*widths))
    options = {} if kind == "dense" else {kind: True}
    config = peft.RandLoraConfig(r=rank, target_modules=["0"], projection_prng_key=seed, **options)
    theirs = peft.get_peft_model(model, config).base_model
    a, b = random_bases(rank, widths, seed, kind)
    np.testing.assert_array_equal(theirs.randlora_A["default"].float().numpy()[:, 0], a)
    np.testing.assert_array_equal(theirs.randlora_B["default"].float().numpy(), b)


def test_layers_share_the_bases_of_the_largest():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.wide, self.narrow = nnx.Linear(6, 12, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    model = Model()
    mj.attach(model, mj.RandLoRAConfig(rank=3), rngs=nnx.Rngs(1))
    a, b = random_bases(3, (8, 12), 0, "dense")
    for layer, smaller, larger, count in ((model.wide, 6, 12, 2), (model.narrow, 5, 8, 2)):
        np.testing.assert_array_equal(layer.adapter.randlora_a[...], a[:, :smaller])
        np.testing.assert_array_equal(layer.adapter.randlora_b[...], b[:larger, :count])


def test_an_update_has_full_rank():
    """Once Γ differs from base to base, since all of them share one A."""
    layer = nnx.Linear(12, 9, rngs=nnx.Rngs(0))
    mj.attach(layer, mj.RandLoRAConfig(rank=3), rngs=nnx.Rngs(1))
    assert not np.asarray(layer.adapter.delta_weight()).any()
    rng = np.random.default_rng(0)
    for variable in (layer.adapter.randlora_lambda, layer.adapter.randlora_gamma):
        variable[...] = jnp.asarray(rng.normal(size=variable.shape), jnp.float32)
    assert np.linalg.matrix_rank(np.asarray(layer.adapter.delta_weight())) == 9


def test_widths_are_two_numbers():
    with pytest.raises(ValueError, match="widths must be a number of inputs and one of outputs"):
        mj.RandLoRAConfig(widths=(3,))
    with pytest.raises(ValueError, match="bases must be one of dense, sparse, very_sparse"):
        mj.RandLoRAConfig(bases="some")
