"""Files written tensor by tensor, and adapters of sharded models that are gathered one at a time."""

import tracemalloc

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.adapters.base import AdapterParam
from mora_jax.interop.safetensors_io import write_tensors
from mora_jax.models import init_decoder
from tests.models.tiny import LLAMA, fill_randomly


def test_the_library_reads_what_is_streamed(tmp_path):
    draws = np.random.default_rng(0)
    tensors = {
        "b": draws.standard_normal((3, 5)),
        "a": draws.standard_normal(()),
        "wider": draws.standard_normal((0, 4)),
    }
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    tensors["turned"] = np.asfortranarray(draws.standard_normal((4, 3)).astype(np.float32))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_tensors(tmp_path / "ours", shapes, iter(tensors.items()))
    for name, tensor in load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(tensor, tensors[name])
    with safe_open(tmp_path / "ours", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, tmp_path / "theirs")
    assert set(load_file(tmp_path / "theirs")) == set(tensors)


def test_headers_are_promises(tmp_path):
    tensor = np.zeros(2, np.float32)
    for shapes, tensors in ({"a": (3,)}, [("a", tensor)]), ({"a": (2,), "b": (2,)}, [("a", tensor)]):
        with pytest.raises(AssertionError, match="header"):
            write_tensors(tmp_path / "file", shapes, iter(tensors))


def shard(model: nnx.Module, kind: type = AdapterParam) -> None:
    """Spreads every array of a kind over four devices, along its last axis that they divide; copies the others."""
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    for _, node in nnx.iter_graph(model):
        if isinstance(node, kind):
            axis = max((i for i, size in enumerate(node.shape) if size % 4 == 0), default=None)
            spec = PartitionSpec(*("fsdp" if i == axis else None for i in range(len(node.shape))))
            node.set_value(jax.device_put(node.get_value(), NamedSharding(mesh, spec)))


@pytest.mark.parametrize("config", [mj.LoRAConfig(rank=4), mj.MoRAConfig(rank=8)], ids=["lora", "mora"])
def test_a_sharded_adapter_is_written_as_a_whole_one(tmp_path, config):
    model = init_decoder(LLAMA, nnx.Rngs(0), dtype="float32")
    mj.attach(model, config, rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "whole")
    shard(model)
    mj.save_adapter(model, tmp_path / "sharded")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()


def test_no_more_than_a_stack_is_gathered_at_once(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    model = init_decoder(LLAMA | sizes, nnx.Rngs(0), dtype="float32")
    mj.attach(model, mj.LoRAConfig(rank=64), rngs=nnx.Rngs(0))
    shard(model)
    arrays = [n.get_value() for _, n in nnx.iter_graph(model) if isinstance(n, AdapterParam)]
    total, largest = sum(array.nbytes for array in arrays), max(array.nbytes for array in arrays)
    tracemalloc.start()
    try:
        mj.save_adapter(model, tmp_path / "adapter")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Two factors of one stack beside those of the stack before, and one tensor that is turned.
    assert peak < 5 * largest < total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_model_is_written_as_a_whole_one_layer_by_layer(tmp_path, dtype):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12}
    model = init_decoder(LLAMA | sizes, nnx.Rngs(0), dtype="float32")
    mj.save_pretrained(model, tmp_path / "whole", dtype=dtype)
    shard(model, nnx.Param)
    arrays = [node.get_value() for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)]
    assert max(len(array.sharding.device_set) for array in arrays) == 4
    total = sum(array.nbytes for array in arrays)
    layer = max(array.nbytes for array in arrays) // 12
    mj.save_pretrained(model, tmp_path / "before", dtype=dtype)  # compiles, whose Python objects aren't counted below
    tracemalloc.start()
    try:
        mj.save_pretrained(model, tmp_path / "sharded", dtype=dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One layer of the largest stack, the tensor taken from it, turned and cast; and what Python holds besides.
    assert peak < 4 * layer + 300_000 < total / 3
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()
    # Nothing that was gathered stays with the arrays.
    assert not any(getattr(array, "_npy_value", None) is not None for array in arrays)
