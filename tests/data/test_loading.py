"""Files of every format and container, and the one line that each kind of broken file gives."""

from __future__ import annotations

import gzip
import json

import pytest

from mora_jax.data import FORMATS, Message, load_rows
from mora_jax.errors import InputError


def user(content, context=""):
    return Message("user", content, context)


def assistant(content):
    return Message("assistant", content)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("alpaca", {"instruction": "i", "output": "o"}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "input": "", "output": "o"}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "input": None, "output": "o"}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "context": "c", "response": "o"}, [user("i", "c"), assistant("o")]),
        (
            "alpaca",
            {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]},
            [Message("system", "s"), user("a"), assistant("b"), user("i", "x"), assistant("o")],
        ),
        (
            "messages",
            {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "u"}]},
            [Message("system", "s"), user("u")],
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}, {"text": "v"}]}]},
            [user("uv")],
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "a", "weight": 1, "tool_calls": None}]},
            [assistant("a")],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "u"},
                    {"from": "gpt", "value": "a"},
                    {"from": "observation", "value": "t"},
                ]
            },
            [user("u"), assistant("a"), Message("tool", "t")],
        ),
        ("prompt_completion", {"prompt": "p", "completion": "c"}, [user("p"), assistant("c")]),
        (
            "prompt_completion",
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            [Message("system", "s"), user("u"), assistant("a")],
        ),
        ("question_answer", {"question": "q", "answer": "a"}, [user("q"), assistant("a")]),
        ("question_answer", {"query": "q", "response": "a"}, [user("q"), assistant("a")]),
        (
            "self_instruct",
            {"instruction": "i", "instances": [{"input": "x", "output": "o"}]},
            [user("i", "x"), assistant("o")],
        ),
    ],
)
def test_formats_are_detected(name, row, messages, tmp_path):
    rows = load_rows(write_lines(tmp_path / "a.jsonl", [row]))
    assert rows.format == name
    assert list(rows[0].messages) == messages
    assert rows[0].text is None
    assert rows[0].source.startswith(f"{tmp_path / 'a.jsonl'}, row 1")


def test_a_row_may_become_several_conversations(tmp_path):
    instances = [{"input": "x", "output": "o"}, {"input": "y", "output": "p"}]
    path = write_lines(tmp_path / "a.jsonl", [{"instruction": "i", "instances": instances}])
    assert [row.messages[-1].content for row in load_rows(path)] == ["o", "p"]


def test_plain_text_of_rows_and_of_files(tmp_path):
    rows = load_rows(write_lines(tmp_path / "a.jsonl", [{"text": "one\ntwo"}]))
    assert (rows.format, rows[0].text) == ("text", "one\ntwo")
    (tmp_path / "a.txt").write_bytes("one\u2028still one\r\n\n  two \n".encode())
    assert [row.text for row in load_rows(tmp_path / "a.txt")] == ["one\u2028still one", "  two "]


def test_alpaca_with_a_text_column_is_alpaca(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", [{"instruction": "i", "input": "", "output": "o", "text": "all"}]
    )
    assert load_rows(path).format == "alpaca"


def test_a_format_that_is_asked_for(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", [{"instruction": "i", "input": "", "output": "o", "text": "all"}]
    )
    rows = load_rows(path, format="text")
    assert (rows.format, rows[0].text) == ("text", "all")
    with pytest.raises(InputError, match=r"a\.jsonl, row 1: `messages` .*null"):
        load_rows(path, format="messages")
    with pytest.raises(InputError, match="unknown data format 'alpacca'.*" + ", ".join(FORMATS)):
        load_rows(path, format="alpacca")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_containers_hold_the_same(newline, mark, tmp_path):
    rows = [{"instruction": "Wann?", "output": "2011-01-01"}, {"instruction": "ü\u2028", "output": "007"}]
    lines = mark + newline.join(json.dumps(row, ensure_ascii=False) for row in rows) + newline
    table = mark + newline.join(["instruction,output", "Wann?,2011-01-01", '"ü\u2028",007']) + newline
    files = {
        "a.json": (mark + json.dumps(rows, indent=1).replace("\n", newline)).encode(),
        "lines.json": lines.encode(),
        "a.jsonl": lines.encode(),
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.csv": table.encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        loaded = load_rows(tmp_path / name)
        assert loaded.format == "alpaca"
        assert [[m.content for m in row.messages] for row in loaded] == [
            ["Wann?", "2011-01-01"],
            ["ü\u2028", "007"],
        ]


def test_parquet_and_several_files(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"question": "q", "answer": "12"}]).to_parquet(tmp_path / "a.parquet")
    write_lines(tmp_path / "b.jsonl", [{"question": "r", "answer": "b"}])
    rows = load_rows([tmp_path / "a.parquet", tmp_path / "b.jsonl"])
    assert [row.messages[0].content for row in rows] == ["q", "r"]
    assert rows.files == (str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl"))
    assert "2 rows of format `question_answer`" in str(rows)


def test_a_line_of_a_megabyte(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "wörd " * 200_000}])
    assert len(load_rows(path)[0].text) == 1_000_000


