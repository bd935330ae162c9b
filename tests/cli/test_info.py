"""`mora-jax info` on models, adapters and runs, against counts of the files themselves."""

import json
import math

import pytest
from flax import nnx
from safetensors.numpy import load_file

import mora_jax as mj
from mora_jax.adapters.methods.registry import CONFIGS
from mora_jax.interop.describe import describe_model
from tests.models.tiny import hf_folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_model(run, tied, tmp_path):
    folder = hf_folder(tmp_path, tie_word_embeddings=tied)
    code, out, _ = run("info", folder, "--json", "--rank", 2)
    found = json.loads(out)
    tensors = load_file(folder / "model.safetensors")
    sizes = {name: value.size for name, value in tensors.items() if not (tied and name == "lm_head.weight")}
    assert (code, found["parameters"], found["tied"]) == (0, sum(sizes.values()), tied)
    assert found["parts"]["attention"] == sum(size for name, size in sizes.items() if "self_attn" in name)
    assert ("head" in found["parts"]) is not tied and sum(found["parts"].values()) == found["parameters"]
    assert found["context"] > 0 and found["targets"]["q_proj"]["layers"] == found["layers"]
    linear = [value.shape for name, value in tensors.items() if "proj" in name and value.ndim == 2]
    assert found["methods"]["lora"] == sum(2 * sum(shape) for shape in linear)
    assert found["methods"]["full"] == found["parameters"] and set(found["methods"]) == set(CONFIGS)
    code, out, _ = run("info", folder)
    assert code == 0 and f"parameters:              {found['parameters']:,}" in out


def test_an_adapter_and_what_is_neither(run, fails, tmp_path):
    folder = hf_folder(tmp_path / "base")
    model = mj.load_pretrained(folder, dtype="float32")[0]
    mj.attach(model, mj.MoRAConfig(rank=2, targets=("q_proj", "v_proj")), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "a")
    found = json.loads(run("info", tmp_path / "a", "--json")[1])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert (found["kind"], found["method"], found["targets"]) == ("adapter", "mora", ["q_proj", "v_proj"])
    assert found["parameters"] == sum(math.prod(value.shape) for value in tensors.values())
    assert found["settings"] == {"r": 2, "kind": "sharing", "lora_dropout": 0.0}  # MoRA has no alpha
    (tmp_path / "empty").mkdir()
    assert "is no model, adapter or run" in fails("info", tmp_path / "empty")


def test_a_check_from_the_command(run, tmp_path):
    folder = hf_folder(tmp_path / "base")
    model = mj.load_pretrained(folder, dtype="float32")[0]
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj",), use_dora=True), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "a")
    arguments = ["check", tmp_path / "a", "--model", folder, "--for"]
    code, out, _ = run(*arguments, "peft")
    assert code == 0 and "PEFT 0.21" in out and "tensors" in out
    code, out, _ = run(*arguments, "transformers", "--json")
    found = json.loads(out)
    layers = describe_model(folder)["layers"]
    assert code == 1 and len(found["findings"]) == layers and len(found["used"]) == 2 * layers
    assert {finding["effect"] for finding in found["findings"]} == {"dropped"}
    assert run(*arguments, "vllm")[0] == 1
