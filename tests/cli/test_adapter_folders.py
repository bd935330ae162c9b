"""Broken adapter folders by the command line: one line, exit code 2, nothing written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mora_jax as mj

CONFIGS = {
    "vera": mj.VeRAConfig(rank=3, targets=("q_proj",)),
    "ia3": mj.IA3Config(),
    "adalora": mj.AdaLoRAConfig(rank=3, target_rank=2, targets=("q_proj",)),
    "bitfit": mj.BitFitConfig(targets=("q_proj",)),
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(model_dir, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for name, config in CONFIGS.items():
        model = mj.load_pretrained(model_dir, dtype="float32")[0]
        mj.attach(model, config, rngs=nnx.Rngs(0))
        mj.save_adapter(model, root / name)
    return root


def fields(folder: Path, **changes) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path, change) -> None:
    found = {name: change(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, folder / WEIGHTS)


def drop(part: str, count: int = 1):
    left = [count]

    def change(name, tensor):
        if part in name and left[0]:
            left[0] -= 1
            return None
        return tensor

    return change


BROKEN = {
    "only a pickle": (
        "ia3",
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "only pickled weights (adapter_model.bin), which can run code when loaded",
    ),
    "no weights": ("ia3", lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "no config": ("vera", lambda f: (f / CONFIG).unlink(), CONFIG),
    "no JSON": ("vera", lambda f: (f / CONFIG).write_text("{"), CONFIG),
    "no peft_type": ("vera", lambda f: fields(f, peft_type=None), "peft_type must be one of LORA, VERA, IA3, ADALORA"),
    "an unknown peft_type": ("ia3", lambda f: fields(f, peft_type="LOHA"), "found 'LOHA'"),
    "half a file": ("adalora", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), "not a complete"),
    "no ia3_l": ("ia3", lambda f: tensors(f, drop("ia3_l")), "1 targets lack tensors"),
    "no projection": ("vera", lambda f: tensors(f, drop("vera_B")), "vera_B are missing"),
    "a short vector": ("vera", lambda f: tensors(f, lambda n, t: t[:2] if "lambda_d" in n else t), "has shape [2]"),
    "names that are no list": ("ia3", lambda f: fields(f, feedforward_modules=5), "feedforward_modules must be a list"),
    "targets that are not there": ("ia3", lambda f: fields(f, target_modules=["c_attn"]), "match no layer"),
    "ranks that are no masks": ("adalora", lambda f: fields(f, rank_pattern={"x.lora_E": 2}), "truth values"),
    "an unknown tensor": ("bitfit", lambda f: tensors(f, lambda n, t: t), "is no part of an adapter"),
    "whole numbers": ("ia3", lambda f: tensors(f, lambda n, t: t.astype(np.int32)), "has dtype I32"),
    "dora beside biases": ("bitfit", lambda f: fields(f, use_dora=True), "use_dora beside lora_bias is not supported"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(fails, folders, model_dir, tmp_path, case):
    kind, breaks, words = BROKEN[case]
    folder = tmp_path / "adapter"
    shutil.copytree(folders / kind, folder)
    breaks(folder)
    if case == "an unknown tensor":
        save_file(load_file(folder / WEIGHTS) | {"q_proj.hada_w1": np.zeros(2, np.float32)}, folder / WEIGHTS)
    out = tmp_path / "out"
    assert words in fails("convert", "--model", model_dir, "--adapter", folder, "--to", "peft", "--out", out)
    assert not out.exists()


def test_merging_leaves_a_model_with_the_same_answers(run, folders, model_dir, tmp_path):
    ids = np.arange(8)[None]
    for kind in CONFIGS:
        model = mj.load_pretrained(model_dir, dtype="float32")[0]
        mj.load_adapter(model, folders / kind)
        for _, node in nnx.iter_graph(model):
            if isinstance(node, mj.AdapterParam):
                noise = np.random.default_rng(node.size).standard_normal(node.shape)
                node.set_value(node[...] + 0.1 * noise.astype(np.float32))
        expected = np.asarray(model(ids))
        mj.save_adapter(model, tmp_path / kind)
        arguments = ["--model", model_dir, "--adapter", tmp_path / kind, "--out", tmp_path / f"{kind}-merged"]
        assert run("merge", *arguments)[0] == 0
        merged = mj.load_pretrained(tmp_path / f"{kind}-merged", dtype="float32")[0]
        np.testing.assert_allclose(np.asarray(merged(ids)), expected, atol=1e-4, err_msg=kind)


def test_the_base_is_the_one_that_the_adapter_was_made_for(run, fails, model_dir, tmp_path):
    model = mj.load_pretrained(model_dir, dtype="float32")[0]
    mj.attach(model, mj.LoRAConfig(rank=2), rngs=0)
    mj.save_adapter(model, tmp_path / "one")
    mj.save_adapter(model, tmp_path / "two")
    for adapters in (["one"], ["one", "two"]):
        given = [word for name in adapters for word in ("--adapter", tmp_path / name)]
        words = ["generate", *given, "--prompt", "red", "--max-new-tokens", "4"]
        code, answer, error = run(*words)
        assert code == 0, error
        assert run(*words, "--model", model_dir)[1] == answer
    assert run("merge", "--adapter", tmp_path / "one", "--out", tmp_path / "merged")[0] == 0
    mj.save_adapter(model, tmp_path / "nameless", base_model_name_or_path="x")
    fields(tmp_path / "nameless", base_model_name_or_path=None)
    error = fails("generate", "--adapter", tmp_path / "nameless", "--prompt", "red")
    assert error.endswith("nameless names no base model: give --model MODEL")
    assert fails("generate", "--prompt", "red").startswith("error: no model: give --model MODEL")
