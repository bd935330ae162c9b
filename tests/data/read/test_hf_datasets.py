"""Folders saved by `datasets`, and data sets on the hub (of which only the call is tested: tests have no network)."""

from __future__ import annotations

import datasets
import pytest
from datasets import Dataset, DatasetDict

from mora_jax.data.read.locate import HubData, SavedFolder
from mora_jax.errors import InputError

ROWS = [{"text": f"row {i}", "m": [{"a": i}, {"b": None}]} for i in range(2500)]
NUMBERED = [(i + 1, {"text": f"row {i}", "m": [{"a": i}, {}]}) for i in range(2500)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    data = Dataset.from_list(ROWS)
    data.save_to_disk(folder / "one")
    data.with_format("numpy", columns=["text"]).save_to_disk(folder / "formatted")
    DatasetDict(train=data, test=data.select(range(3))).save_to_disk(folder / "many")
    DatasetDict(validation=data.select(range(2))).save_to_disk(folder / "only")
    return folder


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("one", None, 2500),
        ("one", "validation", 2500),
        ("formatted", None, 2500),
        ("many", None, 2500),
        ("many", "test", 3),
        ("only", None, 2),
    ],
)
def test_saved_folders(name, split, count, saved):
    folder = SavedFolder(saved / name, split)
    assert SavedFolder.is_one(saved / name)
    assert list(folder.rows()) == NUMBERED[:count]
    assert list(folder.rows()) == NUMBERED[:count]


def test_digests_of_saved_folders(saved, tmp_path):
    def digest(name, split=None):
        return SavedFolder(saved / name, split).digest()

    assert digest("one") == digest("one") == digest("many") == digest("many", "train")
    assert len({digest("one"), digest("many", "test"), digest("only")}) == 3


def test_splits_that_are_not_there(saved, tmp_path):
    with pytest.raises(InputError, match=r"many has no split 'dev': set data.split to one of train, test"):
        list(SavedFolder(saved / "many", "dev").rows())
    DatasetDict(a=Dataset.from_list(ROWS[:1]), b=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "ab")
    with pytest.raises(InputError, match=r"ab has no split 'train': set data.split to one of a, b"):
        list(SavedFolder(tmp_path / "ab").rows())


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_folders_that_are_broken(content, tmp_path):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"not a readable folder of `datasets` with rows in it \(.+\)") as caught:
        list(SavedFolder(tmp_path).rows())
    assert "\n" not in str(caught.value)


def test_a_folder_without_rows(tmp_path):
    Dataset.from_list(ROWS[:2]).select([]).save_to_disk(tmp_path)
    with pytest.raises(InputError, match="not a readable folder of `datasets` with rows in it"):
        list(SavedFolder(tmp_path).rows())


def test_a_folder_whose_file_was_cut(tmp_path):
    Dataset.from_list(ROWS[:2]).save_to_disk(tmp_path / "a")
    [file] = (tmp_path / "a").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable folder"):
        list(SavedFolder(tmp_path / "a").rows())


class Hub:
    """Stands for `datasets.load_dataset`."""

    def __init__(self):
        self.calls = []
        self.data = Dataset.from_list(ROWS[:2])

    def __call__(self, path, name=None, *, split, streaming):
        self.calls.append((path, name, split, streaming))
        return self.data.to_iterable_dataset() if streaming else self.data


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub)
    return hub


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data(streaming, hub):
    data = HubData("owner/name", "test[:2]", "sub", streaming)
    assert list(data.rows()) == list(data.rows()) == NUMBERED[:2]
    assert hub.calls == [("owner/name", "sub", "test[:2]", streaming)]
    assert HubData("owner/name").split == "train"


def test_digests_of_hub_data(hub, monkeypatch):
    first = HubData("owner/name").digest()
    assert first == HubData("owner/name").digest()
    hub.data = Dataset.from_list(ROWS[:1])
    assert HubData("owner/name").digest() != first

    class Builder:
        hash = "abc"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name: Builder())
    streamed = HubData("owner/name", streaming=True)
    assert streamed.digest() == HubData("owner/name", streaming=True).digest()
    assert streamed.digest() != HubData("owner/name", "test", streaming=True).digest()
    assert streamed.digest() != first


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no\nnetwork"),
        ValueError("Unknown split"),
        datasets.exceptions.DatasetNotFoundError("doesn't exist"),
        datasets.exceptions.DatasetGenerationError("failed"),
    ],
)
def test_hub_data_that_cannot_be_read(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    reason = " ".join(str(error).split())
    for data in (HubData("owner/name"), HubData("owner/name", streaming=True)):
        for use in (lambda data=data: list(data.rows()), data.digest):
            with pytest.raises(
                InputError, match=rf"cannot read owner/name \(train\), .* hub: {reason}; check"
            ) as caught:
                use()
            assert "\n" not in str(caught.value)


def test_a_network_that_fails_on_the_way(hub, monkeypatch):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("reset")

    hub.data = datasets.IterableDataset.from_generator(rows)
    hub.data.to_iterable_dataset = lambda: hub.data
    with pytest.raises(InputError, match=r"cannot read owner/name \(train\).* reset"):
        list(HubData("owner/name", streaming=True).rows())
