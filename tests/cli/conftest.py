"""A model folder, data files, and a way to run the command line as a user does."""

import json
import subprocess
import sys

import pytest

from mora_jax.cli.main import main
from tests.evaluation import tiny

ROWS = [{"instruction": f"Say the word {word}", "input": "", "output": word * 2} for word in ("red", "blue", "green")]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A HuggingFace folder with the tiny model."""
    return str(tiny.save_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """Alpaca rows."""
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(ROWS * 4))
    return str(path)


@pytest.fixture
def run(capsys):
    """Runs a command in this process; returns exit code, stdout and stderr."""

    def run_command(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.fixture
def fails(run):
    """Runs a command that must be refused; returns the error's text."""

    def run_command(*arguments):
        code, out, err = run(*arguments)
        assert code == 2, (out, err)
        assert out == ""
        lines = err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert lines[-1] == errors[0]
        assert "Traceback" not in err
        return errors[0]

    return run_command


def start(*arguments, **settings):
    """Starts a command as a process of its own."""
    command = [sys.executable, "-m", "mora_jax", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)
