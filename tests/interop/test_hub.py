"""Paths and hub ids."""

import huggingface_hub
import pytest

import mora_jax as mj
from mora_jax.interop.hub import local_folder


def test_folders_are_themselves(tmp_path, monkeypatch):
    assert local_folder(tmp_path) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("owner/name").samefile(tmp_path / "owner" / "name")  # before any hub id


def test_hub_ids_are_fetched_without_pickles(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, allow_patterns):
        asked[repository] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_folder("owner/name") == tmp_path
    assert "*.safetensors" in asked["owner/name"]
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["owner/name"])


@pytest.mark.parametrize("name", ["/absolute/nowhere", "./owner/name", "a/b/c", "single", "with space/name"])
def test_what_is_neither(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(mj.InputError, match="is not a folder"):
        local_folder(name)
