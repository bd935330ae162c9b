"""The displays: what a log file gets and what a terminal gets."""

import errno
import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from mora_jax.training.display import (
    Display,
    LiveDisplay,
    RunInfo,
    duration,
    example_lines,
    make_display,
    printable,
    speed_words,
    summary_facts,
    summary_words,
    token_text,
    window,
)

INFO = RunInfo(
    facts={
        "model": "base (float32)",
        "method": "lora, rank 8 on 14 layers",
        "trained": "1,000 of 100,000 parameters (1.00%)",
        "loss": "masked: 25.0% of the tokens carry loss",
    },
    steps=4,
    first_example=[
        ("Say \x1b[31m", 0.0),
        ("[bold]half", 0.5),
        (" yes", 1.0),
        ("\n", 0.0),
    ],
    notes=["2 rows dropped"],
)
SUMMARY = {"final_loss": 1.5, "eval_perplexity": None, "wall_seconds": 61.0}


def row(step):
    return {
        "step": step,
        "loss": 2.5,
        "learning_rate": 2e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 1234.5,
        "seconds_left": 99.0,
    }


def run(display):
    with display:
        display.loading("loading base")
        display.start(INFO)
        for step in (1, 2, 3, 4):
            display.step(row(step))
        display.progress("evaluating", 3, 9)
        display.progress("evaluating", 4, 9)
        display.evaluation({"step": 4, "eval_loss": 1.0, "eval_perplexity": 2.718})
        display.finish(SUMMARY)


def test_plain_lines_hold_everything_and_no_control_codes():
    stream = io.StringIO()
    run(Display(stream))
    text = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    for words in (
        "base (float32)",
        "14 layers",
        "1.00%",
        "25.0%",
        "2 rows dropped",
        "perplexity 2.718",
        "1:01",
    ):
        assert words in text
    assert text.count("\nstep ") == 5
    assert "step 3/4  loss 2.5000  grad 0.500  1,234 tokens/s  lr 2.00e-04  1:39 left\n" in text
    assert text.startswith("loading base\n")
    assert text.count("evaluating") == 1 and "\nevaluating 3/9\n" in text, "a line now and then"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_terminal_shows_panel_example_and_bar(width):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system="truecolor", _environ={})
    run(LiveDisplay(console))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "first example" in shown
    assert "[bold]half" in shown, "markup in data must stay text"
    assert "\\x1b[31m" in shown, "escape codes in data must not reach the terminal"
    assert "step 4/4" in shown
    assert "\x1b[?25h" in stream.getvalue(), "the cursor must come back"


@pytest.mark.parametrize("width", [60, 80])
def test_the_bar_says_how_far_steps_and_evaluations_are(width):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, _environ={})
    with LiveDisplay(console) as display:
        display.start(INFO)
        display.step(row(3))
        display.bar.refresh()
        display.progress("evaluating", 4, 9)
        display.bar.refresh()
        display.evaluation({"step": 3, "eval_loss": 1.0, "eval_perplexity": 2.718})
        assert display.bar.tasks[0].fields["words"] == "loss 2.5000  1,234 tokens/s  1:39 left"
        display.waiting("compiling for rows of 512 (4th of 4 lengths)")
        display.bar.refresh()
        display.waiting("")
        assert display.bar.tasks[0].fields["words"] == "loss 2.5000  1,234 tokens/s  1:39 left"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search("step 3/4 .*loss 2.5000  1,234 tokens/s  1:39 left\\n?", shown)
    assert "evaluating 4/9" in shown
    assert "compiling for rows of 512" in shown


class Broken(io.StringIO):
    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_is_gone_ends_no_run():
    run(Display(Broken()))
    display = LiveDisplay(Console(file=Broken(), force_terminal=True, width=80, _environ={}))
    display.note("gone")
    display.close()


def test_trained_tokens_are_readable_without_colour():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, no_color=True, _environ={})
    console.print(token_text([("no", 0.0), ("yes", 1.0)]))
    assert re.search(r"\x1b\[1;4myes", stream.getvalue())


