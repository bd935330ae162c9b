"""What a path means: a file, a glob, a folder, a saved data set or one on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from mora_jax.data.read.files import DataFile
from mora_jax.data.read.locate import HubData, SavedFolder, locate
from mora_jax.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.jsonl",
        "a.jsonl.gz",
        "C.CSV",
        "notes.md",
        ".hidden.json",
        "below/d.txt",
        "x[1].json",
        "../repo/data/d.parquet",
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").mkdir()
    for name in ("dead.jsonl", "dangling/a.jsonl"):
        (tmp_path / name).symlink_to("nowhere")
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


def test_links_and_odd_names(folder):
    for name in ("Däten für 日本/meine Zeilen (1).jsonl", "an,other/x.jsonl", "blobs/3f2a"):
        path = folder / name
        path.parent.mkdir()
        path.write_text('{"text": "t"}')
    (folder / "link.jsonl").symlink_to("blobs/3f2a")  # As the hub's cache keeps its files.
    (folder / "linked").symlink_to("an,other")
    for path in ("Däten für 日本/meine Zeilen (1).jsonl", "an,other/x.jsonl", "link.jsonl"):
        [origin] = locate(path)
        assert origin.name == path
        assert list(origin.rows()) == [(1, {"text": "t"})]
    assert names("Däten für 日本", "linked") == ["Däten für 日本/meine Zeilen (1).jsonl", "linked/x.jsonl"]


def test_what_lies_beside_data_is_no_data(tmp_path):
    for name in ("README.md", "README.txt", "LICENSE.txt", "dataset_infos.json", "requirements.txt", ".gitattributes"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="is a folder without data files"):
        locate(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    assert names(tmp_path) == [str(tmp_path / "rows.jsonl")]
    assert names(tmp_path / "README.txt") == [str(tmp_path / "README.txt")]


def folder_of(tmp_path, *files):
    for name in files:
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "split", "chosen"),
    [
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], None, [1]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl"], "train", [0, 1]),
        (["train.jsonl", "dev.jsonl", "test.jsonl"], "validation", [0]),
        (["train.jsonl", "dev.jsonl", "test.jsonl"], "dev", [0]),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "test", [0]),
        (["train.jsonl", "eval.jsonl", "more.jsonl"], None, [1, 2]),
        (["train_sft-0.parquet", "test_sft-0.parquet", "train_gen-0.parquet"], "train_sft", [2]),
        # No sign of several splits: all.
        (["test-0.jsonl", "test-1.jsonl"], None, [0, 1]),
        (["contest.jsonl", "trainer.jsonl", "latest.jsonl"], None, [0, 1, 2]),
    ],
)
def test_files_of_several_splits(files, split, chosen, tmp_path):
    folder, notes = folder_of(tmp_path, *files), []
    found = [origin.name for origin in locate(folder, split=split, notes=notes)]
    assert found == [str(folder / sorted(files)[index]) for index in chosen]
    left_out = [file for index, file in enumerate(sorted(files)) if index not in chosen]
    expected = f"{folder}: files of other splits than {split or 'train'} are left out: {', '.join(left_out)}"
    assert notes == ([expected] if left_out else [])


def test_a_split_that_no_file_is_named_after(tmp_path):
    folder = folder_of(tmp_path, "train.jsonl", "test.jsonl")
    with pytest.raises(InputError, match="has files of the splits test, train, and none of 'validation': set data.spl"):
        locate(folder, split="validation")


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
        (("empty",), "empty is a folder without data files; known endings: .json, "),
        (("repo",), r"there are some in repo/data: name that folder, or a glob such as repo/\*\*/\*.parquet"),
        (("data\\b.jsonl",), r"no such data file: data\\b.jsonl; folders are separated by /"),
        (("dead.jsonl",), "no such data file: dead.jsonl is a link to nowhere, which is not there"),
        (("dangling",), "dangling/a.jsonl is a link to nowhere, which is not there"),
        (("data/z[1]*",), r"no file matches data/z\[1\]\*; a name with \[ in it is written with \[\[\] in a glob"),
        (("data/notes.md",), "data/notes.md: cannot tell the kind of file from its name"),
        (("data/*",), "data/notes.md: cannot tell the kind of file"),
        (
            ("data/b.jsonl", "absent"),
            r"no such data file: absent \(commas separate paths; one with a comma in its name",
        ),
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
