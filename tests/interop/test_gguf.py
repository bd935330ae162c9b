"""Adapter folders as llama.cpp's converter reads them: names by the package `gguf`, and what it writes read again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import mora_jax as mj
from mora_jax import demo
from mora_jax.interop.engine_check import check_folder

pytestmark = pytest.mark.peers


def test_each_tensor_has_a_name_in_gguf_and_comes_back(tmp_path):
    gguf = pytest.importorskip("gguf")
    model, _ = mj.load_pretrained(demo.model_path(), dtype="float32")
    layer = "model.layers.1.mlp.up_proj"
    before = layer_kernel(model, tmp_path / "base", layer)
    mj.attach(model, mj.LoRAConfig(rank=4, alpha=12.0), rngs=nnx.Rngs(0))
    draws = nnx.Rngs(1)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, mj.AdapterParam):
            node[...] = 0.1 * draws.normal(node.shape)
    mj.save_adapter(model, tmp_path / "lora")
    assert not check_folder(tmp_path / "lora", "llama.cpp").findings

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    alpha = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["lora_alpha"]
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        module, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        known = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        assert known is not None, name
        writer.add_tensor(f"{known}.lora_{factor.lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    assert len(stored) == len(tensors) == 2 * 7 * 4
    # llama.cpp adds alpha / r times B A, r being the rows of A.
    a, b = (stored[f"blk.1.ffn_up.weight.lora_{factor}"] for factor in "ab")
    mj.merge(model)
    merged = layer_kernel(model, tmp_path / "merged", layer)
    np.testing.assert_allclose(merged - before, alpha / len(a) * b @ a, atol=1e-5)


def layer_kernel(model, folder, layer):
    """A layer's weight, `[out, in]`, as the model's folder has it."""
    mj.save_pretrained(model, folder)
    return load_file(folder / "model.safetensors")[f"{layer}.weight"]
