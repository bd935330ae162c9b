"""The table: every figure, whole at 80 columns, at 60, and in a pipe."""

import io

import pytest

from mora_jax.demo.cells import METHODS, MODES, Scores
from mora_jax.demo.show import COLUMNS, LEGEND, Row, print_table

BEFORE = Scores(0.0125, 0.1, {"sort": 0.0}, 1234.5, 2.5, ("x",))
AFTER = Scores(1.0, 0.8, {"sort": 1.0}, 1.25, 3.125, ("y",))
ROWS = [
    Row("base model", "-", BEFORE),
    *(Row(method.name, mode, AFTER, 784_640, 9876.5) for method in METHODS for mode in MODES),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream) -> list[str]:
    print_table(ROWS, "Title", stream)
    title, legend, empty, *table = stream.getvalue().splitlines()
    assert (title, legend, empty) == ("Title", LEGEND, "")
    assert "\x1b" not in stream.getvalue()
    assert all(line == line.rstrip() for line in table)
    return table


@pytest.mark.parametrize("stream, width", [(Terminal, "80"), (Terminal, "200"), (io.StringIO, "40")])
def test_the_whole_table(monkeypatch, stream, width):
    monkeypatch.setenv("COLUMNS", width)
    first, second, rule, *body = shown(stream())
    assert max(map(len, (first, second, *body))) == len(rule) <= 80
    assert second.split() == ["method", "loss", "params", "match", "F1", "ppl", "ppl", "tokens/s"]
    assert first.split() == ["trained", "exact", "response", "base-text"]
    assert body[0].split() == ["base", "model", "-", "-", "1.2%", "10.0%", "1,234.50", "2.50", "-"]
    assert body[1].split() == ["LoRA", "masked", "784,640", "100.0%", "80.0%", "1.25", "3.12", "9,876"]
    assert len(body) == len(ROWS)


@pytest.mark.parametrize("width", [60, 70])
def test_narrow_terminals_get_the_table_in_parts(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shown(Terminal())
    assert 40 < max(map(len, lines)) <= width
    for row in ROWS:
        method, mode, *figures = row.cells()
        starts = [line for line in lines if line.startswith(method) and line[len(method) :].split()[0] == mode]
        assert [word for line in starts for word in line[len(method) :].split()[1:]] == figures


@pytest.mark.parametrize("row", ROWS)
def test_as_many_cells_as_columns(row):
    assert len(row.cells()) == len(COLUMNS)
