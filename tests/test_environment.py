"""Versions, platforms and libtpu: what is wrong here is said in one line before jax says it in many."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mora_jax import environment
from mora_jax.cli.errors import report
from mora_jax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def found(monkeypatch, versions: dict[str, str | None]) -> None:
    """Lets the packages that are named have these versions, or be absent."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for name in ("jax", "flax", *(name for name, version in versions.items() if version is None)):
        monkeypatch.delitem(sys.modules, name, raising=False)


def check() -> None:
    environment.check_versions.__wrapped__()


def test_the_floors_are_those_of_the_project():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert all(f"{name}>={floor}" in listed for name, floor in environment.FLOORS.items())


# jax 0.11.1 and flax 0.12.9, which belong together, need Python 3.12: below it the older pair is the mend.
PAIRS = sys.version_info >= (3, 12)
NEWER_JAX = "'flax>=0.12.9'" if PAIRS else "'jax<0.11.1'"
NEWER_FLAX = "'jax>=0.11.1'" if PAIRS else "'flax<0.12.9'"


@pytest.mark.parametrize(
    ("jax", "flax", "mend"),
    [
        ("0.7.2", "0.12.0", None),
        ("0.10.2", "0.12.8", None),
        ("0.10.2.dev20260101", "0.12.8", None),
        ("0.11.0", "0.12.8", None),
        ("0.11.1", "0.12.9", None),
        ("0.12.0.1", "0.12.12", None),
        ("1.0", "1.0.0", None),
        ("0.7.2", "0.11.2", "'flax>=0.12.0'"),
        ("0.7.1", "0.12.8", "'jax>=0.7.2'"),
        ("0.7.1", "0.11.2", "'jax>=0.7.2' 'flax>=0.12.0'"),
        ("0.11.1", "0.12.8", NEWER_JAX),
        ("0.10.2", "0.12.9", NEWER_FLAX),
        ("0.12.0", "0.9", "'flax>=0.12.0'"),
        (None, "0.12.8", "'jax>=0.7.2'"),
        ("0.10.2", None, "'flax>=0.12.0'"),
    ],
)
def test_versions(monkeypatch, jax, flax, mend):
    found(monkeypatch, {"jax": jax, "flax": flax, "libtpu": None})
    if mend is None:
        check()
        return
    with pytest.raises(ImportError) as caught:
        check()
    said = str(caught.value)
    assert "\n" not in said
    for name, version in {"jax": jax, "flax": flax}.items():
        assert (f"{name} {version}" if version else f"no {name}") in said
    assert said.endswith(f"pip install -U {mend}")


def test_what_is_loaded_counts_and_plugins_go_along(monkeypatch):
    found(monkeypatch, {"jax-cuda12-plugin": "0.7.1"})
    check()
    old = type(sys)("jax")
    old.__version__ = "0.7.1"
    monkeypatch.setitem(sys.modules, "jax", old)
    monkeypatch.setitem(sys.modules, "ipykernel", type(sys)("ipykernel"))
    with pytest.raises(ImportError, match=r"with jax 0\.7\.1 .*'jax\[cuda12\]>=.* restart the notebook's kernel$"):
        check()


OLD = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: {"jax": "0.7.2", "flax": "0.11.2"}.get(name) or real(name)
"""


@pytest.mark.parametrize(
    "statement",
    ["from mora_jax import attach", "import mora_jax as mj; mj.LoRAConfig", "from mora_jax import training"],
)
def test_every_way_in_says_so(statement, tmp_path):
    code = f"{OLD}import mora_jax, sys\nassert 'jax' not in sys.modules\n{statement}"
    done = run(["-c", code], tmp_path)
    assert done.stderr.splitlines()[-1].startswith("ImportError: mora_jax doesn't run with jax 0.7.2 and flax 0.11.2")


def test_the_command_line_says_so_but_helps(tmp_path):
    code = f"{OLD}import sys\nfrom mora_jax.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    done = run(["-c", code, "generate", "--model", "m", "--prompt", "p"], tmp_path)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("error: mora_jax doesn't run with jax 0.7.2 and flax 0.11.2, found here: pip install")
    assert run(["-c", code, "--help"], tmp_path).returncode == 0


def run(arguments: list[str], cwd: Path, **settings: str) -> subprocess.CompletedProcess:
    """Runs Python in a folder of its own, without the settings that stand for all tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, *arguments]
    env = {**inherited, "PYTHONPATH": str(ROOT), **settings}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def machine(monkeypatch, *, plugins=(), libtpu=False, tpu=False, gpu=False) -> None:
    monkeypatch.setattr(environment, "plugins", lambda: set(plugins))
    for name, value in {"has_libtpu": libtpu, "may_have_tpu": tpu, "has_nvidia_gpu": gpu}.items():
        monkeypatch.setattr(environment, name, lambda value=value: value)


