"""Bases quantised while they are read: the same codes however they are cut, one layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.products.quantization import FORMATS, quantize
from mora_jax.interop import sharded_read
from mora_jax.models.init import init_decoder
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import base_shardings
from mora_jax.training.state import flat_arrays
from tests.models.quantized import projections
from tests.models.tiny import LLAMA

#: 192 inputs are 3 blocks and 320 are 5: cut over 2 and 4 devices, blocks don't come out even.
SIZES = LLAMA | {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    mj.save_pretrained(init_decoder(SIZES, rngs=nnx.Rngs(0), dtype="float32"), path)
    return path


@pytest.mark.parametrize("held", FORMATS)
def test_codes_are_those_of_each_layer_of_the_file(folder, held):
    plain = mj.load_pretrained(folder, dtype="float32")[0]
    for dtype in ("float32", "bfloat16"):  # the dtype of the computation doesn't matter
        model = mj.load_pretrained(folder, dtype=dtype, quantize=held)[0]
        assert model.quantize == held
        for ours, theirs in zip(projections(model), projections(plain), strict=True):
            for layer in range(2):
                values, scales = quantize(np.asarray(theirs.kernel[layer]), held)
                np.testing.assert_array_equal(ours.kernel.values[layer], values)
                np.testing.assert_array_equal(ours.kernel.scales[layer], scales)
            assert ours.kernel.shape == theirs.kernel.shape and ours.kernel[...].dtype == dtype
        np.testing.assert_array_equal(
            model.embed_tokens.embedding[...], plain.embed_tokens.embedding[...].astype(dtype)
        )
        assert model.lm_head.kernel.dtype == dtype and model.norm.weight.dtype == jnp.float32


@pytest.mark.parametrize("held", FORMATS)
@pytest.mark.parametrize("mesh", [(1, 4, 1, 1), (1, 1, 4, 1), (1, 2, 2, 1), (1, 1, 2, 2)])
def test_a_shard_has_the_numbers_of_the_whole(folder, held, mesh):
    whole = flat_arrays(nnx.state(mj.load_pretrained(folder, dtype="float32", quantize=held)[0]))
    model, _ = mj.load_pretrained(
        folder, dtype="float32", quantize=held, shardings=lambda shapes: base_shardings(make_mesh(*mesh), shapes)
    )
    spread = flat_arrays(nnx.state(model))
    assert whole.keys() == spread.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(spread[name], array, err_msg=name)
    values = [array for name, array in spread.items() if name.endswith("kernel.values")]
    assert len(values) == 4 and not any(array.sharding.is_fully_replicated for array in values)
    inside = [array.sharding.shard_shape(array.shape)[1] % (64 if held == "int8" else 32) for array in values]
    assert any(inside)  # some cut is inside a block


def test_one_layer_is_read_at_once_and_each_once(folder, monkeypatch):
    sizes = []

    def read_region(*args):
        region = real(*args)
        sizes.append(region.size)
        return region

    real = sharded_read.read_region
    monkeypatch.setattr(sharded_read, "read_region", read_region)
    mj.load_pretrained(folder, dtype="float32", quantize="nf4")
    parameters = nnx.state(init_decoder(SIZES, rngs=nnx.Rngs(0), dtype="float32"), nnx.Param)
    assert max(sizes) == 192 * 2 * 320 and sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(parameters))


def test_an_adapter_goes_out_and_comes_back(folder, tmp_path):
    model = mj.load_pretrained(folder, dtype="float32", quantize="nf4")[0]
    mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    for leaf in jax.tree.leaves(nnx.state(model, mj.AdapterParam), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        leaf[...] = 0.1 * jax.random.normal(jax.random.key(1), leaf.shape)
    mj.save_adapter(model, tmp_path / "adapter")
    again = mj.load_pretrained(folder, dtype="float32", quantize="nf4")[0]
    mj.load_adapter(again, tmp_path / "adapter")
    ids = np.arange(10)[None]
    np.testing.assert_array_equal(again(ids), model(ids))
    exact = mj.load_pretrained(folder, dtype="float32")[0]
    mj.load_adapter(exact, tmp_path / "adapter")
    assert np.abs(exact(ids) - model(ids)).max() > 1e-3
    mj.merge(exact)


@pytest.mark.slow
def test_several_adapters_stand_on_a_quantised_base(folder, tmp_path):
    model = mj.load_pretrained(folder, dtype="float32", quantize="int8")[0]
    ids = np.arange(10)[None]
    base = np.asarray(model(ids))
    mj.attach(model, mj.LoRAConfig(rank=2, init="orthogonal"), rngs=nnx.Rngs(0))
    for _, node in nnx.iter_graph(model):
        if isinstance(node, mj.AdapterParam):
            node[...] = node[...] + 0.1
    expected = np.asarray(model(ids))
    mj.save_adapter(model, tmp_path / "adapter")
    named = mj.NamedAdapters(mj.load_pretrained(folder, dtype="float32", quantize="int8")[0], slots=2)
    named.load(tmp_path / "adapter", "one")
    both = named.model(np.tile(ids, (2, 1)), adapter_ids=np.array([named.ids(["one"])[0], -1]))
    np.testing.assert_allclose(both, np.stack([expected[0], base[0]]), rtol=1e-4, atol=1e-4)


def test_a_format_that_there_is_not(folder):
    with pytest.raises(mj.InputError, match="'fp4' is not supported; give one of none, int8, nf4"):
        mj.load_pretrained(folder, quantize="fp4")