def test_closing_twice_and_before_the_start_is_fine():
    display = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=80))
    display.close()
    display.start(INFO)
    display.close()
    display.close()


def test_long_examples_show_the_first_trained_line():
    lines = [Text(f"line {number}") for number in range(100)]
    lines[70] = token_text([("answer", 1.0)])
    shown = [line.plain for line in window(lines, 10)]
    assert shown[0] == "... 65 lines before"
    assert "answer" in shown
    assert shown[-1] == "... 25 lines after"
    assert [line.plain for line in window(lines[:5], 10)] == [f"line {number}" for number in range(5)]


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, term, kind",
    [
        (FakeTerminal(), "xterm", LiveDisplay),
        (FakeTerminal(), "dumb", Display),
        (io.StringIO(), "xterm", Display),
    ],
)
def test_display_follows_the_terminal(monkeypatch, stream, term, kind):
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", term)
    assert type(make_display()) is kind


def test_plain_examples_show_runs_of_weight_and_segment():
    pieces = [("a", 0.0, "user"), ("b\n", 0.0, "user"), ("c", 1.0, "assistant"), ("d", 0.5, "system")]
    assert list(example_lines(pieces)) == [
        "    0  user         'ab\\n'",
        "    1  assistant    'c'",
        "  0.5  system       'd'",
    ]


def test_words():
    assert [duration(seconds) for seconds in (-1, 0, 59.6, 3723)] == ["0:00", "0:00", "1:00", "1:02:03"]
    assert printable("a\tb\x07é\n") == "a\\tb\\x07é\n"
    assert summary_words({}) == ""
    assert summary_words(SUMMARY) == "loss 1.5000, took 1:01"
    assert speed_words(row(1)) == "1,234 tokens/s"
    assert speed_words(row(1) | {"mfu": 0.412}) == "1,234 tokens/s (MFU 41%)"


MEASURED = {
    "wall_seconds": 100.0,
    "step_seconds": 80.0,
    "device_seconds": 72.0,
    "data_wait_seconds": 2.0,
    "host_seconds": 6.0,
    "compile_seconds": 9.0,
    "other_compile_seconds": 1.0,
    "tokens_per_second": 1000.0,
    "flops_per_token": 4e9,
    "mfu": 0.4,
    "mfu_convention": "4N",
    "peak_memory_bytes": 3_210_000_000,
    "peak_memory_of": "device",
    "step_memory_bytes": {"total": 2_500_000},
    "result": "runs/x/adapter",
    "open": {"TensorBoard": "tensorboard --logdir runs/x/tensorboard"},
}


def test_the_table_at_the_end():
    rows = summary_facts(MEASURED)
    assert rows == {
        "time": "steps 80.0 s, compiling 10.0 s (the step 9.0 s), evaluating, saving and other 10.0 s",
        "steps": "90.0% waiting for the device, 2.5% waiting for data, 7.5% the loop itself",
        "compute": "4 TFLOP/s, MFU 40.0% (4N)",
        "memory": "at most 3.21 GB in this device; the compiled step takes 2.5 MB a device",
        "result": "runs/x/adapter",
        "TensorBoard": "tensorboard --logdir runs/x/tensorboard",
    }
    unknown = summary_facts(MEASURED | {"mfu": None, "tokens_per_second": 10.0})
    assert unknown["compute"] == "40 GFLOP/s; no MFU, as this device's peak isn't known"
    assert summary_facts(SUMMARY) == {}
    stream = io.StringIO()
    Display(stream).finish(MEASURED)
    assert "\nmemory: at most 3.21 GB" in stream.getvalue()
    console = Console(file=stream, force_terminal=True, width=100, _environ={})
    LiveDisplay(console).finish(MEASURED)
    assert "MFU 40.0%" in stream.getvalue().rpartition("done")[2]
