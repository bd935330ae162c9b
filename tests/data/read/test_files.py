"""Files of every kind, and the one line that each kind of broken file gives."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given, settings, strategies as st

from mora_jax.data.read.files import READERS, DataFile
from mora_jax.errors import InputError

# Without the time, so that every process names the tests alike.
compress = functools.partial(gzip.compress, mtime=0)

ROWS = [
    {"instruction": "Wann?", "output": "2011-01-01"},
    {"instruction": "ü\u2028\x85", "output": "007"},
    {"instruction": 'a,b\n"c"', "output": " 👩‍👩‍👧 \u202e𝔘\U0010ffff "},
]


def rows_of(path):
    return list(DataFile(path).rows())


def contents(rows, newline="\n", mark=""):
    """The rows as a file of every kind that holds text."""
    lines = mark + newline.join(json.dumps(row, ensure_ascii=False) for row in rows) + newline

    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    table = [",".join(rows[0])] + [",".join(map(cell, row.values())) for row in rows]
    texts = {
        "list.json": mark + json.dumps(rows, indent=1).replace("\n", newline),
        "one_line.json": mark + json.dumps(rows, ensure_ascii=False),
        "lines.json": lines,
        "a.jsonl": lines,
        "list.jsonl": mark + json.dumps(rows, indent=1).replace("\n", newline),
        "a.NDJSON": newline * 2 + lines.removeprefix(mark) if not mark else lines,
        "v1.2.csv": mark + newline.join(table) + newline,
    }
    return {name: text.encode() for name, text in texts.items()}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_all_kinds_hold_the_same(newline, mark, tmp_path):
    for name, content in contents(ROWS, newline, mark).items():
        for path, data in ((tmp_path / name, content), (tmp_path / f"{name}.gz", compress(content))):
            path.write_bytes(data)
            assert [row for _, row in rows_of(path)] == ROWS, path.name


def test_numbers_of_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n \n{"a": 2}')
    assert rows_of(tmp_path / "a.jsonl") == [(2, {"a": 1}), (4, {"a": 2})]
    (tmp_path / "a.json").write_text('\n\n[{"a": 1},\n\n{"a": 2}]')
    assert rows_of(tmp_path / "a.json") == [(1, {"a": 1}), (2, {"a": 2})]
    (tmp_path / "a.csv").write_text('\na,b\n"x\ny",1\n\nz,\n')
    assert rows_of(tmp_path / "a.csv") == [(1, {"a": "x\ny", "b": "1"}), (3, {"a": "z", "b": ""})]


def test_a_table_whose_lines_end_in_carriage_returns(tmp_path):
    text = 'a,b\r"x\ry",1\rz,"é\r\n"\r'
    (tmp_path / "a.csv").write_bytes(text.encode())
    frame = pd.read_csv(io.StringIO(text, newline=""), dtype=str)
    assert [row for _, row in rows_of(tmp_path / "a.csv")] == frame.to_dict("records")


def test_spaces_around_the_names_of_columns(tmp_path):
    (tmp_path / "a.csv").write_text("instruction , output\na, b\n")
    assert rows_of(tmp_path / "a.csv") == [(1, {"instruction": "a", "output": " b"})]


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028still one\r\n\n  two \nthree\r".encode())
    assert rows_of(tmp_path / "a.txt") == [
        (1, {"text": "one\u2028still one"}),
        (3, {"text": "  two "}),
        (4, {"text": "three"}),
    ]


TEXT = st.text(st.characters(codec="utf-8"))


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["instruction", "output"])
        table.writeheader()
        table.writerows(rows)
    for name, data in contents(rows).items():
        if name.endswith("json") or name.endswith("jsonl"):
            (folder / name).write_bytes(data)
    for path in folder.iterdir():
        assert [row for _, row in rows_of(path)] == rows, path.name


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.txt", "a.parquet"])
def test_a_row_of_a_megabyte(name, tmp_path):
    row = {"text": "wörd " * 200_000}
    data = json.dumps(row, ensure_ascii=False).encode()
    if name == "a.parquet":
        from datasets import Dataset

        Dataset.from_list([row]).to_parquet(tmp_path / name)
    else:
        kinds = {"a.json": b"[%s]" % data, "a.jsonl.gz": compress(data), "a.jsonl.zst": zstd(data)}
        kinds |= {"a.csv": b"text\n" + row["text"].encode(), "a.txt": row["text"].encode()}
        (tmp_path / name).write_bytes(kinds.get(name, data))
    assert rows_of(tmp_path / name) == [(1, row)]


def test_parquet(tmp_path):
    from datasets import Dataset

    rows = [{"m": [{"a": 1}, {"a": None, "b": [None, 2]}], "ids": [1, 2], "n": None}, {"m": [], "ids": [], "n": "x"}]
    path = tmp_path / "a[1]*.parquet"  # The name is a name and no pattern.
    Dataset.from_list(rows).to_parquet(path)
    assert rows_of(path) == [
        (1, {"m": [{"a": 1}, {"b": [None, 2]}], "ids": [1, 2], "n": None}),
        (2, {"m": [], "ids": [], "n": "x"}),
    ]


def zstd(data):
    import pyarrow

    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


GOOD = b'{"instruction": "i", "output": "o"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.json", b"\xef\xbb\xbf \r\n", "is empty"),
        ("a.jsonl", b" \n \n", "is empty"),
        ("a.jsonl.gz", compress(b""), "is empty"),
        ("a.txt", b"\xef\xbb\xbf\n", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n\n", "is empty"),
        ("a.json", b"[]", "holds an empty list"),
        ("a.json", b'{\n"instruction": "i"\n}', r"expected a list of rows, \[...\], or one row a line"),
        ("a.json", b"oops\n", r"line 1, column 1: broken JSON"),
        ("a.json", b'[{"instruction": "i", "output": "o"},', r"line 1, column 38: broken JSON \(the file ends"),
        ("a.json", b"[" + GOOD + GOOD + b"]", r"line 2, column 1: broken JSON \(Expecting ',' deli"),
        ("a.json", b"[\n\n" + GOOD[:-3] + b'\xe9"}]', r"line 3: not valid UTF-8 \(byte 0xe9\)"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        ("a.jsonl", b"[" + GOOD + b"," + GOOD + b",]", r"line 3, column 2: broken JSON \(a comma after the last elem"),
        ("a.json", b'{\n"data": [1]\n}', "of an object that holds the rows, write their list alone"),
        ("a.csv", b"instruction;output\na;b\n", "the header has no comma but ';'; save the table with commas"),
        ("a.csv", b"instruction\toutput\na\tb\n", r"the header has no comma but '\\t'; save the table"),
        ("a.csv", b"instruction,output\n\xff,a\n", r"line 2: not valid UTF-8 \(byte 0xff\)"),
        ("a.csv", b'instruction,output\n"a,b\n', r"line 2: broken CSV"),
        ("a.csv", b"instruction,output,output\na,b,c\n", "names the column 'output' twice"),
        ("a.jsonl.gz", b"not gzip", "broken gzip data"),
        ("a.jsonl.zst", b"not zstd", "broken zstd data"),
        ("a.jsonl.zst", zstd(GOOD)[:-5], "broken zstd data"),
        ("a.json.zst", zstd(b" "), "is empty"),
        ("a.json", b'[{"a": 1,\n "a": 2}]', "line 1: JSON that cannot be read .*the key 'a' stands twice"),
        ("a.jsonl.gz", compress(GOOD)[:-12], "broken gzip data"),
        ("a.json.gz", compress(b"[" + GOOD)[:-12], "broken gzip data"),
        ("a.csv.gz", compress(b"a,b\n1,2\n")[:14], "broken gzip data"),
        ("a.parquet", b"not parquet", "not a readable parquet file"),
        ("a.parquet", b"", "not a readable parquet file"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path, caplog):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        rows_of(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b'{"instruction": "i", "outp\n' + GOOD, r"line 2, column 22: broken JSON \(the line ends"),
        ("a.jsonl", GOOD + b'{"instruction": "i",\n' + GOOD, r"line 2, column 21: broken JSON \(the line ends"),
        ("a.jsonl", GOOD + GOOD[:-2] + b"\xff\xfe\n" + GOOD, r"line 2: not valid UTF-8 \(byte 0xff\)"),
        (
            "a.jsonl",
            GOOD + GOOD[:-1] + b" ,\n" + GOOD,
            r"line 2, column 37: broken JSON \(a comma after the row; lines",
        ),
        ("a.jsonl", GOOD + b"{'a': 1}\n" + GOOD, r"line 2, column 2: broken JSON \(Expecting property name"),
        ("a.jsonl", GOOD + b'{"a": ' + b"9" * 5000 + b"}\n" + GOOD, "line 2: JSON that cannot be read"),
        (
            "a.jsonl",
            GOOD + b'{"a": {"c": 1, "b": 2, "c": 1}}\n' + GOOD,
            "line 2: .*the key 'c' stands twice in one object",
        ),
        ("a.jsonl", GOOD + b"[" * 100_000 + b"\n" + GOOD, "line 2: JSON nested too deeply"),
        ("a.json", GOOD + b"oops\n" + GOOD, "line 2, column 1: broken JSON"),
        ("a.txt", b"a\n\xe9\na\n", r"line 2: not valid UTF-8 \(byte 0xe9\)"),
        ("a.csv", b"instruction,output\na,b\na,b,c\na,b\n", "row 2: 3 fields where the header names 2 columns"),
    ],
)
def test_a_row_that_cannot_be_read_does_not_hide_the_next(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    (one, first), (two, error), (three, last) = rows_of(path)
    assert (one, two, three) == (1, 2, 3)
    assert first == last
    assert isinstance(error, InputError)
    with pytest.raises(InputError, match=f"{name}, {message}"):
        raise error


PIECES = [
    b'{"text": "a"}',
    b"[",
    b"]",
    b",",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"\xff",
    b"\x00",
    b" ",
    b"1e",
    b"\\",
    b"\xef\xbb\xbf",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=12).map(b"".join))
@example(b"\x1f\x8b")
def test_any_bytes_are_rows_or_bad_input(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("a.json", "a.jsonl", "a.csv", "a.txt", "a.json.gz"):
        (folder / name).write_bytes(content)
        errors = []
        try:
            rows = rows_of(folder / name)
        except InputError as error:
            errors.append(error)
        else:
            assert rows or name == "a.csv"
            errors += [row for _, row in rows if isinstance(row, InputError)]
        assert not any("\n" in str(error) for error in errors)


def test_utf16_is_no_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "ü"}'.encode("utf-16"))
    [(_, error)] = rows_of(tmp_path / "a.jsonl")
    assert "not valid UTF-8 (byte 0xff)" in str(error)


@pytest.mark.parametrize("name", ["a.docx", "a", "a.gz", "a.json.bz2", "jsonl"])
def test_names_that_say_nothing(name):
    with pytest.raises(InputError, match="cannot tell the kind of file .* known endings: " + ", ".join(READERS)):
        DataFile(Path(name))


def test_packed_parquet():
    with pytest.raises(InputError, match="a .parquet file is compressed inside"):
        DataFile(Path("a.parquet.gz"))


def test_reading_leaves_the_limit_on_csv_fields(tmp_path):
    (tmp_path / "a.csv").write_text("a\n1\n2\n")
    limit = csv.field_size_limit()
    rows = DataFile(tmp_path / "a.csv").rows()
    assert next(rows) == (1, {"a": "1"})
    assert csv.field_size_limit() == limit


def test_digests(tmp_path):
    for name in ("a.json", "b.json", "a.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    digests = [DataFile(tmp_path / name).digest() for name in ("a.json", "b.json", "a.jsonl")]
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "b.json").write_bytes(GOOD + GOOD)
    assert DataFile(tmp_path / "b.json").digest() != digests[0]
    with pytest.raises(InputError, match="cannot read .*c.json: No such file"):
        DataFile(tmp_path / "c.json").digest()
