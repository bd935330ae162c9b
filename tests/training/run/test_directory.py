"""The metrics of a run directory: unfinished and damaged lines, and what a resumption forgets."""

import json

from mora_jax.training.run.directory import RunDirectory


def rows_until(step):
    return [{"step": number, "loss": 1 / number} for number in range(1, step + 1)]


def test_damaged_lines_lose_no_others(tmp_path):
    directory, notes = RunDirectory(tmp_path), []
    directory.files.note = notes.append
    directory.append_metrics(rows_until(5))
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([*lines[:2], b'{"step": 2.5, "l\xff', b"\0\0\0", *lines[2:]]) + b'{"step": 6, "lo')
    assert directory.read_metrics() == rows_until(5)
    assert notes == [f"{file}: left out lines 3, 4, which can't be read"]
    assert directory.rewind_metrics(4) == rows_until(4)
    assert list(map(json.loads, file.read_text().splitlines())) == rows_until(4)
    assert "kept in" in notes[1] and (tmp_path / "metrics.damaged.txt").read_text() == '{"step": 2.5, "l\\xff\n\0\0\0\n'
    # The next resumption has nothing to say.
    assert directory.rewind_metrics(4) == rows_until(4) and len(notes) == 2
    assert directory.files.present(("metrics.damaged.txt",))


def test_an_unfinished_last_line_is_dropped_without_a_word(tmp_path):
    directory, notes = RunDirectory(tmp_path), []
    directory.files.note = notes.append
    directory.append_metrics(rows_until(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.')
    assert directory.read_metrics() == rows_until(2) == directory.rewind_metrics(9)
    assert notes == [] and not (tmp_path / "metrics.damaged.txt").exists()


def test_separators_of_lines_in_texts_end_no_line(tmp_path):
    directory = RunDirectory(tmp_path)
    rows = [{"step": 1, "note": "a\u2028b\u0085c\u2029d\x0be"}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    assert directory.read_metrics() == rows == directory.rewind_metrics(1)
