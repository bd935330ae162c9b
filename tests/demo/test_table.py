"""The table: every figure, whole at 80 columns, at 60, and in a pipe."""

import io

import pytest

from mora_jax.demo.cells import METHODS, MODES, Scores
from mora_jax.demo.show import COLUMNS, LEGEND, Question, Row, print_answers, print_table, print_verdict

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
    title, *rest = stream.getvalue().splitlines()
    legend, (empty, *table) = rest[: len(LEGEND.splitlines())], rest[len(LEGEND.splitlines()) :]
    assert (title, "\n".join(legend), empty) == ("Title", LEGEND, "")
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


ASKED = [Question(f"Question {number}?", "yes.") for number in range(200)]


def rows_with(**right: int) -> list[Row]:
    """A base that is always wrong, and methods that answer their first questions."""
    answers = {name: ("yes",) * count + ("no",) * (len(ASKED) - count) for name, count in {"base": 0, **right}.items()}
    scores = {
        name: Scores(right.get(name, 0) / len(ASKED), 0.0, {}, 1.0, 1.0, given) for name, given in answers.items()
    }
    return [Row("base", "-", scores["base"]), *(Row(name, "masked", scores[name]) for name in right)]


@pytest.mark.parametrize(
    "worst, best, words",
    [
        (100, 108, "below 8.0 points that is chance, so these methods do not differ here"),
        (20, 150, "more than the 11.4"),
    ],
)
def test_the_verdict_says_whether_methods_differ(worst, best, words):
    stream = io.StringIO()
    print_verdict(rows_with(LoRA=worst, MoRA=best), ASKED, stream)
    text = " ".join(stream.getvalue().split())
    assert f"masked: MoRA is {(best - worst) / 2:.1f} points above LoRA" in text and words in text
    assert "unmasked:" not in text


def test_the_question_is_one_that_was_learned():
    stream = io.StringIO()
    rows = rows_with(LoRA=3, MoRA=200)
    print_answers([rows[0], rows[1]], [Question("An odd one?", "maybe."), *ASKED[1:]], stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith(": Question 1?")
    assert [line.split()[-1] for line in lines[1:4]] == ["yes.", "no", "yes"]