GOOD = b'{"instruction": "i", "output": "o"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.jsonl", b" \n \n", "is empty"),
        ("a.txt", b"\xef\xbb\xbf\n", "is empty"),
        ("a.csv", b"instruction,output\n", "holds no rows"),
        ("a.json", b"[]", "empty list"),
        ("a.json", b"{}", r"row 1: no known format has the keys \(none\)"),
        ("a.json", b'{\n"instruction": "i"\n}', r"expected a list of rows, \[...\], or one row a line"),
        ("a.json", b"3\n", "row 1: a row should be an object"),
        (
            "a.json",
            b'[{"instruction": "i", "output": "o"},',
            r"line 1, column 38: broken JSON \(the file ends",
        ),
        (
            "a.json",
            b'[{"instruction": "i"\n "output": "o"}]',
            r"line 2, column 2: broken JSON \(Expecting ',' deli",
        ),
        ("a.jsonl", GOOD + b'{"instruction": "i", "outp', r"line 2, column 22: broken JSON"),
        ("a.jsonl", GOOD + GOOD[:-2] + b"\xff\xfe", r"line 2: not valid UTF-8 \(byte 0xff\)"),
        ("a.json", b"[\n\n" + GOOD[:-3] + b'\xe9"}]', r"line 3: not valid UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", "ü".encode("utf-16"), "not valid UTF-8"),
        ("a.jsonl", b"3\n", "row 1: a row should be an object with keys and is a number"),
        ("a.jsonl", GOOD + b'["i", "o"]\n', "row 2: a row should be an object"),
        ("a.jsonl", GOOD + b'{"category": "qa"}\n', "row 2: `instruction` is missing; expected text"),
        (
            "a.jsonl",
            GOOD + b'{"prompt": "p", "completion": "c"}\n',
            "row 2: mixed formats.*`prompt_completion`",
        ),
        ("a.jsonl", GOOD + b'{"instruction": "i"}\n', "row 2: `output` or `response` is missing"),
        ("a.jsonl", GOOD + b'{"instruction": "i", "output": null}\n', "row 2: .*`output`.* is null"),
        (
            "a.jsonl",
            GOOD + b'{"instruction": 5, "output": "o"}\n',
            "row 2: `instruction` should be text and is a num",
        ),
        (
            "a.jsonl",
            GOOD + b'{"instruction": {"a": 1}, "output": "o"}\n',
            "`instruction` should be .* an object",
        ),
        (
            "a.jsonl",
            b'{"instruction": "i", "output": "\\ud800!"}\n',
            r"row 1: `output` .*lone surrogate \\ud800 at",
        ),
        (
            "a.jsonl",
            b'{"instruction": "i", "output": "o", "history": [["a"]]}\n',
            r"`history\[0\]` should be a pair",
        ),
        ("a.jsonl", b'{"messages": []}\n', "row 1: `messages` should be a filled list and is empty"),
        ("a.jsonl", b'{"messages": "hi"}\n', "row 1: `messages` should be a filled list and is text"),
        (
            "a.jsonl",
            b'{"messages": [{"content": "hi"}]}\n',
            r"row 1: `messages\[0\]` has no `role`; expected one of",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "bot", "content": "hi"}]}\n',
            r"`messages\[0\].role` is 'bot'; expected",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": [], "content": "hi"}]}\n',
            r"`messages\[0\].role` is \[\]; expected",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user"}]}\n',
            r"`messages\[0\].content` should be text and is missing or null",
        ),
        ("a.jsonl", b'{"messages": [null]}\n', r"`messages\[0\]` should be an object .* is missing or null"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
            "only text can be trained",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}\n',
            r"`messages\[0\].tool_calls` cannot be trained on",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}\n',
            r"`messages\[0\].weight` is 0",
        ),
        ("a.jsonl", b'{"foo": 1}\n', "no known format has the keys 'foo'; known are messages: `messages`"),
        ("a.jsonl.gz", b"not gzip", "broken gzip data"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-12], "broken gzip data"),
        ("a.parquet", b"not parquet", "not a readable parquet file"),
        ("a.csv", b'instruction,output\n"a,b\n', "broken CSV"),
        ("a.csv", b"instruction,output\na,b,c\n", "row 1: 3 fields where the header names 2 columns"),
        ("a.docx", b"x", r"known endings: \.json"),
        ("a", b"x", r"known endings: \.json"),
        ("a.jsonl", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    ],
)
def test_broken_files(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(InputError, match="no such data file"):
        load_rows(tmp_path / "a.json")
    with pytest.raises(InputError, match="is a folder"):
        load_rows(tmp_path)
    with pytest.raises(InputError, match="no data file given"):
        load_rows([])


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
