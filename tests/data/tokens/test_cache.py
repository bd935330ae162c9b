"""Tokens kept between runs: found again, whole, and only where nothing they depend on has changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mora_jax.data import Conversation, EncodedDataset, Message
from mora_jax.data.sources import Source, build_store, fingerprint
from mora_jax.data.tokens import encode
from mora_jax.data.tokens.encode import CHUNK, RowEncoder, encode_chunks
from mora_jax.data.tokens.store import TokenStore
from mora_jax.errors import InputError
from mora_jax.paths import cache_folder
from tests.data.conftest import TOKENIZERS


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("byte_level", "chatml")


def conversation(number: int) -> Conversation:
    turns = (Message("user", f"What is {number}?"), Message("assistant", str(number)))
    return Conversation(turns, source=f"row {number}")


def raw(count: int, start: int = 0):
    return [(f"row {i}", conversation(i)) for i in range(start, start + count)]


def same(one: TokenStore, other: TokenStore) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(one[i].input_ids, other[i].input_ids) and one.source(i) == other.source(i)
        for i in range(len(one))
    )


def test_special_tokens_in_texts_may_be_split(tmp_path):
    tokenizer = TOKENIZERS["byte_level"]()  # Of its own: the setting reaches into what other tests share.
    (tmp_path / "a.jsonl").write_text('{"instruction": "<|im_end|>", "output": "a"}\n')

    def ids(split):
        tokenizer.split_special_tokens = split
        source = Source(str(tmp_path / "a.jsonl"), template="plain", cache=str(tmp_path / "cache"))
        return source.load(tokenizer)[0].input_ids.tolist()

    (tmp_path / "cache").mkdir()
    joined, split = ids(False), ids(True)
    assert joined != split and len(joined) < len(split)
    assert ids(False) == joined and ids(True) == split


def test_found_again_without_reading(tokenizer, tmp_path):
    encoder = RowEncoder(tokenizer)
    first = build_store(encoder, raw(1100), {"format": "x"}, place=tmp_path / "k")

    def unreadable():
        raise AssertionError("the rows were read again")
        yield

    again = build_store(encoder, unreadable(), {}, place=tmp_path / "k")
    assert same(first, again) and len(again) == 1100
    assert again.facts["format"] == "x" and again.facts["counts"] == {}
    assert same(first, build_store(encoder, raw(1100), {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "k.lock"]


def test_an_unfinished_one_is_made_again_and_a_failed_one_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "tokens.arrow").write_bytes(b"half")
    store = build_store(RowEncoder(tokenizer), raw(3), {}, place=tmp_path / "k")
    assert len(store) == 3

    def broken():
        yield from raw(600)
        raise InputError("row 600 is broken")

    with pytest.raises(InputError, match="row 600"):
        build_store(RowEncoder(tokenizer), broken(), {}, place=tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "k.lock", "other.lock"]


def _ask(folder: Path, results: object) -> None:
    from tests.data.conftest import CHAT_TEMPLATES, TOKENIZERS

    tokenizer = TOKENIZERS["byte_level"]()
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    read = []

    def rows():
        for item in raw(700):
            read.append(item)
            yield item

    store = build_store(RowEncoder(tokenizer), rows(), {}, place=folder / "k")
    results.put((len(read), len(store), int(store[699].input_ids.sum())))


def test_several_processes_at_once_encode_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_ask, args=(tmp_path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(read for read, _, _ in found) == [0, 0, 700]
    assert len({rest for _, *rest in map(tuple, found) for rest in [tuple(rest)]}) == 1


def test_workers_give_the_same_tokens_in_the_same_order(tokenizer, monkeypatch):
    monkeypatch.setattr("mora_jax.data.tokens.encode.ALONE", 1)
    rows = raw(5 * CHUNK + 7)
    encoder = RowEncoder(tokenizer)
    alone = TokenStore(chunk.batch for chunk in encode_chunks(encoder, rows))
    shared = TokenStore(chunk.batch for chunk in encode_chunks(encoder, rows, workers=2))
    assert same(alone, shared) and len(shared) == len(rows)


def test_bad_rows_raise_or_are_counted(tokenizer):
    def convert(source: str, number: int):
        if number % 2:
            raise InputError(f"{source}: odd")
        return [conversation(number)]

    rows = [(f"row {i}", i) for i in range(10)]
    with pytest.raises(InputError, match="row 1: odd"):
        build_store(RowEncoder(tokenizer, convert=convert), rows, {})
    store = build_store(RowEncoder(tokenizer, convert=convert, skip=True), rows, {})
    assert (len(store), store.facts["counts"]) == (5, {"skipped": 5})
    assert store.facts["reasons"][0] == "row 1: odd"
    report = EncodedDataset(store).report
    assert (report.rows, report.kept, report.dropped) == (10, 5, {"bad_row": 5})


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("MORA_JAX_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("MORA_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mora_jax"
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": f"c{i}"}) + "\n" for i in range(20)))
    return path


def caches(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_a_key_for_all_that_the_tokens_depend_on(file, tmp_path, make_tokenizer):
    folder = tmp_path / "cache"
    source = {"paths": (str(file),), "cache": str(folder)}
    tokenizer = make_tokenizer("byte_level", "chatml")
    first = Source(**source).load(tokenizer)
    known = caches(folder)
    assert len(known) == 1
    assert same(first, Source(**source).load(tokenizer)) and caches(folder) == known
    for change in ({"template": "plain"}, {"max_rows": 3}, {"fallback": "chatml"}, {"on_error": "skip"}):
        Source(**source | change).load(tokenizer)
        assert len(caches(folder)) > len(known), change
        known = caches(folder)
    Source(**source).load(make_tokenizer("byte_level", "llama3"))
    assert len(caches(folder)) == len(known) + 1
    known = caches(folder)
    # Same size, same name, one character different.
    file.write_text(file.read_text().replace("p7", "q7"))
    assert not same(first, Source(**source).load(tokenizer))
    assert len(caches(folder)) == len(known) + 1


def test_nothing_is_kept_where_it_is_off_or_cannot_be(file, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("MORA_JAX_CACHE", str(tmp_path / "unused"))
    assert len(Source((str(file),), cache="off").load(tokenizer)) == 20
    assert not (tmp_path / "unused").exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert len(Source((str(file),), cache=str(blocked / "inside")).load(tokenizer)) == 20
    assert os.listdir(tmp_path / ".") and blocked.is_file()


def _blocked(chunk):
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_ctrl_c_reaches_no_worker(monkeypatch):
    monkeypatch.setattr(encode, "_work", _blocked)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert signal.SIGINT in encode._submit(pool, []).result(60)
    assert signal.SIGINT not in _blocked([])
