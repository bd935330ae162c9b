"""LoRA out of `.lora.h5` files in the layout of keras-hub, against dense updates by `einsum` over heads.

Numbers of layers and axes are those of files that keras-hub wrote (`scripts/check_checkpoints.py` runs it).
"""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.cli import convert
from mora_jax.cli.main import main
from mora_jax.interop.convert.checkpoints import PROGRAMS
from mora_jax.interop.convert.keras import BLOCKS, adapter_from_keras
from tests.models.tiny import hf_folder

h5py = pytest.importorskip("h5py")

WIDTH, INNER, HEADS, KEYS, SIZE, RANK = 32, 48, 4, 2, 8, 3
GEMMA = {
    "q_proj": ((HEADS, WIDTH), SIZE, "ndr,rh->dnh"),
    "k_proj": ((KEYS, WIDTH), SIZE, "ndr,rh->dnh"),
    "v_proj": ((KEYS, WIDTH), SIZE, "ndr,rh->dnh"),
    "o_proj": ((HEADS, SIZE), WIDTH, "nhr,rd->nhd"),
    "down_proj": ((INNER,), WIDTH, "fr,rd->fd"),
}
LLAMA = GEMMA | {
    "q_proj": ((WIDTH, HEADS), SIZE, "dnr,rh->dnh"),
    "k_proj": ((WIDTH, KEYS), SIZE, "dnr,rh->dnh"),
    "v_proj": ((WIDTH, KEYS), SIZE, "dnr,rh->dnh"),
}
# By family: axes, and the numbers of layers in the second of two blocks.
FAMILIES = {
    "gemma": (GEMMA, {"q_proj": 21, "k_proj": 20, "v_proj": 19, "o_proj": 18, "down_proj": 13}),
    "llama": (LLAMA, {"q_proj": 22, "k_proj": 21, "v_proj": 20, "o_proj": 19, "down_proj": 14}),
    "qwen3": (LLAMA, {"q_proj": 26, "k_proj": 24, "v_proj": 22, "o_proj": 21, "down_proj": 16}),
}


def write(path, layers, rank=RANK):
    with h5py.File(path, "w") as data:
        data["lora/vars/rank"] = rank
        for number, (a, b) in layers.items():
            data[f"lora/{number}/vars/lora_kernel_a"], data[f"lora/{number}/vars/lora_kernel_b"] = a, b
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        hf_folder(folder / family, family, num_hidden_layers=2, head_dim=SIZE)
    weights = folder / "qwen3" / "model.safetensors"
    norms = {f"model.layers.{i}.self_attn.{part}_norm.weight" for i in range(2) for part in "qk"}
    save_file(load_file(weights) | {name: np.ones(SIZE, np.float32) for name in norms}, weights)
    return {family: folder / family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [RANK, 2 * WIDTH])
def test_updates_are_those_of_keras(family, rank, bases, tmp_path):
    """Also of a rank above what the matrix can have: the folder's is no higher than the smaller side."""
    axes, numbers = FAMILIES[family]
    draws, layers, updates = np.random.default_rng(3), {}, {}
    for name, (above, last, product) in axes.items():
        a, b = draws.standard_normal((*above, rank)), draws.standard_normal((rank, last)) / rank
        layers[numbers[name]] = a, b
        updates[name] = np.einsum(product, a, b)
    out = tmp_path / "adapter"
    file = write(tmp_path / "all.lora.h5", layers, rank)
    words = ["convert", "--from", "keras", "--model", bases[family], "--adapter", file, "--out", out]
    assert main([str(word) for word in words]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model, _ = mj.load_pretrained(bases[family], dtype="float32")
    mj.load_adapter(model, out)
    found = {entry.path: entry.params for entry in adapters_of(model) if np.any(entry.params["lora_b"])}
    for name, update in updates.items():
        part = "mlp" if name == "down_proj" else "self_attn"
        params = found.pop(f"model.layers.1.{part}.{name}")
        inputs = INNER if name == "down_proj" else WIDTH
        delta = params["scaling"] * (params["lora_a"] @ params["lora_b"])
        np.testing.assert_allclose(delta, update.reshape(inputs, -1), atol=1e-4, err_msg=name)
    assert not found
    assert rank > RANK or {entry.config.rank for entry in adapters_of(model)} == {RANK, KEYS * RANK, HEADS * RANK}


QUERY = np.ones((WIDTH, HEADS, RANK)), np.ones((RANK, SIZE))
ODD = {
    "no LoRA": ({}, "holds no LoRA"),
    "a norm": ({2: QUERY}, "layer 2 is no matrix of llama with 2 layers"),
    "the embedding": ({0: QUERY}, "layer 0 is no matrix of llama"),
    "a layer too many": ({33: QUERY}, "layer 33 is no matrix of llama with 2 layers"),
    "a name": ({"query": QUERY}, "is no readable .lora.h5 of keras-hub: "),
    "axes of Gemma": (
        {11: (np.ones((HEADS, WIDTH, RANK)), QUERY[1])},
        "layer 11 has factors [4, 32, 3] and [3, 8], but model.layers.0.self_attn.q_proj is [32, 32]",
    ),
    "another rank": ({11: (QUERY[0], np.ones((2, SIZE)))}, "layer 11 has factors [32, 4, 3] and [2, 8], but"),
    "no axes": ({11: (np.float32(1), np.float32(1))}, "layer 11 has factors [] and [], but"),
    "another width": ({3: (np.ones((40, RANK)), np.ones((RANK, WIDTH)))}, "layer 3 has factors [40, 3] and [3, 32]"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_does_not_fit_is_named(odd, bases, tmp_path):
    layers, message = ODD[odd]
    with pytest.raises(mj.InputError) as caught:
        adapter_from_keras(write(tmp_path / "x.lora.h5", layers), bases["llama"])
    assert message in str(caught.value)


def test_what_cannot_be_read_is_refused_and_nothing_written(bases, tmp_path, capsys, monkeypatch):
    assert convert.PROGRAMS == (*PROGRAMS, "keras")
    file = write(tmp_path / "x.lora.h5", {11: QUERY})
    (tmp_path / "text.lora.h5").write_text("no HDF5")
    monkeypatch.delitem(BLOCKS, "qwen3")
    cases = [
        ([file, "--alpha", 2], bases["llama"], "--alpha is for --from tunix"),
        ([tmp_path / "text.lora.h5"], bases["llama"], "text.lora.h5 is no readable .lora.h5 of keras-hub: "),
        ([tmp_path / "absent.lora.h5"], bases["llama"], "absent.lora.h5 is no readable .lora.h5 of keras-hub: "),
        (
            [file],
            bases["qwen3"],
            "LoRA of keras-hub is read for gemma, gemma2, gemma3_text, llama, qwen2, not",
        ),
    ]
    for (adapter, *options), base, message in cases:
        words = ["convert", "--from", "keras", "--adapter", adapter, "--model", base, "--out", tmp_path / "out"]
        assert main([str(word) for word in (*words, *options)]) == 2, message
        printed = capsys.readouterr()
        assert message in printed.err and len(printed.err.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(mj.InputError, match="h5py is not installed"):
        adapter_from_keras(file, bases["llama"])
