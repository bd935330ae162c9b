"""What a stranger meets first: imports that cost nothing, and a wheel that works away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mora_jax

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *, path: Path = ROOT, cwd: Path) -> str:
    """Runs code in a fresh interpreter that finds `mora_jax` in `path`, and returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel, freshly built."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_import_is_lazy(tmp_path):
    code = (
        "import sys, mora_jax\n"
        "heavy = {'jax', 'flax', 'optax', 'numpy', 'torch', 'transformers', 'datasets', 'orbax'}\n"
        "print(sorted(heavy & set(sys.modules)), 'attach' in dir(mora_jax))"
    )
    assert python(code, cwd=tmp_path) == "[] True\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("LoraConfig", "LoRAConfig"),
        ("VeraConfig", "VeRAConfig"),
        ("get_peft_model", "attach"),
        ("PeftModel", "load_adapter"),
    ],
)
def test_names_of_peft_lead_to_those_here(name, hint):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'; here it is {hint}$"):
        getattr(mora_jax, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'$"):
        getattr(mora_jax, "nothing")  # noqa: B009


def test_importing_every_public_name_starts_no_backend(tmp_path):
    code = (
        "import mora_jax\n"
        "for name in mora_jax.__all__:\n"
        "    getattr(mora_jax, name)\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    assert python(code, cwd=tmp_path) == "False\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_is_quick(arguments, tmp_path):
    code = (
        "import sys\n"
        "from mora_jax.cli.main import main\n"
        f"code = main({arguments})\n"
        "heavy = {'jax', 'flax', 'optax', 'numpy', 'torch', 'transformers', 'datasets', 'orbax'}\n"
        "print('loaded:', code, sorted(heavy & set(sys.modules)))"
    )
    assert python(code, cwd=tmp_path).splitlines()[-1] == "loaded: 0 []"


def test_wheel_ships_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mora_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert here <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mora_jax"}
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "mora-jax = mora_jax.cli:start" in zipfile.ZipFile(wheel).read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_away_from_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import jax, numpy, mora_jax as mj\n"
        "from flax import nnx\n"
        "model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))\n"
        "report = mj.attach(model, mj.MoRAConfig(rank=1), rngs=nnx.Rngs(1))\n"
        "print(mj.__file__, report.trainable)"
    )
    file, trainable = python(code, path=site, cwd=tmp_path).split()
    assert Path(file).is_relative_to(site)
    assert trainable == "9"
