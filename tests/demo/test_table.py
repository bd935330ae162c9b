"""The table: all columns, plain or rich."""

import io

import pytest

from mora_jax.demo.measure import Scores
from mora_jax.demo.table import COLUMNS, Row, print_table

BEFORE = Scores(0.0125, 0.1, {"sort": 0.0}, 1234.5, 2.5, ("x",))
AFTER = Scores(0.75, 0.8, {"sort": 1.0}, 1.25, 3.125, ("y",))
ROWS = [Row("base model", "-", 0, BEFORE), Row("LoRA", "masked", 69632, AFTER, BEFORE, 9876.5)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_table_has_every_column_and_figure():
    stream = io.StringIO()
    print_table(ROWS, "Title", stream)
    title, head, base, tuned = stream.getvalue().splitlines()
    assert title == "Title"
    assert "\x1b" not in stream.getvalue()
    positions = [head.index(column) for column in COLUMNS]
    assert positions == sorted(positions)
    assert base.split() == ["base", "model", "-", "-", "1.2%", "10.0%", "1,234.50", "2.50", "-", "-"]
    assert tuned.split() == ["LoRA", "masked", "69,632", "75.0%", "80.0%", "1.25", "2.50", "3.12", "9,876"]


def test_table_on_a_terminal_has_every_figure(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    print_table(ROWS, "Title", stream)
    for text in (*ROWS[1].cells(), *COLUMNS):
        assert text in stream.getvalue()


@pytest.mark.parametrize("row", ROWS)
def test_as_many_cells_as_columns(row):
    assert len(row.cells()) == len(COLUMNS)
