"""Adapters out of the difference of two checkpoints."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.interop.convert.difference import adapter_from_difference
from tests.models.tiny import hf_folder, random_ids
from tests.models.tiny_torch import hf_logits, load_torch
from tests.peers import peft

IDS = random_ids(2, 9)


def changed_folder(folder: Path, rank: int | None = None, *, norm: bool = False) -> Path:
    """The base with other matrices: by a random change of some rank (None for full)."""
    hf_folder(folder)
    draws, tensors = np.random.default_rng(7), load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            out, width = tensor.shape
            inner = rank or min(out, width)
            change = draws.standard_normal((out, inner)) @ draws.standard_normal((inner, width))
            tensors[name] = tensor + np.float32(0.1 * change)
        elif norm and name == "model.norm.weight":
            tensors[name] = tensor + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {
        "base": hf_folder(root / "base"),
        "low": changed_folder(root / "low", 2),
        "full": changed_folder(root / "full", None, norm=True),
    }


@pytest.mark.peers
def test_a_change_of_low_rank_is_found_exactly(folders, tmp_path):
    model, conversion = adapter_from_difference(folders["base"], folders["low"], rank=2)
    assert conversion.error < 1e-5
    assert conversion.left_out == {}
    assert len(conversion.rows) == 21
    mj.save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load_torch(folders["base"]), str(tmp_path / "adapter")).eval()
    np.testing.assert_allclose(hf_logits(loaded, IDS), hf_logits(load_torch(folders["low"]), IDS), atol=1e-4)


def test_the_error_and_what_is_left_out_are_stated(folders):
    model, conversion = adapter_from_difference(folders["base"], folders["full"], rank=4, targets=("q_proj", "up_proj"))
    before, after = (load_file(folders[name] / "model.safetensors") for name in ("base", "full"))
    rest = whole = 0.0
    for row in conversion.rows:
        values = np.linalg.svd(after[f"{row.path}.weight"] - before[f"{row.path}.weight"], compute_uv=False)
        np.testing.assert_allclose(row.error, np.linalg.norm(values[4:]), rtol=1e-4)
        rest, whole = rest + (values[4:] ** 2).sum(), whole + (values**2).sum()
    np.testing.assert_allclose(conversion.error, np.sqrt(rest / whole), rtol=1e-4)
    assert len(conversion.left_out) == 15 + 1
    np.testing.assert_allclose(conversion.left_out["model.norm.weight"], np.sqrt(32), rtol=1e-5)
    assert "left out: 16 other tensors changed too" in str(conversion)
    assert 0 < conversion.left_out_share < 1
    assert {entry.path.rpartition(".")[2] for entry in adapters_of(model)} == {"q_proj", "up_proj"}


def test_mora_is_fitted_to_a_difference(folders):
    model, conversion = adapter_from_difference(folders["base"], folders["full"], rank=4, kind="rotation")
    assert {(entry.config.kind, entry.config.rank) for entry in adapters_of(model)} == {("rotation", 4)}
    assert 0.1 < conversion.error < 1


def test_without_a_rank_the_loss_is_named(folders):
    with pytest.raises(mj.InputError, match=r"21 of 21 updates have full rank, .* at rank 8; give a rank"):
        adapter_from_difference(folders["base"], folders["full"], rank=None)
    with pytest.raises(mj.InputError, match="has no rank that says how large MoRA's matrices become: give a rank"):
        adapter_from_difference(folders["base"], folders["full"], rank=None, kind="sharing")


def test_checkpoints_that_do_not_match(folders, tmp_path):
    tensors = load_file(folders["low"] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(mj.InputError, match=r"up_proj.weight has shape \[48, 32\] in .*, but \[47, 32\]"):
        adapter_from_difference(folders["base"], tmp_path, rank=2)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(mj.InputError, match=f"lacks 1 tensors of .*: {name}"):
        adapter_from_difference(folders["base"], tmp_path, rank=2)
    with pytest.raises(mj.InputError, match=r"targets 'x\+' match no matrix"):
        adapter_from_difference(folders["base"], folders["low"], rank=2, targets="x+")
