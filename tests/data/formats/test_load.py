"""Rows from files: detection, mapping, what is skipped, and what changes the fingerprint."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import tracemalloc

import pytest

from mora_jax.data import Message, load_rows
from mora_jax.data.formats.column_mapping import Mapping
from mora_jax.data.formats.load import open_rows
from mora_jax.errors import InputError


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca(count):
    return [{"instruction": f"i{i}", "input": "", "output": f"o{i}"} for i in range(count)]


def answers(rows):
    return [row.messages[-1].content for row in rows]


def test_rows_are_read_when_they_are_asked_for_and_anew_each_time(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*alpaca(3), {"instruction": "i"}])
    stream = open_rows(path)
    assert stream.format == "alpaca"
    assert stream.files == (str(path),)
    assert answers(itertools.islice(stream, 3)) == ["o0", "o1", "o2"]
    with pytest.raises(InputError, match=rf"{path}, row 4: `output` or `response` is missing"):
        list(stream)
    write_lines(path, alpaca(2))
    assert answers(stream) == answers(stream) == ["o0", "o1"]


def test_several_files_are_one_stream(tmp_path):
    write_lines(tmp_path / "b.jsonl", alpaca(2))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(alpaca(1)).encode()))
    rows = load_rows(tmp_path)
    assert answers(rows) == ["o0", "o0", "o1"]
    assert rows.files == (str(tmp_path / "a.json.gz"), str(tmp_path / "b.jsonl"))
    assert rows[2].source == f"{tmp_path / 'b.jsonl'}, row 2"
    assert str(rows) == f"3 rows of format `alpaca` from {tmp_path / 'a.json.gz'}, {tmp_path / 'b.jsonl'}"


@pytest.mark.parametrize("format", [None, "alpaca", "text"])
def test_a_format_is_recognised_or_asked_for(format, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [alpaca(1)[0] | {"text": "all"}])
    rows = load_rows(path, format)
    assert rows.format == (format or "alpaca")
    assert rows[0].text == ("all" if format == "text" else None)
    with pytest.raises(InputError, match=r"a\.jsonl, row 1: `messages` should be a filled list and is missing or null"):
        load_rows(path, format="messages")


def test_one_of_the_first_rows_decides(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"instruction": "i", "output": None}, *alpaca(1)])
    assert open_rows(path).format == "alpaca"
    with pytest.raises(InputError, match="row 1: `output` or `response` is null; expected text"):
        load_rows(path)
    write_lines(path, [*({"id": i} for i in range(19)), *alpaca(1)])
    assert open_rows(path).format == "alpaca"
    write_lines(path, [*({"id": i} for i in range(20)), *alpaca(1)])
    with pytest.raises(InputError, match="row 1: no format has the columns 'id'"):
        load_rows(path)
    path.write_text('{"id": 1}\noops\n')
    with pytest.raises(InputError, match="row 1: no format has the columns 'id'"):
        load_rows(path)


def test_rows_of_mixed_formats(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*alpaca(2), {"prompt": "p", "completion": "c"}])
    with pytest.raises(InputError, match=r"a\.jsonl, row 3: mixed formats: this row is of format `prompt_completion`"):
        load_rows(path)
    write_lines(tmp_path / "b.jsonl", [{"text": "t"}])
    with pytest.raises(InputError, match=r"b\.jsonl, row 1: mixed formats"):
        load_rows([write_lines(path, alpaca(2)), tmp_path / "b.jsonl"])


PLAIN = {"messages": ["hi", "ho"]}
SPOKEN = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.mark.parametrize("format", [None, "messages"])
@pytest.mark.parametrize(("usual", "other"), [(SPOKEN, PLAIN), (PLAIN, SPOKEN)])
def test_plain_texts_among_messages_with_roles(usual, other, format, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [usual, usual])
    assert [len(row.messages) for row in load_rows(path, format)] == [2, 2]
    write_lines(path, [usual, usual, other])
    kinds = "(plain texts.* objects|objects.* plain texts)"
    with pytest.raises(InputError, match=rf"a\.jsonl, row 3: `messages` is .*{kinds}"):
        load_rows(path, format)
    assert len(load_rows(path, format, on_error="skip")) == 2
    # As CSV cells hold lists.
    write_lines(path, [{key: json.dumps(value) for key, value in row.items()} for row in (usual, other)])
    with pytest.raises(InputError, match=rf"a\.jsonl, row 2: `messages` is .*{kinds}"):
        load_rows(path, format)


def test_plain_texts_do_not_take_turns_in_a_prompt(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "q", "completion": ["a"]}])
    with pytest.raises(InputError, match=r"row 1: `completion\[0\]` should be an object with `role` and `content`"):
        load_rows(path)


def test_other_names(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"dialog": [{"who": "visitor", "said": "u"}, {"who": "bot", "said": "a"}], "weight": "70 kg"}],
    )
    mapping = Mapping.parse(
        ("conversations=dialog", "from=who", "value=said", "ignore=weight"), ("visitor=user", "bot=assistant")
    )
    rows = load_rows(path, mapping=mapping)
    assert rows.format == "sharegpt"
    assert rows[0].messages == (Message("user", "u"), Message("assistant", "a"))
    with pytest.raises(InputError, match="'dialog', 'weight': .* messages=dialog,role=who,content=said;"):
        load_rows(path)
    write_lines(path, [{"question": "q", "reply": None}])
    columns = Mapping.parse(("instruction=question", "output=reply"))
    for format in (None, "alpaca"):
        with pytest.raises(InputError, match=r"row 1: `output` .* is null; .*\(`output` is `reply` in the data\)"):
            load_rows(path, format, mapping=columns)


BROKEN = b"""oops
{"instruction": "i", "output": "o1"}
{"instruction": "i", "output": null}
\xff
{"text": "t"}
[1]
{"instruction": "i", "output": "o2", "weight": -1}
{"instruction": "i", "output": "\\ud800"}
{"instruction": "i", "output": "o3"}
"""


def test_rows_that_break_the_format_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BROKEN)
    stream = open_rows(path, on_error="skip")
    assert answers(stream) == answers(stream) == ["o1", "o3"]
    assert stream.skipped.count == 7
    assert len(stream.skipped.reasons) == 5
    assert stream.skipped.reasons[0] == f"{path}, line 1, column 1: broken JSON (Expecting value)"
    assert all(str(path) in reason for reason in stream.skipped.reasons)
    rows = load_rows(path, on_error="skip")
    assert rows.skipped == stream.skipped
    assert str(rows).endswith(f"; 7 rows skipped, the first because of: {stream.skipped.reasons[0]}")
    with pytest.raises(InputError, match="line 1, column 1: broken JSON"):
        load_rows(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("oops\nno\n", "no row can be used: 2 rows skipped, the first because of: .*line 1, column 1: broken JSON"),
        ('{"instruction": "i", "output": null}\n', "no row can be used: 1 row skipped, .* row 1: `output`"),
        ('{"id": 1}\n', "row 1: no format has the columns"),
        ("", "is empty"),
    ],
)
def test_an_error_where_every_row_is_skipped(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_rows(tmp_path / "a.jsonl", on_error="skip")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_an_error_though_rows_are_skipped(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(alpaca(2))[:-1])
    with pytest.raises(InputError, match="the file ends in the middle"):
        load_rows(tmp_path / "a.json", on_error="skip")
    (tmp_path / "a.csv").write_text("instruction,output\n")
    for on_error in ("raise", "skip"):
        with pytest.raises(InputError, match=r"a\.csv holds no rows"):
            load_rows(tmp_path / "a.csv", on_error=on_error)


def test_raw_rows_and_a_converter_for_other_processes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BROKEN)
    stream = open_rows(path, on_error="skip", mapping=Mapping.parse((), ("bot=user",)))
    convert = pickle.loads(pickle.dumps(stream.converter))
    assert convert == stream.converter
    raw = pickle.loads(pickle.dumps(list(stream.raw())))
    assert [source for source, _ in raw] == [f"{path}, row {i}" for i in range(1, 10)]
    rows, errors = [], 0
    for source, row in raw:
        try:
            rows += convert(source, row)
        except InputError:
            errors += 1
    assert rows == list(stream)
    assert errors == stream.skipped.count == 7
    with pytest.raises(InputError, match="line 1, column 1"):
        list(open_rows(path).raw())


def test_no_more_rows_than_asked_for(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*alpaca(3), {"instruction": "i"}])
    assert answers(open_rows([path, path], max_rows=3)) == ["o0", "o1", "o2"]
    write_lines(path, alpaca(3))
    assert answers(load_rows([path, path], max_rows=4)) == ["o0", "o1", "o2", "o0"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "alpacca"}, "unknown data format 'alpacca'"),
        ({"on_error": "ignore"}, "unknown on_error 'ignore': choose one of raise, skip"),
        ({"max_rows": 0}, "max_rows is 0: it must be at least 1"),
        ({"paths": []}, "no data file given"),
        ({"paths": "absent.json"}, "no such data file: absent.json"),
    ],
)
def test_settings_that_do_not_exist(settings, message, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", alpaca(1))
    with pytest.raises(InputError, match=message):
        open_rows(**{"paths": path, **settings})


def test_the_fingerprint_is_of_the_data_and_what_is_made_of_it(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", alpaca(3))
    same = write_lines(tmp_path / "b.jsonl", alpaca(3))
    prints = {
        name: open_rows(**({"paths": path} | settings)).fingerprint()
        for name, settings in {
            "plain": {},
            "format": {"format": "alpaca"},
            "skip": {"on_error": "skip"},
            "columns": {"mapping": Mapping.parse(("input=x",))},
            "roles": {"mapping": Mapping.parse((), ("x=user",))},
            "max_rows": {"max_rows": 2},
            "twice": {"paths": [path, path]},
            "other": {"paths": write_lines(tmp_path / "c.jsonl", alpaca(4))},
        }.items()
    }
    assert len(set(prints.values())) == len(prints)
    assert open_rows(same).fingerprint() == prints["plain"]
    assert len(prints["plain"]) == 64


def test_a_saved_folder_and_hub_data(tmp_path, monkeypatch):
    import datasets

    data = datasets.Dataset.from_list([{"text": "a", "weight": 2.0}, {"text": "b", "weight": None}])
    data.save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    for path, name in ((tmp_path / "saved", str(tmp_path / "saved")), ("owner/name", "owner/name (train)")):
        rows = load_rows(path)
        assert [(row.text, row.weight) for row in rows] == [("a", 2.0), ("b", 1.0)]
        assert (rows.format, rows.files, rows[1].source) == ("text", (name,), f"{name}, row 2")
        assert open_rows(path).fingerprint() == open_rows(path).fingerprint()


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "jsonl.gz", "json.gz", "txt"])
def test_memory_does_not_grow_with_the_file(kind, tmp_path):
    def peak(count):
        path = tmp_path / f"{count}.{kind}"
        rows = [{"text": f"row {i} " * 20} for i in range(count)]
        lines = "\n".join(json.dumps(row) for row in rows)
        texts = {"json": json.dumps(rows), "csv": "\n".join(["text", *(row["text"] for row in rows)])}
        data = texts.get(kind.removesuffix(".gz"), lines).encode()
        path.write_bytes(gzip.compress(data, 1) if kind.endswith("gz") else data)
        del rows, lines, texts, data
        tracemalloc.start()
        assert sum(1 for _ in open_rows(path)) == count
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(100)  # What is made once.
    small, large = peak(6_000), peak(24_000)
    assert large < 1.2 * small + 100_000


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "format_name", "count"),
    [
        ("alpagasus_dolly_3k.json", "alpaca", 2996),
        ("alpagasus_dolly_3k_messages.jsonl", "messages", 2996),
        ("fastchat_dummy_conversation_500.json", "sharegpt", 500),
        ("llms_from_scratch_1100.json", "alpaca", 1100),
        ("self_instruct_seed_tasks_175.jsonl", "self_instruct", 175),
    ],
)
def test_real_files(name, format_name, count, shared_dir):
    rows = load_rows(shared_dir / "data" / "instruct" / name)
    assert (rows.format, len(rows)) == (format_name, count)
    assert all(row.messages[-1].role == "assistant" for row in rows)
