"""The command line's frame: help, errors, exit codes, signals and pipes."""

import os
import re
import signal
import subprocess
import sys
import warnings

import pytest

from mora_jax.cli import errors
from mora_jax.cli.main import COMMANDS, main
from mora_jax.cli.options import take_overrides
from mora_jax.errors import InputError
from mora_jax.training.config.key import ALIASES
from mora_jax.training.config.schema import keys

QUIET_IMPORTS = "jax", "flax", "transformers", "numpy", "ml_collections", "rich"


def test_help_goes_to_stdout_and_starts_nothing():
    code = (
        "import sys; from mora_jax.cli.main import main; code = main(['--help']);"
        f"heavy = [name for name in {QUIET_IMPORTS} if name in sys.modules];"
        f"codes = [main([name, '--help']) for name in {list(COMMANDS)}];"
        "bridge = sys.modules.get('jax._src.xla_bridge');"
        "started = bridge is not None and bridge.backends_are_initialized();"
        "sys.exit(code or ' '.join(heavy) or any(codes) or started or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: mora-jax") == 1 + len(COMMANDS)


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"mora-jax \d[^ ]* \(jax \d[^ ]*, flax \d[^ ]*, Python 3\.[^ ]*\)\n", out)


@pytest.mark.parametrize("command", [[], ["train"], ["eval"]])
def test_help_is_a_command_too(run, command):
    assert run("help", *command) == run(*command, "--help")


def test_without_arguments_the_commands_are_shown(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert run("--help")[1] in err
    assert err.splitlines()[-1].startswith("error: no command given; choose one of train, ")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no command"),
        (["trian"], "there is no command 'trian'; did you mean train? The commands are train, eval"),
        (["finetune", "--lr", "1"], "did you mean train?"),
        (["runs.py"], "mora-jax train --config runs.py"),
        (["--frobnicate"], "--frobnicate comes before the command"),
        (["--model", "x", "eval"], "--model comes before the command"),
        (
            ["train", "--frobnicate"],
            "train has no option --frobnicate; mora-jax train --help lists what there is",
        ),
        (
            ["train", "--model", "X", "--data", "Y", "Z", "--rank", "8"],
            "train has no option --model, --data, --rank; did you mean --config.model.path=X "
            "--config.data.train=Y,Z --config.adapter.rank=8?",
        ),
        (
            ["train", "--lr=1e-3", "--bf16", "True", "--overwrit", "--frob", "--adapter.rank", "4"],
            "did you mean --config.optimizer.learning_rate=1e-3 --config.model.dtype=bfloat16 --overwrite "
            "--config.adapter.rank=4? mora-jax train --help lists what there is for --frob",
        ),
        (["train", "--output_dir", "my run"], "did you mean --config.out='my run'?"),
        (["train", "--learning-rat", "1"], "did you mean --config.optimizer.learning_rate=1?"),
        (["plan", "--rank", "8"], "did you mean --config.adapter.rank=8?"),
        (["train", "--config.lr=1"], "did you mean 'optimizer.learning_rate'?"),
        (["train", "--config.model=X"], "did you mean 'model.path'?"),
        (["train", "--config.optimizer.lr=1"], "did you mean 'optimizer.learning_rate'?"),
        (["train", "extra"], "train can't place extra"),
        (["train", "c.py"], "did you mean --config c.py?"),
        (["eval", "--model", "x", "--data", "y", "extra"], "eval can't place extra; see mora-jax eval --help"),
        (["eval", "--modle", "x", "--data", "y"], "eval has no option --modle; did you mean --model?"),
        (["eval", "--model_name_or_path", "x"], "did you mean --model?"),
        (["eval", "--max_seq_length", "9"], "did you mean --max-length?"),
        (["merge", "--output", "x"], "did you mean --out?"),
        (["eval"], "--data"),
        (["eval", "--model"], "--model: expected one argument"),
        (["eval", "--mod", "x", "--data", "y"], "did you mean --model?"),
        (["eval", "--model", "x", "--data", "y", "--config.seed=1"], "only train"),
        (["eval", "--model", "x", "--data", "y", "--config.loss.mode=full"], "did you mean --loss-mode?"),
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


def test_values_that_look_like_options_stay_values(monkeypatch):
    seen = []
    monkeypatch.setattr(COMMANDS["generate"], "run", lambda args: seen.append(args) or 0)
    assert main(["generate", "--model", "x", "--prompt", "--no option", "--temperature", "0.5", "--seed=3"]) == 0
    assert main(["generate", "--model", "x", "--prompt=--rank"]) == 0
    assert [args.prompt for args in seen] == ["--no option", "--rank"]


def test_every_alias_means_a_key():
    for alias, key in ALIASES.items():
        name, equals, value = key.partition("=")
        assert name in keys(), alias
        if equals:
            keys()[name].parse(value, alias)


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


def test_a_full_disk_is_no_lack_of_memory(monkeypatch, fails):
    def run(args):
        raise RuntimeError("RESOURCE_EXHAUSTED: /run/trace.pb; No space left on device")

    monkeypatch.setattr(COMMANDS["inspect"], "run", run)
    refusal = fails("inspect", "--model", "x", "--data", "y")
    assert refusal == "error: /run/trace.pb; No space left on device"


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
    code = f"{sys.executable} -m mora_jax"
    environment = {**os.environ, "MORA": code}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment)


def test_a_reader_that_goes_away_is_no_error():
    done = run_shell("$MORA train --help | head -n 1 >/dev/null; echo ${PIPESTATUS[0]}")
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", str(errors.EXIT_PIPE))


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