@pytest.mark.parametrize(
    ("named", "has", "words"),
    [
        ("cuda", {}, r"JAX_PLATFORMS=cuda: jax's plugin for cuda is not installed: pip install 'mora-jax\[cuda\]'"),
        ("cuda", {"plugins": ["cuda"]}, "no NVIDIA GPU is visible"),
        ("cuda", {"plugins": ["cuda"], "gpu": True}, None),
        ("cuda,cpu", {"gpu": True}, "plugin for cuda is not installed"),
        ("cuda,cpu", {}, None),
        ("tpu", {}, r"plugin for tpu is not installed: pip install 'mora-jax\[tpu\]'"),
        ("tpu", {"libtpu": True}, "no TPU is visible here"),
        ("tpu, cpu", {"libtpu": True}, "no TPU is visible here"),
        ("tpu", {"libtpu": True, "tpu": True}, None),
        ("gpu", {"plugins": ["cuda"], "gpu": True}, "name the GPU's platform, cuda or rocm"),
        ("cpu", {"libtpu": True}, None),
    ],
)
def test_platforms_that_are_named(monkeypatch, named, has, words):
    machine(monkeypatch, **has)
    settings = {"JAX_PLATFORMS": named}
    if words is None:
        environment.prepare(settings)
    else:
        with pytest.raises(InputError, match=words) as caught:
            environment.prepare(settings)
        assert "\n" not in str(caught.value)
    assert settings == {"JAX_PLATFORMS": named}


@pytest.mark.parametrize(
    ("has", "given", "expected"),
    [
        ({}, {}, None),
        ({"libtpu": True}, {}, "cpu"),
        ({"libtpu": True}, {"JAX_PLATFORMS": ""}, "cpu"),
        ({"libtpu": True, "plugins": ["cuda"]}, {}, "cuda,cpu"),
        ({"libtpu": True, "plugins": ["somebodys"]}, {}, None),
        ({"libtpu": True, "tpu": True}, {}, None),
        ({"libtpu": True}, {"JAX_FORCE_TPU_INIT": "1"}, None),
        ({"libtpu": True}, {"PJRT_NAMES_AND_LIBRARY_PATHS": "mine:/lib.so"}, None),
    ],
)
def test_libtpu_is_kept_out_where_there_is_no_tpu(monkeypatch, has, given, expected):
    machine(monkeypatch, **has)
    settings = dict(given)
    environment.prepare(settings)
    assert settings.get("JAX_PLATFORMS") == (given.get("JAX_PLATFORMS") if expected is None else expected)


def test_plugins_are_found_as_jax_finds_them(monkeypatch, tmp_path):
    for name in ("xla_cuda12", "mine"):
        (tmp_path / "jax_plugins" / name).mkdir(parents=True)
        (tmp_path / "jax_plugins" / name / "__init__.py").touch()
    before = environment.plugins()
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.plugins() - before == {"cuda", "mine"}


@pytest.mark.parametrize("named", ["cuda", "tpu", "rocm", "nonsense"])
def test_a_command_says_what_is_missing_in_one_line(named, tmp_path):
    if named in ("cuda", "tpu") and (environment.has_nvidia_gpu() or environment.may_have_tpu()):
        pytest.skip("an accelerator is here")
    model = str(ROOT / "mora_jax" / "demo" / "assets" / "model")
    command = ["-m", "mora_jax", "generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", "1"]
    done = run(command, tmp_path, JAX_PLATFORMS=named)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("error: ") and named in line


def test_a_platform_that_jax_cannot_start(capsys):
    assert report(RuntimeError("Unable to initialize backend 'rocm': no such\nthing")) == 2
    assert capsys.readouterr().err == (
        "error: Unable to initialize backend 'rocm': no such thing; to have it: "
        "pip install -U 'jax[rocm7-local]', on a machine with ROCm 7\n"
    )
    assert report(RuntimeError("something else")) is None
