"""The hash of a base: the same wherever and however its tensors are stored, another for any other weights."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mora_jax.errors import InputError
from mora_jax.interop.fingerprint import base_hash


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((300, 200)).astype(np.float32) for name in ("a.weight", "b.weight", "c.weight")}


def whole(folder, tensors, **metadata):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata=metadata or None)
    return base_hash(folder)


def test_only_the_tensors_count(tmp_path, tensors):
    first = whole(tmp_path / "one", tensors)
    assert first.startswith("xxh3:") and len(first) == 37
    assert whole(tmp_path / "two", tensors, format="pt", more="words") == first
    shards = tmp_path / "shards"
    shards.mkdir()
    files = {"x.safetensors": ["c.weight"], "y.safetensors": ["b.weight", "a.weight"]}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, shards / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert base_hash(shards) == first


@pytest.mark.parametrize("change", ["value", "last", "shape", "dtype", "name", "missing"])
def test_what_changes_it(tmp_path, tensors, change):
    first = whole(tmp_path / "one", tensors)
    array = tensors["b.weight"]
    if change == "value":
        array += 1e-6
    elif change == "last":
        array[-1, -1] += 1
    elif change == "shape":
        tensors["b.weight"] = array.reshape(200, 300)
    elif change == "dtype":
        tensors["b.weight"] = array.view(np.int32)
    elif change == "name":
        tensors["d.weight"] = tensors.pop("b.weight")
    else:
        del tensors["b.weight"]
    assert whole(tmp_path / "two", tensors) != first


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x09\x00")
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        base_hash(tmp_path)
