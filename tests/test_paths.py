"""What a path means is what it meant where it was given; files appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from mora_jax.data.read.locate import locate
from mora_jax.errors import InputError
from mora_jax.paths import found_path, glob_pattern, local_path, new_file


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder whose name looks like a pattern, to work in, below a home folder."""
    work = tmp_path / "home" / "notes [1]"
    work.mkdir(parents=True)
    (work / "a.json").write_text("{}")
    (tmp_path / "home" / "b.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(work)
    return work


def test_what_is_here_becomes_absolute_and_nothing_else(work):
    assert found_path("a.json") == f"{work}/a.json"
    assert found_path("./a.json") == f"{work}/a.json"
    assert found_path("../b.json") == f"{work}/../b.json"
    assert found_path("~/b.json") == f"{work.parent}/b.json"
    assert found_path("~") == str(work.parent)
    for text in ("owner/name", "absent.json", "gs://bucket/a.json", f"{work}/a.json"):
        assert found_path(text) == text
    with pytest.raises(InputError, match="~nobody-here/x: there is no such home folder"):
        local_path("~nobody-here/x")


@pytest.mark.parametrize("text", ["*.json", "./*.json", "../*.json", "~/*.json", "~/notes*/a.json", "**/*.json"])
def test_a_glob_means_the_same_from_everywhere(work, tmp_path, monkeypatch, text):
    found = [Path(origin.name).resolve() for origin in locate(text)]
    assert found
    pattern = found_path(text)
    assert pattern == glob_pattern(text) and os.path.isabs(pattern)
    monkeypatch.chdir(tmp_path)
    assert [Path(origin.name).resolve() for origin in locate(pattern)] == found


def test_a_working_directory_that_is_gone(work, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(InputError, match="a.json: the working directory is gone"):
        local_path("a.json")
    assert local_path(work / "a.json") == work / "a.json"


def test_a_file_is_whole_or_as_it_was(work):
    (work / "link.html").symlink_to(work / "page.html")
    with new_file("link.html") as file:
        file.write_text("one")
    assert (work / "link.html").is_symlink() and (work / "page.html").read_text() == "one"

    def fill_the_disk():
        with new_file("page.html") as file:
            file.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="page.html cannot be written: No space left on device"):
        fill_the_disk()
    assert (work / "page.html").read_text() == "one"
    with (
        pytest.raises(InputError, match="absent/page.html cannot be written: No such file"),
        new_file("absent/page.html") as file,
    ):
        file.write_text("x")
    assert sorted(path.name for path in work.iterdir()) == ["a.json", "link.html", "page.html"]
