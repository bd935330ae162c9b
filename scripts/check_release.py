"""Builds wheel and sdist, and tries the wheel where the repository is not.

    python scripts/check_release.py [--out dist] [--python PYTHON …] [--site FOLDER] [--lowest]

Both are built twice, the second time of what the sdist holds: the bytes have to be the same. Then the wheel is
installed into a fresh environment of each interpreter, in an empty folder, and used: the version, an import in time, a
fine-tuned embedded model, its adapter loaded, merged and asked, and each command's help. `--site` takes the
dependencies from an environment that has them instead of installing them; `--lowest` installs the lowest versions that
pyproject.toml allows and that have wheels for the interpreter. Needs hatchling.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: What files in archives are dated, so that they don't change with the clock: 2020-02-02, as hatchling has it.
EPOCH = "1580601600"
SMOKE = """
import sys, time
start = time.perf_counter()
import mora_jax as mj
took = time.perf_counter() - start
assert "jax" not in sys.modules and took < 1, took
assert mj.__version__ == VERSION, mj.__version__
assert "site-packages" in mj.__file__, mj.__file__
from mora_jax import demo
rows = [{"prompt": "What is the capital of France?", "completion": "Paris"}] * 8
options = {"steps": 2, "batch_size": 4, "out": "run", "config": {"data.max_length": 64}}
result = mj.finetune(demo.model_path(), rows, mj.MoRAConfig(rank=4), **options)
assert len(result.metrics) == 2 and all(row["loss"] > 0 for row in result.metrics)
model, tokenizer = mj.load_pretrained(demo.model_path())
mj.load_adapter(model, "run/adapter")
mj.merge(model)
mj.save_pretrained(model, "merged", tokenizer)
print("trained, merged and saved")
"""


def build(source: Path, out: Path) -> dict[str, str]:
    """Wheel and sdist of a folder; SHA-256 by file name."""
    environment = os.environ | {"SOURCE_DATE_EPOCH": EPOCH}
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out)]
    subprocess.run(command, cwd=source, check=True, env=environment, capture_output=True)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def built_twice(out: Path) -> Path:
    """The wheel; it and the sdist are in `out`, and building them again gave the same."""
    first = build(ROOT, out)
    with tempfile.TemporaryDirectory() as temporary:
        again = Path(temporary)
        (sdist,) = out.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(again / "source", filter="data")
        (source,) = (again / "source").iterdir()
        second = build(source, again / "dist")
    for name, digest in first.items():
        print(f"{digest}  {name}")
    if first != second:
        raise SystemExit(f"error: built again, they differ: {second}")
    (wheel,) = out.glob("*.whl")
    return wheel


def smoke_test(wheel: Path, python: str, site: Path | None, lowest: bool) -> None:
    """Uses the wheel in an environment of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        interpreter = folder / "venv" / "bin" / "python"
        pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if lowest:
            subprocess.run([*pip, "uv"], check=True)  # pip only takes the newest
            pip = [interpreter, "-m", "uv", "pip", "install", "--quiet", "--python", interpreter]
            pip += ["--resolution", "lowest-direct", "--no-build"]
            direct = project["dependencies"]  # to uv those of a wheel that it installs are not
        subprocess.run([*pip, *([] if site is None else ["--no-deps"]), wheel, *direct], check=True)
        if site is not None:
            (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
            (packages / "dependencies.pth").write_text(f"{site}\n", encoding="utf-8")
        place = folder / "elsewhere"
        place.mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"MORA_JAX_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}

        def run(*command: str | Path, quiet: bool = False) -> None:
            output = subprocess.DEVNULL if quiet else None
            subprocess.run(command, cwd=place, env=environment, check=True, stdout=output)

        run(interpreter, "--version")
        run(interpreter, "-c", f"VERSION = {project['version']!r}\n{SMOKE}")
        command = folder / "venv" / "bin" / "mora-jax"
        run(command, "--version")
        run(command, "generate", "--model", "merged", "--prompt", "What is the capital of France?")
        for name in ("train", "eval", "generate", "merge", "convert", "check", "inspect", "plan", "sweep", "study"):
            run(command, name, "--help", quiet=True)
    print(f"{wheel.name} works with {python}", flush=True)


def main() -> None:
    """Builds and tries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", nargs="*", default=[sys.executable], help="interpreters to try the wheel with")
    parser.add_argument("--site", type=Path, help="site-packages that have the dependencies, of the same Python")
    parser.add_argument("--lowest", action="store_true", help="try it with the lowest versions that it allows")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("mora_jax-*"):
        old.unlink()
    wheel = built_twice(args.out.resolve())
    for python in args.python:
        smoke_test(wheel, python, args.site, args.lowest)


if __name__ == "__main__":
    main()
