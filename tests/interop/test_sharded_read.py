"""Base models read straight into their shards: the same values, and only the bytes that each device needs."""

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.interop import safetensors_io
from mora_jax.models.init import init_decoder
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import base_shardings
from mora_jax.training.state import flat_arrays

SIZES = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    model = init_decoder(SIZES, rngs=nnx.Rngs(0), dtype="float32")
    bias = model.layers.self_attn.qkv_proj.bias
    bias.set_value(jax.random.normal(jax.random.key(1), bias.shape))
    mj.save_pretrained(model, path)
    return path


@pytest.mark.parametrize("mesh", [(1, 4, 1, 1), (1, 1, 4, 1), (1, 2, 2, 1), (1, 1, 2, 2)])
def test_values_and_places(folder, mesh):
    whole = flat_arrays(nnx.state(mj.load_pretrained(folder, dtype="float32")[0]))
    model, _ = mj.load_pretrained(
        folder, dtype="float32", shardings=lambda shapes: base_shardings(make_mesh(*mesh), shapes)
    )
    spread = flat_arrays(nnx.state(model))
    assert whole.keys() == spread.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(spread[name], array, err_msg=name)
    cut = [name for name, array in spread.items() if not array.sharding.is_fully_replicated]
    assert {name for name in spread if name.endswith(("kernel", "embedding"))} <= set(cut)


def test_no_region_is_read_twice_or_whole(folder, monkeypatch):
    read: dict[str, list[int]] = {}

    of_file = safetensors_io.TensorFiles.read_part

    def read_part(files, name, index):
        part = of_file(files, name, index)
        read.setdefault(name, []).append(part.size)
        return part

    monkeypatch.setattr(safetensors_io.TensorFiles, "read_part", read_part)
    mj.load_pretrained(folder, dtype="float32", shardings=lambda shapes: base_shardings(make_mesh(1, 4), shapes))
    files = safetensors_io.open_checkpoint(folder)
    matrices = {name: shape for name, shape in files.shapes.items() if len(shape) == 2}
    assert len(matrices) == 2 + 2 * 7
    for name, shape in matrices.items():
        assert read[name] == [np.prod(shape) // 4] * 4, name
