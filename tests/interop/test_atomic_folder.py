"""A folder appears whole or not at all."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import mora_jax as mj
from mora_jax.interop.atomic_folder import check_out, new_folder, repair
from mora_jax.interop.hub import local_folder


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
        with new_folder(out, ours={"a", "b"}, overwrite=True) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert (out / "a").read_text() == "old"
    (out / "notes").write_text("somebody's own")
    (out / "d").mkdir()
    (out / "d" / "x").touch()
    with new_folder(out, ours={"a", "b", "d"}, overwrite=True) as folder:
        (folder / "b").write_text("new")
        (folder / "d").mkdir()
    assert sorted(path.name for path in out.iterdir()) == ["b", "d", "notes"]
    assert list((out / "d").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def replace(out, stop):
    """Replaces what is in a folder; in place of the last renaming `stop` is called."""
    calls, rename = [], Path.rename

    def counted(self, target):
        calls.append(target)
        return stop() if len(calls) == 6 else rename(self, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "rename", counted)
        with new_folder(out, ours={"a_config.json", "w", "d"}, overwrite=True) as folder:
            for name in ("a_config.json", "more", "w"):
                (folder / name).write_text("new")


@pytest.fixture
def old(tmp_path):
    out = tmp_path / "out"
    (out / "d").mkdir(parents=True)
    for name in ("a_config.json", "w", "d/x", "notes"):
        (out / name).write_text("old")
    return out


def is_half_done(out):
    # What nobody should take for whole has no configuration.
    return not (out / "a_config.json").exists() and (out / "more").exists() and not (out / "d").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "broken")])
def test_a_stop_between_two_files_leaves_the_old_folder(old, error):
    def stop():
        local_folder(old)  # nobody mends what a living process is about
        assert is_half_done(old)
        raise error

    before = content(old)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else mj.InputError):
        replace(old, stop)
    assert content(old) == before
    assert sorted(path.name for path in old.iterdir()) == ["a_config.json", "d", "notes", "w"]


@pytest.mark.parametrize("look", [local_folder, lambda out: check_out(out, overwrite=True)])
def test_after_a_kill_the_old_folder_comes_back(old, look):
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.interop.test_atomic_folder import replace; "
        "replace(Path(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL))"
    )
    before = content(old)
    assert subprocess.run([sys.executable, "-c", code, str(old)], check=False).returncode == -signal.SIGKILL
    assert is_half_done(old)
    look(old)
    assert content(old) == before
    assert sorted(path.name for path in old.iterdir()) == ["a_config.json", "d", "notes", "w"]


def kill_while_filling(out):
    with new_folder(Path(out)) as folder:
        (folder / "weights").write_bytes(bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)


def test_after_a_kill_in_a_new_folder_the_next_start_leaves_nothing_beside_it(tmp_path):
    code = "import sys; from tests.interop import test_atomic_folder as t; t.kill_while_filling(sys.argv[1])"
    out = tmp_path / "out[1]"
    assert subprocess.run([sys.executable, "-c", code, str(out)], check=False).returncode == -signal.SIGKILL
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    with new_folder(out) as filled:
        repair(tmp_path)
        assert filled.is_dir(), "what a living process fills stays"
    assert list(tmp_path.iterdir()) == [out] and list(out.iterdir()) == []


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
    with pytest.raises(mj.InputError, match=r"is not empty \(file\); .* overwrite=True"), new_folder(tmp_path):
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


def test_a_link_stays_and_leads_to_what_was_written(tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "absent"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / name)
        for text in ("one", "two"):
            with new_folder(link, ours={"file"}, overwrite=text == "two") as folder:
                (folder / "file").write_text(text)
            assert link.is_symlink() and (tmp_path / "disk" / name / "file").read_text() == text
        assert [path.name for path in (tmp_path / "disk" / name).iterdir()] == ["file"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(mj.InputError, match="loop cannot be (made|written)"), new_folder(tmp_path / "loop"):
        pass


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of 64 KiB, where this process may."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_mounted_disk(disk):
    (disk / "lost+found").mkdir()
    with new_folder(disk) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("whole")
    assert sorted(path.name for path in disk.iterdir()) == ["lost+found", "sub"]
    # A full one, and one that may only be read, keep what they hold.
    with pytest.raises(mj.InputError, match="disk cannot be written: No space left on device"):
        with new_folder(disk, ours={"sub"}, overwrite=True) as folder:
            (folder / "big").write_bytes(bytes(100_000))
    assert (disk / "sub" / "file").read_text() == "whole"
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for path in (disk / "new", disk):
        with pytest.raises(mj.InputError, match="cannot be made: Read-only file system"):
            with new_folder(path, overwrite=True):
                pass
    assert sorted(path.name for path in disk.iterdir()) == ["lost+found", "sub"]


def test_a_failure_says_which_folder(tmp_path):
    with pytest.raises(mj.InputError, match=rf"{tmp_path}/out cannot be written: No space left on device$"):
        with new_folder(tmp_path / "out") as folder:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "file"))
    with pytest.raises(mj.InputError, match=r"out cannot be written: No space left on device$"):
        with new_folder(tmp_path / "out"):
            raise Exception("No space left on device (os error 28)")  # noqa: TRY002 -- as the tokenizers library
    with pytest.raises(Exception, match="^a bug$"), new_folder(tmp_path / "out"):
        raise Exception("a bug")  # noqa: TRY002
    with pytest.raises(mj.InputError, match="out cannot be written: /nowhere: No such file or directory"):
        with new_folder(tmp_path / "out"):
            Path("/nowhere").read_text()
