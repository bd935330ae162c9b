"""Model folders whose files are damaged or say what cannot be: one line each, and nothing made in absurd sizes."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

import mora_jax as mj
from mora_jax.evaluation.chat import find_stop_ids
from tests.models.tiny import hf_folder

DEMO = Path(mj.__file__).parent / "demo/assets/model"
DOWN = "model.layers.0.mlp.down_proj.weight"
RAW = (DEMO / "model.safetensors").read_bytes()
SIZE = struct.unpack("<Q", RAW[:8])[0]
HEADER = json.loads(RAW[8 : 8 + SIZE])
START, STOP = HEADER[DOWN]["data_offsets"]


def packed(header: Any) -> bytes:
    """The weights under another header."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + RAW[8 + SIZE :]


def changed(**fields: Any) -> bytes:
    """The weights with other facts about one tensor."""
    return packed(HEADER | {DOWN: HEADER[DOWN] | fields})


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a billion layers": ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers must be at most 10000, found 1"),
    "layers": ({"num_hidden_layers": 9999}, "beside it: num_hidden_layers is 9999, the tensors have 4"),
    "fewer layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the tensors have 4"),
    "vocabulary": ({"vocab_size": 2**31 - 1}, "vocab_size is 2147483647, the tensors have 1001"),
    "width": ({"hidden_size": 2**30}, "hidden_size is 1073741824, the tensors have 128"),
    "inner width": ({"intermediate_size": 2**31 - 1}, "intermediate_size is 2147483647, the tensors have 256"),
    "heads": ({"num_attention_heads": 2**20}, "num_attention_heads × head_dim is 33554432, the tensors have 128"),
    "head size": ({"head_dim": 2**30}, "num_key_value_heads × head_dim is 4294967296, the tensors have 128"),
    "positions": ({"max_position_embeddings": 10**30}, "max_position_embeddings must be at most 2147483647, found 1"),
    "activation": ({"hidden_act": None}, "config.json: hidden_act must be one of gelu, .*, found None"),
    "model type": ({"model_type": "bert"}, "model_type is 'bert', but architectures names LlamaForCausalLM"),
    "model type null": ({"model_type": None}, "model_type is None, but architectures names LlamaForCausalLM"),
    "architectures": ({"architectures": {"a": 1}}, "architectures must be a list with the name of a class"),
    "not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, found nan"),
    "of no use here": (
        {"use_cache": "x"},
        "transformers, which reads config.json for the tokenizer, refuses it: .*'use_c",
    ),
    "remote code": ({"auto_map": 3}, "cannot load a tokenizer from .*: TypeError: "),
}
WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a complete safetensors file"),
    "cut in the length": (RAW[:7], "not a complete safetensors file"),
    "cut in the header": (RAW[: 8 + SIZE // 2], "not a complete safetensors file"),
    "cut in the tensors": (RAW[:-1], "not a complete safetensors file"),
    "longer": (RAW + b"x", "not a complete safetensors file"),
    "a header of exabytes": (struct.pack("<Q", 2**62) + RAW[8:], r"header too large\)"),
    "a list": (packed([1]), "not a complete safetensors file"),
    "unknown dtype": (changed(dtype="F99"), r"unknown variant `F99`, .*\.\.\.\): download it again"),
    "wrong dtype": (changed(dtype="F32"), "invalid shape, data type, or offset for tensor"),
    "huge shape": (changed(shape=[2**62, 2**62]), "not a complete safetensors file"),
    "other shape": (changed(shape=HEADER[DOWN]["shape"][::-1]), "intermediate_size is 256, the tensors have 128"),
    "overlap": (changed(data_offsets=[START - 64, STOP - 64]), "invalid offset for tensor"),
    "absurd offset": (changed(data_offsets=[START, 2**60]), "not a complete safetensors file"),
    "backwards": (changed(data_offsets=[STOP, START]), "not a complete safetensors file"),
    "null": (packed(HEADER | {DOWN: None}), "not a complete safetensors file"),
}
INDEXES: dict[str, tuple[Any, str]] = {
    "no table": ({}, "has no weight_map of tensor names to files"),
    "a number": ({"weight_map": {DOWN: 3}}, "has no weight_map of tensor names to files"),
    "absent": ({"weight_map": {DOWN: "b.safetensors"}}, "b.safetensors does not exist, but the index names it"),
    "outside": ({"weight_map": {DOWN: "../a.safetensors"}}, "names what is no file of the folder: '../a.safetensors'"),
    "no name": ({"weight_map": {DOWN: ""}}, "names what is no file of the folder: ''"),
    "long name": ({"weight_map": {DOWN: "a" * 5000}}, r"names what is no file of the folder: 'a+\.\.\.a+'"),
    "another file": ({"weight_map": {DOWN: "config.json"}}, "config.json is not a complete safetensors file"),
    "more": ({"weight_map": {DOWN: "a.safetensors", "x": "a.safetensors"}}, "1 tensors of the index are in no file: x"),
    "none": ({"weight_map": {}}, "38 tensors are missing"),
}
TOKENIZERS: dict[str, tuple[str, str, str]] = {
    "class": ("tokenizer_config.json", '{"tokenizer_class": 3}', "cannot load a tokenizer from"),
    "list": ("tokenizer_config.json", "[1]", "cannot load a tokenizer from"),
    "broken": ("tokenizer_config.json", "{", "cannot load a tokenizer from"),
    "length": ("tokenizer_config.json", '{"model_max_length": "x"}', "model_max_length must be a number, found 'x'"),
    "no end": ("tokenizer_config.json", '{"eos_token": ""}', "the tokenizer has no token '', which"),
    "no unknown": ("tokenizer_config.json", '{"unk_token": ""}', "cannot load a tokenizer from .*: RecursionError"),
    "model": ("tokenizer.json", '{"version": "1.0", "model": null}', "cannot load a tokenizer from"),
    "null": ("tokenizer.json", "null", "cannot load a tokenizer from"),
}


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(mj.InputError, match=message) as caught:
        mj.load_pretrained(folder, dtype="float32")
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).replace(str(folder), "")) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case, folder):
    fields, message = CONFIGS[case]
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values))
    refused(folder, message)


def test_sizes_of_a_model_of_one_layer(tmp_path):
    refused(
        hf_folder(tmp_path, num_hidden_layers=1, changes={"intermediate_size": 2**30}),
        "intermediate_size is 1073741824, the tensors have 48",
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "9" * 5000, "[" * 100_000, "\ud800"])
def test_config_that_is_no_object(text, folder):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, "config.json (is not valid JSON|must hold a JSON object)")


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case, folder):
    content, message = WEIGHTS[case]
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, message)


@pytest.mark.parametrize("case", INDEXES)
def test_index(case, folder):
    content, message = INDEXES[case]
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(folder, message)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer(case, folder):
    name, content, message = TOKENIZERS[case]
    (folder / name).write_text(content)
    refused(folder, message)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_folders_in_place_of_files(name, folder):
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, f"{name} cannot be read")


def test_stop_tokens(folder):
    model, tokenizer = mj.load_pretrained(folder, dtype="float32")
    for stated, found in ((None, {0}), ([], {0}), ([5, 7], {0, 5, 7}), (-1, {0}), ([10**30, 3], {0, 3})):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
        assert find_stop_ids(model, tokenizer) == found
    for stated in ("x", True, 1.5, float("nan"), ["x"], {}):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
        with pytest.raises(mj.InputError, match=r"generation_config.json: eos_token_id must be a token id or a list"):
            find_stop_ids(model, tokenizer)
