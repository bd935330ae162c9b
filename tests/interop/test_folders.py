"""A folder appears whole or not at all."""

import os
import stat

import pytest

import mora_jax as mj
from mora_jax.interop.folders import new_folder


def test_it_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("whole")
        assert not out.exists()
        assert folder.parent == out.parent
    assert (out / "file").read_text() == "whole"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    def interrupted():
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_folder_stays_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")

    def interrupted():
        with new_folder(out, replace=frozenset({"a", "b"})) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert (out / "a").read_text() == "old"
    with new_folder(out, replace=frozenset({"a", "b"})) as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in out.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_its_mode_is_the_usual_one(tmp_path):
    (tmp_path / "usual").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("usual", "out")}
    assert len(modes) == 1


def test_places_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(mj.InputError, match="is a file; give a folder"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(mj.InputError, match="cannot be made"), new_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(mj.InputError, match=r"is not empty \(file\)"), new_folder(tmp_path):
        pass


def test_others_may_read_it(tmp_path):
    before = os.umask(0o022)
    try:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("whole")
            os.chmod(folder / "file", 0o600)  # as the safetensors library leaves its files
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "file").stat().st_mode) == 0o644
