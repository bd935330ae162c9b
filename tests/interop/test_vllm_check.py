"""Folders that vLLM takes, and one finding for each thing that it refuses or misreads."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.interop.convert.convert import convert_to_lora
from mora_jax.interop.load import load_shapes
from mora_jax.interop.vllm_check import check_folder
from tests.interop.test_load import write_tokenizer
from tests.models.tiny import fill_randomly, hf_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    model = load_shapes(base)
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj", "up_proj")), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_our_adapters_pass(adapter):
    assert check_folder(adapter) == []


def test_lifted_mora_passes_although_its_ranks_differ(base, tmp_path):
    model = load_shapes(base)
    mj.attach(model, mj.MoRAConfig(rank=1), rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "mora")
    assert any("it is a MoRA" in finding for finding in check_folder(tmp_path / "mora"))
    convert_to_lora(model)
    mj.save_adapter(model, tmp_path / "lifted")
    fields = json.loads((tmp_path / "lifted" / "adapter_config.json").read_text())
    assert fields["rank_pattern"], "the matrices have different sides"
    assert check_folder(tmp_path / "lifted") == []


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "VERA"}, "peft_type is VERA"),
        ({"r": 513}, "max_lora_rank goes up to 512"),
        ({"target_modules": None}, "lacks target_modules"),
        ({"target_parameters": ["x"]}, "target_parameters is set"),
        ({"alpha_pattern": {"q_proj": 4}}, "q_proj is scaled by 2, but vLLM reads no patterns and would scale by 8"),
        ({"r": 1, "rank_pattern": {"q_proj|up_proj": 2}}, "rank 2 above r 1"),
    ],
    ids=str,
)
def test_fields(adapter, fields, words):
    edit(adapter, **fields)
    assert any(words in finding for finding in check_folder(adapter))


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t | {"base_model.model.lm_head.weight": np.zeros((2, 2))}, "is no LoRA weight by its name"),
        (lambda t: {n: v for n, v in t.items() if n != f"{KEY}.lora_B.weight"}, "has lora_A alone"),
        (lambda t: t | {f"{KEY}.lora_A.weight": np.zeros((3, 32), np.float32)}, "has factors [3, 32] and [32, 2]"),
        (lambda t: {n.replace("q_proj", "c_attn"): v for n, v in t.items()}, "c_attn is none of the modules"),
        (lambda t: {n.replace(".weight", ".default.weight"): v for n, v in t.items()}, "by its name"),
        (lambda t: {n: v.astype(np.float64) for n, v in t.items()}, "dtype F64"),
    ],
)
def test_tensors(adapter, change, words):
    edit_tensors(adapter, change)
    assert any(words in finding for finding in check_folder(adapter))


def test_missing_and_broken_weights(adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert any("not a complete safetensors file" in finding for finding in check_folder(adapter))
    weights.unlink()
    assert any("has no adapter_model.safetensors" in finding for finding in check_folder(adapter))
    with pytest.raises(mj.InputError, match=r"neither adapter_config.json nor config.json"):
        check_folder(tmp_path)


def test_merged_models(base, tmp_path):
    model = mj.load_pretrained(base, dtype="float32")[0]
    mj.save_pretrained(model, tmp_path / "merged", max_shard_bytes=20_000)
    assert check_folder(tmp_path / "merged") == ["there are no tokenizer files; vLLM needs them, or --tokenizer"]
    write_tokenizer(tmp_path / "merged")
    assert check_folder(tmp_path / "merged") == []
    (tmp_path / "merged" / "more.safetensors").write_bytes(
        next((tmp_path / "merged").glob("model-00001*")).read_bytes()
    )
    assert check_folder(tmp_path / "merged") == ["more.safetensors is not in the index; vLLM would leave it out"]
    next((tmp_path / "merged").glob("model-00002*")).unlink()
    config = tmp_path / "merged" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float8", "architectures": None}))
    findings = check_folder(tmp_path / "merged")
    assert [words in "\n".join(findings) for words in ("weights: ", "'float8'", "no architectures")] == [True] * 3
