"""The command line's frame: help, errors, exit codes, signals and pipes."""

import os
import signal
import subprocess
import sys
import warnings

import pytest

from mora_jax.cli import failures
from mora_jax.cli.main import COMMANDS, main
from mora_jax.cli.options import take_overrides
from mora_jax.errors import InputError

QUIET_IMPORTS = "jax", "flax", "transformers", "numpy", "ml_collections", "rich"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_goes_to_stdout_and_imports_nothing_heavy(arguments):
    code = (
        "import sys; from mora_jax.cli.main import main; code = main(sys.argv[1:]);"
        f"heavy = [name for name in {QUIET_IMPORTS} if name in sys.modules];"
        "sys.exit(code or ' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: mora-jax" in done.stdout


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.strip()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no command"),
        (["trian"], "invalid choice: 'trian'"),
        (["--frobnicate"], "unrecognized arguments"),
        (["train", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["train", "extra"], "unrecognized arguments: extra"),
        (["eval"], "--model, --data"),
        (["eval", "--model"], "--model: expected one argument"),
        (["eval", "--mod", "x", "--data", "y"], "required: --model"),
        (["eval", "--model", "x", "--data", "y", "--config.seed=1"], "only train"),
        (["eval", "--model", "x", "--data", "y", "--loss-mode", "mask"], "--loss-mode must be one of masked"),
        (
            ["eval", "--model", "x", "--data", "y", "--batch-size", "0"],
            "--batch-size must be an integer, at least 1",
        ),
        (
            ["eval", "--model", "x", "--data", "y", "--dtype", "int8"],
            "--dtype must be one of float32, bfloat16",
        ),
        (["generate", "--model", "x", "--prompt", "y", "--temperature", "-1"], "--temperature"),
        (["generate", "--model", "x", "--prompt", "y", "--temperature", "nan"], "not finite"),
        (["generate", "--model", "x", "--prompt", "y", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["generate", "--model", "x", "--prompt", "y", "--seed", "1.5"], "--seed"),
        (["merge", "--model", "x", "--out", "y"], "required: --adapter"),
        (["inspect", "--model", "x", "--data", "y", "--examples", "-1"], "--examples"),
        (["train", "--config."], "a key must follow"),
    ],
)
def test_bad_arguments(fails, arguments, words):
    assert words in fails(*arguments)


def test_error_messages_are_one_line(monkeypatch, capsys):
    def run(args):
        raise InputError("first\n  second\tthird")

    monkeypatch.setattr(COMMANDS["inspect"], "run", run)
    assert main(["inspect", "--model", "x", "--data", "y"]) == 2
    assert capsys.readouterr().err == "error: first second third\n"


def test_disk_errors_are_input_errors_and_bugs_are_not(monkeypatch, capsys, tmp_path):
    def run(args):
        (tmp_path / "absent").read_text()

    monkeypatch.setattr(COMMANDS["inspect"], "run", run)
    assert main(["inspect", "--model", "x", "--data", "y"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/absent: No such file or directory\n"

    def broken(args):
        raise ZeroDivisionError

    monkeypatch.setattr(COMMANDS["inspect"], "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "--model", "x", "--data", "y"])


@pytest.mark.parametrize("error", [MemoryError("238 GiB"), RuntimeError("RESOURCE_EXHAUSTED: 238 GiB\nmore")])
def test_too_little_memory_is_said_in_one_line(monkeypatch, fails, error):
    def run(args):
        raise error

    monkeypatch.setattr(COMMANDS["inspect"], "run", run)
    assert "238 GiB; choose fewer rows" in fails("inspect", "--model", "x", "--data", "y")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_give_their_exit_codes_and_run_cleanup(monkeypatch, capsys, number, code):
    cleaned = []

    def run(args):
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(COMMANDS["inspect"], "run", run)
    before = signal.getsignal(signal.SIGTERM)
    # A shell starts its background jobs with SIGINT ignored, and the tests may be one.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["inspect", "--model", "x", "--data", "y"]) == code
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Traceback" not in capsys.readouterr().err


def test_warnings_are_one_line(monkeypatch):
    seen = []

    def run(args):
        seen.append(warnings.formatwarning(UserWarning("odd\nthing"), UserWarning, "file.py", 1))
        return 0

    monkeypatch.setattr(COMMANDS["inspect"], "run", run)
    before = warnings.formatwarning
    assert main(["inspect", "--model", "x", "--data", "y"]) == 0
    assert seen == ["warning: odd thing\n"]
    assert warnings.formatwarning is before


def run_shell(line):
    code = f"{sys.executable} -m mora_jax.cli.main"
    environment = {**os.environ, "MORA": code}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment)


def test_a_reader_that_goes_away_is_no_error():
    done = run_shell("$MORA train --help | head -n 1 >/dev/null; echo ${PIPESTATUS[0]}")
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", str(failures.EXIT_PIPE))


def test_a_full_disk_is_an_error_without_traceback():
    done = run_shell("$MORA train --help >/dev/full")
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device\n"


def test_overrides_are_separated_from_other_arguments():
    rest, overrides = take_overrides(
        ["train", "--config", "c.py", "--config.a.b=1=2", "--config.c", "-1", "--config.d", "--overwrite"]
    )
    assert rest == ["train", "--config", "c.py", "--overwrite"]
    assert overrides == [("a.b", "1=2"), ("c", "-1"), ("d", "true")]
