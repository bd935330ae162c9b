"""What a path means: a file, a glob, a folder, a saved data set or one on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from mora_jax.data.arrow_rows import HubData, SavedFolder
from mora_jax.data.locating import locate
from mora_jax.data.reading import DataFile
from mora_jax.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl.gz", "C.CSV", "notes.md", ".hidden.json", "below/d.txt", "x[1].json"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(*paths):
    return [origin.name for origin in locate(paths)]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("data/b.jsonl", ["data/b.jsonl"]),
        ("data", ["data/C.CSV", "data/a.jsonl.gz", "data/b.jsonl", "data/x[1].json"]),
        ("data/*.jsonl*", ["data/a.jsonl.gz", "data/b.jsonl"]),
        ("data/[ab].*", ["data/a.jsonl.gz", "data/b.jsonl"]),
        ("data/**/*.txt", ["data/below/d.txt"]),
        ("data/x[1].json", ["data/x[1].json"]),
    ],
)
def test_files(path, found, folder):
    assert names(path) == found
    assert names(Path(path), "data/b.jsonl") == [*found, "data/b.jsonl"]
    assert all(isinstance(origin, DataFile) for origin in locate(path))
    assert names(str(folder / path)) == [str(folder / name) for name in found]


def test_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert names("~/data/b.jsonl") == [str(folder / "data/b.jsonl")]
    assert names("~/data/b.*") == [str(folder / "data/b.jsonl")]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), "no data file given"),
        (("",), "no data file given"),
        (("a.json",), "no such data file: a.json"),
        (("data/c.jsonl",), "no such data file: data/c.jsonl"),
        (("owner/rows.jsonl.gz",), "no such data file: owner/rows.jsonl.gz"),
        (("data/train",), "no such data file: data/train"),
        (("a/b/c",), "no such data file: a/b/c"),
        (("/absent/rows",), "no such data file: /absent/rows"),
        (("data/*.parquet",), r"no file matches data/\*.parquet"),
        (("data/bel*",), r"no file matches data/bel\*"),
        (("empty",), "empty is a folder without data files; known endings: .json, .*a glob, such as empty/"),
        (("data/notes.md",), "data/notes.md: cannot tell the kind of file from its name"),
        (("data/*",), "data/notes.md: cannot tell the kind of file"),
        (("data/b.jsonl", "absent"), "no such data file: absent"),
    ],
)
def test_paths_that_lead_nowhere(paths, message, folder):
    with pytest.raises(InputError, match=message) as caught:
        locate(paths)
    assert "\n" not in str(caught.value)


def test_hub_ids(folder):
    [origin] = locate("owner/name-1.0", split="test", subset="s", streaming=True)
    assert isinstance(origin, HubData)
    assert (origin.identity, origin.split, origin.subset, origin.streaming) == ("owner/name-1.0", "test", "s", True)
    assert origin.name == "owner/name-1.0 (s, test)"
    assert names("owner/name") == ["owner/name (train)"]


def test_saved_folders(folder):
    for name, files in (("one", ("state.json", "dataset_info.json")), ("many", ("dataset_dict.json",))):
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_text("{}")
        [origin] = locate(name, split="test")
        assert isinstance(origin, SavedFolder)
        assert origin.name == ("many (test)" if name == "many" else "one")
        assert names(name) == [name]
